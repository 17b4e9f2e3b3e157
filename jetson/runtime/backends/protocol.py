"""What an inference library has to offer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

# Graph name ("conv_state.0", "ssm_state.0", ...) -> array in whatever memory the backend uses;
# np.asarray of it copies to the host.
States = Mapping[str, Any]

LayerTimes = list[tuple[str, float]]  # names of the library's layers, in order, and their seconds


@dataclass(frozen=True)
class BackendOptions:
    """How to open a backend; what one does not have, it ignores."""

    threads: int | None = None  # of onnxruntime; None leaves it the choice
    engines: Path | None = None  # folder that build_engine.py wrote; None: engine/ in the bundle
    plugins: Path | None = None  # plugin library; None: where the engine's build log says
    profiling: bool = False  # collect `layer_times`
    reason: str = ""  # why this backend was chosen, where the user did not name it
    hash_all: bool = False  # also of an engine that is large


class Backend(Protocol):
    """One loaded graph. It serves prefill, continued prefill and decode."""

    description: str  # library, version and device, for people
    runtime: str  # its name in manifests and records
    versions: Mapping[str, str]  # library -> version
    engine: Mapping[str, Any] | None  # as in a bench record
    max_keep: int | None  # the most positions that `forward` gives logits of; None: any
    sequences: int | None  # batches whose states stay good while others go on; None: any number

    @property
    def notes(self) -> Sequence[str]:
        """What a user should know of this run, one sentence each; may grow while it runs."""
        ...

    @property
    def gpu_bytes(self) -> int | None:
        """GPU memory taken since it was opened."""
        ...

    def zero_states(self, batch: int) -> States:
        """States that start `batch` sequences."""
        ...

    def load_states(self, held: Mapping[str, np.ndarray]) -> States:
        """States of one sequence with the values of `held`, whole arrays that stay as they are.

        Like `zero_states`, it may end what goes on beyond `sequences`.
        """
        ...

    def forward(
        self, ids: np.ndarray, states: States, keep: int = 1, position: int = 0
    ) -> tuple[np.ndarray, States]:
        """Run tokens `ids` (b, l) int32 after `states`, to which `position` tokens have led.

        Where states grow, `position` + l is at most the context of the bundle.
        Returns the logits (b, keep, vocab) float32 of the last `keep` positions and the new states.
        Both may be overwritten by the next call, and `states` by this one: go on with the states
        returned, and copy what has to stay.
        """
        ...

    def layer_times(self) -> list[LayerTimes]:
        """One entry per call of `forward` so far; ends the profiling."""
        ...

    def close(self) -> None:
        """Free everything; may be called again."""
        ...
