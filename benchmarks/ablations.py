"""What each departure of a method of ours from the published one is worth.

    python benchmarks/ablations.py edge-w8a8 ssdi8_edge/demo --calibration BOOKS.txt \
        --text HELD-OUT.txt --runs RUNS --save table.md

One row per departure, taken back alone; the first two rows are the checkpoint in FP32 and the
method itself. Choices are made on such tables: the text has to be of the calibration's kind and
apart from it, never one that results are reported on.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ssdi8_edge.ground.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from runtime.files import TOKENIZER
from ssdi8_edge.compile.comparison import quantize_by
from ssdi8_edge.evaluate import evaluate, open_subject, plan
from ssdi8_edge.evaluate.table import save_results, show
from ssdi8_edge.ground.allocator import keep_freed_memory
from ssdi8_edge.recipes.presets import METHODS

_STATIC: dict[str, Any] = {"scaling": "static"}

SHARED: dict[str, dict[str, Any]] = {
    "static scales inside SSD": _STATIC,
    "static scales, of chunk states before passing": {**_STATIC, "state_observer": "local"},
    "static scales, Q0.7 gate": {**_STATIC, "gate": "q0.7"},
    "inputs of linears by one static scale": {"input_scaling": "static"},
    "ranges from absolute maxima": {"clip": "absmax"},
    "A_log and D in INT8": {"ssm_params": "int8"},
    "half away from zero": {"rounding": "half_away"},
    "B and C not rotated": {"bc_rotation": "none"},
    "SSD in FP16 but for B and C": {"scaling": "none"},
    "no mean correction": {"correction": "none"},
    "no compensation": {"compensation": 0.0},
    "full compensation": {"compensation": 1.0},
    "long calibration sequences": {"calibration_tokens": 2048, "calibration_samples": 32},
    "weights rounded to nearest": {"gptq": False},
    "lm_head in FP16": {"lm_head": "fp16"},
    "lm_head in INT8": {"lm_head": "w8_row"},
    "lm_head in 4 bits": {"lm_head": "w4"},
    "embedding in INT8": {"embedding": "int8_row"},
}
# What 4 bits need and 8 bits do not.
_ADDED: dict[str, dict[str, Any]] = {
    "descent after GPTQ": {"descent": 4},
    "correction of the residual stream": {"correction": "residual", "correction_strength": None},
}
DEPARTURES: dict[str, dict[str, dict[str, Any]]] = {
    "edge-w8a8": {
        "one scale per weight matrix": {"linear": "w8_tensor"},
        **SHARED,
        **{f"with {name}": fields for name, fields in _ADDED.items()},
    },
    "edge-w4a8": {
        "groups of 64": {"group_size": 64},
        "groups of 128": {"group_size": 128},
        "FP16 group scales": {"group_scales": "fp16"},
        "group scales from absolute maxima": {"group_search": "absmax"},
        "no descent after GPTQ": {"descent": 0},
        "correction of out_proj's output": {"correction": "out"},
        "correction by 0.15": {"correction_strength": 0.15},
        "correction in full": {"correction_strength": 1.0},
        "correction as published": {"correction": "out", "correction_strength": 0.15},
        **SHARED,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("method", choices=DEPARTURES)
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="first so many windows of the text")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="rows whose name holds one of these"
    )
    parser.add_argument("--samples", type=int, help="calibration windows, of all rows alike")
    parser.add_argument("--long-context", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--save", type=Path)
    args = parser.parse_args()

    keep_freed_memory()
    method = METHODS[args.method]
    if args.samples:
        method = replace(method, calibration_samples=args.samples)
    recipes = [method] + [
        replace(method, name=f"{method.name}, {name}", **fields)
        for name, fields in DEPARTURES[args.method].items()
        if any(part in name for part in args.only) and replace(method, **fields) != method
    ]
    measures = plan([], [args.text], None, args.limit, args.long_context)
    say = Console(stderr=True).print
    folders = quantize_by(
        *(recipes, args.model, args.runs, args.calibration),
        device=args.device,
        say=lambda name, line: say(f"{name}: {line}", markup=False),
    )
    subjects = [open_subject(args.model, folders[0] / TOKENIZER, args.device)]
    subjects += [open_subject(str(folder), None, args.device) for folder in folders]
    rows = evaluate(subjects, measures)
    save_results(rows, [args.save] if args.save else [])
    show(rows, Console())


if __name__ == "__main__":
    main()
