"""The report: one pydantic model, written as JSON or shown as a table."""
