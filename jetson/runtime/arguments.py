"""What the command lines of run_engine.py and build_engine.py share."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from typing import Any, NoReturn

from runtime.problems import BundleProblem


class Parser(argparse.ArgumentParser):
    """Reports a wrong option as every other problem is reported: one sentence, exit code 2."""

    def error(self, message: str) -> NoReturn:
        hint = f"see {self.prog} --help"
        if message.endswith("expected one argument"):
            hint = f"a value that begins with - is written --option=-value, {hint}"
        raise BundleProblem(message, hint)


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


def text(argument: str) -> str:
    """An argparse type: text, which came as bytes that are UTF-8 or of the locale's encoding."""
    try:
        argument.encode("utf-8")
    except UnicodeEncodeError:
        # Bytes that the locale's encoding lacks arrive as lone surrogates.
        try:
            return os.fsencode(argument).decode("utf-8")
        except UnicodeDecodeError as error:
            raise argparse.ArgumentTypeError(f"the text is not UTF-8 ({error})") from error
    return argument


def text_to_find(argument: str) -> str:
    """An argparse type: text of at least one character."""
    if not argument:
        raise argparse.ArgumentTypeError("the text is empty, give at least one character")
    return text(argument)


def numbers(text: str) -> list[int]:
    """An argparse type: whole numbers of at least 1, separated by commas."""
    parse = number(int, 1)
    return [parse(part) for part in text.split(",")]
