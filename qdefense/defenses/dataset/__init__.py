"""Scans of the training data through the file, one file per paper."""
