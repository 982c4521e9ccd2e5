"""Qwen-Image: load it, encode with it, decode with it, one velocity of it, and what it needs of memory."""
