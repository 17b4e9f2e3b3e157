"""Keeping what was read and said: the states of a sequence, at rest and on disk."""
