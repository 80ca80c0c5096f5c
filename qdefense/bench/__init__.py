"""Measurements: what a defense costs, and what it gives for it."""
