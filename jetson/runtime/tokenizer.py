"""A tokenizer.json: text -> token ids -> text. The host reads tokenizers through this file too."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from runtime.problems import BundleProblem

# How tokenizers of the sentencepiece kind name the bytes of characters that have no token.
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Texts that may stand before a continuation while it is encoded.
ANCHORS = ("\n", ".", "a", "0", ",", ")")


def _unless_panic(error: BaseException) -> BaseException:
    """A defect of the library in words; it raises that past `except Exception`."""
    if isinstance(error, Exception) or type(error).__name__ != "PanicException":
        return error
    return BundleProblem(
        f"tokenizers fails with this tokenizer.json ({error})",
        f"upgrade it with: {sys.executable} -m pip install -U tokenizers",
    )


def _stripping_safely(decoder: Any) -> Any:
    """The same decoder, of its JSON, where `Strip` takes nothing on the right.

    The library's own reads beyond the start of a text of too few letters and panics, with pages
    about it on stderr; a `Replace` does the same to all others.
    """
    if isinstance(decoder, list):
        return [_stripping_safely(each) for each in decoder]
    if not isinstance(decoder, dict):
        return decoder
    if decoder.get("type") == "Strip" and decoder.get("stop"):
        letters = rf"(?:{re.escape(decoder['content'])}){{0,{decoder['stop']}}}\z"
        replace = {"type": "Replace", "pattern": {"Regex": letters}, "content": ""}
        return {"type": "Sequence", "decoders": [{**decoder, "stop": 0}, replace]}
    return {key: _stripping_safely(value) for key, value in decoder.items()}


class Tokenizer:
    """A tokenizer.json. What it says about truncation and padding is not obeyed.

    vocabulary   1 + its largest token id
    known        how many tokens it has
    """

    def __init__(self, path: Path) -> None:
        """Raises BundleProblem where the file cannot be read or the library is missing."""
        try:
            import tokenizers
        except ImportError as error:
            raise BundleProblem(
                f"tokenizers cannot be imported ({error})",
                f"install it with: {sys.executable} -m pip install tokenizers",
            ) from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise BundleProblem(
                f"tokenizers {tokenizers.__version__} cannot read {path} ({error})",
                f"upgrade it with: {sys.executable} -m pip install -U tokenizers",
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        decoder = self._tokenizer.decoder
        if decoder is not None:
            written = json.loads(decoder.__getstate__())
            if (safe := _stripping_safely(written)) != written:
                decoder.__setstate__(json.dumps(safe).encode())
                self._tokenizer.decoder = decoder
        ids = self._tokenizer.get_vocab().values()
        self.known = len(ids)
        self.vocabulary = 1 + max(ids, default=-1)
        self._special = {
            token for token, added in self._tokenizer.get_added_tokens_decoder().items()
            if added.special
        }  # fmt: skip

    def token_to_id(self, token: str) -> int | None:
        """The id of one token, None where there is no such token."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def id_to_token(self, token: int) -> str | None:
        """The name of one token, None where there is no such id."""
        found: str | None = self._tokenizer.id_to_token(token)
        return found

    def start_ids(self, text: str) -> list[int]:
        """The special tokens that the tokenizer's template puts before `text`, most often one BOS
        or nothing. What it would put behind a text is left out: the model is to go on."""
        return self._split(text)[0]

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """Token ids of `text`, empty where nothing is left of it.

        A text begins with `start_ids`, once: also where they are written in it. With `continues` it
        goes on from an earlier one: nothing is put before it, neither a special token nor the space
        that tokenizers of the sentencepiece kind invent at the start of a text.
        """
        if continues:
            return self._encode_continuation(text)
        start, ids = self._split(text)
        return ids if ids[: len(start)] == start else [*start, *ids]

    def encode_whole(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a text that spells its special tokens out, and the letters of each.

        Nothing is put before or behind it. Letters are [start, end) of `text`; tokens that share a
        character have it all.
        """
        encoded = self._encoded(text, add_special_tokens=False)
        return encoded.ids, encoded.offsets

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """Text of `ids`, special tokens left out unless they are asked for; bytes that are not
        UTF-8 become U+FFFD."""
        try:
            text: str = self._tokenizer.decode(ids, skip_special_tokens=not special)
        except BaseException as error:
            raise _unless_panic(error) from error
        return text

    def shows(self, token: int) -> bool:
        """Whether `decode` heeds the token: it skips special and unknown ones."""
        return token not in self._special and self.id_to_token(token) is not None

    def is_byte(self, token: int) -> bool:
        """Whether the token is a byte by name; more of its character may follow."""
        return BYTE.fullmatch(self.id_to_token(token) or "") is not None

    def _split(self, text: str) -> tuple[list[int], list[int]]:
        """What the template puts before `text`, and the text; nothing where that is empty."""
        encoded = self._encoded(text)
        # 1 where the template put a token, 0 also where the text itself has a special one.
        mask = encoded.special_tokens_mask
        ids = [token for token, put in zip(encoded.ids, mask) if not put]  # noqa: B905
        start = len(list(takewhile(bool, mask)))
        return (encoded.ids[:start] if ids else []), ids

    def _plain(self, text: str) -> list[int]:
        ids: list[int] = self._encoded(text, add_special_tokens=False).ids
        return ids

    def _encoded(self, text: str, add_special_tokens: bool = True) -> Any:
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except BaseException as error:
            raise _unless_panic(error) from error

    def _encode_continuation(self, text: str) -> list[int]:
        """What a tokenizer does at the start of a text falls on an anchor in front of it.

        Normalizers and pre-tokenizers have many ways to do that; none need be known here. An anchor
        serves if its own tokens come out the same, that is, none reaches across into `text`.
        """
        for anchor in ANCHORS:
            before = self._plain(anchor)
            both = self._plain(anchor + text)
            if before and both[: len(before)] == before:
                return both[len(before) :]
        return self._plain(text)
