"""States kept, copied and saved: what goes on from one is bit for bit what never stopped."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path

import fake_tensorrt
import numpy as np
import pytest
from hybrid_builds import CONTEXT, build_hybrid, for_board, toy_layout
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tiny_bundle import CHUNK, JETSON, MAX_TOKENS, make_bundle
from tiny_model import one_thread, write_model, write_text

from runtime.backends.onnxruntime import OnnxRuntimeBackend
from runtime.backends.protocol import BackendOptions
from runtime.bundle import open_bundle
from runtime.command_line import run_build
from runtime.problems import BundleProblem
from runtime.session import Conversation, Session, prefill_pieces
from runtime.states.fingerprint import fingerprint
from runtime.states.prefix_cache import PrefixCache, StateFolder
from runtime.states.slot import Snapshot
from runtime.states.state_file import Chat, Saved, load, save
from ssdi8_edge.compile.pipeline import Build, BuildRequest
from ssdi8_edge.recipes.presets import METHODS
from ssdi8_edge.targets import load_target

__all__ = ["one_thread", "toy_layout"]  # fixtures, taken over
PIECE = MAX_TOKENS - MAX_TOKENS % CHUNK
MIB = 1 << 20


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """States of a constant size; FP16 ones, which are rounded between calls."""
    bundle = open_bundle(make_bundle(tmp_path_factory.mktemp("bundle") / "tiny", "fp16"))
    return Session(bundle, OnnxRuntimeBackend(bundle, threads=1))


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """Quantized Mamba-2, attention and both side by side; calls of at most 20 tokens."""
    run = build_hybrid(tmp_path_factory.mktemp("hybrid"))
    bundle = dataclasses.replace(open_bundle(run / "bundle"), max_tokens=20)
    return Session(bundle, OnnxRuntimeBackend(bundle, threads=1))


@pytest.fixture(scope="module")
def mamba(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """Quantized Mamba-2 alone; calls of at most 20 tokens."""
    scene = tmp_path_factory.mktemp("mamba")
    sizes = {"d_model": 64, "headdim": 16, "d_state": 16, "chunk_size": 16}
    model, text = write_model(scene / "model", **sizes), write_text(scene / "text.txt", size=300)
    target = load_target("host-cpu")
    Build(
        BuildRequest(str(model), METHODS["edge-w8a8"], target, scene / "run", calibration=text)
    ).run()
    bundle = dataclasses.replace(open_bundle(scene / "run" / "bundle"), max_tokens=20)
    return Session(bundle, OnnxRuntimeBackend(bundle, threads=1))


@pytest.fixture(scope="module", params=["recurrent", "mamba", "hybrid"])
def session(request: pytest.FixtureRequest) -> Session:
    found: Session = request.getfixturevalue(request.param)
    return found


def ids_of(length: int, seed: int = 0) -> list[int]:
    random = np.random.default_rng(seed)
    return [int(token) for token in random.integers(0, 256, length)]


class Greedy:
    """The likeliest token; remembers the logits that it saw."""

    def __init__(self) -> None:
        self.seen: list[np.ndarray] = []

    def __call__(self, logits: np.ndarray) -> int:
        self.seen.append(logits.copy())
        return int(logits[:256].argmax())


def say(
    talk: Conversation, ids: list[int], count: int, marks: Collection[int] = ()
) -> tuple[list[int], list[np.ndarray]]:
    """Lead a conversation to `ids`, and on for `count` tokens: these, and the logits of each."""
    sample = Greedy()
    steps = talk.generate(talk.lead_to(ids), sample, count, (), marks)
    return [step.token for step in steps], sample.seen


def same(a: Snapshot, b: Snapshot) -> None:
    assert a.ids.tolist() == b.ids.tolist() and a.pending == b.pending
    for name, state in b.states.items():
        np.testing.assert_array_equal(a.states[name], state)


RELAXED = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


# --------------------------------------------------------------------------------------------------
# going on


@given(
    length=st.integers(1, 45),
    start=st.integers(0, 44),
    marks=st.sets(st.integers(-1, 50), max_size=4),
)
def test_pieces_do_not_depend_on_where_reading_began(
    length: int, start: int, marks: set[int]
) -> None:
    """From the end of any piece on, they are those of reading in one go."""
    pieces = prefill_pieces(length, MAX_TOKENS, CHUNK, min(start, length - 1), marks)
    assert pieces[0][0] == min(start, length - 1) and pieces[-1][1] == length
    for i, (begin, end) in enumerate(pieces):
        assert 0 < end - begin <= MAX_TOKENS
        assert prefill_pieces(length, MAX_TOKENS, CHUNK, begin, marks) == pieces[i:]
    assert {mark for mark in marks if pieces[0][0] < mark < length} <= {end for _, end in pieces}


@RELAXED
@given(
    prompt=st.integers(1, 28),
    first=st.integers(1, 6),
    more=st.integers(0, 6),
    stop=st.integers(1, 6),
    marks=st.sets(st.integers(1, 44), max_size=2),
)
def test_a_conversation_that_was_saved_goes_on_bit_for_bit(
    session: Session,
    tmp_path_factory: pytest.TempPathFactory,
    prompt: int,
    first: int,
    more: int,
    stop: int,
    marks: set[int],
) -> None:
    """Left at any token of an answer, with another prompt or without one, through a file."""
    talk, sample = session.conversation(), Greedy()
    steps = talk.generate(np.array([ids_of(prompt)], np.int32), sample, 6, (), marks)
    for _, _ in zip(range(min(first, stop)), steps, strict=False):
        pass
    left = talk.take()
    assert left is not None and left.pending == (talk.ids[-1],)
    made_by = fingerprint(session.bundle, session.backend)
    path = tmp_path_factory.mktemp("state") / "left.state"
    save(path, Saved(left), session.bundle, made_by)
    restored = load(path, session.bundle, made_by).snapshot
    same(restored, left)
    again = session.conversation()
    again.resume(restored)
    assert again.ids == talk.ids
    following = np.array([ids_of(more, seed=1)], np.int32).reshape(1, more)
    one, other = Greedy(), Greedy()
    said = [step.token for step in talk.generate(following, one, 4, (), marks)]
    assert said == [step.token for step in again.generate(following, other, 4, (), marks)]
    np.testing.assert_array_equal(one.seen, other.seen)


@RELAXED
@given(
    length=st.integers(2, 40),
    marks=st.sets(st.integers(1, 39), max_size=3),
    budget=st.sampled_from([0, 40_000, MIB]),
)
def test_a_prompt_read_from_a_kept_state_gives_the_same_bits(
    session: Session, length: int, marks: set[int], budget: int
) -> None:
    """However much of it the cache still holds; each time is like the first."""
    ids = ids_of(length)
    wanted, logits = say(session.conversation(PrefixCache(0)), ids, 3, marks)
    cache = PrefixCache(budget)
    for _ in range(3):
        talk = session.conversation(cache)
        said, seen = say(talk, ids, 3, marks)
        assert said == wanted
        np.testing.assert_array_equal(seen, logits)
        talk.keep()
        assert cache.nbytes <= budget


def test_a_fork_leaves_what_it_came_from(session: Session) -> None:
    talk = session.conversation()
    say(talk, ids_of(12), 3)
    snapshot = talk.take()
    assert snapshot is not None
    answers = []
    for seed in (1, 2, 1):
        branch = session.conversation()
        branch.resume(snapshot)
        answers.append(say(branch, branch.ids + ids_of(9, seed), 4)[1])
    np.testing.assert_array_equal(answers[0], answers[2])
    assert not np.array_equal(answers[0], answers[1])
    unchanged = talk.take()
    assert unchanged is not None
    same(unchanged, snapshot)


def test_a_board_goes_on_from_its_states(hybrid: Session, tmp_path: Path) -> None:
    """TensorRT's protocol: what was saved, loaded and forked there computes the same."""
    board = for_board(hybrid.bundle.root, tmp_path / "board")
    with fake_tensorrt.installed():
        assert run_build(["--json"], board) == 0
        with Session.open(open_bundle(board), BackendOptions()) as session:
            assert session.backend.sequences == 1
            talk = session.conversation()
            say(talk, ids_of(21), 5)
            snapshot = talk.take()
            assert snapshot is not None
            say(talk, ids_of(30, 1), 2)  # overwrites both slots, and rows of the caches
            for _ in range(2):
                talk.resume(snapshot)
                back = talk.take()
                assert back is not None
                same(back, snapshot)
                following = [*talk.ids, *ids_of(4, 2)]
                tokens, _ = say(talk, following, 4)
                host = hybrid.conversation()
                host.resume(snapshot)
                assert say(host, following, 4)[0] == tokens
            theirs = fingerprint(session.bundle, session.backend)
            mine = fingerprint(hybrid.bundle, hybrid.backend)
            assert {part for part in mine if mine[part] != theirs[part]} >= {"engine"}


