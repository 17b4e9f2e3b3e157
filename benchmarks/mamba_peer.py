"""The FP16 Triton kernels of state-spaces/mamba, to be timed in the same run as ours.

Needs a source tree of that repository (`bench_ops.py --mamba FOLDER`), triton and einops; its
package is loaded without its `__init__`, which wants compiled extensions that these kernels do not.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def load(folder: Path) -> None:
    """Make `mamba_ssm` importable from a source tree."""
    package = types.ModuleType("mamba_ssm")
    package.__path__ = [str(folder / "mamba_ssm")]
    sys.modules["mamba_ssm"] = package
    sys.path.append(str(folder))


def peer_of(
    op: str, values: Mapping[str, Tensor], attributes: Mapping[str, Any]
) -> tuple[Callable[..., Any], tuple[Tensor, ...]] | None:
    """A call that computes in FP16 what `op` computes on `values`, and its inputs."""
    if op != "Ssdi8SsdScan":
        return None
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update
    from mamba_ssm.ops.triton.ssd_combined import _mamba_chunk_scan_combined_fwd

    heads, p, n = (attributes[k] for k in ("nheads", "headdim", "d_state"))
    x = values["x"].unflatten(2, (heads, p))
    b, c = (
        (values[f"{k}_q"].float() * values[f"{k}_scale"]).half().unflatten(2, (-1, n))
        for k in ("b", "c")
    )
    column = attributes["dt_column"]
    dt = values["zxbcdt"][..., column : column + heads]
    A, D, dt_bias = (values[k] for k in ("A", "D", "dt_bias"))
    state = values["ssm_state"].clone()

    def prefill(x: Tensor, dt: Tensor, b: Tensor, c: Tensor, state: Tensor) -> Any:
        return _mamba_chunk_scan_combined_fwd(
            *(x, dt, A, b, c, attributes["chunk_size"]),
            D=D,
            dt_bias=dt_bias,
            initial_states=state,
            dt_softplus=True,
        )

    wide_A, wide_dt_bias, wide_D = (
        A[:, None, None].expand(heads, p, n),
        dt_bias[:, None].expand(heads, p),
        D[:, None].expand(heads, p),
    )

    def step(x: Tensor, dt: Tensor, b: Tensor, c: Tensor, state: Tensor) -> Any:
        return selective_state_update(
            *(state, x[:, 0], dt[:, 0, :, None].expand(-1, heads, p), wide_A, b[:, 0], c[:, 0]),
            D=wide_D,
            dt_bias=wide_dt_bias,
            dt_softplus=True,
        )

    call = step if x.shape[1] == 1 else prefill
    if x.shape[1] > 1:
        with torch.inference_mode():
            prefill(x, dt, b, c, state)  # the autotuner's runs are not timed
    return call, (x, dt, b, c, state)
