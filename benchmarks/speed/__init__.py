"""What the measurements of a step and of an image share: jobs, the methods that are compared, clocks and recorders."""
