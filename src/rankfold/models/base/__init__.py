"""A base model: found, loaded, held."""
