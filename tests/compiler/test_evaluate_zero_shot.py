"""evaluate/: the zero-shot tasks, on local data and through lm-eval, item by item."""

from __future__ import annotations

import json
import os
import socket
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import mamba
from serving import Served
from tiny_model import byte_tokenizer, one_thread, write_model, write_text
from tokenizers.processors import TemplateProcessing
from zero_shot_data import ARC, HELLASWAG, ITEMS, NO_HARNESS, PIQA, WINOGRANDE, write_data

from ssdi8_edge.checkpoints.checkpoint import open_checkpoint
from ssdi8_edge.checkpoints.layouts.state_spaces import stored_name
from ssdi8_edge.compile.pipeline import Build, BuildRequest
from ssdi8_edge.evaluate import open_subject, tasks
from ssdi8_edge.evaluate.evaluation import evaluate, plan
from ssdi8_edge.evaluate.tasks import TASKS
from ssdi8_edge.ground.errors import UsageError
from ssdi8_edge.recipes.presets import METHODS
from ssdi8_edge.targets import load_target

__all__ = ["one_thread"]  # a fixture, taken over


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "zeroshot")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run folder of edge-w8a8."""
    out = tmp_path_factory.mktemp("run")
    text = write_text(out / "text.txt")
    recipe = METHODS["edge-w8a8"]
    Build(BuildRequest(str(model), recipe, load_target("host-cpu"), out / "run", text)).run()
    return out / "run"


@pytest.fixture(scope="module")
def harness() -> Any:
    """The bridge, where what it leads to is installed; data sets never come from a hub here."""
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    pytest.importorskip("lm_eval", reason=NO_HARNESS)
    from ssdi8_edge.evaluate import harness

    return harness


@pytest.fixture(scope="module")
def opened(harness: Any, data: Path) -> Iterator[dict[str, Any]]:
    """All six tasks on the local data."""
    rows = {task.name: task.local_rows(data) for task in TASKS.values()}
    with harness.open_tasks(list(TASKS.values()), rows) as found:
        yield found


Pair = tuple[str, str]


def likelihoods(harness: Any, source: Path, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
    """What our LM answers to all pairs at once."""
    lm = harness.SubjectLM(open_subject(str(source)))
    requests = [
        harness.Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)
    ]
    found: list[tuple[float, bool]] = lm.loglikelihood(requests)
    return found


# Of lengths 2 to some hundreds, with shared contexts, shared inputs, and a chunk of 16 in between.
PAIRS: list[Pair] = [
    ("A", "b"),
    ("The sea was", " calm"),
    ("The sea was", " calX"),
    ("The sea was", " rough and full of foam that night"),
    (" ".join(["night"] * 40), " fell"),
    ("x" * 15, "y"),
    ("x" * 16, "y"),
    ("x" * 17, "yy"),
    ("Trailing space ", "moves"),
]


# --------------------------------------------------------------------------------------------------
# log-likelihoods


def test_likelihood_is_that_of_the_continuation(harness: Any, model: Path) -> None:
    """Sum of log-probabilities of its tokens, and whether each is the likeliest."""
    subject = open_subject(str(model))
    for (context, continuation), (found, greedy) in zip(
        PAIRS, likelihoods(harness, model, PAIRS), strict=True
    ):
        ids = torch.tensor(byte_tokenizer().encode(context + continuation).ids)
        log_p = subject.logits(ids[None])[0].double().log_softmax(-1)
        places = range(len(context.rstrip()), len(ids))  # spaces belong to what follows
        expected = sum(log_p[i - 1, ids[i]].item() for i in places)
        assert found == pytest.approx(expected, abs=1e-4)
        assert greedy == all(log_p[i - 1].argmax() == ids[i] for i in places)


def test_greedy_continuation_is_recognized(harness: Any, model: Path) -> None:
    """What the model itself would write, and the same with another end."""
    subject = open_subject(str(model))
    ids = list(b"The sea")
    for _ in range(3):
        ids.append(int(subject.logits(torch.tensor([ids]), 1).argmax()))
    lm = harness.SubjectLM(subject)
    requests = [(("", ""), ids[:7], ids[7:]), (("", ""), ids[:7], [*ids[7:9], ids[9] ^ 1])]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(requests)] == [True, False]


@pytest.mark.parametrize("kind", ["fp32", "quantized", "bundle"])
def test_a_batch_answers_as_its_members_do(harness: Any, model: Path, run: Path, kind: str) -> None:
    """Padding on the right changes nothing: INT8 bit for bit, FP32 but for the order of sums."""
    source = {"fp32": model, "quantized": run / "quantized", "bundle": run}[kind]
    together = likelihoods(harness, source, PAIRS)
    alone = [likelihoods(harness, source, [pair])[0] for pair in PAIRS]
    if kind == "fp32":
        assert [g for _, g in together] == [g for _, g in alone]
        assert [v for v, _ in together] == pytest.approx([v for v, _ in alone], abs=1e-4)
    else:
        assert together == alone


def test_batches_keep_to_their_budget_and_show_progress(harness: Any, model: Path) -> None:
    """Longest first; every input once, also when it serves several continuations."""
    lm = harness.SubjectLM(open_subject(str(model)))
    inputs = [tuple(range(length)) for length in (3, 900, 700, 1025, *[4] * 9, 2000)]
    batches = lm._batches(inputs)
    lengths = [[len(tokens) for tokens in batch] for batch in batches]
    assert lengths == [[2000], [1025], [900, 700], [4] * 8, [4, 3]]
    seen: list[tuple[int, str]] = []

    def track(items: Sequence[Any], label: str) -> Sequence[Any]:
        seen.append((sum(map(len, items)), label))
        return items

    lm = harness.SubjectLM(open_subject(str(model)), track)
    lm._loglikelihood_tokens([(("", ""), [1, 2], [3]), (("", ""), [1, 2], [4])])
    assert seen == [(1, "evaluating fp32 zero-shot")]


def test_long_input_loses_its_beginning(
    harness: Any, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert harness.MAX_TOKENS == 2048
    monkeypatch.setattr(harness, "MAX_TOKENS", 32)
    long, cut = likelihoods(harness, model, [("ab" * 100, "cd"), ("ab" * 15 + "b", "cd")])
    assert long != cut
    assert long == likelihoods(harness, model, [(("ab" * 100)[-31:], "cd")])[0]


def test_texts_start_and_end_as_the_checkpoint_says(harness: Any, model: Path) -> None:
    """The template's BOS stands before a context and for an empty one, never inside."""
    subject = open_subject(str(model))
    with_bos = subject.tokenizer.parent / "with_bos.json"
    tokenizer = byte_tokenizer()
    tokenizer.post_processor = TemplateProcessing(single="! $A", special_tokens=[("!", 0)])
    tokenizer.save(str(with_bos))
    lm = harness.SubjectLM(replace(subject, tokenizer=with_bos, end_ids=(7, 8)))
    from lm_eval.api.instance import Instance

    seen: list[Any] = []
    lm._loglikelihood_tokens = lambda requests, **_: seen.extend(requests) or []
    lm.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in (("ab", "c"), ("", "c"))])
    plain = byte_tokenizer().encode("abc").ids
    assert [request[1:] for request in seen] == [([0, *plain[:2]], plain[2:]), ([0], plain[2:])]
    assert lm.eot_token_id == 7
    lm = harness.SubjectLM(open_subject("demo"))
    assert lm.eot_token_id == lm.prefix_token_id == lm.tok_encode("<|endoftext|>")[0]


