"""What the singular value decomposition says about low-rank updates."""
