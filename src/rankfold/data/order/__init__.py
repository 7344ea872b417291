"""Which rows are held out, and in which batches the others come."""
