"""What can be evaluated: an FP checkpoint, a quantized checkpoint, a bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from runtime.failures import during
from runtime.files import MANIFEST, TOKENIZER
from runtime.session import Session
from ssdi8_edge.checkpoints.checkpoint import open_checkpoint
from ssdi8_edge.checkpoints.quantized import is_quantized_checkpoint, load_quantized, read_config
from ssdi8_edge.ground.artifacts import QUANTIZED
from ssdi8_edge.ground.board_runtime import bundle_folder, open_checked_bundle
from ssdi8_edge.ground.device import require_device
from ssdi8_edge.ground.errors import UsageError
from ssdi8_edge.ground.inputs import expanded
from ssdi8_edge.ground.tokens import end_ids, require_fitting, tokenizer_in
from ssdi8_edge.local.gpu_backend import GpuBackend
from ssdi8_edge.models.block import States
from ssdi8_edge.models.float import FloatModel
from ssdi8_edge.models.network import Scope, watched_model
from ssdi8_edge.numerics import int8
from ssdi8_edge.ops import kernel_library


def _no_scope(name: str) -> AbstractContextManager[None]:
    return nullcontext()


class Forward(Protocol):
    """input_ids (B, L) INT64 -> logits (B, keep, V) FP32 of the last positions, from zero states.

    A model that runs layer by layer in Python enters `scope("layers.{i}")` around each.
    """

    def __call__(self, ids: Tensor, keep: int, scope: Scope) -> Tensor: ...


class Running(Protocol):
    """One sequence that grows: tokens (1, L) INT64 -> logits (1, L, V) FP32 of all of them."""

    def __call__(self, ids: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Subject:
    """A model that can be evaluated.

    Attributes:
        source: what the user named.
        name: of the method, or fp32.
        engine: what computes.
        vocabulary: rows of the embedding, padding included.
        sequence: starts a sequence.
        device: where ids are taken from and logits are left.
        counts_saturation: whether every INT8 rounding goes through `int8.round_to_int8`.
        notes: of its checkpoint.
        beyond_fp16: sentences about tensors that left FP16 so far, of an engine that looks.
        end_ids: the tokens that end a text, the model's own one first.
        context: tokens that a sequence may have; None: any number.
    """

    source: str
    name: str
    engine: str
    forward: Forward
    sequence: Callable[[], Running]
    tokenizer: Path
    vocabulary: int
    device: str = "cpu"
    counts_saturation: bool = False
    notes: tuple[str, ...] = ()
    beyond_fp16: list[str] = field(default_factory=list)
    end_ids: tuple[int, ...] = ()
    context: int | None = None

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
        UsageError: it is none of these, has no tokenizer or that of another model, or cannot run
            on `device`.
    """
    require_device(device)
    with during(f"loading {source}", "end other programs, or name fewer models at once"):
        return _open_subject(source, tokenizer, device)


def _open_subject(source: str, tokenizer: Path | None, device: str) -> Subject:
    folder = expanded(source)
    if device != "cpu" and is_quantized_checkpoint(folder / QUANTIZED):
        return _quantized_subject(source, folder / QUANTIZED, tokenizer, device)
    if (bundle_folder(folder) / MANIFEST).is_file():
        return _bundle_subject(source, folder, device)
    for place in (folder, folder / QUANTIZED):  # the latter in a run that ended early
        if is_quantized_checkpoint(place):
            return _quantized_subject(source, place, tokenizer, device)
    return _float_subject(source, tokenizer, device)


