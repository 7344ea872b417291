"""What is asked for, and what it leaves open settled."""