def test_only_the_filled_rows_of_a_cache_are_held(hybrid: Session) -> None:
    talk = hybrid.conversation()
    say(talk, ids_of(7), 1)
    snapshot = talk.take()
    assert snapshot is not None
    whole = hybrid.bundle.model.state_bytes()
    cut = hybrid.bundle.model.cache_bytes() * 7 // CONTEXT
    assert snapshot.nbytes == whole - hybrid.bundle.model.cache_bytes() + cut + 7 * 4


# --------------------------------------------------------------------------------------------------
# the cache


def test_the_rest_alone_is_read(recurrent: Session) -> None:
    """Behind the longest text that is held, token by token the same."""
    cache, talk = PrefixCache(MIB), recurrent.conversation()
    long, marks = ids_of(30), {12}
    assert talk.lead_to(long).shape == (1, 30)
    filled = recurrent.conversation(cache)
    list(filled.read(filled.lead_to(long), marks))
    filled.keep()

    def left(ids: list[int]) -> int:
        return recurrent.conversation(cache).lead_to(ids).shape[1]

    assert left([*long, 1]) == 1
    assert left(long) == 30 - 28  # its own state has no logits to go on from
    assert left(long[:28]) == 28 - 20
    assert left(long[:20]) == 20 - 12
    assert left([*long[:15], 999]) == 16 - 12
    assert left([*long[:7], 999]) == 8
    assert left([999, *long]) == 31
    # A conversation goes on from its own states where they are the longest.
    assert filled.lead_to([*long, 5, 6]).tolist() == [[5, 6]]
    assert filled.lead_to(long[:14]).tolist() == [long[12:14]]


