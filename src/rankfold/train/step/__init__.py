"""One optimiser step."""
