"""Histograms of magnitudes, and the range of an INT8 quantizer that costs them least.

A range up to the largest value ever seen spends most of its steps on values that hardly occur; one
that ends below it saturates a few values and makes all steps finer (docs/method.md §6.3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssdi8_edge.numerics.int8 import QMAX

# Bins are slices of an octave, from 2^-24 (smaller counts as zero) to 2^24.
BINS_PER_OCTAVE = 32
LOWEST, HIGHEST = -24, 24
BINS = (HIGHEST - LOWEST) * BINS_PER_OCTAVE
# At the end of the range a bin is several steps wide: its values are taken as spread over it.
POINTS_PER_BIN = 8
# Ranges tried, in parts of the largest value.
FRACTIONS = tuple(percent / 100 for percent in range(100, 18, -2))


class MagnitudeHistogram:
    """Counts of |v| per group."""

    def __init__(self, groups: int, device: torch.device) -> None:
        self.counts = torch.zeros(groups, BINS, dtype=torch.int64, device=device)

    def add(self, values: Tensor) -> None:
        """`values` (groups, n), any float type."""
        octave = values.float().abs().clamp_min(2.0**LOWEST).log2() - LOWEST
        index = (octave * BINS_PER_OCTAVE).long().clamp_(0, BINS - 1)
        groups = len(self.counts)
        offset = torch.arange(groups, device=index.device)[:, None] * BINS
        counts = torch.bincount((index + offset).flatten(), minlength=groups * BINS)
        self.counts += counts.reshape(groups, BINS)

    def quantile(self, fraction: float) -> Tensor:
        """The magnitude that `fraction` of the values do not exceed, (groups), to 1 %."""
        seen = self.counts.cumsum(1)
        index = (seen < fraction * seen[:, -1:]).sum(1)
        return (LOWEST + (index + 0.5) / BINS_PER_OCTAVE).exp2()

    def best_range(self, absmax: Tensor) -> Tensor:
        """The end of the INT8 range with the least squared error, (groups), at most `absmax`."""
        steps = torch.arange(BINS * POINTS_PER_BIN, dtype=torch.float64, device=absmax.device)
        octave = LOWEST + (steps + 0.5) / (BINS_PER_OCTAVE * POINTS_PER_BIN)
        points = octave.exp2()
        weights = self.counts.double().repeat_interleave(POINTS_PER_BIN, 1)
        best = torch.full(absmax.shape, torch.inf, dtype=torch.float64, device=absmax.device)
        chosen = absmax.clone()
        for fraction in FRACTIONS:
            scale = (absmax.double() * fraction / QMAX)[:, None].clamp_min(2.0**LOWEST / QMAX)
            rounded = torch.round(points / scale).clamp_(max=QMAX) * scale
            error = (weights * (rounded - points).square()).sum(1)
            better = error < best
            best = torch.where(better, error, best)
            chosen = torch.where(better, absmax * fraction, chosen)
        return chosen
