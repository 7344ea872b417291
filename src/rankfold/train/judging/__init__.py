"""Base and tuned model on rows that were held out."""