def _bundle_subject(source: str, folder: Path, device: str) -> Subject:
    if device != "cpu":
        raise UsageError(
            f"{source} is a bundle, which onnxruntime runs on the CPU;",
            "name the quantized/ folder of its build, or give --device cpu.",
        )
    bundle = open_checked_bundle(folder)
    require_fitting(bundle.path(TOKENIZER), source, bundle.model.vocab_size)
    from runtime.backends.onnxruntime import OnnxRuntimeBackend

    session = Session(bundle, OnnxRuntimeBackend(bundle))

    def forward(ids: Tensor, keep: int, scope: Scope) -> Tensor:
        logits, _ = session.prefill(ids.numpy().astype(np.int32), keep)
        return torch.from_numpy(logits)

    def sequence() -> Running:
        states, position = None, 0

        def feed(ids: Tensor) -> Tensor:
            nonlocal states, position
            given = ids.numpy().astype(np.int32)
            logits, states = session.prefill(given, ids.shape[1], states, position)
            position += ids.shape[1]
            return torch.from_numpy(logits.copy())

        return feed

    return Subject(
        source,
        bundle.recipe,
        session.backend.description,
        forward,
        sequence,
        bundle.path(TOKENIZER),
        bundle.model.vocab_size,
        end_ids=tuple(sorted(bundle.end_ids)),
        context=bundle.model.context,
    )


def _quantized_subject(source: str, folder: Path, tokenizer: Path | None, device: str) -> Subject:
    config = read_config(folder)
    tokenizer = tokenizer or folder / TOKENIZER
    require_fitting(tokenizer, source, config["model"]["vocab_size"])
    model = load_quantized(folder, device)
    kernels = device != "cpu" and kernel_library.available()
    if model.recipe.quantized:
        kernels = kernels and model.description.misfit() is None

    beyond_fp16: list[str] = []

    @contextmanager
    def watching() -> Iterator[None]:
        references = nullcontext() if kernels else kernel_library.references_only()
        with watched_model(model, beyond_fp16.append), references:
            yield

    def forward(ids: Tensor, keep: int, scope: Scope) -> Tensor:
        with watching():
            return model.forward(ids, None, keep, scope)[0]

    def sequence() -> Running:
        # Op by op, states grow as they have to.
        if kernels and not model.description.grows(model.recipe):
            return _by_graphs(GpuBackend(model, device), device)
        states: list[States] | None = None
        position = 0

        def feed(ids: Tensor) -> Tensor:
            nonlocal states, position
            with watching():
                logits, states = model.forward(ids, states, ids.shape[1], position=position)
            position += ids.shape[1]
            return logits

        return feed

    return Subject(
        source,
        model.recipe.name,
        _engine("CUDA kernels" if kernels else "torch reference", device),
        forward,
        sequence,
        tokenizer,
        model.description.vocab_size,
        device,
        counts_saturation=model.recipe.quantized and not kernels,
        beyond_fp16=beyond_fp16,
        end_ids=tuple(config.get("text", {}).get("end_ids", ())),
    )


def _by_graphs(backend: GpuBackend, device: str) -> Running:
    """One sequence by CUDA graphs, as generating has it: launching op by op takes far longer."""
    states = backend.zero_states(1)

    def feed(ids: Tensor) -> Tensor:
        nonlocal states
        given = ids.cpu().numpy().astype(np.int32)
        logits, states = backend.forward(given, states, ids.shape[1])
        return torch.from_numpy(logits).to(device)

    return feed


def _float_subject(source: str, tokenizer: Path | None, device: str) -> Subject:
    checkpoint = open_checkpoint(source)
    found = tokenizer or tokenizer_in(checkpoint.folder)
    if found is None:
        raise UsageError(f"{source} has no tokenizer.json;", "name one with --tokenizer.")
    vocabulary = checkpoint.description.vocab_size
    require_fitting(found, source, vocabulary)
    ends = end_ids(checkpoint.folder, found, vocabulary)
    model = FloatModel(checkpoint.description).eval()
    model.load_state_dict({name: checkpoint.tensor(name).float() for name in checkpoint.names})
    model = model.to(device)

    def forward(ids: Tensor, keep: int, scope: Scope) -> Tensor:
        logits: Tensor = model(ids, None, keep)[0]
        return logits

    def sequence() -> Running:
        states: list[States] | None = None

        def feed(ids: Tensor) -> Tensor:
            nonlocal states
            logits, states = model(ids, states)
            return cast(Tensor, logits)

        return feed

    return Subject(
        source,
        "fp32",
        _engine("torch", device),
        forward,
        sequence,
        found,
        model.description.vocab_size,
        device,
        notes=tuple(checkpoint.notes),
        end_ids=tuple(ends),
    )


def _engine(name: str, device: str) -> str:
    return name if device == "cpu" else f"{name}, {device}"
