"""Judging models: on rows that were held out, on a task, and on what they were good at before."""
