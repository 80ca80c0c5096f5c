"""Filters: input by input, as they arrive at the deployed model."""
