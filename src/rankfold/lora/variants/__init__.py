"""What a pair of factors can be beside plain LoRA."""
