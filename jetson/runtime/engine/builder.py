"""model.onnx and a target's shapes -> a TensorRT engine with two optimization profiles.

Profile 0 serves prefill, any length up to the target's; profile 1 serves decode, one token. Both
share the weights. Types are those of the graph, and FP32 stays FP32: no builder flag decides what
is computed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from runtime.bundle import Bundle
from runtime.engine.tensorrt_api import LogLines, strongly_typed
from runtime.problems import BundleProblem, RunFailure

MIB = 2**20
# Not measured on a board yet. Others report three to four times the parameters while building;
# parser, builder, serialized engine and the engine loaded for inspection each hold the weights.
WEIGHT_COPIES = 4
BASE_BYTES = 800 * MIB  # CUDA, TensorRT and Python
DISK_COPIES = 1.5  # the engine holds the weights, some in another layout


def estimate_memory(weights: int, workspace: int, caches: int = 0) -> int:
    """Bytes that building needs at most, by a rule of thumb.

    Args:
        caches: bytes of the states that grow. They are inputs and outputs, which TensorRT allocates
            to time kernels.
    """
    return WEIGHT_COPIES * weights + workspace + BASE_BYTES + 2 * caches


def estimate_disk(weights: int) -> int:
    """Bytes that the engine, its log and the timing cache need at most, by a rule of thumb."""
    return int(DISK_COPIES * weights) + 64 * MIB


class EngineBuilder:
    """One build; `seconds` says what its parts took."""

    def __init__(self, trt: ModuleType, log: Any, lines: LogLines) -> None:
        self._trt = trt
        self._log = log
        self._lines = lines
        self.seconds: dict[str, float] = {}

    def build(
        self, graph: Path, bundle: Bundle, workspace: int, timing_cache: bytes
    ) -> tuple[Any, bytes]:
        """The serialized engine (a buffer), and the timing cache with what was measured.

        Args:
            workspace: bytes that a kernel may use as scratch memory.

        Raises:
            BundleProblem: TensorRT cannot read the graph.
            RunFailure: it cannot build it.
        """
        trt = self._trt
        builder = trt.Builder(self._log)
        network = builder.create_network(strongly_typed(trt))
        parser = trt.OnnxParser(network, self._log)
        started = time.perf_counter()
        if not parser.parse_from_file(str(graph)):
            raise self._parse_problem(parser, graph, bundle)
        self.seconds["parse"] = time.perf_counter() - started
        _check_tensors(network, bundle, graph)
        for tensor in (*_inputs(network), *_outputs(network)):
            tensor.allowed_formats = 1 << int(trt.TensorFormat.LINEAR)

        config = builder.create_builder_config()
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.clear_flag(trt.BuilderFlag.TF32)
        self._add_profiles(builder, network, config, bundle)
        cache = config.create_timing_cache(timing_cache)
        if cache is None or not config.set_timing_cache(cache, False):
            # Of another GPU or version: measured anew rather than trusted.
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, False)

        started = time.perf_counter()
        plan = builder.build_serialized_network(network, config)
        self.seconds["build"] = time.perf_counter() - started
        if plan is None:
            raise RunFailure(
                f"TensorRT {trt.__version__} cannot build {graph}{self._lines.last()}",
                "its messages are in the log; if it asked for more than it may take, give a larger"
                " --workspace-mb; if memory ran out, end other programs or add swap",
            )
        return plan, bytes(memoryview(config.get_timing_cache().serialize()))

    def _add_profiles(self, builder: Any, network: Any, config: Any, bundle: Bundle) -> None:
        shapes: Mapping[str, Sequence[int]] = bundle.manifest["target"]["engine"]
        for tokens in (shapes["tokens"], [1, 1, 1]):
            profile = builder.create_optimization_profile()
            for tensor in _inputs(network):
                if not tensor.shape:  # position, a scalar
                    if tensor.is_shape_tensor:
                        raise BundleProblem(
                            f"{bundle.name} has a state that grows by an op without a plugin",
                            "run it with --backend onnxruntime",
                        )
                    continue
                rest = tuple(tensor.shape)[1:]
                profile.set_shape(
                    tensor.name,
                    *(
                        (b, t) if tensor.name == "input_ids" else (b, *rest)
                        for b, t in zip(shapes["batch"], tokens, strict=True)
                    ),
                )
            if config.add_optimization_profile(profile) < 0:
                raise RunFailure(
                    f"TensorRT refuses the shapes {dict(shapes)}{self._lines.last()}",
                    "pack the bundle again with other [engine] shapes in its target",
                )

    def _parse_problem(self, parser: Any, graph: Path, bundle: Bundle) -> BundleProblem:
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        first = " ".join(errors[0].split()) if errors else "no reason given"
        if any("lugin not found" in error for error in errors):
            return BundleProblem(
                f"{graph} needs plugins that are not loaded ({first})",
                "build them with setup.sh, or name the library with --plugins",
            )
        return BundleProblem(
            f"TensorRT {self._trt.__version__} cannot read {graph} ({first})",
            f"copy the bundle {bundle.name} again, or pack it again",
        )


def _inputs(network: Any) -> list[Any]:
    return [network.get_input(i) for i in range(network.num_inputs)]


def _outputs(network: Any) -> list[Any]:
    return [network.get_output(i) for i in range(network.num_outputs)]


def _check_tensors(network: Any, bundle: Bundle, graph: Path) -> None:
    """The runtime binds by name, so the names must be the manifest's."""
    states = bundle.model.states
    found = {tensor.name for tensor in (*_inputs(network), *_outputs(network))}
    expected = {"input_ids", "logits", *states, *(state.output for state in states.values())}
    if bundle.model.grows:
        expected.add("position")
    if found != expected:
        odd = sorted(found ^ expected)[0]
        raise BundleProblem(
            f"{graph} and the manifest disagree about the tensor {odd}", "pack the bundle again"
        )
