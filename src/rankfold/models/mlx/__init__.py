"""Adapters as mlx-lm and mlx-vlm write and load them."""
