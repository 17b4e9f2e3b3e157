"""Every name of TensorRT's Python module that jetson/ uses exists in the versions it is for.

`data/tensorrt_names.json` holds the public names of the classes concerned as the bindings of PyPI
have them, read by importing them (tensorrt-cu12-bindings 10.3.0, tensorrt-cu13-bindings 10.16.1.11
and 11.4.0.106) with empty libraries in place of libnvinfer, libnvinfer_plugin and libnvonnxparser.
The modules that can be installed here are asked themselves.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_bundle

FILES = (
    *("engine/builder.py", "engine/tensorrt_api.py"),
    *("backends/tensorrt.py", "backends/tensorrt_context.py"),
    "commands/build.py",
)
# What a variable (or an attribute of self) of that name holds in these files.
CLASSES = {
    "trt": "module",
    "_trt": "module",
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "cache": "ITimingCache",
    "tensor": "ITensor",
    "registry": "IPluginRegistry",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "_engine": "ICudaEngine",
    "inspector": "EngineInspector",
    "_context": "IExecutionContext",
}
# Classes that are not named by a variable: what is called on what a call returned.
RETURNED = {
    "get_error": "ParserError",
    "get_timing_cache": "ITimingCache",
}
OURS = {  # variables of those names that hold something of ours
    "builder": {"seconds", "build"},
    "engine": {"log", "path", "check", "key", "stat"},
    "parser": {"add_argument", "parse_args"},
}
BUILD_ONLY = {
    *("Builder", "INetworkDefinition", "OnnxParser", "ParserError", "IBuilderConfig", "ITensor"),
    *("IOptimizationProfile", "ITimingCache", "NetworkDefinitionCreationFlag", "MemoryPoolType"),
    *("BuilderFlag", "TensorFormat", "ProfilingVerbosity", "EngineInspector"),
    *("LayerInformationFormat", "create_engine_inspector"),
}


def used_names() -> set[tuple[str, str]]:
    """(class, name) of each use, the class "module" for names of the module itself."""
    used = set()
    for file in FILES:
        path = tiny_bundle.JETSON / "runtime" / file
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and (owner := _owner(node.value)):
                used.add((owner, node.attr))
    return {
        (owner, name)
        for owner, name in used
        if name != "__init__"
        and not any(CLASSES.get(v) == owner and name in names for v, names in OURS.items())
    }


def _owner(value: ast.expr) -> str | None:
    """The class of what stands before a dot."""
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
        return RETURNED.get(value.func.attr)
    name = value.id if isinstance(value, ast.Name) else getattr(value, "attr", None)
    if not isinstance(name, str):
        return None
    inner = getattr(value, "value", None)
    if isinstance(inner, ast.Name) and CLASSES.get(inner.id) == "module":
        return name  # an enum: trt.MemoryPoolType.WORKSPACE
    if isinstance(inner, ast.Attribute) and CLASSES.get(inner.attr) == "module":
        return name
    if isinstance(inner, ast.Name) and inner.id != "self":
        return None
    return CLASSES.get(name)


USED = used_names()


def test_the_uses_are_found() -> None:
    """Some of each kind, so that the tests below cannot pass for want of names."""
    assert {
        ("module", "Builder"),
        ("module", "get_plugin_registry"),
        ("ILogger", "WARNING"),
        ("MemoryPoolType", "WORKSPACE"),
        ("Builder", "build_serialized_network"),
        ("IBuilderConfig", "profiling_verbosity"),
        ("ITensor", "allowed_formats"),
        ("ParserError", "desc"),
        ("ITimingCache", "serialize"),
        ("Runtime", "deserialize_cuda_engine"),
        ("ICudaEngine", "device_memory_size_v2"),
        ("EngineInspector", "get_engine_information"),
        ("IExecutionContext", "execute_async_v3"),
        ("IExecutionContext", "enqueue_emits_profile"),
        ("IPluginRegistry", "all_creators"),
    } <= USED
    assert len(USED) > 50


RECORDED: dict[str, dict[str, str]] = json.loads(
    (Path(__file__).parents[1] / "data" / "tensorrt_names.json").read_text()
)


@pytest.mark.parametrize("version", RECORDED)
def test_names_exist_in_recorded_bindings(version: str) -> None:
    """JetPack 6.2 has 10.3, JetPack 7.2 has 10.16; 11 is the newest."""
    recorded = {owner: set(names.split()) for owner, names in RECORDED[version].items()}
    recorded["module"] = {*recorded, *recorded["functions"], "__version__"} - {"functions"}
    missing = [(o, n) for o, n in sorted(USED) if n not in recorded.get(o, set())]
    assert missing == []


@pytest.mark.parametrize(
    ("name", "package", "builds"),
    [
        ("tensorrt_rtx", "tensorrt-rtx-cu13", True),
        ("tensorrt_lean", "tensorrt-lean-cu13", False),
    ],
)
def test_names_exist_in_a_real_module(name: str, package: str, builds: bool) -> None:
    """The lean runtime runs engines and does not build them, so it lacks what building needs."""
    module: Any = pytest.importorskip(name, reason=f"not installed: pip install {package}")
    for owner, attribute in sorted(USED):
        if builds or not {owner, attribute} & BUILD_ONLY:
            holder = module if owner == "module" else getattr(module, owner)
            assert hasattr(holder, attribute), f"{name}: {owner}.{attribute}"
