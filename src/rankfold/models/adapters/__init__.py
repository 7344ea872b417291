"""A model's adapters: what they say of themselves, and other layouts of them."""
