"""Experiments: one file each, on the public pieces alone."""
