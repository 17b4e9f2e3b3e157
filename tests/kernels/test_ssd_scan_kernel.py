"""The CUDA kernel of all of SSD against its reference."""

from __future__ import annotations

from typing import Any

import kernel_emulator
import pytest
import torch
from kernel_cases import (
    FP16_ROWS,
    NONE,
    SSD_ROWS,
    STATIC,
    module_inputs,
    run_ssd_kernel,
    ssd_arguments,
    ssd_case,
)
from kernel_compare import (
    kernel_of,
    reference,
    relative_error,
)
from kernel_fixtures import (
    CUDA,
    GPU,
    needs_emulation,
    threads_in_order,
)

from ssdi8_edge.ground.errors import Ssdi8Error
from ssdi8_edge.ops import kernel_library

pytestmark = CUDA


@pytest.mark.parametrize("row", [*SSD_ROWS, *FP16_ROWS, {"length": 1}], ids=str)
def test_ssd_scan(generator: torch.Generator, row: dict[str, Any]) -> None:
    case = ssd_case(generator, row)
    values, attributes = case["inputs"], case["attributes"]
    y, final = run_ssd_kernel("Ssdi8SsdScan", values, attributes)
    want_y, want_final = reference(
        "Ssdi8SsdScan", *ssd_arguments("Ssdi8SsdScan", values), **attributes
    )
    assert relative_error(y, want_y) < 2e-3
    assert relative_error(final, want_final) < 1e-3


@needs_emulation
@pytest.mark.parametrize(
    "row",
    [
        *({"nheads": heads, "d_state": n} for heads in (4, 5) for n in (64, 128, 256)),
        *(NONE | {"nheads": heads, "d_state": n} for heads in (4, 9) for n in (64, 128, 256)),
    ],
    ids=str,
)
def test_ssd_scan_with_more_heads_than_the_chip_holds(
    generator: torch.Generator, row: dict[str, Any]
) -> None:
    """Heads walk the chunks a few at a time; with scaling "none" in chunks of 128."""
    kernel_emulator.configure(processors=1)
    try:
        test_ssd_scan(generator, row | {"length": 300})
    finally:
        kernel_emulator.configure()


@pytest.mark.parametrize("state", [torch.float16, torch.float32])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize(
    ("headdim", "d_state"), [(64, 128), (128, 64), (64, 256), (80, 64), (80, 128), (32, 256)]
)
def test_ssd_step(
    generator: torch.Generator, batch: int, headdim: int, d_state: int, state: torch.dtype
) -> None:
    """One token: the state to the last rounding, y to FP16."""
    row = {"length": 1, "batch": batch, "headdim": headdim, "d_state": d_state, "state": state}
    case = ssd_case(generator, row | {"nheads": 8, "ngroups": 2})
    values, attributes = case["inputs"], case["attributes"]
    y, final = run_ssd_kernel("Ssdi8SsdScan", values, attributes)
    want_y, want_final = reference(
        "Ssdi8SsdScan", *ssd_arguments("Ssdi8SsdScan", values), **attributes
    )
    assert relative_error(y, want_y) < 3e-4
    assert relative_error(final, want_final) < (3e-4 if state is torch.float16 else 1e-6)


@pytest.mark.parametrize("magnitude", [0.0, 1e-3, 1e2])
def test_dynamic_scales_follow_the_values(generator: torch.Generator, magnitude: float) -> None:
    """Nothing, little or much: as accurate as any."""
    case = ssd_case(generator, {"length": 600})
    values, attributes = case["inputs"], case["attributes"]
    values["ssm_state"] *= magnitude
    values["x"] = (values["x"].float() * magnitude).half()
    y, final = run_ssd_kernel("Ssdi8SsdScan", values, attributes)
    want_y, want_final = reference(
        "Ssdi8SsdScan", *ssd_arguments("Ssdi8SsdScan", values), **attributes
    )
    if magnitude == 0.0:
        assert not y.any() and not final.any()
    assert relative_error(y, want_y) < 2e-3
    assert relative_error(final, want_final) < 1e-3


