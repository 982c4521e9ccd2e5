"""Measurements of the package on the small model: each module is a command, each writes a page beside itself."""
