"""Labelled images: one loader per format, and `opening.open_data`, which tells the formats apart."""
