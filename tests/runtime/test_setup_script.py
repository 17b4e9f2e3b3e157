"""jetson/setup.sh with stand-ins for everything that it calls, so that it runs as on a Jetson."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "jetson" / "setup.sh"
NVCC = Path("/usr/local/cuda/bin/nvcc")
LIBRARY = "build/libssdi8_plugins.so"
# What the script needs of any Linux. Nothing else is on its PATH.
SYSTEM = (
    *("bash", "dirname", "sort", "head", "sed", "awk", "nproc", "mkdir", "cp", "touch", "cat"),
    *("basename", "rm"),
)
SERVER = "starlette uvicorn prometheus_client llguidance"

DPKG = """#!/bin/bash
[[ "$*" == *nvidia-l4t-core ]] && printf 36.4.3-20250107174145
"""
# Knows the modules that lie as files beside it, and makes a copy of itself for a `venv`.
PYTHON = """#!/bin/bash
echo "$(basename "$0") $*" >>"$CALLS"
modules=$(dirname "$0")/modules
case "$*" in
    *"import sys"* | *"import ensurepip"*) exit 0 ;;
    *"import tensorrt"*) [[ -f $modules/tensorrt ]] && cat "$modules/tensorrt" ;;
    "-m venv"*)
        mkdir -p "${@: -1}/bin/modules"
        cp "$0" "${@: -1}/bin/python"
        [[ ! -f $modules/numpy ]] || touch "${@: -1}/bin/modules/numpy"
        ;;
    *"import jinja2"*) [[ -f $modules/jinja2 ]] && cat "$modules/jinja2" ;;
    "-m pip --version") ;;
    "-m pip install"*)
        [[ ! -f $modules/offline ]] || { echo "no network" >&2; exit 1; }
        [[ " $* " != *" jinja2>=3.1.6 "* ]] || echo 3.1.10 >"$modules/jinja2"
        for package in pycuda tokenizers numpy onnxruntime $SERVER; do
            [[ " $* " != *" $package "* ]] || touch "$modules/$package"
        done
        ;;
    "-c import "*)
        module=${2#import }
        [[ -f $modules/${module%%.*} ]]
        ;;
    *) exit 99 ;;
esac
"""
CMAKE = """#!/bin/bash
echo "cmake $*" >>"$CALLS"
case "$*" in
    --version) echo "cmake version 3.22.1" ;;
    -S*) mkdir -p "$4" ;;
    --build*)
        [[ ! -f $(dirname "$0")/broken ]] || { echo "error: NvInfer.h"; exit 2; }
        touch "$2/lib$4.so"
        ;;
