"""Measuring on boards: every point once, whatever happens to the link."""
