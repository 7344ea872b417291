"""Rows of any file, one after another, each with its place."""
