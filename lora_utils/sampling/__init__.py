"""A prompt -> images."""
