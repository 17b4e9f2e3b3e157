"""--serve: OpenAI's API over HTTP until SIGTERM or Ctrl-C."""

from __future__ import annotations

import argparse
import sys

from runtime.bundle import Bundle
from runtime.options import open_session
from runtime.problems import BundleProblem
from runtime.text import TextCodec

PACKAGES = "starlette uvicorn prometheus_client"


def run(bundle: Bundle, options: argparse.Namespace) -> int:
    """Serve; returns the exit code."""
    try:
        from runtime.serve.guard import is_loopback, read_keys
        from runtime.serve.server import listen, serve
        from runtime.serve.unit import unit_file
    except ImportError as error:
        package = (error.name or "a package").partition(".")[0]
        raise BundleProblem(
            f"the server needs {package}, which cannot be imported ({error})",
            f"install it with: bash setup.sh --serve, or: {sys.executable} -m pip install"
            f" {PACKAGES}",
        ) from error
    keys = read_keys(options.api_key_file) if options.api_key_file else []
    if not keys and not is_loopback(options.listen):
        raise BundleProblem(
            f"{options.listen} can be reached from other machines and there is no key",
            "give --api-key-file FILE, or listen on 127.0.0.1 and forward the port by ssh -L",
        )
    if options.print_unit:
        print(unit_file(bundle, sys.executable, sys.argv), end="")
        return 0
    bundle.check_files()
    codec = TextCodec(bundle)
    with (
        listen(options.listen, options.port) as listener,
        open_session(bundle, options) as session,
    ):
        serve(session, codec, listener, keys, options)
    return 0
