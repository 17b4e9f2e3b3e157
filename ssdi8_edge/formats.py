"""Choices of number format that recipes make and ops honour; free of torch, so that listing recipes
is quick."""

from __future__ import annotations

from typing import Literal

# `int8` says what they do.
Rounding = Literal["half_even", "half_away"]

# How the state travels from chunk to chunk: as released, INT8 states and a gate of 7 fractional
# bits on an INT32 carry; ours, real states and an FP32 gate on an FP32 carry.
Gate = Literal["q0.7", "fp32"]

# What one step of an INT8 w · x is worth, where w is the decay over a chunk or tile times dt: as
# released, the same in every chunk; ours, in proportion to the largest w of the chunk or tile, so
# that a chunk of small w does not round to zero.
DecayScale = Literal["static", "peak"]
