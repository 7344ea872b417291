"""Rows to examples: what a row means."""
