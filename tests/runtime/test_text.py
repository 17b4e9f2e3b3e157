"""Text in and out, for tokenizers of both kinds: where a text starts and ends, what is streamed."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_bundle  # puts jetson/ on the path, so it comes first
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bundle import CHAIN, SENTENCE, make_bundle, pack, run_engine, run_json
from tiny_model import byte_tokenizer, one_thread, write_model, write_text
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Library

from runtime.problems import BundleProblem
from runtime.text import REPLACEMENT, TextStream
from runtime.tokenizer import Tokenizer
from ssdi8_edge.checkpoints.checkpoint import DEMO_FOLDER
from ssdi8_edge.compile.pipeline import Build, BuildRequest, named_tokenizer
from ssdi8_edge.evaluate import open_subject
from ssdi8_edge.evaluate.texts import wikitext2
from ssdi8_edge.ground.artifacts import read_json
from ssdi8_edge.ground.errors import CheckpointError, UsageError
from ssdi8_edge.ground.tokens import end_ids, tokenizer_in
from ssdi8_edge.ground.windows import read_tokens
from ssdi8_edge.recipes.presets import METHODS
from ssdi8_edge.targets import load_target

__all__ = ["one_thread"]  # a fixture, taken over

WORDS = ("the", "sea", "hi", "world")
BOS, EOS = "<s>", "</s>"


def sentencepiece_like(scheme: str = "normalizer", template: str = f"{BOS} $A") -> Library:
    """Pieces with ▁, bytes as <0xNN>, a first space that is invented and dropped again.

    `scheme`: what invents it, of the ways that published tokenizers have.
    """
    tokens = ["<unk>", BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [chr(code) for code in range(33, 127)] + ["\n", "▁"]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        merged = "▁"
        for letter in word:
            merges.append((merged, letter))
            merged += letter
            tokens.append(merged)
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Library(
        models.BPE(
            vocabulary,
            list(dict.fromkeys(merges)),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", "▁")
    if scheme == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    elif scheme == "pattern":
        start = normalizers.Replace(Regex(r"\A"), "▁")
        tokenizer.normalizer = normalizers.Sequence([start, spaces])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    bytes_to_text = [decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), *bytes_to_text, decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", BOS, EOS)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(BOS, 1), (EOS, 2)]
    )
    return tokenizer


def word_like() -> Library:
    """Words and their ends, as WordPiece has them."""
    words = ["[UNK]", "[CLS]", "the", "sea", "##s", ".", "'"]
    tokenizer = Library(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


KINDS = {
    "byte level": tiny_bundle.make_tokenizer(),
    "byte fallback": sentencepiece_like(),
    "metaspace": sentencepiece_like("first"),
    "words": word_like(),
}


def saved(library: Library, path: Path) -> Tokenizer:
    library.save(str(path))
    return Tokenizer(path)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """All of `KINDS`, as the runtime opens them."""
    folder = tmp_path_factory.mktemp("kinds")
    return {kind: saved(made, folder / f"{kind}.json") for kind, made in KINDS.items()}


# --------------------------------------------------------------------------------------------------
# streaming


def streamed(
    tokenizer: Tokenizer, tokens: list[int], context: list[int] | None = None
) -> list[str]:
    stream = TextStream(tokenizer, context or [])
    return [*(stream.add(token) for token in tokens), stream.finish()]


def ids_of(kind: str) -> st.SearchStrategy[list[int]]:
    """Any tokens, also unknown ones, and runs of bytes that do and do not make characters."""
    library = KINDS[kind]
    any_token = st.integers(0, library.get_vocab_size() + 2).map(lambda token: [token])
    text = st.text(max_size=4).map(lambda t: library.encode(t, add_special_tokens=False).ids)
    cut = st.tuples(text, st.integers(0, 6)).map(lambda pair: pair[0][: pair[1]])
    return st.lists(st.one_of(any_token, text, cut), max_size=12).map(
        lambda parts: [token for part in parts for token in part]
    )


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_streamed_text_is_the_decoded_text(
    opened: dict[str, Tokenizer], kind: str, data: st.DataObject
) -> None:
    """Joined it is the same; so that nothing was given out that a later token has changed."""
    tokens = data.draw(ids_of(kind))
    assert "".join(streamed(opened[kind], tokens)) == KINDS[kind].decode(tokens)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_streamed_text_goes_on_from_the_prompt(
    opened: dict[str, Tokenizer], kind: str, data: st.DataObject
) -> None:
    prompt = opened[kind].encode(data.draw(st.text(max_size=6)))
    tokens = data.draw(ids_of(kind))
    known, whole = KINDS[kind].decode(prompt), KINDS[kind].decode(prompt + tokens)
    text = "".join(streamed(opened[kind], tokens, prompt))
    # A run of bytes that is no text spoils all of it, the prompt's last character included.
    assert text == whole.removeprefix(known) or not whole.startswith(known)


def test_first_space_after_the_prompt_is_kept(opened: dict[str, Tokenizer]) -> None:
    codec = opened["byte fallback"]
    prompt = codec.encode("hi")
    tokens = [KINDS["byte fallback"].token_to_id(f"▁{word}") for word in ("world", "the", "sea")]
    assert streamed(codec, tokens, prompt) == [" world", " the", " sea", ""]
    assert "".join(streamed(codec, tokens)) == "world the sea"


def test_bytes_wait_for_their_character(opened: dict[str, Tokenizer]) -> None:
    library = KINDS["byte fallback"]
    face = [library.token_to_id(f"<0x{byte:02X}>") for byte in "🙂".encode()]
    sea = library.token_to_id("▁sea")
    assert streamed(opened["byte fallback"], [*face, sea]) == ["", "", "", "", "🙂 sea", ""]
    # A special token between them is skipped, and what is not whole comes at the very end.
    assert streamed(opened["byte fallback"], [*face[:2], 2, *face[2:]])[-1] == "🙂"
    assert streamed(opened["byte fallback"], [sea, face[0]]) == ["sea", "", REPLACEMENT]


# --------------------------------------------------------------------------------------------------
# the start of a text, and its middle


@pytest.mark.parametrize("scheme", ["normalizer", "pattern", "first", "always"])
def test_a_second_turn_continues(tmp_path: Path, scheme: str) -> None:
    """No special token, no invented space: the tokens of the joined text."""
    library = sentencepiece_like(scheme)
    tokenizer = saved(library, tmp_path / "t.json")
    first, second = tokenizer.encode("the sea"), tokenizer.encode("\nthe sea", continues=True)
    assert library.decode(first + second) == "the sea\nthe sea"
    assert first + second == library.encode("the sea\nthe sea").ids
    assert [library.id_to_token(token) for token in first] == [BOS, "▁the", "▁sea"]


@settings(max_examples=100, deadline=None)
@given(before=st.text(min_size=1, max_size=8), text=st.text(min_size=1, max_size=8))
@pytest.mark.parametrize("kind", ["byte level", "byte fallback", "metaspace"])
def test_pieces_of_a_text_are_the_text(
    opened: dict[str, Tokenizer], kind: str, before: str, text: str
) -> None:
    tokenizer = opened[kind]
    pieces = tokenizer.encode(before) + tokenizer.encode(text, continues=True)
    assert tokenizer.decode(pieces) == tokenizer.decode(tokenizer.encode(before + text))


def test_start_is_what_the_template_says(tmp_path: Path) -> None:
    """Once, also where it is written; what a template puts at an end is for whole texts."""
    both = saved(sentencepiece_like(template=f"{BOS} $A {EOS}"), tmp_path / "both.json")
    assert both.encode("the sea") == [1, *both.encode("the sea")[1:]]
    assert both.encode("the sea").count(1) == 1 and 2 not in both.encode("the sea")
    assert both.encode(f"{BOS}the").count(1) == 1
    assert both.encode(f"the{EOS}").count(2) == 1
    assert both.encode("") == [] and both.start_ids("a") == [1]
    none = saved(sentencepiece_like(template="$A"), tmp_path / "none.json")
    assert 1 not in none.encode("the sea") and none.start_ids("a") == []


@pytest.mark.parametrize("sentence", [SENTENCE * 2, SENTENCE * 5])
def test_truncation_and_padding_are_never_obeyed(tmp_path: Path, sentence: str) -> None:
    library = tiny_bundle.make_tokenizer()
    whole = library.encode(sentence).ids
    library.enable_truncation(8)
    library.enable_padding(length=200)
    tokenizer = saved(library, tmp_path / "tokenizer.json")
    assert tokenizer.encode(sentence) == whole
    assert tokenizer.encode(sentence, continues=True) == whole
    (tmp_path / "wiki.test.raw").write_text(sentence)
    windows = wikitext2(tmp_path).windows(tmp_path / "tokenizer.json", 1, 1 << 40)
    assert windows.flatten().tolist() == whole
    text = write_text(tmp_path / "text.txt")
    tokens = read_tokens(text, tmp_path / "tokenizer.json", 1, 1 << 40)
    assert tokens.flatten().tolist() == tiny_bundle.make_tokenizer().encode(text.read_text()).ids


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (1, 1), (0, 2), (2, 3)])
def test_what_strips_on_the_right_never_fails(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], start: int, stop: int
) -> None:
    """The library's own panics on a text of fewer letters, with a backtrace on stderr."""
    library = sentencepiece_like()
    replace = decoders.Replace("▁", " ")
    library.decoder = decoders.Sequence(
        [replace, decoders.Fuse(), decoders.Strip(" ", start, stop)]
    )
    tokenizer = saved(library, tmp_path / "tokenizer.json")
    space, letter = tokenizer.token_to_id("▁"), tokenizer.token_to_id("x")
    assert space is not None and letter is not None
    for before in range(3):
        for behind in range(4):
            ids = [space] * before + [letter] + [space] * behind
            text = " " * max(0, before - start) + "x" + " " * max(0, behind - stop)
            assert tokenizer.decode(ids) == text == library.decode(ids)
        assert tokenizer.decode([space] * before) == " " * max(0, before - start - stop)
    stream = TextStream(tokenizer, [1])  # after BOS alone
    assert "".join([stream.add(letter), stream.add(space), stream.finish()]).rstrip() == "x"
    assert capfd.readouterr().err == ""


