"""The wheel: it carries what a bundle needs, and nothing of the machine that built it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ssdi8_edge import __version__

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """Built here without a network: build isolation would fetch the build backend."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling, which builds the wheel, is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--disable-pip-version-check", "--wheel-dir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    assert path.name == f"ssdi8_edge-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(path) as file:
        yield file


def test_wheel_carries_what_a_bundle_needs(wheel: zipfile.ZipFile) -> None:
    """Board runtime, plugin sources and target files, file by file as in the source tree."""
    names = set(wheel.namelist())
    for folder in ("jetson", "plugins", "profiles"):
        sources = {
            f"ssdi8_edge/share/{folder}/{path.relative_to(ROOT / folder).as_posix()}"
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and not {"__pycache__", "build"} & set(path.parts)
        }
        assert sources and sources <= names


def test_wheel_carries_the_package_and_the_demo_model(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ssdi8_edge").rglob("*.py")}
    assert modules <= names
    demo = ("config.json", "model.safetensors", "tokenizer.json", "calibration.txt")
    for name in (*demo, "evaluation.txt", "README.md"):
        data = wheel.read(f"ssdi8_edge/demo/{name}")
        assert data == (ROOT / "ssdi8_edge" / "demo" / name).read_bytes()


def test_installed_package_finds_the_runtime_that_it_carries(
    wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    """And no other package of that name."""
    wheel.extractall(tmp_path)
    code = "import ssdi8_edge.ground.board_runtime as host, runtime; print(runtime.__file__)"
    other = tmp_path / "other" / "runtime"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("raise ImportError")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{other.parent}"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    expected = tmp_path / "ssdi8_edge" / "share" / "jetson" / "runtime" / "__init__.py"
    assert Path(done.stdout.strip()) == expected


def test_wheel_carries_nothing_else(wheel: zipfile.ZipFile) -> None:
    """No caches, tests, runs or build outputs, and the licence with its notice."""
    info = f"ssdi8_edge-{__version__}.dist-info/"
    for name in wheel.namelist():
        assert name.startswith(("ssdi8_edge/", info)), name
        assert "__pycache__" not in name and not name.endswith((".pyc", ".so", ".o")), name
    licences = [name for name in wheel.namelist() if name.startswith(f"{info}licenses/")]
    assert {Path(name).name for name in licences} >= {"LICENSE", "NOTICE"}


def test_no_path_of_this_machine_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    """Names and contents."""
    private = {str(ROOT).encode(), sys.prefix.encode()}
    for name in wheel.namelist():
        assert not name.startswith("/") and ".." not in name
        data = wheel.read(name)
        for path in private:
            assert path not in data, f"{name} holds {path.decode()}"


def test_no_path_of_this_machine_in_the_sources() -> None:
    """What is written by hand travels too."""
    for folder in ("ssdi8_edge", "jetson", "plugins", "profiles", "tests", "tools", "docs"):
        for path in (ROOT / folder).rglob("*"):
            if "build" in path.parts:
                continue
            if path.suffix in {".py", ".md", ".toml", ".cu", ".cuh", ".h", ".txt", ".json"}:
                assert str(ROOT).encode() not in path.read_bytes(), path