def test_empty_context_without_an_end_of_text(harness: Any, model: Path) -> None:
    with pytest.raises(UsageError, match=r"no <\|endoftext\|>, which an empty context needs; name"):
        likelihoods(harness, model, [("", "abc")])


# --------------------------------------------------------------------------------------------------
# texts


def generated(lm: Any, context: str, **settings: Any) -> str:
    from lm_eval.api.instance import Instance

    (text,) = lm.generate_until([Instance("generate_until", {}, (context, settings), 0)])
    return str(text)


@pytest.mark.parametrize("kind", ["fp32", "quantized", "bundle"])
def test_text_is_that_of_the_likeliest_tokens(
    harness: Any, model: Path, run: Path, kind: str
) -> None:
    """Each given back to the model, also after a context of several pieces."""
    source = {"fp32": model, "quantized": run / "quantized", "bundle": run}[kind]
    subject = open_subject(str(source))
    lm = harness.SubjectLM(subject)
    for context in ("The sea", "night " * 50):
        feed, ids = subject.sequence(), byte_tokenizer().encode(context).ids
        with torch.inference_mode():
            logits = feed(torch.tensor([ids]))
            tokens = [int(logits[0, -1].argmax())]
            for _ in range(4):
                tokens.append(int(feed(torch.tensor([tokens[-1:]]))[0, -1].argmax()))
        assert generated(lm, context, until=[], max_gen_toks=5) == byte_tokenizer().decode(tokens)