def test_states_of_a_long_prompt_are_held_every_512_tokens(mamba: Session) -> None:
    """And where the same prompt, or one that ends otherwise, can go on."""
    session = dataclasses.replace(mamba, bundle=dataclasses.replace(mamba.bundle, max_tokens=2000))
    cache, ids = PrefixCache(MIB), ids_of(1100)
    talk = session.conversation(cache)
    list(talk.read(talk.lead_to(ids)))
    for common, held in ((1099, 1088), (1087, 1024), (1023, 512), (511, 0), (1100, 1088)):
        again = session.conversation(cache)
        again.lead_to([*ids[:common], *ids_of(5, 1)][:1100])
        assert len(again.ids) == held


def test_what_was_used_longest_ago_goes_first(recurrent: Session) -> None:
    one = recurrent.bundle.model.state_bytes() + 4 * CHUNK
    cache = PrefixCache(2 * one)
    texts = [ids_of(CHUNK, seed) for seed in range(3)]
    for text in texts[:2]:
        talk = recurrent.conversation(cache)
        say(talk, text, 1)
        talk.keep()
    assert cache.longest([*texts[0], 1]) is not None  # used now
    talk = recurrent.conversation(cache)
    say(talk, texts[2], 1)
    talk.keep()
    assert len(cache) == 2 and cache.nbytes == 2 * one
    assert [cache.longest([*text, 1]) is not None for text in texts] == [True, False, True]


def test_a_state_larger_than_the_budget_is_not_held(recurrent: Session) -> None:
    cache = PrefixCache(100)
    talk = recurrent.conversation(cache)
    say(talk, ids_of(CHUNK), 1)
    talk.keep()
    assert len(cache) == cache.nbytes == 0


