"""Inference libraries: their interface, the choice of one, and one file each."""
