"""Options of generating text in both command lines: the same help, limits, values and answers."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_bundle  # puts jetson/ on the path, so it comes first
from tiny_bundle import CHAIN, make_bundle

from runtime import options as shared
from runtime.backends.choose import BACKENDS
from runtime.backends.onnxruntime import OnnxRuntimeBackend
from runtime.bundle import open_bundle
from runtime.sampling import SAMPLING
from ssdi8_edge import cli
from ssdi8_edge.ground.board_runtime import parse_run
from ssdi8_edge.ground.errors import Interrupted, UsageError
from ssdi8_edge.local import gpu_backend

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "90"}
# A locale without UTF-8, and Python kept from putting one in its place.
PLAIN = {"LC_ALL": "C", "LANG": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
PROMPTING = [flag for group in shared.PROMPTING.values() for flag in group]
FLAGS = (*shared.PROMPTS, *PROMPTING, *shared.RUNNING)
PROMISED = (
    "--prompt --prompt-file --interactive --max-new-tokens --temperature --top-k --top-p --min-p"
    " --repetition-penalty --presence-penalty --frequency-penalty --seed --stop --threads"
    " --force --json"
    " --system --think --no-think --save-state --load-state --state-dir --state-memory"
)

Program = Callable[..., subprocess.CompletedProcess[bytes]]
Arguments = list[str | bytes]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that tests only read; its model says `CHAIN` for ever."""
    return make_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


def program(command: list[str], folder: Path) -> Program:
    def call(*arguments: str | bytes, **options: Any) -> subprocess.CompletedProcess[bytes]:
        environment = {**ENVIRONMENT, **options.pop("env", {})}
        return subprocess.run(
            [*command, str(folder), *arguments],
            **{"capture_output": True, "timeout": 120, "env": environment, **options},
        )

    return call


BOARD = [sys.executable, str(tiny_bundle.JETSON / "run_engine.py")]
HOST = [sys.executable, "-m", "ssdi8_edge", "run"]


@pytest.fixture(params=[BOARD, HOST], ids=["run_engine.py", "ssdi8-edge run"])
def either(request: pytest.FixtureRequest, packed: Path) -> Program:
    """Each of the two command lines."""
    return program(request.param, packed)


@pytest.fixture
def board(packed: Path) -> Program:
    return program(BOARD, packed)


def report(program: Program, *arguments: str | bytes, **options: Any) -> dict[str, Any]:
    result = program(*arguments, "--json", **options)
    assert result.returncode == 0, result.stderr.decode()
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def assert_one_sentence(result: subprocess.CompletedProcess[bytes], words: list[str]) -> None:
    text = result.stderr.decode()
    assert result.returncode == 2 and result.stdout == b"", text
    assert re.fullmatch(r"(run_engine|ssdi8-edge): [^\n]+\.\n", text), text
    for word in words:
        assert word in text, text


# --------------------------------------------------------------------------------------------------
# one table


def rows_of_help(command: list[str]) -> dict[str, str]:
    """Flag -> all that --help says of it."""
    done = subprocess.run(
        [*command, "--help"], capture_output=True, text=True, env=ENVIRONMENT, check=True
    )
    rows = re.findall(r"(?m)^  (--[\w-]+).*(?:\n {4,}.*)*", done.stdout)
    texts = re.findall(r"(?m)^  --[\w-]+.*(?:\n {4,}.*)*", done.stdout)
    return dict(zip(rows, texts, strict=True))


def test_help_is_the_same_row_by_row() -> None:
    board, host = rows_of_help(BOARD), rows_of_help(HOST)
    assert set(FLAGS) == set(PROMISED.split())
    for flag in FLAGS:
        assert board[flag] == host[flag]
    assert set(host) - set(FLAGS) == {"--device"}
    for option in SAMPLING:
        assert f"(default: {option.default:g})" in " ".join(board[option.flag].split())


VALUES: Arguments = [
    *("--max-new-tokens=3", "--temperature=1.5", "--top-k=9", "--top-p=0.9", "--min-p=0.01"),
    *("--repetition-penalty=1.1", "--presence-penalty=-0.5", "--frequency-penalty=0.25"),
    *("--seed=12345678901234567890", "--threads=1", "--stop", "x y", "--stop=-z"),
]


