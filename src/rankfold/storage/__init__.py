"""Frozen weights held in few bytes and expanded when they are used."""
