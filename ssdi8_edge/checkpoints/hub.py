"""Fetching from a model hub what is asked for by `organisation/name`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from runtime.files import TOKENIZER
from ssdi8_edge.ground.chat_templates import CHAT_FILES
from ssdi8_edge.ground.errors import CheckpointError

# What a hub model may say about its text.
TOKENIZER_FILES = [
    *(TOKENIZER, "tokenizer_config.json", "special_tokens_map.json"),
    *("tokenizer.model", *CHAT_FILES),
]


def reason(error: Exception) -> str:
    """The first line of what the hub client says; the others are addresses and advice."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def fetch_checkpoint(repository: str, download: Callable[..., str]) -> Path:
    """Safetensors first: some repositories hold the same weights in both forms."""
    small = ["config.json", "generation_config.json", "*.index.json", *TOKENIZER_FILES]
    folder = Path(download(repository, allow_patterns=[*small, "model*.safetensors"]))
    if not any(folder.glob("model*.safetensors")):
        folder = Path(download(repository, allow_patterns=[*small, "pytorch_model*.bin"]))
    return folder


def fetch_config(repository: str) -> Path:
    """config.json of a hub model (`organisation/name`).

    Raises CheckpointError when it cannot be fetched.
    """
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repository, "config.json"))
    except Exception as error:  # the hub client raises its own, httpx's and OS errors alike
        raise CheckpointError(
            f"the config.json of {repository} cannot be fetched ({reason(error)}).",
            "check the spelling and the network, or give a folder.",
        ) from error


def fetch_tokenizer(repository: str) -> Path:
    """Folder with the tokenizer of a hub model (`organisation/name`) and what belongs to it.

    Raises CheckpointError when it cannot be fetched.
    """
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repository, allow_patterns=TOKENIZER_FILES))
    except Exception as error:  # the hub client raises its own, httpx's and OS errors alike
        raise CheckpointError(
            f"{repository} is neither a file nor a hub model with a tokenizer.json"
            f" ({reason(error)}).",
            "check the spelling and the network, or name a tokenizer.json.",
        ) from error
