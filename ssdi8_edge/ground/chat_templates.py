"""The chat templates of a checkpoint, wherever its makers put them, as a bundle carries them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runtime.chat_template import DEFAULT, ChatTemplate
from runtime.problems import BundleProblem
from ssdi8_edge.ground.errors import CheckpointError
from ssdi8_edge.ground.foreign_json import read_object

TEMPLATE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"  # a folder, NAME.jinja each
OF_PROCESSOR = "chat_template.json"  # of models that read more than text
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
# Beside a tokenizer.
CHAT_FILES = (TEMPLATE, f"{MORE_TEMPLATES}/*.jinja", OF_PROCESSOR)
ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


def chat_templates(folder: Path) -> dict[str, Any] | None:
    """{"templates": {name: text}, "special_tokens": {role: token}} of the files beside a tokenizer,
    None where there is no template. A file of its own counts before an entry in a JSON file.

    Raises:
        CheckpointError: a file cannot be read, or holds something else than templates.
    """
    config = _object(folder / TOKENIZER_CONFIG)
    templates = {
        **_entry(folder / OF_PROCESSOR, _object(folder / OF_PROCESSOR)),
        **_entry(folder / TOKENIZER_CONFIG, config),
        **_files(folder),
    }
    if not templates:
        return None
    tokens = {**_object(folder / SPECIAL_TOKENS), **config}
    extra = config.get("extra_special_tokens")
    tokens |= extra if isinstance(extra, dict) else {}
    roles = (*ROLES, *(extra if isinstance(extra, dict) else ()))
    special_tokens = {
        role: token for role in roles if (token := _text(tokens.get(role))) is not None
    }
    try:
        ChatTemplate(templates, special_tokens, str(folder))
    except BundleProblem as problem:
        raise CheckpointError(f"{problem.message};", f"{problem.hint}.") from problem
    return {"templates": templates, "special_tokens": special_tokens}


def _object(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _entry(path: Path, content: dict[str, Any]) -> dict[str, str]:
    """`chat_template` of a JSON file: a text, or a list of {"name", "template"}."""
    said = content.get("chat_template")
    if said is None:
        return {}
    if isinstance(said, str):
        return {DEFAULT: said}
    try:
        named = {each["name"]: each["template"] for each in said}
    except (KeyError, TypeError):
        named = {}
    if not named or not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise CheckpointError(
            f"{path} sets a chat_template that is neither a text nor a list of named ones.",
            "correct it, or delete the entry.",
        )
    return named


def _files(folder: Path) -> dict[str, str]:
    paths = {DEFAULT: folder / TEMPLATE}
    paths |= {path.stem: path for path in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
    try:
        return {
            name: path.read_text(encoding="utf-8") for name, path in paths.items() if path.is_file()
        }
    except (OSError, UnicodeError) as error:
        raise CheckpointError(
            f"a chat template beside {folder} cannot be read ({error}).",
            "correct it, or delete it.",
        ) from error


def _text(token: Any) -> str | None:
    """A token: a text, or an object with the text as its content."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None
