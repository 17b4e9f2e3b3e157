"""One checkpoint quantized by several methods, to be compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ssdi8_edge.checkpoints.quantized import is_quantized_checkpoint
from ssdi8_edge.compile.pipeline import Build, BuildRequest, run_name
from ssdi8_edge.ground.artifacts import QUANTIZED
from ssdi8_edge.ground.errors import UsageError
from ssdi8_edge.ground.inputs import expanded
from ssdi8_edge.ground.progress import Track, silent
from ssdi8_edge.recipes.recipe import QuantConfig
from ssdi8_edge.targets import load_target


def quantize_by(
    recipes: Sequence[QuantConfig],
    model: str,
    runs: Path,
    calibration: Path | None = None,
    tokenizer: str | None = None,
    device: str = "cpu",
    track: Track = silent,
    say: Callable[[str, str], None] = lambda method, line: None,
) -> list[Path]:
    """The quantized checkpoint by each recipe, in the run folders below `runs` that `build` makes.

    What is there and up to date is not made again, and what methods have in common, the statistics
    of the same windows, is made once.

    Args:
        calibration, tokenizer, device: as in `pipeline.BuildRequest`.
        say: is told what was done, and for which method.

    Raises:
        UsageError: a model that is quantized already.
    """
    target = load_target("host-cpu")
    source = expanded(model)
    if is_quantized_checkpoint(source) or is_quantized_checkpoint(source / QUANTIZED):
        raise UsageError(
            f"{source} is quantized already;",
            "name the checkpoint that it was made from, or leave out --methods.",
        )
    builds: list[Build] = []
    for recipe in recipes:
        request = BuildRequest(
            model=model,
            recipe=recipe,
            target=target,
            out=runs / run_name(model, recipe.name, target.name),
            calibration=calibration,
            tokenizer=tokenizer,
            until="quantize",
            out_option="--runs",
            device=device,
        )
        build = Build(request, track, partial(say, recipe.name))
        for earlier in builds:
            build.adopt_calibration(earlier)
        build.run()
        builds.append(build)
    return [build.request.out / QUANTIZED for build in builds]
