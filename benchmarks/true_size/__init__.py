"""A model folder of the true size, as the hub lays it out, with random weights, and this package run on it."""
