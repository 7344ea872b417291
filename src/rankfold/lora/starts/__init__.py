"""Starts of factors that look at the base weight, at data, or at both."""
