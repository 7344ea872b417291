"""Configs of other programs, as recipes."""
