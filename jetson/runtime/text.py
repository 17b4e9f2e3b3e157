"""Text -> token ids, and token ids -> text as it grows."""

from __future__ import annotations

import sys

import numpy as np

from runtime.bundle import Bundle, BundleProblem

TOKENIZER = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextCodec:
    """The bundle's tokenizer."""

    def __init__(self, bundle: Bundle) -> None:
        if TOKENIZER not in bundle.files:
            raise BundleProblem(
                f"bundle {bundle.name} has no {TOKENIZER}, so a prompt cannot be read",
                "pack it again from a checkpoint that has one",
            )
        try:
            import tokenizers
        except ImportError as error:
            raise BundleProblem(
                f"tokenizers cannot be imported ({error})",
                f"install it with: {sys.executable} -m pip install tokenizers",
            ) from error
        path = bundle.path(TOKENIZER)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise BundleProblem(
                f"tokenizers {tokenizers.__version__} cannot read {path} ({error})",
                f"upgrade it with: {sys.executable} -m pip install -U tokenizers",
            ) from error
        self._model_vocabulary = bundle.model.vocab_size
        self.vocabulary = 1 + max(self._tokenizer.get_vocab().values())
        self.end_id: int | None = self._tokenizer.token_to_id(END_OF_TEXT)

    def encode(self, text: str) -> np.ndarray:
        """Token ids (1, l) int32."""
        ids = self._tokenizer.encode(text).ids
        if not ids:
            raise BundleProblem("the prompt is empty", "give at least one character")
        if max(ids) >= self._model_vocabulary:
            raise BundleProblem(
                f"{TOKENIZER} gives token {max(ids)} and the model has {self._model_vocabulary}",
                "pack the bundle again with the tokenizer of its model",
            )
        return np.array([ids], np.int32)

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become replacement characters."""
        return self._tokenizer.decode(ids)


class TextStream:
    """Turns tokens into text one by one and holds back a character that is not complete yet.

    A byte-level token may end inside a character. Decoded, such an end is one replacement
    character, the last of the text, and only that one can still change; so it waits for the next
    token. An end that never becomes a character is not printed.
    """

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._ids: list[int] = []
        # Decoding starts at a finished token some steps back, because a decoder may treat the first
        # token of a text differently (it drops its space) and all of the text would cost O(n^2).
        self._start = 0  # first token decoded
        self._finished = 0  # tokens before this one are printed to their last byte
        self._printed = 0  # characters printed of the text that starts at _start

    def add(self, token: int) -> str:
        """Text that `token` completes, often one word, sometimes nothing."""
        self._ids.append(token)
        text = self._codec.decode(self._ids[self._start :])
        if text.endswith(REPLACEMENT):
            new = text[self._printed : -1]
            self._printed = max(self._printed, len(text) - 1)
            return new
        new = text[self._printed :]
        self._start, self._finished = self._finished, len(self._ids)
        self._printed = len(self._codec.decode(self._ids[self._start :]))
        return new
