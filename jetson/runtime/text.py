"""The bundle's text: prompt -> token ids, and token ids -> text as it grows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtime.bundle import Bundle
from runtime.files import TOKENIZER
from runtime.problems import BundleProblem
from runtime.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextCodec:
    """The bundle's tokenizer and the tokens that end a text."""

    def __init__(self, bundle: Bundle) -> None:
        if TOKENIZER not in bundle.files:
            raise BundleProblem(
                f"bundle {bundle.name} has no {TOKENIZER}, so a prompt cannot be read",
                "pack it again from a checkpoint that has one",
            )
        self._tokenizer = Tokenizer(bundle.path(TOKENIZER))
        self.vocabulary = self._tokenizer.vocabulary
        if self.vocabulary > bundle.model.vocab_size:
            raise BundleProblem(
                f"{TOKENIZER} has token {self.vocabulary - 1} and the model has"
                f" {bundle.model.vocab_size}",
                "pack the bundle again with the tokenizer of its model",
            )
        self.end_ids = bundle.end_ids

    def encode(self, text: str, continues: bool = False) -> np.ndarray:
        """Token ids (1, l) int32 of a text, or of one that continues another."""
        ids = self._tokenizer.encode(text, continues)
        if not ids:
            raise BundleProblem("the prompt is empty", "give at least one character")
        return np.array([ids], np.int32)

    def encode_whole(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a text that spells its special tokens out, and the letters of each."""
        return self._tokenizer.encode_whole(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become replacement characters."""
        return self._tokenizer.decode(ids)

    def decode_behind(self, context: Sequence[int], ids: Sequence[int]) -> str:
        """Text of `ids` as it stands behind `context`, special tokens spelt out."""
        before = self._tokenizer.decode(context, special=True)
        whole = self._tokenizer.decode([*context, *ids], special=True)
        if whole.startswith(before):
            return whole[len(before) :]
        return self._tokenizer.decode(ids, special=True)

    def shows(self, token: int) -> bool:
        """Whether `decode` heeds the token."""
        return self._tokenizer.shows(token)

    def name(self, token: int) -> str:
        """What the tokenizer calls the token; empty where it has none of this id."""
        return self._tokenizer.id_to_token(token) or ""

    def is_byte(self, token: int) -> bool:
        """Whether the token is a byte by name."""
        return self._tokenizer.is_byte(token)


class TextStream:
    """Turns tokens into text one by one: joined, what the tokenizer makes of all of them at once.

    Nothing is given out that a later token may change. A byte-level token may end inside a
    character; decoded, such an end is one replacement character, the last of the text. Of bytes
    that are tokens of their own, a row of which is decoded as a whole, none is final before another
    token follows.
    """

    def __init__(self, codec: TextCodec | Tokenizer, context: Sequence[int] = ()) -> None:
        """`context`: tokens before the first one, whose text is known to the reader already.

        A decoder may treat the first token of a text differently (it drops its space).
        """
        self._codec = codec
        # All of the text would cost O(n^2), so that decoding starts at a finished token some steps
        # back; which ones come before makes no difference to what follows a finished token.
        self._ids = [token for token in context if self._codec.shows(token)]
        self._known = self._codec.decode(self._ids)  # text of the first ids, given out before
        self._finished = len(self._ids)  # how many ids that are
        self._given = 0  # characters given out of what follows

    def add(self, token: int) -> str:
        """Text that `token` completes, often one word, sometimes nothing."""
        if not self._codec.shows(token):
            return ""
        self._ids.append(token)
        if self._codec.is_byte(token):
            return ""
        text = self._following()
        if text.endswith(REPLACEMENT):
            return self._give(text[:-1])
        new = self._give(text)
        self._forget()
        return new

    def finish(self) -> str:
        """What was held back: the end of the text, whole or not."""
        return self._give(self._following())

    def _following(self) -> str:
        """Text behind the known one."""
        text = self._codec.decode(self._ids)
        if text.startswith(self._known):
            return text[len(self._known) :]
        # Bytes at the start that go on from bytes of the context are told apart from these.
        return self._codec.decode(self._ids[self._finished :])

    def _give(self, text: str) -> str:
        new = text[self._given :]
        self._given = max(self._given, len(text))
        return new

    def _forget(self) -> None:
        """Keep of the finished tokens the last ones whose text is not empty, as context."""
        last = self._codec.decode(self._ids[self._finished :])
        if last:
            del self._ids[: self._finished]
            self._known = last
        else:
            self._known = self._codec.decode(self._ids)
        self._finished, self._given = len(self._ids), 0
