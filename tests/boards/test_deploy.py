"""deploy, as its user sees it: a bundle that is brought, built, verified, and found again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from board_simulator.lab import PATH, Lab, needs_sshd
from board_simulator.server import free_port
from tiny_bundle import MAX_TOKENS, SHAPES, make_bundle, pack
from tiny_model import TEXT_BYTES, write_model

from ssdi8_edge.boards.facts.interpreter import find_interpreter
from ssdi8_edge.boards.link.connection import Connection
from ssdi8_edge.boards.store.deploy import Deployed, deploy
from ssdi8_edge.cli import main
from ssdi8_edge.ground.errors import BoardBusy, BoardError, BundleError

pytestmark = needs_sshd

# Stand-ins for what needs a GPU, in the words of the real ones.
FAKE_SETUP = f"""
mkdir -p .venv/bin
printf '#!/bin/sh\\nexec {sys.executable} "$@"\\n' > .venv/bin/python
chmod +x .venv/bin/python
echo ready
"""
FAKE_BUILD = """
import json, os, sys, time
from pathlib import Path
here = Path(__file__).parent
Path(sys.argv[sys.argv.index("--timing-cache") + 1]).write_bytes(b"timings")
engine = here / "engine/0123/model.engine"
built = not engine.exists()
if built:
    with (here / "started").open("a") as file:
        file.write("x")
    for step in range(int((here / "steps").read_text())):
        print("step", step, flush=True)
        time.sleep(0.02)
    if (here / "fails").exists():
        print("build_engine: TensorRT could not build it; see build.txt.", file=sys.stderr)
        sys.exit(1)
    engine.parent.mkdir(parents=True)
    (engine.parent / "build_log.json").write_text("{}")
    (here / "engine/build.txt").write_text("said")
    engine.with_name("new").write_bytes(b"engine" * 1000)
    os.rename(engine.with_name("new"), engine)
