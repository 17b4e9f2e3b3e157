"""TensorRT's Python module from 10.3 to 11.x: import, log, plugins. Names differ between versions
here and nowhere else; numbers of enums differ too, so none is written down."""

from __future__ import annotations

import ctypes
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from runtime.problems import BundleProblem, RunFailure

# JetPack 6.1; earlier ones lack IPluginV3OneBuildV2, which the plugins implement.
OLDEST_TENSORRT = (10, 3)
PLUGIN_LIBRARY = "libssdi8_plugins.so"
PLUGIN_PREFIX = "Ssdi8"


def import_tensorrt() -> ModuleType:
    """The module `tensorrt`.

    Raises:
        BundleProblem: it is absent or too old.
    """
    try:
        import tensorrt
    except ImportError as error:
        raise BundleProblem(
            f"tensorrt cannot be imported ({error})",
            "on a Jetson it comes with JetPack: sudo apt install nvidia-jetpack; make the virtual"
            " environment with setup.sh, so that it sees the system's packages",
        ) from error
    found = re.match(r"(\d+)\.(\d+)", tensorrt.__version__)
    if not found or tuple(int(part) for part in found.groups()) < OLDEST_TENSORRT:
        raise BundleProblem(
            f"TensorRT {tensorrt.__version__} is too old, this needs 10.3 or newer",
            "install JetPack 6.1 or newer",
        )
    return tensorrt


def logger(trt: ModuleType, write: Callable[[str, str], None]) -> Any:
    """A logger that hands (severity, message) to `write`: "ERROR", "WARNING", "INFO".

    TensorRT keeps one logger per process, the first one that it is given.
    """
    names = {
        trt.ILogger.INTERNAL_ERROR: "ERROR",
        trt.ILogger.ERROR: "ERROR",
        trt.ILogger.WARNING: "WARNING",
        trt.ILogger.INFO: "INFO",
    }

    class Log(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in names:
                write(names[severity], message)

    return Log()


class LogLines:
    """Keeps what TensorRT said as an error, for the sentence that the user gets."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def __call__(self, severity: str, message: str) -> None:
        if severity == "ERROR":
            self.errors.append(message)
        if severity in ("ERROR", "WARNING"):
            print(f"TensorRT {severity.lower()}: {message}", file=sys.stderr)

    def last(self) -> str:
        """The last error in brackets, or nothing."""
        return f" ({' '.join(self.errors[-1].split())})" if self.errors else ""


def load_plugins(trt: ModuleType, library: Path) -> None:
    """Register the plugins in `library`.

    Raises:
        BundleProblem: it cannot be loaded, has none of ours, or is for another TensorRT.
    """
    try:
        # The registry below would not say why it cannot be loaded.
        built_for = ctypes.CDLL(str(library)).ssdi8_tensorrt_major()
    except AttributeError as error:
        raise BundleProblem(
            f"{library} is not a plugin library of ours ({error})",
            "build it on this machine with setup.sh, or name another with --plugins",
        ) from error
    except OSError as error:
        raise BundleProblem(
            f"the plugin library {library} cannot be loaded ({error})",
            "build it on this machine: setup.sh",
        ) from error
    version: str = trt.__version__
    if not version.startswith(f"{built_for}."):
        raise BundleProblem(
            f"the plugin library {library} was built for TensorRT {built_for}, this is {version}",
            "build it again on this machine: setup.sh",
        )
    registry = trt.get_plugin_registry()
    # Gives nothing back also where equal creators are there already, so what is there decides.
    registry.load_library(str(library))
    names = [getattr(creator, "name", "") for creator in registry.all_creators]
    if not any(name.startswith(PLUGIN_PREFIX) for name in names):
        raise BundleProblem(
            f"the plugin library {library} registered no plugin of ours",
            "build it again on this machine: setup.sh",
        )


def strongly_typed(trt: ModuleType) -> int:
    """Flags for `create_network`: types are those of the graph. Its bit moved in 11.0."""
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def deserialize(trt: ModuleType, log: Any, plan: Any, what: str, lines: LogLines) -> Any:
    """The engine in the buffer `plan`.

    Raises:
        RunFailure: TensorRT refuses it; `what` names it and `lines` holds the reason.
    """
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise RunFailure(
            f"TensorRT {trt.__version__} does not load {what}{lines.last()}",
            "build it again here: build_engine.py --force",
        )
    return engine


def layer_information(trt: ModuleType, engine: Any) -> dict[str, Any]:
    """{"layers": […], "tensors": […]} as the engine inspector tells it.

    The I/O tensors are called Bindings before TensorRT 11 and I/O Tensors since.
    """
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    try:
        told = json.loads(text)
    except ValueError:
        return {"layers": [], "tensors": [], "unreadable": text}
    if not isinstance(told, Mapping):
        return {"layers": [], "tensors": [], "unreadable": text}
    tensors = told.get("Bindings", told.get("I/O Tensors", []))
    return {"layers": told.get("Layers", []), "tensors": tensors}
