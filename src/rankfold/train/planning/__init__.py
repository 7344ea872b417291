"""What a run will do, before its first step."""
