"""Mean correction in closed form.

argmin_c ‖Y - (Y' + 1cᵀ)‖² is the mean difference per channel. It is measured layer by layer, with
all earlier layers quantized and corrected, and carried in the bias of out_proj. Source: SSDi8,
docs/method.md §8.1; pairing, shrinkage and the correction of the residual stream are ours, §8.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The first tokens of a sample have atypical states.
SKIP_TOKENS = 4


class MeanDifference:
    """Mean over tokens of FP minus quantized, per channel, with its reliability."""

    def __init__(self) -> None:
        self._sample_means: list[Tensor] = []

    def add(self, difference: Tensor) -> None:
        """`difference` (samples, L, D)."""
        skip = min(SKIP_TOKENS, difference.shape[1] - 1)
        self._sample_means.append(difference[:, skip:].double().mean(1).cpu())

    def correction(self, strength: float | None) -> Tensor:
        """λ · mean difference, (D) FP32.

        With `strength` None, λ_i = max(0, 1 - v_i / c_i²), where v_i is the variance of the mean
        estimated from the means of the samples (tokens inside one are correlated): a channel whose
        mean is not distinguishable from noise is left alone.
        """
        means = torch.cat(self._sample_means)
        c = means.mean(0)
        if strength is not None:
            return (strength * c).float()
        if len(means) < 2:
            return torch.zeros_like(c).float()
        variance = means.var(0) / len(means)
        shrink = (1 - variance / c.square().clamp_min(1e-30)).clamp_min(0)
        return (shrink * c).float()