def test_a_defect_of_the_library_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It raises that past `except Exception`."""
    panic = type("PanicException", (BaseException,), {})
    tokenizer = saved(sentencepiece_like(), tmp_path / "tokenizer.json")

    class Broken:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            raise panic("index out of bounds")

        encode = decode

    monkeypatch.setattr(tokenizer, "_tokenizer", Broken())
    with pytest.raises(BundleProblem, match=r"fails with this tokenizer\.json \(index out"):
        tokenizer.decode([])


def test_prompt_calibration_and_evaluation_start_alike(tmp_path: Path) -> None:
    """A long text is read in blocks; only the first of them is its start."""
    tokenizer = saved(sentencepiece_like(), tmp_path / "tokenizer.json")
    text = "hi the sea\nthe world\n" * 8000
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "wiki.test.raw").write_text(text)
    prompt = tokenizer.encode(text)
    calibration = read_tokens(tmp_path / "text.txt", tmp_path / "tokenizer.json", 1, 1 << 40)
    assert calibration.flatten().tolist() == prompt and prompt.count(1) == 1 == prompt[0]
    windows = wikitext2(tmp_path).windows(tmp_path / "tokenizer.json", 1, 1 << 40)
    assert windows[0].item() == 1 and (windows == 1).sum() == 1


# --------------------------------------------------------------------------------------------------
# the end of a text

ENDS: dict[str, tuple[dict[str, Any], list[int] | str]] = {
    "nothing said": ({}, [2]),
    "one id": ({"config.json": {"eos_token_id": 5}}, [5]),
    "a list": ({"config.json": {"eos_token_id": [7, 5, 7]}}, [7, 5]),
    "both files": (
        {"config.json": {"eos_token_id": 5}, "generation_config.json": {"eos_token_id": [2, 11]}},
        [2, 11],
    ),
    "null and minus one say nothing": (
        {
            "config.json": {"eos_token_id": 5},
            "generation_config.json": {"eos_token_id": [None, -1]},
        },
        [5],
    ),
    "an empty list says nothing": ({"generation_config.json": {"eos_token_id": []}}, [2]),
    "the tokenizer's": ({"tokenizer_config.json": {"eos_token": "▁sea"}}, ["▁sea"]),
    "the tokenizer's as an object": (
        {"tokenizer_config.json": {"eos_token": {"content": "▁sea", "lstrip": False}}},
        ["▁sea"],
    ),
    "in the older file": ({"special_tokens_map.json": {"eos_token": "▁sea"}}, ["▁sea"]),
    "ids and the tokenizer's": (
        {
            "generation_config.json": {"eos_token_id": 5},
            "tokenizer_config.json": {"eos_token": EOS},
        },
        [5, 2],
    ),
    "a token that the tokenizer lacks": ({"tokenizer_config.json": {"eos_token": "<e>"}}, [2]),
    "digits": ({"config.json": {"eos_token_id": ["5", 7.0]}}, [5, 7]),
    "a text for an id": ({"config.json": {"eos_token_id": "</s>"}}, "expected a token id"),
    "a list in a list": ({"config.json": {"eos_token_id": [[5]]}}, "expected a token id"),
    "a flag for an id": ({"generation_config.json": {"eos_token_id": True}}, "expected a token"),
    "a fraction": ({"config.json": {"eos_token_id": [2.5]}}, "expected a token id"),
    "a negative id": ({"config.json": {"eos_token_id": -2}}, "expected a token id"),
    "an id beyond the vocabulary": ({"config.json": {"eos_token_id": [2, 999]}}, "has 400 tokens"),
    "a number for a token": ({"tokenizer_config.json": {"eos_token": 2}}, "expected a text"),
    "a list for a file": ({"generation_config.json": []}, "holds no JSON object"),
}


@pytest.mark.parametrize("case", ENDS)
def test_ends_are_what_the_checkpoint_says(tmp_path: Path, case: str) -> None:
    files, expected = ENDS[case]
    tokenizer = saved(sentencepiece_like(), tmp_path / "tokenizer.json")
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    if isinstance(expected, str):
        with pytest.raises(CheckpointError, match=rf"{next(iter(files))}.*{expected}"):
            end_ids(tmp_path, tmp_path / "tokenizer.json", 400)
    else:
        ids = [tokenizer.token_to_id(e) if isinstance(e, str) else e for e in expected]
        assert end_ids(tmp_path, tmp_path / "tokenizer.json", 400) == ids


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    saved(sentencepiece_like(), tmp_path / "tokenizer.json")
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json cannot be read as JSON"):
        end_ids(tmp_path, tmp_path / "tokenizer.json", 400)


def test_end_of_the_demo_model() -> None:
    assert end_ids(DEMO_FOLDER, DEMO_FOLDER / "tokenizer.json", 4096) == [0]


def test_a_tokenizer_named_apart_brings_its_end(tmp_path: Path) -> None:
    model, other = tmp_path / "model", tmp_path / "other"
    model.mkdir(), other.mkdir()
    tokenizer = saved(sentencepiece_like(), other / "tokenizer.json")
    (other / "tokenizer_config.json").write_text('{"eos_token": "▁sea"}')
    (other / "generation_config.json").write_text('{"eos_token_id": 9}')  # of another model
    ends = end_ids(model, named_tokenizer(str(other)), 400)
    assert ends == [tokenizer.token_to_id("▁sea")]


@pytest.fixture(scope="module")
def ending(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose texts end at ж's last byte and at Z."""
    folder = make_bundle(tmp_path_factory.mktemp("ending") / "tiny")
    chain = tiny_bundle.make_tokenizer().encode(CHAIN).ids
    pack(folder, text={"end_ids": [chain[-1], chain[-2]]})
    return folder


