"""An adapter's files."""