esac
"""


class Jetson:
    """A bundle folder, a PATH, and a record of what was called."""

    def __init__(self, root: Path) -> None:
        self.bundle = root / "a bundle"
        self.bundle.mkdir()
        shutil.copyfile(SCRIPT, self.bundle / "setup.sh")
        self.bin = root / "bin"
        (self.bin / "modules").mkdir(parents=True)
        (self.bin / "modules" / "tensorrt").write_text("10.3.0\n")
        (self.bin / "modules" / "numpy").touch()
        for name in SYSTEM:
            found = shutil.which(name)
            assert found, f"{name} is not installed"
            (self.bin / name).symlink_to(found)
        for name, text in {
            "dpkg-query": DPKG,
            "python3": PYTHON,
            "cmake": CMAKE,
            "nvcc": "#!/bin/bash\n",
            "c++": "#!/bin/bash\n",
        }.items():
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)
        self.record = root / "calls"

    def run(self, *arguments: str, shell: str = "bash") -> subprocess.CompletedProcess[str]:
        self.record.write_text("")
        return subprocess.run(
            [str(self.bin / shell), str(self.bundle / "setup.sh"), *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={"PATH": str(self.bin), "CALLS": str(self.record), "SERVER": SERVER},
        )

    def calls(self, word: str) -> list[str]:
        return [line for line in self.record.read_text().splitlines() if word in line]

    def made(self) -> set[str]:
        """What lies in the bundle besides the script."""
        return {path.name for path in self.bundle.iterdir()} - {"setup.sh"}


@pytest.fixture
def jetson(tmp_path: Path) -> Jetson:
    return Jetson(tmp_path)


def test_a_bundle_with_a_chat_template_gets_jinja2(jetson: Jetson) -> None:
    """Also where the system has an older one, which pip would leave there."""
    (jetson.bundle / "chat.json").touch()
    assert jetson.run().returncode == 0
    (installed,) = jetson.calls("pip install")
    assert installed.endswith("pycuda tokenizers jinja2>=3.1.6")
    (jetson.bundle / ".venv" / "bin" / "modules" / "jinja2").write_text("3.0.3\n")
    assert jetson.run().returncode == 0
    (installed,) = jetson.calls("pip install")
    assert installed.endswith("--quiet jinja2>=3.1.6")
    assert jetson.run().returncode == 0 and not jetson.calls("pip install")


def test_a_fresh_board_becomes_ready(jetson: Jetson) -> None:
    """The environment sees the system's packages; only what it lacks is installed."""
    done = jetson.run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("ready: ") and done.stderr == ""
    for word in ("Jetson Linux 36.4.3", "TensorRT 10.3.0", "CMake 3.22.1"):
        assert word in done.stdout
    assert jetson.made() == {".venv", "build", "setup.log"}
    assert (jetson.bundle / LIBRARY).is_file()
    (venv,) = jetson.calls("-m venv")
    assert "--system-site-packages" in venv
    (pip,) = jetson.calls("pip install")
    assert pip.endswith(" pycuda tokenizers") and "--no-cache-dir" in pip
    configure, build = jetson.calls("cmake -S")[0], jetson.calls("cmake --build")[0]
    assert "-DCMAKE_CUDA_ARCHITECTURES=87-real" in configure
    assert f"-DCMAKE_CUDA_COMPILER={jetson.bin / 'nvcc'}" in configure
    assert "--target ssdi8_plugins --parallel" in build


def test_a_second_run_installs_nothing(jetson: Jetson) -> None:
    assert jetson.run().returncode == 0
    assert jetson.run().returncode == 0
    assert jetson.calls("-m venv") == [] and jetson.calls("pip install") == []
    assert len(jetson.calls("cmake --build")) == 1  # which finds by itself that nothing is to do


def test_a_server_needs_more_packages(jetson: Jetson) -> None:
    """Only what is missing is installed, also on a board that is ready but for them."""
    assert jetson.run().returncode == 0
    done = jetson.run("--check", "--serve")
    assert done.returncode == 2 and f"missing  {SERVER} in" in done.stdout
    assert jetson.run("--serve").returncode == 0
    (pip,) = jetson.calls("pip install")
    assert pip.endswith(f" --quiet {SERVER}")
    assert jetson.run("--serve", "--check").returncode == 0


def test_a_server_on_a_cpu_needs_no_jetpack(jetson: Jetson) -> None:
    (jetson.bundle / "manifest.json").write_text('{"target": {"engines": ["onnxruntime"]}}')
    for program in ("cmake", "nvcc", "c++", "dpkg-query"):
        (jetson.bin / program).unlink()
    (jetson.bin / "modules" / "tensorrt").unlink()
    done = jetson.run("--serve")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("run_engine.py --serve")
    assert jetson.made() == {"manifest.json", ".venv"}
    (pip,) = jetson.calls("pip install")
    assert pip.endswith(f" onnxruntime tokenizers {SERVER}")


def test_check_changes_nothing(jetson: Jetson) -> None:
    """Before: what is missing and who brings it. After: all is well."""
    before = jetson.run("--check")
    assert before.returncode == 2 and jetson.made() == set()
    assert "pycuda tokenizers in" in before.stdout and "libssdi8_plugins.so: run" in before.stdout
    assert jetson.calls("-m venv") == [] and jetson.calls("cmake -S") == []
    assert jetson.run().returncode == 0
    after = jetson.run("--check")
    assert after.returncode == 0 and "missing" not in after.stdout + after.stderr
    assert jetson.calls("cmake -S") == []


