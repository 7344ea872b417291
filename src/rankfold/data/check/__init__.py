"""The data doctor: everything that can be said of the rows before a run."""
