"""The tokenizer of a checkpoint, and the tokens that end its texts.

A tokenizer.json is read by the file that boards read it with (`runtime/tokenizer.py`), so that a
prompt, calibration and evaluation give a model the same tokens for the same text. A checkpoint that
has a sentencepiece model alone gets a tokenizer.json from transformers' converter.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.files import TOKENIZER
from runtime.problems import BundleProblem
from runtime.tokenizer import Tokenizer
from ssdi8_edge.ground.chat_templates import CHAT_FILES
from ssdi8_edge.ground.errors import CheckpointError, UsageError
from ssdi8_edge.ground.foreign_json import read_object, typed

SENTENCEPIECE = "tokenizer.model"
# Files beside a tokenizer that say more about it, the one that is heeded first at the front.
TOKENIZER_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")
# Of the checkpoint, the one that is heeded first at the front.
MODEL_CONFIGS = ("generation_config.json", "config.json")
# Of a checkpoint that does not say what ends a text: the first that the tokenizer has.
CUSTOMARY_ENDS = ("<|endoftext|>", "</s>")
CONVERT = "pip install 'ssdi8-edge[convert]'"


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json.

    Raises:
        UsageError: the file is missing or is something else.
    """
    if not path.is_file():
        raise UsageError(f"tokenizer {path} does not exist", "name the model's tokenizer.json.")
    try:
        return Tokenizer(path)
    except BundleProblem as error:
        raise UsageError(
            f"{path} is not a tokenizer file ({error.__cause__});",
            "name the model's tokenizer.json.",
        ) from error


def require_fitting(tokenizer: Path, model: str, vocabulary: int) -> None:
    """Refuse a tokenizer that cannot be the one of `model`, whose embedding has `vocabulary` rows.

    Embeddings are padded, by less than half.

    Raises:
        UsageError: it has tokens that the model lacks, or fewer than half of those it has.
    """
    opened = open_tokenizer(tokenizer)
    if opened.vocabulary > vocabulary:
        said = f"has token {opened.vocabulary - 1}, but {model} has {vocabulary} tokens;"
    elif 2 * opened.known < vocabulary:
        said = f"has {opened.known} tokens, fewer than half of the {vocabulary} of {model};"
    else:
        return
    raise UsageError(f"{tokenizer} {said}", "name the model's own --tokenizer.")


def tokenizer_in(folder: Path) -> Path | None:
    """The tokenizer.json in a folder, or what its sentencepiece model is converted to, or None.

    Raises:
        UsageError: there is a sentencepiece model and it cannot be converted.
    """
    if (folder / TOKENIZER).is_file():
        return folder / TOKENIZER
    # NVIDIA's converted models name it after the data that it was trained on.
    models = [path for path in sorted(folder.glob("*.model")) if path.is_file()]
    if (folder / SENTENCEPIECE) in models:
        return converted(folder / SENTENCEPIECE)
    return converted(models[0]) if len(models) == 1 else None


@functools.cache
def converted(model: Path) -> Path:
    """tokenizer.json made of a sentencepiece model, in a folder that goes when Python ends.

    Raises:
        UsageError: the extra `convert` is not installed, or the file is no sentencepiece model.
    """
    try:
        import google.protobuf  # noqa: F401
        import sentencepiece
        from transformers import AutoTokenizer, __version__
    except ImportError as error:
        raise UsageError(
            f"{model} is a sentencepiece model, and converting it needs {error.name};",
            f"{CONVERT}, or name a tokenizer.json with --tokenizer.",
        ) from error
    if int(__version__.split(".")[0]) < 5:  # earlier ones want a class for each kind of model
        raise UsageError(
            f"{model} is a sentencepiece model, which transformers {__version__} cannot convert;",
            f"{CONVERT}, or name a tokenizer.json with --tokenizer.",
        )
    try:
        sentencepiece.SentencePieceProcessor(model_file=str(model))
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"{model} is not a sentencepiece model;", "name a tokenizer.json with --tokenizer."
        ) from error
    scratch = Path(tempfile.mkdtemp(prefix="ssdi8-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    given, made = scratch / "given", scratch / "made"
    given.mkdir()
    # Apart from the weights and their config.json, which would make transformers look for a model.
    shutil.copyfile(model, given / SENTENCEPIECE)
    for name in TOKENIZER_CONFIGS:
        if (model.parent / name).is_file():
            shutil.copyfile(model.parent / name, given / name)
    chat = [path for pattern in CHAT_FILES for path in model.parent.glob(pattern)]
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            given, trust_remote_code=False, local_files_only=True
        )
        tokenizer.save_pretrained(made)
        open_tokenizer(made / TOKENIZER)
    except Exception as error:  # transformers raises whatever it runs into
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"transformers {__version__} cannot convert {model} ({reason});",
            "name a tokenizer.json with --tokenizer.",
        ) from error
    for path in chat:
        copy = made / path.relative_to(model.parent)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    return made / TOKENIZER


def end_ids(folder: Path, tokenizer: Path, vocabulary: int) -> list[int]:
    """The tokens that end a text of the checkpoint in `folder`, its own one first.

    They are `eos_token_id` of generation_config.json, or for lack of it that of config.json, one id
    or a list, and `eos_token` of the tokenizer_config.json beside the tokenizer. Where none of them
    says anything it is the customary token, and nothing if the tokenizer has none.

    Args:
        vocabulary: rows of the model's embedding.

    Raises:
        CheckpointError: one of the files cannot be read, or has something else in that place.
    """
    opened = open_tokenizer(tokenizer)
    ids: list[int] = (
        _first(folder, MODEL_CONFIGS, lambda path: _declared_ids(path, vocabulary)) or []
    )
    token = _first(tokenizer.parent, TOKENIZER_CONFIGS, _declared_token)
    # A token that the tokenizer does not have is none that the model was trained with.
    if token and (found := opened.token_to_id(token)) is not None:
        ids = [*ids, found]
    if not ids:
        customary = map(opened.token_to_id, CUSTOMARY_ENDS)
        ids = [end for end in customary if end is not None][:1]
    return list(dict.fromkeys(ids))


def _first(folder: Path, names: tuple[str, ...], read: Callable[[Path], Any]) -> Any:
    """What the first of the files says that says anything."""
    return next(
        (said for name in names if (folder / name).is_file() and (said := read(folder / name))),
        None,
    )


def _declared_ids(path: Path, vocabulary: int) -> list[int]:
    """`eos_token_id`: an id or a list of ids; null and -1 stand for none."""
    said = typed(read_object(path).get("eos_token_id"))
    ids: list[Any] = said if isinstance(said, list) else [said]
    ids = [token for token in ids if token is not None and token != -1]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise CheckpointError(
                f"{path} sets eos_token_id = {said!r}; expected a token id or a list of them.",
                "correct it, or delete the entry.",
            )
        if token >= vocabulary:
            raise CheckpointError(
                f"{path} sets eos_token_id = {said!r}, but the model has {vocabulary} tokens.",
                "correct it, or delete the entry.",
            )
    return ids


def _declared_token(path: Path) -> str | None:
    """`eos_token`: a text, or an object with the text as its content."""
    said = read_object(path).get("eos_token")
    token = said.get("content") if isinstance(said, dict) else said
    if token is not None and not isinstance(token, str):
        raise CheckpointError(
            f"{path} sets eos_token = {said!r}; expected a text.",
            "correct it, or delete the entry.",
        )
    return token
