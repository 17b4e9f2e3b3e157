"""Perplexity by the paper's protocol, of a bundle, a quantized checkpoint or an FP checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ssdi8_edge.artifacts import TOKENIZER
from ssdi8_edge.board_runtime import bundle_folder, open_checked_bundle, runtime_module
from ssdi8_edge.checkpoint import open_checkpoint
from ssdi8_edge.errors import UsageError
from ssdi8_edge.model import Mamba2Config, Mamba2LM
from ssdi8_edge.progress import Track, silent
from ssdi8_edge.quantize.saved import is_quantized_checkpoint, load_quantized
from ssdi8_edge.stream import read_tokens, require_vocabulary

# Method §7: non-overlapping blocks of 2048 tokens.
WINDOW = 2048

# input_ids (1, L) -> logits (1, L, V) FP32, from zero states
Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Subject:
    """A model that can be evaluated."""

    source: str
    name: str
    engine: str
    forward: Forward
    tokenizer: Path
    vocabulary: int


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean over windows of the mean negative log-likelihood, in nats per token."""

    model: str
    engine: str
    text: str
    windows: int
    window_tokens: int
    perplexity: float


def open_subject(source: str, tokenizer: Path | None = None, device: str = "cpu") -> Subject:
    """What `source` names: a bundle or run folder, a quantized checkpoint, an FP checkpoint.

    Raises:
        UsageError: it is none of these, or has no tokenizer.
    """
    folder = Path(source).expanduser()
    if (bundle_folder(folder) / "manifest.json").is_file():
        return _bundle_subject(folder)
    if is_quantized_checkpoint(folder):
        model = load_quantized(folder, device)
        return Subject(
            source,
            model.recipe.name,
            "torch reference",
            lambda ids: model.forward(ids.to(device), None, ids.shape[1])[0].cpu(),
            tokenizer or folder / TOKENIZER,
            model.config.vocab_size,
        )
    checkpoint = open_checkpoint(source)
    found = tokenizer or checkpoint.tokenizer_path
    if found is None:
        raise UsageError(f"{source} has no tokenizer.json;", "name one with --tokenizer.")
    lm = Mamba2LM(Mamba2Config(**checkpoint.config)).eval()
    lm.load_state_dict({name: checkpoint.tensor(name).float() for name in checkpoint.names})
    lm = lm.to(device)
    return Subject(
        source,
        "fp32",
        "torch",
        lambda ids: lm(ids.to(device).long())[0].cpu(),
        found,
        checkpoint.config["vocab_size"],
    )


def _bundle_subject(folder: Path) -> Subject:
    bundle = open_checked_bundle(folder)
    backend = runtime_module("onnxruntime_backend").OnnxRuntimeBackend(bundle)
    prefill = runtime_module("generate").prefill

    def forward(ids: Tensor) -> Tensor:
        logits, _ = prefill(backend, bundle, ids.numpy().astype(np.int32), ids.shape[1])
        return torch.from_numpy(logits)

    return Subject(
        str(folder),
        bundle.recipe,
        backend.description,
        forward,
        bundle.path(TOKENIZER),
        bundle.model.vocab_size,
    )


def perplexity(
    subject: Subject, text: Path, limit: int | None = None, track: Track = silent
) -> Perplexity:
    """Perplexity of `subject` on a UTF-8 text.

    Args:
        limit: the first so many windows; None takes all. A text shorter than a window is one.
    """
    windows = read_tokens(text, subject.tokenizer, WINDOW, limit or 1 << 40)
    require_vocabulary(windows, subject.tokenizer, subject.source, subject.vocabulary)
    total = 0.0
    with torch.inference_mode():
        for window in track(list(windows), f"evaluate {subject.name}"):
            logits = subject.forward(window[None])[0, :-1]
            total += functional.cross_entropy(logits, window[1:].long()).item()
    return Perplexity(
        model=subject.name,
        engine=subject.engine,
        text=text.name,
        windows=len(windows),
        window_tokens=windows.shape[1],
        perplexity=math.exp(total / len(windows)),
    )