def test_a_folder_keeps_the_cache(recurrent: Session, tmp_path: Path) -> None:
    def opened(budget: int = MIB) -> PrefixCache:
        return PrefixCache(budget, StateFolder(tmp_path, recurrent.bundle, recurrent.backend))

    cache = opened()
    for seed in range(3):
        talk = recurrent.conversation(cache)
        say(talk, ids_of(CHUNK, seed), 1)
        talk.keep()
    again = opened()
    assert len(again) == 3 and again.nbytes == cache.nbytes and not again.notes
    text = [*ids_of(CHUNK, 1), 7]
    wanted = say(recurrent.conversation(cache), text, 3)
    np.testing.assert_array_equal(say(recurrent.conversation(again), text, 3)[1], wanted[1])
    # The one used last is there where the budget has room for one.
    assert again.longest([*ids_of(CHUNK, 0), 1, 2]) is not None
    small = opened(again.nbytes // 3 + 4)
    assert len(small) == 1 and small.longest([*ids_of(CHUNK, 0), *range(9)]) is not None
    again.clear()
    assert len(opened()) == 0


def test_a_torn_file_of_the_folder_is_named_and_left_out(
    recurrent: Session, tmp_path: Path
) -> None:
    folder = StateFolder(tmp_path, recurrent.bundle, recurrent.backend)
    cache = PrefixCache(MIB, folder)
    talk = recurrent.conversation(cache)
    say(talk, ids_of(CHUNK), 2)
    talk.keep()
    (file,) = folder.newest_first()
    file.write_bytes(file.read_bytes()[:-1])
    again = PrefixCache(MIB, folder)
    assert len(again) == 0 and len(again.notes) == 1 and str(file) in again.notes[0]


# --------------------------------------------------------------------------------------------------
# the file


@pytest.fixture
def written(recurrent: Session, tmp_path: Path) -> tuple[Path, Snapshot]:
    talk = recurrent.conversation()
    say(talk, ids_of(5), 2)
    snapshot = talk.take()
    assert snapshot is not None
    path = tmp_path / "folder" / "a.state"
    chat = Chat([{"role": "user", "content": "é"}], "text")
    made_by = fingerprint(recurrent.bundle, recurrent.backend)
    save(path, Saved(snapshot, chat), recurrent.bundle, made_by)
    assert load(path, recurrent.bundle, made_by).chat == chat
    assert [file.name for file in path.parent.iterdir()] == ["a.state"]
    return path, snapshot


SAVER = """
import itertools, sys
from pathlib import Path
import numpy as np
from runtime.bundle import open_bundle
from runtime.states.slot import Snapshot
from runtime.states.state_file import Saved, save

bundle, path = open_bundle(Path(sys.argv[1])), Path(sys.argv[2])
for value in itertools.cycle((1, 2)):
    states = {
        name: np.full((1, *state.shape), value, state.dtype)
        for name, state in bundle.model.states.items()
    }
    save(path, Saved(Snapshot(np.full(100_000, value, np.int32), states)), bundle, {})
    print(value, flush=True)
"""


def test_kill_while_saving_leaves_the_old_file_or_the_new_one(
    recurrent: Session, tmp_path: Path
) -> None:
    path = tmp_path / "a.state"
    command = [sys.executable, "-c", SAVER, str(recurrent.bundle.root), str(path)]
    for delay in (0.0, 0.002, 0.005):
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(JETSON)}
        ) as process:
            assert process.stdout is not None and process.stdout.readline()
            time.sleep(delay)
            process.kill()
        snapshot = load(path, recurrent.bundle, {}).snapshot
        values = {int(value) for state in snapshot.states.values() for value in np.unique(state)}
        assert values == {int(snapshot.ids[0])} and len(snapshot.ids) == 100_000
    save(path, Saved(snapshot), recurrent.bundle, {})
    assert [file.name for file in tmp_path.iterdir()] == ["a.state"]


def test_a_file_is_one_of_safetensors(written: tuple[Path, Snapshot]) -> None:
    path, snapshot = written
    with safe_open(path, framework="np") as file:
        assert file.metadata()["format"] == "ssdi8-edge state 1"
        np.testing.assert_array_equal(file.get_tensor("ids"), snapshot.ids)
        for name, state in snapshot.states.items():
            np.testing.assert_array_equal(file.get_tensor(name), state)


