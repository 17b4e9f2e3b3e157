"""`python rtx_as_tensorrt.py build_engine.py BUNDLE …`: NVIDIA's TensorRT-RTX as `tensorrt`.

Parser and builder are real. Without a GPU a built engine cannot be loaded, so that part is a
stand-in, as are the GPU and its driver. What the builder was given goes to `GIVEN` in the
environment, as JSON; `PAUSE` names a file that appears when the build begins, which then waits.
"""

from __future__ import annotations

import json
import os
import sys
import time
import types
from pathlib import Path
from typing import Any

import tensorrt_rtx as rtx
from fake_cuda import Cuda, FakeCtypes
from fake_tensorrt import INSPECTED

LOADS = os.environ.get("LOADS", "yes") == "yes"


class Builder(rtx.Builder):  # type: ignore[misc]
    """For a compute capability of our own choice, since there is no GPU to ask."""

    def __init__(self, log: Any) -> None:
        super().__init__(log)
        self._profiles: list[Any] = []

    def create_builder_config(self) -> Any:
        config = super().create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(rtx.ComputeCapability.SM86, 0)
        return config

    def create_optimization_profile(self) -> Any:
        self._profiles.append(super().create_optimization_profile())
        return self._profiles[-1]

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        inputs = [network.get_input(i) for i in range(network.num_inputs)]
        outputs = [network.get_output(i) for i in range(network.num_outputs)]
        given = {
            "profiles": [
                {
                    tensor.name: [tuple(s) for s in profile.get_shape(tensor.name)]
                    for tensor in inputs
                }
                for profile in self._profiles
            ],
            "typed": network.get_flag(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED),
            "tf32": config.get_flag(rtx.BuilderFlag.TF32),
            "workspace": config.get_memory_pool_limit(rtx.MemoryPoolType.WORKSPACE),
            "verbosity": str(config.profiling_verbosity),
            "formats": sorted({tensor.allowed_formats for tensor in (*inputs, *outputs)}),
        }
        if "GIVEN" in os.environ:
            Path(os.environ["GIVEN"]).write_text(json.dumps(given))
        if "PAUSE" in os.environ:
            Path(os.environ["PAUSE"]).touch()
            time.sleep(60)
        return super().build_serialized_network(network, config)


class Runtime:
    def __init__(self, log: Any) -> None:
        self._log = log

    def deserialize_cuda_engine(self, plan: Any) -> Any:
        assert len(memoryview(plan)) > 1000
        if not LOADS:
            self._log.log(rtx.ILogger.ERROR, "no kernel image is available")
            return None
        told = lambda _: os.environ.get("INSPECTED", json.dumps(INSPECTED))  # noqa: E731
        inspector = types.SimpleNamespace(get_engine_information=told)
        return types.SimpleNamespace(create_engine_inspector=lambda: inspector)


def main() -> None:
    trt = types.ModuleType("tensorrt")
    trt.__dict__.update({name: getattr(rtx, name) for name in dir(rtx) if name[0] != "_"})
    trt.__version__ = "10.3.0"  # type: ignore[attr-defined]
    trt.Builder, trt.Runtime = Builder, Runtime  # type: ignore[attr-defined]
    sys.modules["tensorrt"] = trt
    sys.path.insert(0, str(Path(sys.argv[1]).parent))
    sys.argv = sys.argv[1:]
    from run_engine import start
    from runtime.engine import libcuda

    cuda = Cuda()
    cuda.sms = int(os.environ.get("SMS", "8"))
    libcuda.ctypes = FakeCtypes(cuda)  # type: ignore[assignment]
    start("build_engine", "run_build")


if __name__ == "__main__":
    main()