def test_every_end_ends_a_run(ending: Path) -> None:
    report = run_json(ending, "--prompt", CHAIN, "--max-new-tokens", "30")
    assert (report["finish"], report["new_tokens"]) == ("stop", 8)
    assert report["text"] == f" é🙂{REPLACEMENT}"
    shown = run_engine(ending, "--prompt", f"{CHAIN} é🙂ж", "--max-new-tokens", "30")
    assert shown.stdout.decode() == "\n"


def test_every_end_ends_a_turn(ending: Path) -> None:
    asked = f"{CHAIN}\n{CHAIN}\n".encode()
    turns = run_engine(ending, "--interactive", "--json", input=asked).stdout.splitlines()
    assert [json.loads(turn)["finish"] for turn in turns] == ["stop", "stop"]


@pytest.mark.parametrize("ids", [[-1], ["2"], [True], None])
def test_ends_that_are_no_ids_are_refused(ending: Path, tmp_path: Path, ids: Any) -> None:
    folder = Path(shutil.copytree(ending, tmp_path / "tiny"))
    pack(folder, text={"end_ids": ids})
    result = run_engine(folder, "--prompt", "a")
    assert result.returncode == 2 and b"pack the bundle again." in result.stderr


# --------------------------------------------------------------------------------------------------
# a build


