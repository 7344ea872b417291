"""Which layers are meant, and putting adapters in, merging them, taking them out."""
