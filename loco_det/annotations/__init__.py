"""Annotated data sets: found by name or path, read, checked, and mapped to what a detector trains on."""