@pytest.mark.parametrize(
    ("choice", "noise_y", "noise_state"), [({}, 3e-2, 2e-1), (NONE, 2e-3, 2e-3)], ids=str
)
@pytest.mark.parametrize("length", [1, 256, 700])
def test_ssd_prefill_then_step(
    generator: torch.Generator,
    length: int,
    choice: dict[str, Any],
    noise_y: float,
    noise_state: float,
) -> None:
    """prefill(L) and two steps = prefill(L + 2), within the noise of INT8, or of FP16."""
    case = ssd_case(generator, choice | {"length": length + 2})
    values, attributes = case["inputs"], case["attributes"]
    whole_y, whole_state = run_ssd_kernel("Ssdi8SsdScan", values, attributes)
    parts = []
    for start, stop in ((0, length), (length, length + 1), (length + 1, length + 2)):
        part = values | {k: values[k][:, start:stop] for k in ("x", "b_q", "c_q", "zxbcdt")}
        y, values["ssm_state"] = run_ssd_kernel("Ssdi8SsdScan", part, attributes)
        parts.append(y)
    assert relative_error(torch.cat(parts, 1), whole_y) < noise_y
    # The fastest head keeps few tokens, small ones on the scale of the largest of the sequence.
    assert relative_error(values["ssm_state"], whole_state) < noise_state


@pytest.mark.parametrize("choice", [{}, NONE], ids=str)
def test_ssd_scan_in_place_and_repeatable(
    generator: torch.Generator, choice: dict[str, Any]
) -> None:
    """The state may be updated where it lies; runs agree bit by bit."""
    size, runs = ({"length": 2000, "nheads": 80}, 10) if GPU else ({"length": 600}, 4)
    case = ssd_case(generator, choice | size)
    values, attributes = case["inputs"], case["attributes"]
    first = run_ssd_kernel("Ssdi8SsdScan", values, attributes)
    for run in range(runs):
        with threads_in_order(run):
            again = run_ssd_kernel("Ssdi8SsdScan", values, attributes)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
    state = values["ssm_state"].clone()
    with kernel_library.states_in_place():
        in_place = kernel_of("Ssdi8SsdScan")(
            *ssd_arguments("Ssdi8SsdScan", values | {"ssm_state": state}), **attributes
        )
    assert in_place[1] is state
    assert all(torch.equal(a, b) for a, b in zip(in_place, first, strict=True))


def test_ssd_refusals(generator: torch.Generator) -> None:
    for change, match in (
        ({"headdim": 96}, "headdim 96"),
        ({"d_state": 32}, "d_state 32"),
        ({"chunk_size": 512}, "chunk_size 512"),
        (NONE | {"gate": "q0.7"}, r"scaling none with gate Q0\.7"),
    ):
        case = ssd_case(generator, {"length": 8} | change)
        with pytest.raises(Ssdi8Error, match=match):
            run_ssd_kernel("Ssdi8SsdScan", case["inputs"], case["attributes"])
    case = ssd_case(generator, STATIC | {"length": 8})
    for op, scales in (
        ("Ssdi8SsdScan", ("x_scale", "state_scale")),
        ("Ssdi8ChunkState", ("x_scale", "state_scale")),
        ("Ssdi8StatePassing", ("state_scale",)),
    ):
        values, attributes = case["inputs"], case["attributes"]
        if op != "Ssdi8SsdScan":
            values = module_inputs(values, attributes)
        for name in scales:
            with pytest.raises(Ssdi8Error, match=f"scaling static needs {name}"):
                run_ssd_kernel(op, values | {name: None}, attributes)
        with pytest.raises(Ssdi8Error, match=r"scaling dynamic with gate Q0\.7"):
            choice = {"gate": "q0.7", "scaling": "dynamic"}
            states = {"states": values["states"].to(torch.int8)} if "states" in values else {}
            run_ssd_kernel(op, values | states, attributes | choice)
