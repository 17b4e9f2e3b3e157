"""What can be evaluated: an FP checkpoint, a quantized checkpoint, a bundle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ssdi8_edge import int8
from ssdi8_edge.artifacts import QUANTIZED, TOKENIZER
from ssdi8_edge.board_runtime import bundle_folder, open_checked_bundle, runtime_module
from ssdi8_edge.checkpoint import open_checkpoint
from ssdi8_edge.device import require_device
from ssdi8_edge.errors import UsageError
from ssdi8_edge.model import Mamba2Config, Mamba2LM
from ssdi8_edge.ops import kernel_library
from ssdi8_edge.ops.kernel_limits import misfit
from ssdi8_edge.quantize.modules import Scope
from ssdi8_edge.quantize.saved import is_quantized_checkpoint, load_quantized
from ssdi8_edge.stream import open_tokenizer


def _no_scope(name: str) -> AbstractContextManager[None]:
    return nullcontext()


class Forward(Protocol):
    """input_ids (B, L) INT64 -> logits (B, keep, V) FP32 of the last positions, from zero states.

    A model that runs layer by layer in Python enters `scope("layers.{i}")` around each.
    """

    def __call__(self, ids: Tensor, keep: int, scope: Scope) -> Tensor: ...


@dataclass(frozen=True)
class Subject:
    """A model that can be evaluated.

    Attributes:
        source: what the user named.
        name: of the method, or fp32.
        engine: what computes.
        vocabulary: rows of the embedding, padding included.
        device: where ids are taken from and logits are left.
        counts_saturation: whether every INT8 rounding goes through `int8.round_to_int8`.
    """

    source: str
    name: str
    engine: str
    forward: Forward
    tokenizer: Path
    vocabulary: int
    device: str = "cpu"
    counts_saturation: bool = False

    def logits(self, ids: Tensor, keep: int | None = None) -> Tensor:
        """ids (B, L) -> logits (B, keep, V) FP32 of the last `keep` positions; None keeps all."""
        with torch.inference_mode():
            return self.forward(ids.to(self.device), keep or ids.shape[1], _no_scope)

    def counted_logits(self, ids: Tensor, keep: int) -> tuple[Tensor, dict[str, float]]:
        """The logits, and `layers.{i}.<site>` -> fraction of saturated INT8 values.

        The fractions are empty for a model that has none, or whose engine does not count them.
        """
        if not self.counts_saturation:
            return self.logits(ids, keep), {}
        with torch.inference_mode(), int8.count_saturation() as counter:

            @contextmanager
            def scope(name: str) -> Iterator[None]:
                counter.scope = f"{name}."
                yield

            return self.forward(ids.to(self.device), keep, scope), counter.fractions()


def open_subject(source: str, tokenizer: Path | None = None, device: str = "cpu") -> Subject:
    """What `source` names: a bundle or run folder, a quantized checkpoint, an FP checkpoint.

    Raises:
        UsageError: it is none of these, has no tokenizer, or cannot run on `device`.
    """
    require_device(device)
    folder = Path(source).expanduser()
    if device != "cpu" and is_quantized_checkpoint(folder / QUANTIZED):
        return _quantized_subject(source, folder / QUANTIZED, tokenizer, device)
    if (bundle_folder(folder) / "manifest.json").is_file():
        subject = _bundle_subject(source, folder, device)
    elif is_quantized_checkpoint(folder):
        subject = _quantized_subject(source, folder, tokenizer, device)
    else:
        subject = _float_subject(source, tokenizer, device)
    open_tokenizer(subject.tokenizer)
    return subject


def _bundle_subject(source: str, folder: Path, device: str) -> Subject:
    if device != "cpu":
        raise UsageError(
            f"{source} is a bundle, which onnxruntime runs on the CPU;",
            "name the quantized/ folder of its build, or give --device cpu.",
        )
    bundle = open_checked_bundle(folder)
    backend = runtime_module("onnxruntime_backend").OnnxRuntimeBackend(bundle)
    prefill = runtime_module("generate").prefill

    def forward(ids: Tensor, keep: int, scope: Scope) -> Tensor:
        logits, _ = prefill(backend, bundle, ids.numpy().astype(np.int32), keep)
        return torch.from_numpy(logits)

    return Subject(
        source,
        bundle.recipe,
        backend.description,
        forward,
        bundle.path(TOKENIZER),
        bundle.model.vocab_size,
    )


def _quantized_subject(source: str, folder: Path, tokenizer: Path | None, device: str) -> Subject:
    model = load_quantized(folder, device)
    kernels = device != "cpu" and kernel_library.available()
    if model.recipe.quantized:
        kernels = kernels and misfit(model.config.kernel_sizes) is None

    def forward(ids: Tensor, keep: int, scope: Scope) -> Tensor:
        with nullcontext() if kernels else kernel_library.references_only():
            return model.forward(ids, None, keep, scope)[0]

    return Subject(
        source,
        model.recipe.name,
        _engine("CUDA kernels" if kernels else "torch reference", device),
        forward,
        tokenizer or folder / TOKENIZER,
        model.config.vocab_size,
        device,
        counts_saturation=model.recipe.quantized and not kernels,
    )


def _float_subject(source: str, tokenizer: Path | None, device: str) -> Subject:
    checkpoint = open_checkpoint(source)
    found = tokenizer or checkpoint.tokenizer_path
    if found is None:
        raise UsageError(f"{source} has no tokenizer.json;", "name one with --tokenizer.")
    model = Mamba2LM(Mamba2Config(**checkpoint.config)).eval()
    model.load_state_dict({name: checkpoint.tensor(name).float() for name in checkpoint.names})
    model = model.to(device)

    def forward(ids: Tensor, keep: int, scope: Scope) -> Tensor:
        logits: Tensor = model(ids, None, keep)[0]
        return logits

    return Subject(
        source,
        "fp32",
        _engine("torch", device),
        forward,
        found,
        model.config.vocab_size,
        device,
    )


def _engine(name: str, device: str) -> str:
    return name if device == "cpu" else f"{name}, {device}"