def spelling(subject: Any, text: str, end: int) -> Any:
    """The subject with a model that says each letter of `text` after the one before, then `end`."""
    ids = [*byte_tokenizer().encode(text).ids, end]
    following = dict(pairwise(ids))

    def sequence() -> Any:
        def feed(given: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros(1, given.shape[1], 256)
            logits[0, -1, following.get(int(given[0, -1]), 0)] = 1.0
            return logits

        return feed

    return replace(subject, sequence=sequence, end_ids=(7, end))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"until": ["xyz"]}, "bcdéfgh"),
        ({}, "bcdéfgh"),
        ({"until": "f"}, "bcdé"),
        ({"until": ["", "gh", "dé"]}, "bc"),
        ({"until": ["hi"], "max_gen_toks": 3}, "bcd"),
        ({"until": ["h?"], "do_sample": False, "temperature": 0.0}, "bcdéfgh"),
        ({"max_new_tokens": 5}, "bcdé"),
        ({"max_gen_toks": 0}, ""),
    ],
)
def test_text_ends_at_an_end_of_text_and_at_stop_texts(
    harness: Any, model: Path, settings: dict[str, Any], text: str
) -> None:
    """Stop texts across the borders of tokens, left out; a character of two tokens stays whole."""
    lm = harness.SubjectLM(spelling(open_subject(str(model)), "abcdéfgh", 9))
    assert generated(lm, "x a", **settings) == text


def test_a_text_that_cannot_be_asked_for(harness: Any, model: Path) -> None:
    lm = harness.SubjectLM(open_subject(str(model)))
    with pytest.raises(UsageError, match="the task samples its texts"):
        generated(lm, "a", do_sample=True, temperature=0.7)
    with pytest.raises(UsageError, match="generates 2048 tokens, which leaves no room"):
        generated(lm, "a", max_gen_toks=2048)


