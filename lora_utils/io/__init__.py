"""Bytes in and out: archives, downloads, images, atomic files, the log."""