@pytest.mark.parametrize(
    ("tool", "words"),
    [
        ("cmake", "CMake 3.22 or newer: sudo apt install cmake"),
        ("c++", "C++ compiler: sudo apt install g++"),
        ("nvcc", "CUDA compiler: sudo apt install nvidia-jetpack"),
        ("python3", "Python 3.10 or newer: install JetPack 6.2"),
        ("modules/tensorrt", "TensorRT 10.3 or newer for python3: sudo apt install nvidia-jetpack"),
    ],
)
def test_what_is_missing_is_named_with_its_remedy(jetson: Jetson, tool: str, words: str) -> None:
    """And nothing is made."""
    (jetson.bin / tool).unlink()
    done = jetson.run()
    if tool == "nvcc" and NVCC.exists():  # where JetPack puts it, off the PATH
        assert f"-DCMAKE_CUDA_COMPILER={NVCC}" in jetson.calls("cmake -S")[0]
        return
    assert done.returncode == 2
    assert f"missing  {words}" in done.stdout
    assert done.stderr == "setup: 1 thing(s) missing, named above.\n"
    assert jetson.made() == set()


@pytest.mark.parametrize(
    ("release", "words"),
    [("35.4.1-2023", "Jetson Linux 35.4.1 is older"), ("36.3.0-2024", "36.3.0 is older than 36.4")],
)
def test_old_jetpack_is_refused(jetson: Jetson, release: str, words: str) -> None:
    (jetson.bin / "dpkg-query").write_text(f"#!/bin/bash\nprintf {release}\n")
    (jetson.bin / "modules" / "tensorrt").write_text("8.5.2.2\n")
    done = jetson.run()
    assert done.returncode == 2 and words in done.stdout
    assert "for python3 (this is 8.5.2.2)" in done.stdout and "2 thing(s)" in done.stderr


def test_another_machine_compiles_for_its_own_gpu(jetson: Jetson) -> None:
    (jetson.bin / "dpkg-query").write_text("#!/bin/bash\nexit 1\n")
    done = jetson.run()
    assert done.returncode == 0 and "this is no Jetson" in done.stdout
    assert "-DCMAKE_CUDA_ARCHITECTURES=native" in jetson.calls("cmake -S")[0]


def test_another_machine_is_not_sent_to_jetpack(jetson: Jetson) -> None:
    """What is missing there does not come with a package for Jetsons."""
    (jetson.bin / "dpkg-query").write_text("#!/bin/bash\nexit 1\n")
    (jetson.bin / "modules" / "tensorrt").unlink()
    done = jetson.run()
    assert done.returncode == 2 and "install NVIDIA's TensorRT" in done.stdout
    (jetson.bin / "python3").unlink()
    assert "Python 3.10 or newer: install it as python3" in jetson.run().stdout
    assert "jetpack" not in done.stdout.lower() and jetson.made() == set()


