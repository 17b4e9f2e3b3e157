"""What the layouts of hybrid models share: linear layers that are joined, sizes, refusals."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ssdi8_edge.checkpoints.config import size
from ssdi8_edge.checkpoints.layout import Piece, Source, Sources, whole
from ssdi8_edge.ground.errors import CheckpointError
from ssdi8_edge.models.block import IN_BIAS, IN_PROJ, NORM, OUT_BIAS, OUT_PROJ
from ssdi8_edge.models.kinds.attention import Attention
from ssdi8_edge.models.kinds.mamba2 import Mamba2

MIXTURE = "only dense hybrids are supported: Granite 4.0 H-1B or H-Micro, Nemotron 3 Nano 4B."


@dataclass(frozen=True)
class Linear:
    """A stored linear layer that is a part of one of ours.

    Attributes:
        stored: its name, without `.weight`.
        sizes: rows of in_proj by part, or the columns of out_proj.
        factors: of weight and bias: one, or one for each of `sizes`.
        input_factor: of the weight alone.
        bias: whether it has one.
    """

    stored: str
    sizes: tuple[int, ...]
    factors: tuple[float, ...] = (1.0,)
    input_factor: float = 1.0
    bias: bool = False

    def weight_piece(self) -> Piece:
        """Its weight."""
        return self._piece("weight", self.sizes, self.input_factor)

    def bias_piece(self) -> Piece:
        """Its bias, which is as long as its rows; zeros, if it has none."""
        return self._piece("bias", self.sizes) if self.bias else Piece("", (sum(self.sizes),))

    def added_piece(self) -> Piece:
        """Its bias, which is as long as ours."""
        return self._piece("bias", ())

    def _piece(self, what: str, sizes: tuple[int, ...], factor: float = 1.0) -> Piece:
        factors = tuple(factor * each for each in self.factors)
        return Piece(f"{self.stored}.{what}", sizes, () if {*factors} == {1.0} else factors)


def linears(rows: Sequence[Linear], columns: Sequence[Linear]) -> dict[str, Source]:
    """in_proj and out_proj of a block: these beneath each other, those beside each other."""
    joined = {
        IN_PROJ: Source(tuple(each.weight_piece() for each in rows)),
        OUT_PROJ: Source(tuple(each.weight_piece() for each in columns), "columns"),
    }
    if any(each.bias for each in rows):
        joined[IN_BIAS] = Source(tuple(each.bias_piece() for each in rows))
    if biases := tuple(each.added_piece() for each in columns if each.bias):
        joined[OUT_BIAS] = Source(biases, "sum")
    return joined


def qkv(
    stored: str,
    block: Attention,
    bias: bool,
    *,
    q: float = 1.0,
    k: float = 1.0,
    input_factor: float = 1.0,
) -> list[Linear]:
    """q_proj, k_proj and v_proj; `q` and `k` are factors of these two."""
    factors = {"q": q, "k": k, "v": 1.0}
    return [
        Linear(f"{stored}.{part}_proj", (rows,), (factors[part],), input_factor, bias)
        for part, rows in block.parts.items()
    ]


def mamba_own(stored: str, block: Mamba2, conv_bias: bool) -> dict[str, Source]:
    """What a Mamba-2 block has besides linear layers."""
    names = ["conv1d.weight", "dt_bias", "A_log", "D"]
    found = {name: whole(f"{stored}.{name}") for name in names}
    found["conv1d.bias"] = whole(f"{stored}.conv1d.bias" if conv_bias else "")
    if block.gate_norm != "none":
        found["gate_norm.weight"] = whole(f"{stored}.norm.weight")
    return found


def in_block(index: int, norm: str, own: Mapping[str, Source]) -> dict[str, Source]:
    """The tensors of a block under our names; `norm` is the stored name of its norm."""
    local = {NORM: whole(norm), **own}
    return {f"layers.{index}.{name}": source for name, source in local.items()}


def require_whole_context(config: Mapping[str, Any], rotary: bool = False) -> None:
    """Raises CheckpointError where attention has a window or positions that are not supported."""
    if config.get("sliding_window") is not None:
        raise CheckpointError(
            f"config.json sets sliding_window = {config['sliding_window']!r}; only attention over "
            "the whole context is supported."
        )
    asked = [config.get("rope_scaling"), config.get("rope_parameters")]
    for scaling in asked:
        if scaling is None:
            continue
        if not isinstance(scaling, Mapping):
            raise CheckpointError(f"config.json sets rope_scaling = {scaling!r}; expected a table.")
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind != "default":
            refuse_positions(kind)
        share = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        if rotary and share not in (None, 1):
            refuse_positions(f"partial_rotary_factor = {share!r}")


def refuse_positions(kind: Any) -> None:
    """Raises CheckpointError."""
    raise CheckpointError(
        f"config.json asks for {kind} positions; only plain rotary of Falcon-H1 is supported."
    )


def heads_of_mamba(config: Mapping[str, Any], channels: int) -> tuple[int, int]:
    """Heads and their width, where `mamba_d_head` may be "auto" and all have `channels`."""
    heads = size(config, "mamba_n_heads", 128)
    if config.get("mamba_d_head", "auto") in (None, "auto"):
        width = max(channels // heads, 1)
    else:
        width = size(config, "mamba_d_head")
    if heads * width != channels:
        raise CheckpointError(
            f"config.json sets mamba_n_heads * mamba_d_head = {heads * width}, but the inner width "
            f"of Mamba-2 is {channels}."
        )
    return heads, width


def attention(
    config: Mapping[str, Any],
    *,
    heads: int,
    kv: int | None = None,
    head_dim: int | None = None,
) -> Attention:
    """Attention without positions and biases; the arguments are class defaults.

    Left out, there are as many heads of keys as of queries, and they share hidden_size.
    """
    n_heads = size(config, "num_attention_heads", heads)
    d_model = size(config, "hidden_size")
    if config.get("head_dim") is None and head_dim is None and d_model % n_heads:
        raise CheckpointError(
            f"config.json sets hidden_size = {d_model}, which num_attention_heads = {n_heads} do "
            "not divide."
        )
    return Attention(
        n_heads,
        _given(config, "num_key_value_heads", kv or n_heads),
        _given(config, "head_dim", head_dim or d_model // n_heads),
    )


def _given(config: Mapping[str, Any], key: str, default: int) -> int:
    return default if config.get(key) is None else size(config, key)


def words(config: Mapping[str, Any], key: str, known: Mapping[str, str]) -> list[str] | None:
    """A list of block types, of which `known` gives one word for each spelling."""
    value = config.get(key)
    if value is None:
        return None
    if not isinstance(value, Iterable) or not value:
        raise CheckpointError(f"config.json sets {key} = {value!r}; expected block types.")
    for word in value:
        if word not in known:
            raise CheckpointError(
                f"config.json sets {key} with {word!r}; only {', '.join(map(repr, known))} are "
                "supported."
            )
    return [known[word] for word in value]


def flattened(parts: Iterable[Sources]) -> Sources:
    """All of them in one."""
    return dict(itertools.chain.from_iterable(part.items() for part in parts))
