"""The command line: one file per group of commands; nothing else parses arguments."""

from __future__ import annotations

from ssdi8_edge.cli.app import app, main

__all__ = ["app", "main"]