@pytest.mark.parametrize("arguments", [(), ("--check",)])
def test_a_bundle_for_a_cpu_needs_no_plugins(jetson: Jetson, arguments: tuple[str, ...]) -> None:
    """One sentence with what to do instead, whatever is installed; nothing is made."""
    (jetson.bundle / "manifest.json").write_text(
        json.dumps({"target": {"name": "host-cpu", "engines": ["onnxruntime"]}}, indent=2)
    )
    done = jetson.run(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(
        "setup: this bundle is for a CPU"
    )
    assert "onnxruntime" in done.stderr and "run_engine.py" in done.stderr
    assert jetson.made() == {"manifest.json"} and jetson.calls("") == []


def test_kernels_need_no_tensorrt(jetson: Jetson) -> None:
    """A bundle that they can run: neither TensorRT nor pycuda is asked for."""
    (jetson.bin / "modules" / "tensorrt").unlink()
    target = {"target": {"engines": ["tensorrt", "kernels"]}}
    (jetson.bundle / "manifest.json").write_text(json.dumps(target, indent=2))
    (jetson.bundle / "plugins").mkdir()
    done = jetson.run()
    assert done.returncode == 0 and "our kernels run the bundle without it" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("run_engine.py --verify")
    assert "--target ssdi8_kernels --parallel" in jetson.calls("cmake --build")[0]
    assert (jetson.bundle / "build/libssdi8_kernels.so").is_file()
    (pip,) = jetson.calls("pip install")
    assert pip.endswith(" tokenizers") and "pycuda" not in pip
    assert jetson.run("--check").returncode == 0
    (jetson.bin / "modules" / "tensorrt").write_text("10.3.0\n")
    assert jetson.run().returncode == 0  # both
    assert (jetson.bundle / LIBRARY).is_file()


def test_a_bundle_without_its_plugins(jetson: Jetson) -> None:
    (jetson.bundle / "manifest.json").write_text('{"target": {"engines": ["tensorrt"]}}')
    done = jetson.run()
    assert done.returncode == 2 and "copy the whole bundle" in done.stderr
    (jetson.bundle / "plugins").mkdir()
    assert jetson.run().returncode == 0


def test_sh_goes_on_as_bash(jetson: Jetson) -> None:
    """`sh setup.sh`, where sh is dash, or bash itself."""
    (jetson.bin / "sh").symlink_to("bash")
    assert jetson.run(shell="sh").returncode == 0
    dash = shutil.which("dash")
    if dash is None:
        pytest.skip("dash is not installed")
    (jetson.bin / "dash").symlink_to(dash)
    done = jetson.run("--check", shell="dash")
    assert done.returncode == 0, done.stderr


def test_a_bundle_that_was_moved_is_built_anew(jetson: Jetson) -> None:
    """CMake refuses a build folder that was made for another place."""
    assert jetson.run().returncode == 0
    cache = jetson.bundle / "build/CMakeCache.txt"
    cache.write_text("CMAKE_HOME_DIRECTORY:INTERNAL=/elsewhere/plugins\n")
    assert jetson.run().returncode == 0 and not cache.exists()
    cache.write_text(f"CMAKE_HOME_DIRECTORY:INTERNAL={jetson.bundle}/plugins\n")
    assert jetson.run().returncode == 0 and cache.exists()


def test_plugins_that_do_not_compile(jetson: Jetson) -> None:
    """The log is named; the environment is kept, and the next run finishes."""
    (jetson.bin / "broken").touch()
    done = jetson.run()
    assert done.returncode == 1 and "the plugins do not build; see" in done.stderr
    assert "error: NvInfer.h" in (jetson.bundle / "setup.log").read_text()
    (jetson.bin / "broken").unlink()
    assert jetson.run().returncode == 0
    assert jetson.calls("pip install") == []


def test_pip_without_a_network(jetson: Jetson) -> None:
    (jetson.bin / "modules" / "numpy").unlink()
    assert jetson.run().returncode == 0
    assert jetson.calls("pip install")[0].endswith(" numpy pycuda tokenizers")
    shutil.rmtree(jetson.bundle / ".venv")
    (jetson.bundle / ".venv" / "bin" / "modules").mkdir(parents=True)
    shutil.copy(jetson.bin / "python3", jetson.bundle / ".venv" / "bin" / "python")
    (jetson.bundle / ".venv" / "bin" / "modules" / "offline").touch()
    done = jetson.run()
    assert done.returncode == 1
    assert "no network" in done.stderr and "pip could not install numpy pycuda" in done.stderr


def test_unknown_option(jetson: Jetson) -> None:
    done = jetson.run("--bogus")
    assert done.returncode == 2 and done.stderr.startswith("setup: unknown option --bogus")
    assert "setup.sh --check" in jetson.run("--help").stdout


def test_shellcheck() -> None:
    program = shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([program, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
