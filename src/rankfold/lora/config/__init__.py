"""What is asked for: ``LoraConfig``, checked as a whole."""
