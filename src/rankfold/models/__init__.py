"""Base models: finding, loading, prompting."""
