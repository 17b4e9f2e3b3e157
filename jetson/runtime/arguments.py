"""What the command lines of run_engine.py and build_engine.py share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any, NoReturn

from runtime.bundle import BundleProblem


class Parser(argparse.ArgumentParser):
    """Reports a wrong option as every other problem is reported: one sentence, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise BundleProblem(message, f"see {self.prog} --help")


def number(kind: type, least: float, most: float = math.inf) -> Callable[[str], Any]:
    """An argparse type: a number of `kind` in a range, infinity excluded."""
    noun = "a whole number" if kind is int else "a number"
    limits = f"of at least {least}" if most == math.inf else f"from {least} to {most}"

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun} {limits}")
        return value

    return parse


def numbers(text: str) -> list[int]:
    """An argparse type: whole numbers of at least 1, separated by commas."""
    parse = number(int, 1)
    return [parse(part) for part in text.split(",")]