def test_every_option_arrives(packed: Path) -> None:
    """And both command lines generate the same with them."""
    found, by_host = (
        report(program(command, packed), "--prompt", "the board", *VALUES)
        for command in (BOARD, HOST)
    )
    for name in ("sampling", "stop", "threads", "tokens"):
        assert found[name] == by_host[name]
    assert len(found["tokens"]) == 3
    assert found["sampling"] == {
        "max_new_tokens": 3, "repetition_penalty": 1.1, "presence_penalty": -0.5,
        "frequency_penalty": 0.25, "temperature": 1.5, "top_k": 9, "top_p": 0.9, "min_p": 0.01,
        "seed": 12345678901234567890,
    }  # fmt: skip
    assert list(found["sampling"]) == [option.name for option in SAMPLING]
    assert (found["stop"], found["threads"]) == (["x y", "-z"], 1)


OUT_OF_RANGE = [
    (option.flag, str(value))
    for option in SAMPLING
    for value in (option.least - 1, option.most + 1, "many", "nan")
]


@pytest.mark.parametrize("flag", [option.flag for option in SAMPLING] + ["--threads", "--stop"])
def test_value_out_of_range_is_one_sentence(
    flag: str, packed: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The same sentence in both, and nothing was loaded for it."""
    import runtime.command_line

    values = [value for known, value in OUT_OF_RANGE if known == flag]
    for value in values or {"--threads": ["0", "1025"], "--stop": [""]}[flag]:
        arguments = [str(packed), "--prompt", "a", f"{flag}={value}"]
        assert runtime.command_line.run(arguments, packed) == 2
        board = capfd.readouterr().err
        with pytest.raises(UsageError) as caught:
            parse_run(arguments)
        host = f"ssdi8-edge: {caught.value}\n"
        assert f"argument {flag}: " in board and board.count("\n") == 1
        assert (
            host.partition(": ")[2].replace("ssdi8-edge run", "run_engine.py")
            == (board.partition(": ")[2])
        )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", "a", "--min-p", "2"], ["--min-p", "'2'", "from 0 to 1"]),
        (["--prompt", "a", "--repetition-penalty", "0"], ["--repetition-penalty", "from 0.01"]),
        (["--prompt", "a", "--presence-penalty", "2.5"], ["--presence-penalty", "from -2 to 2"]),
        (["--prompt", "a", "--stop", ""], ["--stop", "empty"]),
        (["--prompt", "a", "--stop", "--"], ["--stop", "--option=-value"]),
        (["--prompt", b"caf\xe9"], ["--prompt", "not UTF-8", "0xe9 in position 3"]),
        (["--prompt", "a", "--stop", b"caf\xe9"], ["--stop", "not UTF-8"]),
        (["--prompt", ""], ["the prompt is empty"]),
        (["--prompt", "a", "--interactive"], ["--interactive", "not allowed with"]),
        (["--prompt-file", "absent.txt"], ["absent.txt", "No such file", "--prompt-file"]),
        (["--prompt-file", "/"], ["/", "Is a directory", "--prompt-file"]),
        (["--prompt", "a", "--nonsense"], ["--nonsense"]),
    ],
    ids=str,
)
def test_bad_request_is_one_sentence(
    board: Program, arguments: Arguments, words: list[str]
) -> None:
    assert_one_sentence(board(*arguments), words)
    if b"caf\xe9" in arguments:
        assert_one_sentence(board(*arguments, env=PLAIN), words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--prompt", "--interactive", "required", "ssdi8-edge run --help"]),
        (["--prompt", "a", "--min-p", "2"], ["--min-p", "'2'", "from 0 to 1"]),
        (["--prompt", b"caf\xe9"], ["--prompt", "not UTF-8", "0xe9 in position 3"]),
        (["--prompt-file", "absent.txt"], ["absent.txt", "No such file", "--prompt-file"]),
    ],
    ids=str,
)
def test_bad_request_to_the_host(packed: Path, arguments: Arguments, words: list[str]) -> None:
    assert_one_sentence(program(HOST, packed)(*arguments), words)


ROW = """    SamplingOption(
        "ban", int, -1, -1, 9, "ID", "never take this token",
        lambda value, tokens, logits: np.where(np.arange(logits.size) == value, -np.inf, logits),
    ),
"""


def test_a_row_is_all_that_an_option_needs(packed: Path, tmp_path: Path) -> None:
    """Added to a copy of the runtime, it is in both command lines, their help and the JSON."""
    jetson = Path(shutil.copytree(tiny_bundle.JETSON, tmp_path / "jetson"))
    table = jetson / "runtime" / "sampling.py"
    text = table.read_text(encoding="utf-8")
    last = '    SamplingOption("seed"'
    assert text.count(last) == 1
    table.write_text(text.replace(last, ROW + last), encoding="utf-8")
    board = [sys.executable, str(jetson / "run_engine.py")]
    start = (
        f"import pathlib, sys, ssdi8_edge; sys.path.insert(0, {str(jetson)!r});"
        "import ssdi8_edge.ground.board_runtime as b, ssdi8_edge.cli as c;"
        f"b.shipped = lambda name: pathlib.Path({str(tmp_path)!r}, name); c.main()"
    )
    host = [sys.executable, "-c", start, "run"]
    assert "never take this token" in rows_of_help(board)["--ban"] == rows_of_help(host)["--ban"]
    for command in (board, host):
        found = report(program(command, packed), "--prompt", CHAIN, "--max-new-tokens=1", "--ban=9")
        assert found["sampling"]["ban"] == 9
        assert_one_sentence(program(command, packed)("--prompt=a", "--ban=10"), ["from -1 to 9"])


# --------------------------------------------------------------------------------------------------
# stop texts


def test_stop_across_token_borders(either: Program) -> None:
    """Characters of `CHAIN` are several tokens each; the text ends before the stop text."""
    result = either("--prompt", CHAIN, "--stop", "жZ", "--stop", "nowhere")
    assert result.returncode == 0, result.stderr.decode()
    assert result.stdout.decode() == " é🙂\n"


def test_stop_in_json(board: Program) -> None:
    found = report(board, "--prompt", CHAIN, "--stop", "🙂ж")
    assert (found["text"], found["finish"], found["stop"]) == (" é", "stop", ["🙂ж"])
    assert found["new_tokens"] == len(found["tokens"]) == 9  # those of the stop text, too
    # What might have become a stop text is text where generation ends in it.
    cut = report(board, "--prompt", CHAIN, "--stop", "Z é!", "--max-new-tokens", "13")
    assert (cut["text"], cut["finish"]) == (CHAIN + " é", "length")
    last = report(board, "--prompt", CHAIN, "--stop", "Z", "--max-new-tokens", "10")
    assert (last["text"], last["finish"]) == (CHAIN[:-1], "stop")


def test_stop_in_a_conversation(board: Program) -> None:
    """The tokens of the stop text are part of what was said: the next line follows them."""
    lines = f"{CHAIN}\nq\n".encode()
    arguments = ("--interactive", "--json", "--max-new-tokens=12")
    stopped = board(*arguments, "--stop", "жZ", input=lines)
    turns = [json.loads(line) for line in stopped.stdout.splitlines()]
    assert (turns[0]["text"], turns[0]["finish"]) == (" é🙂", "stop")
    assert len(turns[0]["tokens"]) == 10
    whole = board("--interactive", "--json", "--max-new-tokens=10", input=lines)
    expected = [json.loads(line) for line in whole.stdout.splitlines()]
    assert expected[0]["tokens"] == turns[0]["tokens"]
    assert turns[1]["tokens"][:10] == expected[1]["tokens"]


def test_nothing_of_a_stop_text_is_streamed(packed: Path) -> None:
    """While the model is still in what might become the stop text, the text before it is out."""
    arguments = ["--prompt", CHAIN, "--stop", f"Z{CHAIN * 40}!", "--max-new-tokens", "1000000"]
    with subprocess.Popen(
        [*BOARD, str(packed), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
    ) as process:
        assert process.stdout is not None
        seen = process.stdout.read(9).decode()
        process.kill()
    assert seen == CHAIN[:-1]


# --------------------------------------------------------------------------------------------------
# what is read


@pytest.mark.parametrize(
    ("command", "locale"),
    [
        (BOARD, {}),
        (BOARD, PLAIN),
        (BOARD, {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}),
        (HOST, PLAIN),
    ],
    ids=["as it is", "C", "PYTHONIOENCODING", "host, C"],
)
def test_line_that_is_not_utf8(packed: Path, command: list[str], locale: dict[str, str]) -> None:
    """It gets one sentence with its number; the lines around it are continued as ever."""
    lines = b"a\ncaf\xe9\nhello \xc3\xa9\n"
    arguments = ("--interactive", "--json", "--max-new-tokens=3")
    done = program(command, packed)(*arguments, input=lines, env=locale)
    assert done.returncode == 0, done.stderr.decode()
    turns = [json.loads(line) for line in done.stdout.splitlines()]
    assert [turn["prompt"] for turn in turns] == ["a", "hello é"]
    complaints = [line for line in done.stderr.decode().splitlines() if "run_engine:" in line]
    assert len(complaints) == 1 and "Traceback" not in done.stderr.decode()
    assert "line 2 is not UTF-8" in complaints[0] and "0xe9 in position 3" in complaints[0]


@pytest.mark.parametrize(
    ("lines", "prompts"),
    [
        (b"\xef\xbb\xbfa\nb", ["a", "b"]),
        (b"a\r\nb\r\n\r\n", ["a", "b"]),
        (b"a\rb\n", ["a\rb"]),
        (b"a\0b\n", ["a\0b"]),
        (b"x" * 20_000 + b"\n", ["x" * 20_000]),
        (b"\xff\n\xfe\n", []),
        (b"", []),
    ],
    ids=["byte order mark", "CRLF", "CR", "NUL", "long", "no text at all", "nothing"],
)
def test_odd_lines(board: Program, lines: bytes, prompts: list[str]) -> None:
    done = board("--interactive", "--json", "--max-new-tokens=1", input=lines)
    assert done.returncode == 0, done.stderr.decode()
    assert [json.loads(line)["prompt"] for line in done.stdout.splitlines()] == prompts
    assert "Traceback" not in done.stderr.decode()


@pytest.mark.parametrize(
    "bytes_", [b"\xef\xbb\xbfthe \xc3\xa9\r\n", b"the \xc3\xa9\n", b"the \xc3\xa9"]
)
def test_prompt_file(board: Program, tmp_path: Path, bytes_: bytes) -> None:
    """Without a byte order mark and one final line end; in any locale, and from stdin."""
    (tmp_path / "prompt.txt").write_bytes(bytes_)
    short = ("--max-new-tokens", "1")
    for file, stdin in ((str(tmp_path / "prompt.txt"), b""), ("-", bytes_)):
        found = report(board, "--prompt-file", file, *short, input=stdin, env=PLAIN)
        assert found["prompt"] == "the é"


def test_words_in_a_locale_without_utf8(either: Program) -> None:
    found = report(either, "--prompt", "the é", "--stop", "é", "--max-new-tokens=1", env=PLAIN)
    assert (found["prompt"], found["stop"]) == ("the é", ["é"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"caf\xe9", ["not UTF-8", "convert it"]),
        ("text".encode("utf-16"), ["not UTF-8", "convert it"]),
        (b"\xef\xbb\xbf\n", ["prompt is empty"]),
    ],
)
def test_prompt_file_that_is_no_text(
    board: Program, tmp_path: Path, content: bytes, words: list[str]
) -> None:
    (tmp_path / "odd.txt").write_bytes(content)
    assert_one_sentence(board("--prompt-file", str(tmp_path / "odd.txt")), words)
    assert_one_sentence(board("--prompt-file", "-", input=content), words)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_prompt_file_that_may_not_be_read(board: Program, tmp_path: Path) -> None:
    (tmp_path / "closed.txt").write_text("a")
    (tmp_path / "closed.txt").chmod(0)
    assert_one_sentence(
        board("--prompt-file", str(tmp_path / "closed.txt")), ["closed.txt", "Permission denied"]
    )


@pytest.mark.parametrize("arguments", [["--interactive"], ["--prompt-file", "-"]], ids=str)
def test_stdin_is_closed(board: Program, arguments: Arguments) -> None:
    done = board(*arguments, stdin=None, preexec_fn=lambda: os.close(0))
    assert_one_sentence(done, ["stdin is closed"])


@pytest.mark.parametrize("closed", [1, 2])
def test_output_is_closed(board: Program, closed: int) -> None:
    done = board(
        *("--interactive", "--max-new-tokens=3"),
        input=b"a\n",
        preexec_fn=lambda: os.close(closed),
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr


@pytest.mark.parametrize("json_", [[], ["--json"]], ids=str)
def test_reader_goes_away_in_a_conversation(packed: Path, json_: list[str]) -> None:
    command = [*BOARD, str(packed), "--interactive", "--max-new-tokens", "20", *json_]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None and process.stderr is not None
        process.stdin.write(b"a\n")
        process.stdin.flush()
        process.stdout.read(1)
        process.stdout.close()
        process.stdin.write(b"b\n" * 50)
        process.stdin.close()
        errors = process.stderr.read()
    assert process.returncode == 141 and b"Traceback" not in errors


def test_host_becomes_the_runtime(packed: Path) -> None:
    """So that Ctrl-C and the terminal are the runtime's."""
    with subprocess.Popen(
        [*HOST, str(packed), "--interactive"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdin is not None and process.stderr is not None
        while b"Ctrl-D ends" not in process.stderr.readline():
            pass
        assert b"run_engine.py" in Path(f"/proc/{process.pid}/cmdline").read_bytes()
        time.sleep(0.3)  # until it waits for a line
        process.send_signal(signal.SIGINT)
        assert b"Ctrl-D ends" in process.stderr.readline() + process.stderr.readline()
        process.stdin.close()
        assert process.wait(timeout=60) == 0


# --------------------------------------------------------------------------------------------------
# --device cuda


@pytest.fixture
def gpu(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's place is taken by onnxruntime."""
    monkeypatch.setattr(gpu_backend, "require_device", lambda device: None)
    monkeypatch.setattr(gpu_backend, "is_quantized_checkpoint", lambda folder: True)
    monkeypatch.setattr(gpu_backend, "load_quantized", lambda folder, device, context: None)
    monkeypatch.setattr(gpu_backend, "kernel_library", SimpleNamespace(load=lambda: None))
    stand_in(monkeypatch, lambda: OnnxRuntimeBackend(open_bundle(packed), threads=1))
    monkeypatch.setitem(BACKENDS, "torch", lambda bundle, options: None)


def stand_in(monkeypatch: pytest.MonkeyPatch, opening: Callable[[], OnnxRuntimeBackend]) -> None:
    class GpuBackend:
        runtime = "torch"

        def __new__(cls, *_: object) -> OnnxRuntimeBackend:  # type: ignore[misc]
            return opening()

    monkeypatch.setattr(gpu_backend, "GpuBackend", GpuBackend)


def on_gpu(folder: Path, *arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.app(["run", str(folder), "--device", "cuda", *arguments])
    return int(ended.value.code or 0)


def test_gpu_takes_the_same(
    packed: Path, gpu: None, board: Program, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [word for word in VALUES if isinstance(word, str)]
    assert on_gpu(packed, "--prompt", "the board", *arguments, "--json") == 0
    found = json.loads(capfd.readouterr().out)
    expected = report(board, "--prompt", "the board", *VALUES)
    for name in ("sampling", "stop", "tokens", "text", "finish", "threads"):
        assert found[name] == expected[name]


def test_ctrl_c_on_a_gpu(packed: Path, gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes to the runtime as KeyboardInterrupt, and leaves it as an end with 130."""
    before = signal.getsignal(signal.SIGINT)

    def interrupted() -> OnnxRuntimeBackend:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        raise AssertionError("nobody heard Ctrl-C")

    stand_in(monkeypatch, interrupted)
    with pytest.raises(Interrupted):
        gpu_backend.run_on_gpu(packed, ["--prompt", "a"], "cuda")
    assert signal.getsignal(signal.SIGINT) is before
