"""What stands between a board and running bundles, and the profile that fits it. Reads only."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from runtime.engine.tensorrt_api import OLDEST_TENSORRT
from ssdi8_edge.boards.facts.board_facts import MODULE_SMS, BoardFacts
from ssdi8_edge.boards.facts.interpreter import venv_remedy
from ssdi8_edge.boards.link.connection import Connection
from ssdi8_edge.ground.errors import BoardError
from ssdi8_edge.targets import load_target, target_names

OLDEST_L4T = (36, 4)
OLDEST_PYTHON = (3, 10)
LITTLE_DISK_MB = 4000.0
MEMORY_GB = (4, 8, 16, 32, 64)
GIB = 2**30 / 1e9  # in GB
CONTEXT_PER_GB, LEAST_CONTEXT, MOST_CONTEXT = 512, 4096, 16384  # tokens
JETPACK = "sudo apt install nvidia-jetpack"
FLASH = "flash JetPack 6.2 or 7.2 with NVIDIA's SDK Manager"


@dataclass(frozen=True)
class Finding:
    """Something that is missing or in the way.

    Attributes:
        needed_for: `everything`, `kernels` (compiling them, which TensorRT's plugins need, too),
            `tensorrt` (engines), `onnxruntime` (host-cpu bundles) or `measuring`.
    """

    what: str
    remedy: str
    needed_for: str


def examine(facts: BoardFacts, connection: Connection) -> list[Finding]:
    """What to install or change, most important first."""
    findings = _everywhere(facts, connection)
    if facts.is_jetson:
        findings += [*_tensorrt(facts), *_compilers(facts), *_measuring(facts)]
    return findings


def engine_for(engines: Sequence[str], facts: BoardFacts, connection: Connection) -> str:
    """Which of a bundle's engines can be built there, before it is brought: the first.

    Raises:
        BoardError: none can; says what the first is missing first.
    """
    refused = None
    for engine in engines:
        try:
            if engine == "tensorrt":
                _check_for_tensorrt(facts, connection)
            elif engine == "kernels":
                _require(_compilers(facts), "compile our kernels", connection)
            return engine
        except BoardError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def _check_for_tensorrt(facts: BoardFacts, connection: Connection) -> None:
    if not facts.is_jetson and "tensorrt" not in facts.system_python.modules:
        raise BoardError(
            f"{connection.name} is no Jetson and has no TensorRT: engines cannot be built there;",
            "deploy a bundle that was built with --target host-cpu.",
        )
    needed = ("tensorrt", "kernels")
    found = [each for each in examine(facts, connection) if each.needed_for in needed]
    _require(found, "build engines", connection)


def _require(found: Sequence[Finding], what: str, connection: Connection) -> None:
    if found:
        more = f" (and {len(found) - 1} more: ssdi8-edge doctor)" if len(found) > 1 else ""
        raise BoardError(
            f"{connection.name} cannot {what} yet: {found[0].what}{more};",
            f"{found[0].remedy}.",
        )


def _everywhere(facts: BoardFacts, connection: Connection) -> list[Finding]:
    findings = []
    python = facts.python
    if python.version is None:
        remedy = "sudo apt install python3 python3-venv"
        findings.append(Finding(f"{python.path} does not run", remedy, "everything"))
    elif _version(python.version) < OLDEST_PYTHON:
        remedy = "install Python 3.10 or newer and name it by --python"
        findings.append(
            Finding(f"Python {python.version} is older than 3.10", remedy, "everything")
        )
    if facts.disk_free_mb < LITTLE_DISK_MB:
        findings.append(
            Finding(
                f"only {facts.disk_free_mb:.0f} MB of disk are free",
                "ssdi8-edge deploy --prune removes old bundles",
                "everything",
            )
        )
    if python.missing and python.version is not None:
        what = f"{python.path} has no {', '.join(python.missing)}"
        findings.append(Finding(what, venv_remedy(connection.store), "onnxruntime"))
    return findings


def _tensorrt(facts: BoardFacts) -> list[Finding]:
    findings = []

    def missing(what: str, remedy: str) -> None:
        findings.append(Finding(what, remedy, "tensorrt"))

    if _version(facts.l4t or "") < OLDEST_L4T:
        missing(f"L4T {facts.l4t} is older than JetPack 6.1 (TensorRT 8)", FLASH)
    if facts.tensorrt is None:
        missing("TensorRT is not installed", JETPACK)
    elif _version(facts.tensorrt) < OLDEST_TENSORRT:
        missing(f"TensorRT {facts.tensorrt} is older than 10.3", FLASH)
    elif not facts.tensorrt_headers:
        missing("TensorRT's headers are not installed", "sudo apt install libnvinfer-dev")
    if "tensorrt" not in facts.system_python.modules:
        missing(
            "python3 has no tensorrt module", "sudo apt install python3-libnvinfer (never by pip)"
        )
    return findings


def _compilers(facts: BoardFacts) -> list[Finding]:
    findings = []
    if not facts.nvcc:
        what = "CUDA's compiler is not at /usr/local/cuda/bin/nvcc"
        findings.append(Finding(what, JETPACK, "kernels"))
    for tool, package in (("cmake", "cmake"), ("g++", "build-essential")):
        if tool not in facts.tools:
            remedy = f"sudo apt install {package}"
            findings.append(Finding(f"{tool} is not installed", remedy, "kernels"))
    return findings


def _measuring(facts: BoardFacts) -> list[Finding]:
    findings = []

    def missing(what: str, remedy: str) -> None:
        findings.append(Finding(what, remedy, "measuring"))

    for tool in ("nvpmodel", "tegrastats", "jetson_clocks"):
        if tool not in facts.tools:
            missing(f"{tool} is not on PATH", JETPACK)
    if not facts.root:
        missing(
            "sudo asks for a password: power modes and clocks cannot be set",
            "allow nvpmodel and jetson_clocks without one in /etc/sudoers.d",
        )
    if not facts.rails_w:
        missing("no power rails can be read", "energy will be missing from reports")
    return findings


def report(host: str, facts: BoardFacts, findings: list[Finding]) -> dict[str, Any]:
    """Facts and findings, as JSON carries them."""
    lacking = {finding.needed_for for finding in findings}
    return {
        "host": host,
        "simulated": facts.simulated,
        "runs": {
            "tensorrt": facts.is_jetson and not {"everything", "tensorrt", "kernels"} & lacking,
            "kernels": facts.is_jetson and not {"everything", "kernels"} & lacking,
            "onnxruntime": not {"everything", "onnxruntime"} & lacking,
        },
        **{key: value for key, value in asdict(facts).items() if key != "simulated"},
        "findings": [asdict(finding) for finding in findings],
    }


def profile_toml(facts: BoardFacts) -> str:
    """A target file for this board, which `--target FILE.toml` accepts."""
    simulated = " (simulated)" if facts.simulated else ""
    if not facts.is_jetson:
        engine = load_target("host-cpu").engine
        lines = [
            f"name = {_toml(_slug(facts.cpu or facts.machine or 'board'))}",
            f"about = {_toml((facts.cpu or facts.machine or 'unknown machine') + simulated)}",
            'engines = ["onnxruntime"]',
            'where = "board"',
        ]
    else:
        engine = load_target("orin-nx").engine
        lines = [
            f"name = {_toml(_jetson_name(facts))}",
            f"about = {_toml((facts.model or 'Jetson') + simulated)}",
            'engines = ["tensorrt", "kernels"]',
            'where = "board"',
            f"context = {_context(_memory_gb(facts))}",
            "",
            "[board]",
            'compute_capability = "8.7"',
            f"memory_gb = {_memory_gb(facts)}",
            f"sms = {MODULE_SMS.get(facts.part or '') or facts.sms or MODULE_SMS['p3767-0000']}",
            *_planning(facts),
        ]
    lines += [
        "",
        "[engine]",
        f"batch = {engine.batch}",
        f"tokens = {engine.tokens}",
        f"workspace_mb = {engine.workspace_mb}",
    ]
    return "\n".join(lines) + "\n"


def _planning(facts: BoardFacts) -> Iterator[str]:
    """What plans need, as the shipped target of the same module has it; nothing for another."""
    shipped = (load_target(name) for name in target_names())
    about = f"Jetson {_family(facts)} {_memory_gb(facts)} GB"
    board = next((each.board for each in shipped if each.about == about), None)
    for name in ("free_mib", "bandwidth_gb_s", "gpu_mhz", "source"):
        value = getattr(board, name, None)
        if value:
            yield f"{name} = {_toml(value) if isinstance(value, str) else f'{value:g}'}"


def _jetson_name(facts: BoardFacts) -> str:
    return f"{_slug(_family(facts) or facts.model or 'jetson')}-{_memory_gb(facts)}gb"


def _family(facts: BoardFacts) -> str | None:
    found = re.search(r"AGX Orin|Orin NX|Orin Nano", facts.model or "")
    return found[0] if found else None


def _memory_gb(facts: BoardFacts) -> int:
    """What the module was sold with; Linux sees less."""
    visible = (facts.memory_mb or 0) / 1000
    fitting = [size for size in MEMORY_GB if visible <= size * GIB]
    return fitting[0] if fitting else math.ceil(visible)


def _context(memory_gb: int) -> int:
    """Tokens for the caches of a model with attention, as the shipped targets have them."""
    return min(max(memory_gb * CONTEXT_PER_GB, LEAST_CONTEXT), MOST_CONTEXT)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-") or "board"


def _toml(text: str) -> str:
    # JSON's strings are TOML's, as long as nothing outside the basic plane is escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])
