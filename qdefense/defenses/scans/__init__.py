"""Scans of the model."""
