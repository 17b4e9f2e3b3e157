"""Choices of number format that recipes make and ops honour; free of torch, so that listing recipes
is quick."""

from __future__ import annotations

from typing import Literal

# `int8` says what they do.
Rounding = Literal["half_even", "half_away"]

# How the state travels from chunk to chunk: as released, INT8 states and a gate of 7 fractional
# bits on an INT32 carry; ours, real states and an FP32 gate on an FP32 carry.
Gate = Literal["q0.7", "fp32"]

# Of B and C after the convolution, in each group, before they become INT8: as released, none; ours,
# signs and a Hadamard matrix (`hadamard.rotate`). Products C·B stay the same, and the state is kept
# in the rotated basis, so that nothing else changes; but no channel stands out any more.
Rotation = Literal["none", "hadamard"]

# Of the input of out_proj before it becomes INT8, see `hadamard.apply`: by one matrix where the
# width has one, by equal matrices along the diagonal, or by these behind signs, for values that are
# never negative.
InputRotation = Literal["none", "full", "blocks", "signs"]

# The scales of tensors that exist only inside SSD (the weighted x, the passed states): as released,
# calibrated and the same for every input; ours, taken from the tensor itself, one along each axis
# that the following product sums over, so that nothing saturates and no step is wasted. "none":
# these tensors are FP16; B, C and the linear layers alone are INT8, and how the fused kernel cuts a
# sequence into chunks is its own choice.
Scaling = Literal["static", "dynamic", "none"]
