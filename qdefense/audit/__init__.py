"""The audit: a supervisor that decides and writes, and one spawned worker that parses, loads and runs."""
