"""A dataset -> weights.zip."""
