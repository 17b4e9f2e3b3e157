"""A server of a bundle in a process of its own, on a port that is free."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


class Served:
    """run_engine.py --serve; as a context manager it is killed at the end."""

    def __init__(self, bundle: Path, *options: str, command: Sequence[str] = ()) -> None:
        """`command`: another one than the bundle's own script."""
        if not command:
            command = [sys.executable, str(bundle / "run_engine.py"), str(bundle), "--serve"]
        self.process = subprocess.Popen(
            [*command, "--port=0", "--threads=1", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        self._reader: threading.Thread | None = None
        self.said: list[str] = []
        self.headers: dict[str, str] = {}  # of each request
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if found := re.fullmatch(r"serving (\S+) on (http://\S+)\n", line):
                self.model, self.url = found.groups()
                break
        else:
            self.__exit__()
            raise AssertionError("".join(self.said))
        self.host = self.url.removeprefix("http://")
        # A full pipe would stop it.
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.said += self.process.stderr

    def ask(
        self, path: str, body: Any = None, method: str | None = None, **headers: str
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON (text where it is none) and headers; `body`: JSON, or bytes as they are."""
        connection = http.client.HTTPConnection(self.host, timeout=60)
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body)
        named = self.headers | headers
        try:
            connection.request(method or ("GET" if body is None else "POST"), path, data, named)
            response = connection.getresponse()
            text = response.read().decode()
            found = dict(response.getheaders())
        finally:
            connection.close()
        is_json = found.get("content-type", "").startswith("application/json")
        return response.status, json.loads(text) if is_json else text, found

    def metric(self, name: str) -> float:
        """The sum over the labels of a metric."""
        lines = re.findall(rf"(?m)^{name}(?:{{.*}})? (\S+)$", self.ask("/metrics")[1])
        return sum(map(float, lines))

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(30)
        if self._reader:
            self._reader.join(10)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