@RELAXED
@given(data=st.data())
def test_a_torn_or_altered_file_is_refused(
    recurrent: Session, written: tuple[Path, Snapshot], data: st.DataObject
) -> None:
    """Any byte, any length, anything behind it."""
    content = bytearray(written[0].read_bytes())
    if data.draw(st.booleans()):
        at = data.draw(
            st.integers(0, min(len(content), 2000) - 1) | st.integers(0, len(content) - 1)
        )
        content[at] ^= data.draw(st.integers(1, 255))
    else:
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    path = written[0].with_name("b.state")
    path.write_bytes(content)
    with pytest.raises(BundleProblem, match=r"b\.state is no whole state file"):
        load(path, recurrent.bundle, fingerprint(recurrent.bundle, recurrent.backend))
    path.write_bytes(written[0].read_bytes() + b" ")
    with pytest.raises(BundleProblem, match=r"b\.state is no whole state file"):
        load(path, recurrent.bundle, fingerprint(recurrent.bundle, recurrent.backend))


@pytest.mark.parametrize("part", ["model", "method", "tokenizer", "engine"])
def test_a_foreign_file_is_refused(
    recurrent: Session, written: tuple[Path, Snapshot], part: str
) -> None:
    other = {**fingerprint(recurrent.bundle, recurrent.backend), part: "another"}
    with pytest.raises(BundleProblem) as refused:
        load(written[0], recurrent.bundle, other)
    assert f"with another {part} " in str(refused.value) and "a.state" in str(refused.value)


def test_a_fingerprint_tells_model_method_tokenizer_and_engine(recurrent: Session) -> None:
    bundle = recurrent.bundle
    mine = fingerprint(bundle, recurrent.backend)

    def changed(**parts: object) -> set[str]:
        other = dataclasses.replace(bundle, manifest={**bundle.manifest, **parts})
        theirs = fingerprint(other, recurrent.backend)
        return {part for part in mine if mine[part] != theirs[part]}

    assert changed() == set()
    assert changed(name="other", created={}) == set()
    assert changed(recipe={**bundle.manifest["recipe"], "linear": "w4"}) == {"method"}
    assert changed(interface={**bundle.manifest["interface"], "context": 9}) == {"model"}
    for name, part in (("tokenizer.json", "tokenizer"), ("model.portable.onnx", "engine")):
        files = {**bundle.files, name: {"sha256": "0", "bytes": 1}}
        assert changed(files=files) == {part}


def test_a_file_that_lies_about_its_tensors_is_refused(
    recurrent: Session, written: tuple[Path, Snapshot]
) -> None:
    """With a right hash, by someone who can compute one."""
    path, snapshot = written
    short = {name: state[:, :1] for name, state in snapshot.states.items()}
    made_by = fingerprint(recurrent.bundle, recurrent.backend)
    for wrong in (short, {**snapshot.states, "more": snapshot.ids}):
        save(path, Saved(dataclasses.replace(snapshot, states=wrong)), recurrent.bundle, made_by)
        with pytest.raises(BundleProblem, match=r"a\.state does not fit"):
            load(path, recurrent.bundle, made_by)


def test_what_is_no_state_file_is_named(recurrent: Session, tmp_path: Path) -> None:
    made_by = fingerprint(recurrent.bundle, recurrent.backend)
    with pytest.raises(BundleProblem, match=r"x\.state cannot be read"):
        load(tmp_path / "x.state", recurrent.bundle, made_by)
    other = json.dumps({"__metadata__": {"format": "pt"}}).encode()
    for content in (
        b"",
        b"text",
        struct.pack("<Q", 1 << 60),
        struct.pack("<Q", len(other)) + other,
    ):
        (tmp_path / "x.state").write_bytes(content)
        with pytest.raises(BundleProblem, match=r"x\.state is no whole state file"):
            load(tmp_path / "x.state", recurrent.bundle, made_by)
    snapshot = Snapshot(np.zeros(1, np.int32), {})
    with pytest.raises(BundleProblem, match="cannot be written to"):
        save(tmp_path, Saved(snapshot), recurrent.bundle, made_by)
