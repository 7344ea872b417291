"""Asking a model for text."""
