"""Golden vectors: what every runtime must reproduce, from the torch reference."""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from runtime.session import prefill_pieces
from ssdi8_edge.ground.progress import Track, silent
from ssdi8_edge.models.block import States
from ssdi8_edge.models.description import Description
from ssdi8_edge.models.network import QuantizedModel, watched_model

DECODE_STEPS = 4
GOLDEN_LOGITS = 4


def golden_tokens(model: Description) -> tuple[int, int]:
    """How many tokens the golden vectors of `model` take: of the prompt, and one by one."""
    return 2 * model.prompt_multiple + 3, DECODE_STEPS


def golden_vectors(
    model: QuantizedModel, ids: Tensor, max_tokens: int, track: Track = silent
) -> dict[str, np.ndarray]:
    """A prefill over two chunks and three tokens more, the states behind it, and a few steps.

    Of states that grow there are the rows of the prefill.

    Args:
        ids: (tokens,) real text; used cyclically where it is short.
        max_tokens: the most that a call takes; a longer prefill goes in the runtime's pieces, since
            the states between them are rounded to their type.

    Raises:
        CheckpointError: a tensor leaves FP16.
    """
    multiple = model.description.prompt_multiple
    length, _ = golden_tokens(model.description)
    repeats = -(-(length + DECODE_STEPS) // len(ids))
    ids = ids.repeat(repeats)[: length + DECODE_STEPS].to(torch.int32)[None]
    prompt, following = ids[:, :length], ids[:, length:]
    pieces = prefill_pieces(length, max_tokens, multiple)
    layers = iter(track(range(model.description.n_layer * len(pieces) + 1), "golden vectors"))

    def layer_begins(_: str) -> AbstractContextManager[None]:
        next(layers, None)
        return nullcontext()

    states: list[States] | None = None
    last_logits = []
    with watched_model(model):
        for start, end in pieces:
            keep = min(GOLDEN_LOGITS, end - start)
            piece = prompt[:, start:end]
            logits, states = model.forward(piece, states, keep, layer_begins, start)
            last_logits.append(logits)
    deque(layers, maxlen=0)  # ends the bar
    assert states is not None
    logits = torch.cat(last_logits, 1)[:, -GOLDEN_LOGITS:]
    golden = {"input_ids": prompt, "logits": logits, "decode_ids": following}
    golden |= model.named_states(states)
    steps = []
    with watched_model(model):
        for step in range(DECODE_STEPS):
            token = following[:, step : step + 1]
            logits, states = model.forward(token, states, position=length + step)
            steps.append(logits[0, 0])
    golden["decode_logits"] = torch.stack(steps)
    return {name: tensor.numpy() for name, tensor in golden.items()}
