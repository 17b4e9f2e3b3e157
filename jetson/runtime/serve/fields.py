"""Reading the JSON object of a request: each wrong field is named in one sentence, status 4xx."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from runtime.problems import BundleProblem


class RequestProblem(BundleProblem):
    """What a client can put right; `status` is that of HTTP, `param` names a field."""

    def __init__(
        self, message: str, hint: str, status: int = 400, param: str | None = None, code: str = ""
    ) -> None:
        super().__init__(message, hint)
        self.status = status
        self.param = param
        self.code = code or None
        self.headers: dict[str, str] = {}


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object that `body` is.

    Raises:
        RequestProblem: it is none, or has NaN, an infinity or text that is not Unicode.
    """
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_number)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        words = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RequestProblem(
            f"the body is not JSON ({words[:200]})", "send one JSON object in UTF-8"
        ) from error
    if not isinstance(value, dict):
        raise RequestProblem("the body is JSON and no object", "send one JSON object")
    return value


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


class Fields:
    """The fields of one object, each taken once; `done` refuses those that nobody took.

    A field that is null counts as absent.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        """`where`: stands before the names in messages, such as "stream_options."."""
        self._values = dict(values)
        self._where = where

    def take(self, name: str) -> Any:
        """The value as it came, None where there is none."""
        return self._values.pop(name, None)

    def names(self) -> list[str]:
        """Those that nobody took yet."""
        return list(self._values)

    def refuse(self, name: str, what: str, hint: str) -> NoReturn:
        """Raise the problem that field `name` `what`."""
        raise RequestProblem(f"{self._where}{name} {what}", hint, param=self._where + name)

    def number(
        self, name: str, kind: type, default: Any, least: float, most: float = math.inf
    ) -> Any:
        """A finite number of `kind` in a range; a whole float counts as int."""
        value = self.take(name)
        if value is None:
            return default
        noun = "a whole number" if kind is int else "a number"
        limits = f"of at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or (kind is int and not whole)
            or not least <= value <= most
            or (isinstance(value, float) and not math.isfinite(value))
        ):
            self.refuse(name, f"is {_shown(value)}", f"give {noun} {limits}")
        try:
            return kind(value)
        except OverflowError:
            self.refuse(name, "is too large", f"give {noun} {limits}")

    def flag(self, name: str, default: bool = False) -> bool:
        """true or false."""
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(name, f"is {_shown(value)}", "give true or false")
        return value

    def text(self, name: str) -> str | None:
        """Text, which may be empty."""
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            self.refuse(name, f"is {_shown(value)}", "give text")
        return value

    def object(self, name: str) -> Fields | None:
        """The fields of an object inside this one."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.refuse(name, f"is {_shown(value)}", "give an object")
        return Fields(value, f"{self._where}{name}.")

    def only(self, name: str, *values: Any) -> None:
        """Refuse a field whose value is not the one that the server has anyway."""
        value = self.take(name)
        if value is not None and not any(value == each for each in values):
            known = " or ".join(_shown(each) for each in values)
            self.refuse(name, f"is {_shown(value)}", f"leave it out or give {known}")

    def ignore(self, *names: str) -> None:
        """Take fields that say something to other servers and change no answer."""
        for name in names:
            self.take(name)

    def done(self) -> None:
        """Raises RequestProblem where a field is left: a misspelt one shall not go unnoticed."""
        for name, value in self._values.items():
            if value is not None:
                self.refuse(
                    json.dumps(name)[1:-1][:60],
                    "is not known here",
                    "leave it out, or correct its name",
                )


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
