"""What stays of a run."""
