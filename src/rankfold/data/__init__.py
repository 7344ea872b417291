"""Rows of data: reading, understanding, encoding, batching."""
