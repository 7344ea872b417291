"""From rows and a base model to a tuned model, its numbers and its report."""
