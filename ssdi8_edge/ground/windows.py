"""Token windows of a text."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ssdi8_edge.ground.errors import UsageError
from ssdi8_edge.ground.tokens import open_tokenizer


def read_tokens(
    text: Path, tokenizer: Path, tokens: int, samples: int, purpose: str = "calibration"
) -> Tensor:
    """The first `samples` windows of `tokens` tokens of a UTF-8 text: (S, T) INT64.

    The text begins as a prompt does, with the special tokens that the tokenizer puts there. They
    are not repeated: a window from the middle of the text begins in its middle.

    The file is read line by line, so that it may be larger than memory. A text shorter than one
    window gives one shorter sample; fewer windows than asked are all used.

    Args:
        purpose: what needs the tokens, for the message.

    Raises:
        UsageError: a file is missing, the text is not UTF-8 or holds fewer than 16 tokens.
    """
    encoder = open_tokenizer(tokenizer)
    ids: list[int] = []
    try:
        with text.open(encoding="utf-8") as lines:
            # Tokenized in blocks of lines: long enough that joins between them do not matter.
            block: list[str] = []
            size = 0
            for line in lines:
                block.append(line)
                size += len(line)
                if size >= 1 << 16:
                    ids += encoder.encode("".join(block), continues=bool(ids))
                    block, size = [], 0
                    if len(ids) >= tokens * samples:
                        break
            ids += encoder.encode("".join(block), continues=bool(ids))
    except UnicodeDecodeError as error:
        raise UsageError(f"{text} is not UTF-8 text;", "give a plain text file.") from error
    except OSError as error:
        raise UsageError(f"cannot read {text}: {error.strerror};", "name a text file.") from error
    require_tokens(len(ids), text, purpose)
    tokens = min(tokens, len(ids))
    samples = min(samples, len(ids) // tokens)
    return torch.tensor(ids[: samples * tokens]).reshape(samples, tokens)


def require_tokens(count: int, text: Path | str, purpose: str) -> None:
    """Refuse a text that is too short to say anything.

    Raises:
        UsageError: it holds fewer than 16 tokens.
    """
    if count < 16:
        raise UsageError(f"{text} holds {count} tokens;", f"{purpose} needs at least 16.")