def test_ends_travel_into_the_bundle(tmp_path: Path) -> None:
    """And a change of them reaches it, without calibrating again."""
    model = write_model(tmp_path / "model")
    (model / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    text = write_text(tmp_path / "text.txt")
    request = BuildRequest(
        str(model), METHODS["edge-w8a8"], load_target("host-cpu"), tmp_path / "run", text
    )
    Build(request).run()
    assert read_json(tmp_path / "run/bundle/manifest.json")["text"] == {"end_ids": [3, 4]}
    for folder in (tmp_path / "run/quantized", tmp_path / "run/bundle"):
        assert list(open_subject(str(folder)).end_ids) == [3, 4]
    (model / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert list(Build(request).plan().values()) == ["reuse", "run", "run", "run"]


@pytest.mark.parametrize(
    ("vocabulary", "said"),
    [(257, "has token 256, but .* has 256"), (100, "has 100 tokens, fewer than half of the 256")],
)
def test_tokenizer_of_another_model_is_named_at_once(
    tmp_path: Path, vocabulary: int, said: str
) -> None:
    model = write_model(tmp_path / "model")
    tokenizer = byte_tokenizer(vocabulary)
    tokenizer.add_tokens(["more"] if vocabulary > 256 else [])
    tokenizer.save(str(model / "tokenizer.json"))
    recipe, target = METHODS["edge-w8a8"], load_target("host-cpu")
    with pytest.raises(UsageError, match=said):
        Build(BuildRequest(str(model), recipe, target, tmp_path / "run"))
    (model / "model.safetensors").rename(tmp_path / "kept")
    shutil.copy(tmp_path / "kept", model / "model.safetensors")
    with pytest.raises(UsageError, match=said):
        open_subject(str(model))
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------
# sentencepiece


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model, and no tokenizer.json."""
    trainer = pytest.importorskip(
        "sentencepiece", reason="sentencepiece (extra convert) trains the model to convert"
    ).SentencePieceTrainer
    folder = tmp_path_factory.mktemp("spm")
    trainer.train(
        input=str(DEMO_FOLDER / "calibration.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        byte_fallback=True,
        model_type="bpe",
        minloglevel=2,
        input_sentence_size=500,
    )
    (folder / "tokenizer.vocab").unlink()
    return folder


def test_sentencepiece_is_converted(spm: Path) -> None:
    import sentencepiece

    path = tokenizer_in(spm)
    assert path is not None and sorted(p.name for p in spm.iterdir()) == ["tokenizer.model"]
    tokenizer = Tokenizer(path)
    original = sentencepiece.SentencePieceProcessor(model_file=str(spm / "tokenizer.model"))
    for text in ("the old man and the sea", " two  spaces", "héllo 🙂 日本語", "Hi,\n\nyou"):
        assert tokenizer.encode(text) == original.encode(text)
        assert tokenizer.decode(original.encode(text)) == original.decode(original.encode(text))
    assert end_ids(spm, path, 400) == [original.eos_id()]
    assert named_tokenizer(str(spm / "tokenizer.model")) == path == named_tokenizer(str(spm))


def test_sentencepiece_of_another_name(spm: Path, tmp_path: Path) -> None:
    shutil.copy(spm / "tokenizer.model", tmp_path / "multilingual_256k.model")
    assert tokenizer_in(tmp_path) is not None


@pytest.mark.parametrize("missing", ["sentencepiece", "transformers", "google.protobuf"])
def test_sentencepiece_without_the_extra(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("google.protobuf", "sentencepiece", "transformers"):
        if name != missing:
            pytest.importorskip(name, reason=f"{name} (extra convert)")
    monkeypatch.setitem(sys.modules, missing, None)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(UsageError, match=rf"{missing}; pip install 'ssdi8-edge\[convert\]'"):
        tokenizer_in(tmp_path)


def test_a_model_file_that_is_no_sentencepiece(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece", reason="sentencepiece (extra convert)")
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(UsageError, match="is not a sentencepiece model; name a tokenizer"):
        tokenizer_in(tmp_path)