def test_a_task_that_generates(harness: Any, model: Path, tmp_path: Path) -> None:
    """Through lm-eval: what stands after the end of a text does not count."""
    rows = [{"question": "x a", "answer": "bcd"}, {"question": "a", "answer": "bcde"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    definition = {
        "task": "spelling",
        "output_type": "generate_until",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "rows.jsonl")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n"]},
        "metric_list": [{"metric": "exact_match"}],
    }
    (tmp_path / "spelling.yaml").write_text(json.dumps(definition))
    manager = harness.TaskManager(include_path=str(tmp_path), include_defaults=False)
    loaded = manager.load(["spelling"])["tasks"]["spelling"]
    task = replace(TASKS["piqa"], name="spelling", harness="spelling")
    lm = harness.SubjectLM(spelling(open_subject(str(model)), "abcd", 9))
    found = harness.run_tasks(lm, {"spelling": harness.OpenTask(task, loaded)}, None)
    assert [sample["exact_match"] for sample in found["samples"]["spelling"]] == [1, 0]


# --------------------------------------------------------------------------------------------------
# tasks


@pytest.mark.parametrize(
    ("task", "pairs"),
    [
        ("lambada", [("She took the lamp and lit the", " lamp")]),
        (
            "piqa",
            [
                ("Question: open a jar\nAnswer:", " turn the lid"),
                ("Question: open a jar\nAnswer:", " eat the lid"),
            ],
        ),
        *(
            (
                name,
                [
                    (f"Question: {ARC['question']}\nAnswer:", f" {choice}")
                    for choice in ARC["choices"]
                ],
            )
            for name in ("arc_easy", "arc_challenge")
        ),
        (
            "hellaswag",
            [
                ("Baking: A man mixes flour. He", f" {ending}")
                for ending in ("pours water.", "flies. away.", "sleeps.", "sings.")
            ],
        ),
        (
            "winogrande",
            [
                (f"The cup fell off the shelf as the {option}", " was loose.")
                for option in ("cup", "shelf")
            ],
        ),
    ],
)
def test_local_rows_ask_what_the_published_ones_ask(
    opened: dict[str, Any], task: str, pairs: list[Pair]
) -> None:
    """The prompts of the first item, as lm-eval's definitions make them."""
    loaded = opened[task].loaded
    loaded.build_all_requests(limit=1, rank=0, world_size=1)
    assert [instance.args for instance in loaded.instances] == pairs


def test_accuracies_and_their_standard_errors(
    harness: Any, opened: dict[str, Any], model: Path
) -> None:
    """The paper's metric of each task, as lm-eval reports it and by hand."""
    subject = open_subject(str(model))
    results = harness.run_tasks(harness.SubjectLM(subject), opened, None)
    found = harness.accuracies(subject, opened)
    metrics = {each.task: each.metric for each in found}
    assert metrics == {
        **dict.fromkeys(("lambada", "piqa", "arc_easy", "winogrande"), "acc"),
        **dict.fromkeys(("hellaswag", "arc_challenge"), "acc_norm"),
    }
    for each in found:
        name = TASKS[each.task].harness
        outcomes = [sample[each.metric] for sample in results["samples"][name]]
        assert each.items == ITEMS == len(outcomes)
        assert each.accuracy == pytest.approx(sum(outcomes) / ITEMS)
        assert each.stderr == pytest.approx((statistics.variance(outcomes) / ITEMS) ** 0.5)
    assert any(each.stderr > 0 for each in found)
    assert all(each.items == 2 for each in harness.accuracies(subject, opened, limit=2))
    assert all(each.stderr == 0 for each in harness.accuracies(subject, opened, limit=1))


def test_answers_follow_the_data(harness: Any, data: Path, model: Path, tmp_path: Path) -> None:
    """Turning every right answer of piqa into the wrong one turns the accuracy around."""
    other = write_data(tmp_path / "other")
    labels = (data / "piqa_valid-labels.lst").read_text()
    (other / "piqa_valid-labels.lst").write_text(labels.translate({48: 49, 49: 48}))
    right, wrong = (
        evaluate([open_subject(str(model))], plan(["piqa"], data=folder))[0].accuracies[0].accuracy
        for folder in (data, other)
    )
    assert right + wrong == pytest.approx(1.0)


def test_nothing_is_fetched(
    harness: Any, data: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With local data no address is looked up and no connection made."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    measures = plan(list(TASKS), data=data, limit=1)
    (row,) = evaluate([open_subject(str(model))], measures)
    assert [each.task for each in row.accuracies] == list(TASKS)


def test_hub_that_cannot_be_reached(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with (
        pytest.raises(
            UsageError, match=r"cannot fetch the data of piqa from the hub .* by --data\."
        ),
        harness.open_tasks([TASKS["piqa"]], {}),
    ):
        pass


# --------------------------------------------------------------------------------------------------
# lm-eval's own backend


def hugging_face_lm(source: str) -> Any:
    """lm-eval's Hugging Face backend on the same weights and tokenizer."""
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle")
    pytest.importorskip("accelerate", reason="accelerate (with lm-eval's hf backend) is missing")
    from lm_eval.models.huggingface import HFLM

    checkpoint = open_checkpoint(source)
    model, sizes = checkpoint.description, mamba(checkpoint.description)
    config = transformers.Mamba2Config(
        hidden_size=model.d_model,
        num_hidden_layers=model.n_layer,
        vocab_size=model.vocab_size,
        state_size=sizes.d_state,
        head_dim=sizes.headdim,
        num_heads=sizes.nheads,
        n_groups=sizes.ngroups,
        chunk_size=sizes.chunk_size,
        tie_word_embeddings=True,
    )
    network = transformers.Mamba2ForCausalLM(config).eval()
    network.load_state_dict(
        {
            stored_name(n).replace(".embedding.", ".embeddings."): checkpoint.tensor(n).float()
            for n in checkpoint.names
        }
    )
    assert checkpoint.tokenizer_path is not None
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(checkpoint.tokenizer_path), eos_token="<|endoftext|>"
    )
    return HFLM(
        pretrained=network,
        tokenizer=tokenizer,
        backend="causal",
        max_length=2048,
        batch_size=4,
        device="cpu",
    )


def assert_same_answers(found: dict[str, Any], wanted: dict[str, Any], items: int) -> None:
    """Every item of every task right or wrong alike, likelihoods 1e-3 apart."""
    for name in (task.harness for task in TASKS.values()):
        assert len(found["samples"][name]) == items
        for ours, theirs in zip(found["samples"][name], wanted["samples"][name], strict=True):
            assert ours["doc_hash"] == theirs["doc_hash"]
            for metric in ("acc", "acc_norm"):
                assert ours.get(metric) == theirs.get(metric)
            for (value, greedy), (their_value, their_greedy) in zip(
                ours["filtered_resps"], theirs["filtered_resps"], strict=True
            ):
                assert value == pytest.approx(their_value, abs=1e-3)
                assert greedy == their_greedy


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_scores_are_those_of_the_hugging_face_backend(harness: Any, opened: dict[str, Any]) -> None:
    """The demo model: every item of every task right or wrong alike, likelihoods 1e-3 apart."""
    wanted = harness.run_tasks(hugging_face_lm("demo"), opened, 2)
    found = harness.run_tasks(harness.SubjectLM(open_subject("demo")), opened, 2)
    assert_same_answers(found, wanted, 2)
    for name in (task.harness for task in TASKS.values()):
        metric = next(task.metric for task in TASKS.values() if task.harness == name)
        key = f"{metric},none"
        assert found["results"][name][key] == wanted["results"][name][key]


# --------------------------------------------------------------------------------------------------
# through the server


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_server_scores_item_for_item_as_evaluate_does(
    harness: Any, opened: dict[str, Any], run: Path, tmp_path: Path
) -> None:
    """lm-eval's own client of OpenAI's API, against the bundle that `evaluate` opens."""
    transformers = pytest.importorskip("transformers", reason="transformers splits for lm-eval")
    pytest.importorskip("tenacity", reason="lm-eval's API models need tenacity")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    bundle = run / "bundle"
    transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(bundle / "tokenizer.json"), eos_token="<|endoftext|>"
    ).save_pretrained(tmp_path)
    wanted = harness.run_tasks(harness.SubjectLM(open_subject(str(run))), opened, ITEMS)
    with Served(bundle) as server:
        lm = LocalCompletionsAPI(
            base_url=f"{server.url}/v1/completions",
            model=server.model,
            tokenizer=str(tmp_path),
            tokenizer_backend="huggingface",
            max_retries=1,
            batch_size=3,
        )
        found = harness.run_tasks(lm, opened, ITEMS)
    assert_same_answers(found, wanted, ITEMS)


# --------------------------------------------------------------------------------------------------
# data that does not fit


@pytest.mark.parametrize(
    ("task", "spoiled"),
    [
        ("lambada", {"text": "one"}),
        ("lambada", {"words": "a b"}),
        ("piqa", {**PIQA, "sol2": ""}),
        ("arc_easy", {**ARC, "gold": 3}),
        ("arc_easy", {**ARC, "gold": "C"}),
        ("arc_challenge", {**ARC, "choices": []}),
        ("hellaswag", {**HELLASWAG, "label": ""}),
        ("hellaswag", {**HELLASWAG, "label": 4}),
        ("winogrande", {**WINOGRANDE, "sentence": "no gap"}),
        ("winogrande", {**WINOGRANDE, "answer": ""}),
        ("winogrande", "a string"),
    ],
)
def test_row_of_another_form(task: str, spoiled: Any, tmp_path: Path) -> None:
    """The file, the line and the form that it should have."""
    folder = write_data(tmp_path / "data")
    path = folder / TASKS[task].file
    lines = path.read_text().splitlines()
    lines[4] = json.dumps(spoiled)
    path.write_text("\n".join(lines))
    with pytest.raises(UsageError) as refused:
        TASKS[task].local_rows(folder)
    assert f"{path}, line 5, has not the form {TASKS[task].form}" in str(refused.value)


def test_files_of_another_kind(tmp_path: Path) -> None:
    folder = write_data(tmp_path / "data")
    labels = folder / "piqa_valid-labels.lst"
    for answers in ("0\n" * (ITEMS - 1), "2\n" * ITEMS):
        labels.write_text(answers)
        with pytest.raises(UsageError, match=rf"labels\.lst does not hold {ITEMS} answers"):
            TASKS["piqa"].local_rows(folder)
    labels.unlink()
    with pytest.raises(UsageError, match=r"no piqa_valid-labels\.lst below"):
        TASKS["piqa"].local_rows(folder)
    path = folder / "lambada_test.jsonl"
    for content, word in ((b"{", "as JSON lines"), (b"\xff\n", "as JSON lines"), (b"", "is empty")):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=rf"lambada_test\.jsonl.* {word}|{word}"):
            TASKS["lambada"].local_rows(folder)