import hashlib
sha256 = hashlib.sha256(engine.read_bytes()).hexdigest()
print(json.dumps({"built": built, "path": str(engine), "engine": {"sha256": sha256}}, indent=2))
"""
FAKE_RUN = """
import json
print(json.dumps(dict(verified=True, problem=None, backend="fake TensorRT", comparisons=[1])))
"""


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    lab = Lab(tmp_path, monkeypatch)
    lab.serve("board", environment=with_tensorrt(tmp_path))
    yield lab
    lab.close()


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("portable") / "bundle")


@pytest.fixture
def run_folder(portable: Path, tmp_path: Path) -> Path:
    shutil.copytree(portable, tmp_path / "run/bundle")
    return tmp_path / "run"


@pytest.fixture
def engine_run(portable: Path, tmp_path: Path) -> Path:
    """A run folder whose bundle is for TensorRT, with stand-ins for what needs a GPU."""
    bundle = tmp_path / "run/bundle"
    shutil.copytree(portable, bundle)
    (bundle / "setup.sh").write_text(FAKE_SETUP)
    (bundle / "build_engine.py").write_text(FAKE_BUILD)
    (bundle / "run_engine.py").write_text(FAKE_RUN)
    pack_for_tensorrt(bundle, steps=5)
    return tmp_path / "run"


def with_tensorrt(folder: Path) -> dict[str, str]:
    """Of a board whose python3 seems to have TensorRT."""
    (folder / "modules").mkdir()
    (folder / "modules/tensorrt.py").write_text("")
    return {"PYTHONPATH": str(folder / "modules")}


def pack_for_tensorrt(bundle: Path, steps: int) -> None:
    (bundle / "steps").write_text(str(steps))
    common = {"name": "orin-nx", "engines": ["tensorrt"], "where": "board"}
    pack(bundle, target={**common, "max_tokens": MAX_TOKENS, "engine": SHAPES})


def brought(connection: Connection, folder: Path, **options: Any) -> tuple[Deployed, list[str]]:
    said: list[str] = []
    return deploy(connection, folder, say=said.append, **options), said


def cli(*arguments: object, exit_code: int = 0) -> subprocess.CompletedProcess[str]:
    code = "from ssdi8_edge.cli import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == exit_code, done.stderr
    assert "Traceback" not in done.stderr
    return done


# --------------------------------------------------------------------------------------------------
# the portable graph


def test_deploy_brings_verifies_and_is_found_again(lab: Lab, run_folder: Path) -> None:
    options = ("--host", "board", "--store", lab.store("board"), "--python", sys.executable)
    first = cli("deploy", run_folder, *options, "--json")
    result = json.loads(first.stdout)
    assert result["sent"] > 5 and result["verification"]["verified"] is True
    assert "sent" in first.stderr and "verified on board with onnxruntime" in first.stderr
    kept = json.loads((run_folder / "boards/board/verification.json").read_text())
    assert kept == result["verification"]
    ran = subprocess.run(
        [result["python"], f"{result['folder']}/run_engine.py", "--prompt", "the", "--json"],
        capture_output=True,
        text=True,
    )
    assert json.loads(ran.stdout)["text"]

    second = cli("deploy", run_folder, *options, "--json")
    assert json.loads(second.stdout)["sent_bytes"] == 0
    assert "board has all files" in second.stderr
    third = cli("deploy", *options, "--prune")
    assert "removed 1 bundles from board" in third.stderr
    assert not list((lab.store("board") / "bundles").iterdir())


def test_a_bundle_that_computes_something_else_does_not_pass(lab: Lab, run_folder: Path) -> None:
    """The board's verdict is the command's: exit code 1, and a report of what differed."""
    import numpy as np

    path = run_folder / "bundle/golden.npz"
    with np.load(path) as arrays:
        golden = dict(arrays)
    golden["logits"] = golden["logits"] * 1.5
    np.savez(path, **golden)
    pack(run_folder / "bundle")
    options = ("--host", "board", "--store", lab.store("board"), "--python", sys.executable)
    done = cli("deploy", run_folder, *options, exit_code=1)
    last = done.stderr.strip().splitlines()[-1]
    assert "does not pass --verify on board: logits is the first" in last
    report = json.loads((run_folder / "boards/board/verification.json").read_text())
    assert report["verified"] is False and report["comparisons"]


def test_what_was_altered_on_the_board_is_mended(lab: Lab, run_folder: Path) -> None:
    connection = lab.connect("board")
    connection.python = sys.executable
    placed, _ = brought(connection, run_folder)
    for name in ("weights.bin", "manifest.json"):
        path = Path(placed.folder) / name
        os.chmod(path, 0o644)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        again, said = brought(connection, run_folder)
        assert again.verification is not None and again.verification["verified"] is True
        assert any("sent 1 files anew" in line for line in said)


def test_a_bundle_that_is_not_whole_never_leaves(lab: Lab, run_folder: Path) -> None:
    (run_folder / "bundle/golden.npz").write_bytes(b"")
    with pytest.raises(BundleError, match=r"golden\.npz has 0 bytes"):
        deploy(lab.connect("board"), run_folder)
    assert not lab.store("board").exists()
    done = cli("deploy", run_folder / "nothing", "--host", "board", exit_code=2)
    assert "is not a bundle" in done.stderr
    cli("deploy", "--host", "board", exit_code=2)


def test_a_python_without_what_is_needed(lab: Lab, run_folder: Path, tmp_path: Path) -> None:
    """Says how to make an environment in the store; the one that is there is taken."""
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    path = f"{bare}/bin:{PATH}"
    lab.serve("other", environment={"PATH": path})
    connection = lab.connect("other")
    with pytest.raises(BoardError, match=r"python3 on other has no numpy, onnxruntime, tokenizers"):
        deploy(connection, run_folder)
    python = Path(connection.store) / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    placed, _ = brought(connection, run_folder)
    assert placed.python == str(python)
    connection.python = "/no/such/python"
    with pytest.raises(BoardError, match="/no/such/python on other does not run"):
        find_interpreter(connection)


# --------------------------------------------------------------------------------------------------
# engines


def test_an_engine_is_built_there_fetched_and_kept(lab: Lab, engine_run: Path) -> None:
    connection, lines = lab.connect("board"), []
    placed, said = brought(connection, engine_run, on_line=lines.append)
    assert [line for line in lines if line.startswith("step")] == [f"step {i}" for i in range(5)]
    assert placed.engine is not None and placed.engine["built"] is True
    assert placed.python == f"{placed.folder}/.venv/bin/python"
    results = Path(placed.results)
    assert (results / "model.engine").read_bytes() == b"engine" * 1000
    assert (results / "timing.cache").read_bytes() == b"timings"
    assert (results / "build.txt").read_text() == "said"
    assert "step 4" in (results / "build.log").read_text()
    assert any("engine built on board" in line for line in said)
    before = (results / "model.engine").stat().st_ino
    again, said = brought(connection, engine_run)
    assert again.sent == 0 and again.engine is not None and again.engine["built"] is False
    assert any("engine found up to date on board" in line for line in said)
    assert (results / "model.engine").stat().st_ino == before


def test_a_build_that_fails_says_why_and_where_its_log_is(lab: Lab, engine_run: Path) -> None:
    connection = lab.connect("board")
    (engine_run / "bundle/fails").touch()
    pack_for_tensorrt(engine_run / "bundle", steps=1)
    with pytest.raises(BoardError, match=r"could not be built on board: .*build_engine: TensorRT"):
        deploy(connection, engine_run)
    assert "step 0" in (engine_run / "boards/board/build.log").read_text()
    (engine_run / "bundle/build_engine.py").write_text("print('{')")
    pack_for_tensorrt(engine_run / "bundle", steps=1)
    with pytest.raises(BoardError, match="said nothing readable"):
        deploy(connection, engine_run)


def test_a_board_that_cannot_build_is_told_before_anything_travels(
    lab: Lab, engine_run: Path
) -> None:
    """No Jetson, no JetPack, an old TensorRT: one sentence each, exit code 3."""
    lab.serve("pc")
    with pytest.raises(BoardError, match="pc is no Jetson and has no TensorRT") as caught:
        deploy(lab.connect("pc"), engine_run)
    assert caught.value.exit_code == 3
    lab.simulate("orin")
    root = lab.folder / "orin/root"
    libraries = root / "usr/lib/aarch64-linux-gnu"
    with pytest.raises(BoardError, match="orin cannot build engines yet: python3 has no tensorrt"):
        deploy(lab.connect("orin"), engine_run)
    for library in libraries.iterdir():
        library.unlink()
    (libraries / "libnvinfer.so.8.6.2").touch()
    with pytest.raises(BoardError, match=r"TensorRT 8\.6\.2 is older than 10\.3 \(and 1 more"):
        deploy(lab.connect("orin"), engine_run)
    release = root / "etc/nv_tegra_release"
    release.write_text(release.read_text().replace("R36", "R35"))
    with pytest.raises(BoardError, match=r"L4T 35\.4\.3 is older than JetPack 6\.1"):
        deploy(lab.connect("orin"), engine_run)
    assert not lab.store("orin").exists() and not lab.store("pc").exists()


def test_kernels_run_where_tensorrt_is_missing(lab: Lab, engine_run: Path) -> None:
    """setup.sh alone prepares the board; no engine is built, and the result is judged."""
    lab.simulate("orin")  # has CUDA's compiler, and no tensorrt module
    bundle = engine_run / "bundle"
    target = {"name": "orin-nx", "engines": ["tensorrt", "kernels"], "where": "board"}
    pack(bundle, target={**target, "max_tokens": MAX_TOKENS, "engine": SHAPES})
    deployed, said = brought(lab.connect("orin"), engine_run)
    assert deployed.engine is None and deployed.python.endswith("/.venv/bin/python")
    assert deployed.verification is not None and deployed.verification["verified"]
    assert not any("engine" in line for line in said)
    assert not list((engine_run / "boards").rglob("model.engine"))


def test_what_setup_misses_is_said(lab: Lab, engine_run: Path) -> None:
    text = "echo 'ok       CUDA'; echo 'missing  CMake: sudo apt install cmake'; exit 2"
    (engine_run / "bundle/setup.sh").write_text(text)
    pack_for_tensorrt(engine_run / "bundle", steps=1)
    with pytest.raises(BoardError, match="on board: missing CMake: sudo apt install cmake"):
        deploy(lab.connect("board"), engine_run)


def test_a_lost_link_does_not_end_the_build(lab: Lab, engine_run: Path) -> None:
    """Cut up to three times; the log has every line once, and the build ran once."""
    server = lab.serve("shaky", environment={"PYTHONPATH": str(lab.folder / "modules")})
    connection, lines = lab.connect("shaky"), []
    pack_for_tensorrt(engine_run / "bundle", steps=150)
    cuts = iter([20, 60, 100])
    next_cut = next(cuts)

    def cut(line: str) -> None:
        nonlocal next_cut
        lines.append(line)
        if line == f"step {next_cut}":
            next_cut = next(cuts, -1)
            server.kill_sessions()

    placed, said = brought(connection, engine_run, on_line=cut)
    assert [line for line in lines if line.startswith("step")] == [f"step {i}" for i in range(150)]
    assert (Path(placed.folder) / "started").read_text() == "x"
    assert any("trying again" in line for line in said)


def test_a_killed_deploy_is_picked_up(lab: Lab, engine_run: Path) -> None:
    """kill -9 in the middle of the build; the next deploy follows the same build to its end."""
    pack_for_tensorrt(engine_run / "bundle", steps=150)
    store = lab.store("board")
    code = "from ssdi8_edge.cli import main; main()"
    command = [sys.executable, "-c", code, "deploy", str(engine_run), "--host", "board"]
    first = subprocess.Popen([*command, "--store", str(store)], stderr=subprocess.PIPE, text=True)
    assert first.stderr is not None
    for line in first.stderr:
        if "step 10" in line:
            break
    first.kill()
    first.communicate()
    lines: list[str] = []
    placed, said = brought(lab.connect("board"), engine_run, on_line=lines.append)
    assert any("is still building" in line for line in said)
    assert [line for line in lines if line.startswith("step")] == [f"step {i}" for i in range(150)]
    assert (Path(placed.folder) / "started").read_text() == "x"


def test_a_build_waits_for_nobody_who_measures(lab: Lab, engine_run: Path) -> None:
    connection = lab.connect("board")
    with (
        connection.lock("board", holder="sweep of someone"),
        pytest.raises(BoardBusy, match="in use by sweep of someone"),
    ):
        deploy(connection, engine_run)
    deploy(connection, engine_run)


def test_a_restart_of_the_board_is_told(lab: Lab, engine_run: Path) -> None:
    """The build is gone with the power; the next deploy builds anew."""
    pack_for_tensorrt(engine_run / "bundle", steps=400)
    server = lab.serve("weak", environment={"PYTHONPATH": str(lab.folder / "modules")})
    connection = lab.connect("weak")

    def power_cut() -> None:
        jobs = lab.store("weak") / "jobs"
        while not list(jobs.glob("*/group")) or not list(lab.folder.rglob("started")):
            time.sleep(0.02)
        group = json.loads(next(iter(jobs.glob("*/group"))).read_text())["group"]
        os.killpg(group, 9)
        server.kill()
        server.start()

    thread = threading.Thread(target=power_cut)
    thread.start()
    with pytest.raises(BoardError, match="ended without an exit status"):
        deploy(connection, engine_run)
    thread.join()
    (engine_run / "bundle/steps").write_text("5")
    pack_for_tensorrt(engine_run / "bundle", steps=5)
    placed, _ = brought(connection, engine_run)
    assert placed.engine is not None and placed.engine["built"] is True


# --------------------------------------------------------------------------------------------------
# build --host


def test_build_with_a_host_ends_with_a_verified_bundle_there(
    lab: Lab,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = write_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the board runs the model. " * (TEXT_BYTES // 26))
    python = lab.folder / "board/board/.local/share/ssdi8-edge/venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    options = ["--model", model, "--calibration", tmp_path / "text.txt", "--out", tmp_path / "out"]
    arguments = ["ssdi8-edge", "build", *options, "--host", "board", "--json"]
    # In this process, which has torch already.
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert result["deployed"]["host"] == "board"
    assert result["deployed"]["verification"]["verified"] is True
    assert Path(result["deployed"]["folder"]).is_relative_to(lab.folder / "board/board")


@pytest.mark.parametrize(
    ("options", "exit_code", "words"),
    [
        (["--host", f"127.0.0.1:{free_port()}"], 3, "refuses connections"),
        (["--host", "-oProxyCommand=x"], 2, "is no host"),
        (["--host", "board", "--until", "export"], 2, "the build stops after export"),
    ],
)
def test_a_host_that_does_not_fit_is_said_before_the_build(
    lab: Lab, tmp_path: Path, options: list[str], exit_code: int, words: str
) -> None:
    done = cli("build", "--out", tmp_path / "out", *options, exit_code=exit_code)
    assert words in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_wrong_address_is_not_waited_for(run_folder: Path) -> None:
    done = cli("deploy", run_folder, "--host", f"127.0.0.1:{free_port()}", exit_code=3)
    assert "refuses connections" in done.stderr and done.stderr.count("\n") == 1


def test_deploy_to_this_machine(lab: Lab, run_folder: Path) -> None:
    """The same command without SSH: host-cpu's own board."""
    options = ("--host", "this-machine", "--store", lab.folder / "store")
    result = json.loads(cli("deploy", run_folder, *options, "--json").stdout)
    assert result["verification"]["verified"] is True and result["python"] == sys.executable
