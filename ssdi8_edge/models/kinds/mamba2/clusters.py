"""Groups of heads, and of channels inside them, whose x is alike: Quamba2's sort-and-cluster.

Source: docs/method.md §10.3. Each head's channels are sorted by size, heads of one SSD group are
clustered by the shape of their sorted curves, and the positions of each head cluster by their
values; the layer is reordered so that clusters lie together, which changes nothing that it
computes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssdi8_edge.models.block import IN_BIAS, IN_PROJ, OUT_PROJ, Layer

HEAD_GROUPS = 4
CHANNEL_GROUPS = 4
K_MEANS_STEPS = 100


class Order(NamedTuple):
    """A new order of a layer's channels of x, and the clusters in it.

    heads: (H) the old index of each head. channels: (H, P) the old index inside the head, by new
    head and position. clusters: (H, P) INT64, the cluster of each new channel.
    """

    heads: Tensor
    channels: Tensor
    clusters: Tensor

    def of_heads(self, value: Tensor) -> Tensor:
        """(H, …) in the new order."""
        return value[self.heads]

    def of_channels(self, value: Tensor) -> Tensor:
        """(H, P, …) in the new order."""
        return value[self.heads[:, None], self.channels]

    def share_largest(self, absmax: Tensor) -> Tensor:
        """(H, P) in the new order: each channel gets the largest of its cluster."""
        flat = self.clusters.flatten().to(absmax.device)
        largest = absmax.new_zeros(int(flat.max()) + 1)
        largest.scatter_reduce_(0, flat, absmax.flatten(), "amax")
        return largest[self.clusters]


def sort_and_cluster(size: Tensor, ngroups: int) -> Order:
    """The order of heads and channels by `size` (H, P), of x; heads stay in their SSD group."""
    size = size.double().cpu()
    values, channels = size.sort(1)
    curves = values / values.norm(dim=1, keepdim=True).clamp_min(1e-30)
    heads_per_group = len(size) // ngroups
    heads, labels = [], []
    for g in range(ngroups):
        first = g * heads_per_group
        label = _ward(curves[first : first + heads_per_group], HEAD_GROUPS)
        order = label.argsort(stable=True)
        heads.append(first + order)
        labels.append(g * HEAD_GROUPS + label[order])
    head_order, head_label = torch.cat(heads), torch.cat(labels)
    clusters = torch.empty_like(channels)
    for label in head_label.unique():
        members = head_label == label
        positions = _k_means(values[head_order][members].t(), CHANNEL_GROUPS)
        clusters[members] = label * CHANNEL_GROUPS + positions
    return Order(head_order, channels[head_order], clusters)


def _ward(points: Tensor, count: int) -> Tensor:
    """Labels (n) of `points` (n, d) after merging the pair of least added variance until `count`.

    Labels are numbered by the first point of each cluster.
    """
    members = [[i] for i in range(len(points))]
    while len(members) > count:
        means = torch.stack([points[m].mean(0) for m in members])
        sizes = torch.tensor([float(len(m)) for m in members], dtype=points.dtype)
        weight = sizes[:, None] * sizes / (sizes[:, None] + sizes)
        cost = weight * torch.cdist(means, means).square()
        cost.fill_diagonal_(torch.inf)
        i, j = divmod(int(cost.argmin()), len(members))
        i, j = min(i, j), max(i, j)
        members[i] = sorted(members[i] + members[j])
        del members[j]
    labels = torch.empty(len(points), dtype=torch.int64)
    for label, member in enumerate(sorted(members)):
        labels[member] = label
    return labels


def _k_means(points: Tensor, count: int) -> Tensor:
    """Labels (n) of `points` (n, d); the first centres are points at even distances."""
    count = min(count, len(points))
    step = len(points) / count
    centres = points[[int((i + 0.5) * step) for i in range(count)]]
    labels = torch.zeros(len(points), dtype=torch.int64)
    for _ in range(K_MEANS_STEPS):
        new = torch.cdist(points, centres).argmin(1)
        if bool((new == labels).all()):
            break
        labels = new
        centres = torch.stack(
            [
                points[labels == i].mean(0) if (labels == i).any() else centres[i]
                for i in range(count)
            ]
        )
    return labels


def permuted(layer: Layer, heads: Tensor, channels: Tensor) -> Layer:
    """The same block with its heads, and the channels of each, in another order.

    Rows of in_proj and columns of out_proj that stand behind those of Mamba-2 stay where they are.

    Args:
        heads: (H) the old index of each new head; heads must stay in their SSD group.
        channels: (H, P) the old index inside the head of each new channel.
    """
    headdim = channels.shape[1]
    inner = (heads[:, None] * headdim + channels).flatten()
    d_inner, conv_dim = len(inner), len(layer["conv1d.bias"])
    # z, x, then B and C as they are, then dt.
    middle = torch.arange(2 * d_inner, d_inner + conv_dim)
    rows = torch.cat([inner, d_inner + inner, middle, d_inner + conv_dim + heads])
    rows = torch.cat([rows, torch.arange(len(rows), len(layer[IN_PROJ]))])
    columns = torch.cat([inner, torch.arange(d_inner, layer[OUT_PROJ].shape[1])])
    conv = torch.cat([inner, torch.arange(d_inner, conv_dim)])
    order = {
        IN_PROJ: rows,
        IN_BIAS: rows,
        "conv1d.weight": conv,
        "conv1d.bias": conv,
        **dict.fromkeys(("A_log", "D", "dt_bias"), heads),
        "gate_norm.weight": inner,
    }
    reordered = {k: v[order[k].to(v.device)] if k in order else v for k, v in layer.items()}
    reordered[OUT_PROJ] = layer[OUT_PROJ][:, columns.to(layer[OUT_PROJ].device)]
    return reordered