def test_without_lm_eval(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is computed, with what to install."""

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    for found, word in ((missing, "is not installed"), (lambda name: "0.4.2", "not 0.4.2")):
        monkeypatch.setattr(tasks, "version", found)
        with pytest.raises(UsageError, match=rf"{word}; pip install 'ssdi8-edge\[eval\]'\."):
            plan(["piqa"], data=data)
    assert plan(["wikitext2"], [], _with_wikitext2(data)).tasks == ()


def _with_wikitext2(folder: Path) -> Path:
    (folder / "wiki.test.raw").write_text(" \n = A = \n")
    return folder


# --------------------------------------------------------------------------------------------------
# what to measure


def test_plan_puts_tasks_in_the_order_of_the_paper(harness: Any, data: Path) -> None:
    measures = plan(["winogrande", "wikitext2", "lambada", "winogrande"], [], _with_wikitext2(data))
    assert [task.name for task in measures.tasks] == ["lambada", "winogrande"]
    assert [text.name for text in measures.texts] == ["wikitext2"]
    assert len(measures.rows["lambada"]) == ITEMS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ["nope"]}, r"unknown task 'nope'; known: wikitext2, lambada, .*, winogrande\."),
        ({"names": []}, "nothing to evaluate on; name --tasks or a --text"),
        ({"names": ["wikitext2"], "limit": 0}, "--limit 0 evaluates nothing; give at least 1"),
        ({"names": ["wikitext2"], "data": Path("/nowhere")}, "/nowhere is not a folder"),
    ],
)
def test_plan_that_does_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(**arguments)


def test_long_context_without_a_text(harness: Any, data: Path) -> None:
    with pytest.raises(
        UsageError, match=r"needs a text; add wikitext2 to --tasks or name a --text"
    ):
        plan(["piqa"], data=data, long_context=True)


def test_every_measure_of_every_model(
    harness: Any, model: Path, run: Path, data: Path, tmp_path: Path
) -> None:
    """One row a model, in the order given; the average is that of the tasks."""
    text = write_text(tmp_path / "text.txt", size=200)
    measures = plan(["piqa", "lambada"], [text], data, limit=4)
    subjects = [open_subject(str(source)) for source in (model, run / "quantized", run)]
    rows = evaluate(subjects, measures)
    assert [row.model for row in rows] == ["fp32", "edge-w8a8", "edge-w8a8"]
    assert [row.engine for row in rows] == [subject.engine for subject in subjects]
    for row in rows:
        lambada, piqa = row.accuracies
        assert (lambada.items, piqa.items) == (4, 4)
        assert row.average is not None
        assert row.average.accuracy == pytest.approx((lambada.accuracy + piqa.accuracy) / 2)
        stderr = (lambada.stderr**2 + piqa.stderr**2) ** 0.5 / 2
        assert row.average.stderr == pytest.approx(stderr)
        assert [record["measure"] for record in row.records()] == [
            *("perplexity", "accuracy", "accuracy", "average")
        ]
        assert json.loads(json.dumps(row.records()))[0]["model"] == row.model
    assert rows[0].perplexities[0].kl is None and rows[1].perplexities[0].kl is not None
