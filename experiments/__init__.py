"""Experiments: one file each, computing numbers and writing `results/<name>.json`."""
