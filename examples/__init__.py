"""A drawn world, the small model that has learned it, and the demo that teaches the model something new."""
