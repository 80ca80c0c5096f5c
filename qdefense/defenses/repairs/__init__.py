"""Repairs: one file per paper; they make a new file, and are judged by what it does."""
