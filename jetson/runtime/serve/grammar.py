"""Answers that are JSON of a schema: masks over the logits, by llguidance."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from runtime.bundle import Bundle
from runtime.files import TOKENIZER
from runtime.problems import RunFailure
from runtime.serve.fields import RequestProblem

# Left free to, a small model fills an answer with white space.
COMPACT: Any = {"whitespace_flexible": False}


class Grammars:
    """Grammars for the tokenizer of one bundle; what takes memory is shared by all of them."""

    def __init__(self, bundle: Bundle, vocabulary: int) -> None:
        """`vocabulary`: ids that are sampled."""
        self._bundle = bundle
        self._vocabulary = vocabulary
        self._tokenizer: Any = None

    def of_schema(self, schema: Mapping[str, Any] | bool) -> Callable[[], Constraint]:
        """What constrains one answer, made anew with each call.

        Raises:
            RequestProblem: the library is missing, or cannot read the schema.
        """
        try:
            import llguidance
        except ImportError as error:
            raise RequestProblem(
                f"response_format needs llguidance, which cannot be imported here ({error})",
                f"install it on the server with: {sys.executable} -m pip install llguidance",
                param="response_format",
            ) from error
        if self._tokenizer is None:
            text = self._bundle.path(TOKENIZER).read_text(encoding="utf-8")
            ends = sorted(end for end in self._bundle.end_ids if end < self._vocabulary)
            self._tokenizer = llguidance.LLTokenizer(text, self._vocabulary, ends or None)
        grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), COMPACT)
        tokenizer = self._tokenizer

        def make() -> Constraint:
            return Constraint(llguidance.LLMatcher(tokenizer, grammar, log_level=0))

        problem = make().problem()
        if problem:
            raise RequestProblem(
                f"the schema cannot be used ({' '.join(problem.split())[:300].rstrip('.;')})",
                "change that part of it",
                param="response_format",
            )
        return make


class Constraint:
    """The grammar of one answer, and how far that has come."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def problem(self) -> str:
        """What is wrong with the grammar; empty where nothing is."""
        return str(self._matcher.get_error() or "")

    def mask(self, logits: np.ndarray) -> np.ndarray:
        """-inf for tokens that may not follow.

        Raises:
            RunFailure: none may.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: logits.size].astype(bool)
        if not allowed.any():
            raise RunFailure(
                f"the grammar came to a dead end ({self.problem() or 'no token fits'})",
                "change the schema",
            )
        return np.where(allowed, logits, -np.inf)

    def took(self, token: int) -> bool:
        """Go on behind `token`; whether the answer is complete, so that nothing may follow."""
        self._matcher.consume_token(token)
        return bool(self._matcher.is_stopped())
