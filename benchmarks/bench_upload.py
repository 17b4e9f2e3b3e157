"""Time of bringing a bundle to a board over SSH, against plain scp, on loopback.

    python benchmarks/bench_upload.py --megabytes 200 --repeat 9

Both go through one OpenSSH server that it starts; scp copies the same folder. An upload hashes
everything on the board and has it on the disk when it ends, which scp does not. Prints a JSON line
per repetition and the medians last.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from ssdi8_edge.boards.link.hosts import connect
from ssdi8_edge.boards.store.upload import Cargo, upload
from tests.board_simulator.server import SshServer

# Besides the weights: graphs, golden vectors, and as many sources as a bundle has.
SMALL = {"model.onnx": 3_000_000, "model.portable.onnx": 5_000_000, "golden.npz": 1_500_000}
SOURCES = {f"plugins/kernels/{number}.cu": 8_000 for number in range(60)}


def make_bundle(folder: Path, size: int) -> Cargo:
    rest = SMALL | SOURCES
    files = {}
    for name, count in {"model.safetensors": size - sum(rest.values()), **rest}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(count))
        files[name] = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": count}
    manifest = {"name": "random", "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Cargo.of(folder, manifest)


def timed(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def measure(folder: Path, cargo: Cargo) -> dict[str, float]:
    """Seconds, each login included."""
    config, known = folder / "home/.ssh/config", folder / "home/.ssh/known_hosts"
    scp = ["scp", "-q", "-r", "-F", str(config), "-o", f"UserKnownHostsFile={known}"]
    copy, store = folder / "copy", folder / "store"

    def bring() -> None:
        with connect("board", store=str(store)) as connection:
            upload(connection, cargo)

    command = [*scp, str(cargo.folder), f"board:{copy}"]
    seconds = {"scp": timed(lambda: subprocess.run(command, check=True))}
    seconds["upload"] = timed(bring)
    seconds["second upload"] = timed(bring)
    shutil.rmtree(copy)
    shutil.rmtree(store)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--repeat", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-upload-") as scratch:
        folder = Path(scratch)
        (folder / "home/.ssh").mkdir(parents=True)
        os.environ["HOME"] = str(folder / "home")
        cargo = make_bundle(folder / "bundle", options.megabytes * 1_000_000)
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {"HOME": str(folder / "home"), "PATH": path}
        with SshServer(folder / "sshd", environment=environment) as server:
            (folder / "home/.ssh/config").write_text(server.client_config("board"))
            (folder / "home/.ssh/known_hosts").write_text(server.known_host())
            rows = []
            for _ in range(options.repeat):
                rows.append(measure(folder, cargo))
                print(json.dumps({key: round(value, 3) for key, value in rows[-1].items()}))
        medians = {key: round(statistics.median(row[key] for row in rows), 3) for key in rows[0]}
        machine = {"machine": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()}
        print(json.dumps({"median": medians, "megabytes": options.megabytes, **machine}))


if __name__ == "__main__":
    main()
