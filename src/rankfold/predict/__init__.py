"""Answers for a whole file."""
