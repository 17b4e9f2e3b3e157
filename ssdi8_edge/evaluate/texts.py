"""Texts that perplexity is measured on, as windows of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ssdi8_edge.evaluate.local_data import AGAIN, find_file
from ssdi8_edge.ground.errors import UsageError
from ssdi8_edge.ground.inputs import text_input
from ssdi8_edge.ground.tokens import open_tokenizer
from ssdi8_edge.ground.windows import read_tokens, require_tokens

PURPOSE = "evaluating"
WIKITEXT2 = "wikitext2"
WIKITEXT2_FILE = "wiki.test.raw"
WIKITEXT2_HUB = ("Salesforce/wikitext", "wikitext-2-raw-v1")


@dataclass(frozen=True)
class Text:
    """`windows(tokenizer, tokens, samples)` gives the first windows of token ids: (S, T) INT64."""

    name: str
    windows: Callable[[Path, int, int], Tensor]


def text_file(path: Path) -> Text:
    """A UTF-8 text, read when its windows are asked for.

    Raises:
        UsageError: it cannot be read.
    """
    path = text_input(path, "text")
    return Text(path.name, partial(read_tokens, path, purpose=PURPOSE))


def wikitext2(data: Path | None) -> Text:
    """The test part of WikiText-2 raw, from `wiki.test.raw` in `data`, or from the hub.

    Raises:
        UsageError: the file is not there, or the hub cannot be reached.
    """
    lines = _wikitext2_from_hub() if data is None else _lines(find_file(data, WIKITEXT2_FILE))
    return Text(WIKITEXT2, partial(_windows, join_lines(lines)))


def _lines(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            lines = list(file)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path} ({error});", AGAIN) from error
    if not any(line.strip() for line in lines):
        raise UsageError(f"{path} is empty;", AGAIN)
    return lines


def join_lines(lines: list[str]) -> str:
    r"""The lines, each with its own end of line, blank ones empty, joined by "\n\n".

    Source: docs/method.md §11.1.
    """
    return "\n\n".join(line if line.strip() else "" for line in lines)


def _windows(text: str, tokenizer: Path, tokens: int, samples: int) -> Tensor:
    ids = torch.tensor(open_tokenizer(tokenizer).encode(text))
    require_tokens(len(ids), WIKITEXT2, PURPOSE)
    tokens = min(tokens, len(ids))
    samples = min(samples, len(ids) // tokens)
    return ids[: samples * tokens].reshape(samples, tokens)


def _wikitext2_from_hub() -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UsageError(
            f"{WIKITEXT2} is read from the hub, which needs the package datasets;",
            f"name a folder with {WIKITEXT2_FILE} by --data, or pip install 'ssdi8-edge[eval]'.",
        ) from error
    try:
        return list(load_dataset(*WIKITEXT2_HUB, split="test")["text"])
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot fetch {WIKITEXT2} from the hub ({type(error).__name__});",
            f"name a folder with {WIKITEXT2_FILE} by --data.",
        ) from error
