"""Annotated data sets: found by name or path, read, validated, and mapped to detector input."""
