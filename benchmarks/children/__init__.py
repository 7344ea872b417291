"""Scripts that the measuring ones run in processes of their own."""
