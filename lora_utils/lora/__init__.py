"""Trainable and applied LoRAs, their file formats, weights.zip, and the hub."""
