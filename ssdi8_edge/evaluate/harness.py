"""The bridge to lm-eval: our models as its LM, its tasks on our data, its answers as accuracies.

Imports lm-eval, so that it is itself imported only where the extra `eval` is installed.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import lm_eval.api.task
import torch
from datasets import disable_progress_bars
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, TemplateLM
from lm_eval.tasks import TaskManager
from torch import Tensor
from tqdm import tqdm

from runtime.failures import during
from runtime.stop import StopTexts
from runtime.text import TextStream
from ssdi8_edge.evaluate.decode import PIECE
from ssdi8_edge.evaluate.local_data import Row
from ssdi8_edge.evaluate.subject import Subject
from ssdi8_edge.evaluate.tasks import Accuracy, Task
from ssdi8_edge.ground.errors import UsageError
from ssdi8_edge.ground.progress import Track, silent
from ssdi8_edge.ground.spool import GPU_TOKENS_PER_BATCH, TOKENS_PER_BATCH
from ssdi8_edge.ground.tokens import CUSTOMARY_ENDS, open_tokenizer

# docs/method.md §11.2: longer inputs lose their beginning.
MAX_TOKENS = 2048
# How many tokens a task that does not say generates: lm-eval's own default.
NEW_TOKENS = 256
# Its names of that, the one that is heeded first at the front.
NEW_TOKENS_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# What a short sequence counts for: the torch references pad it to a whole chunk.
CHUNK = 256

# Of lm-eval: the texts, the tokens of the context, the tokens of the continuation.
Request = tuple[tuple[str, str], list[int], list[int]]
Answer = tuple[float, bool]

# A bar for each task and model, of what takes no time.
lm_eval.api.task.tqdm = partial(tqdm, disable=True)


class OpenTask(NamedTuple):
    """A task of ours and lm-eval's object of it."""

    task: Task
    loaded: lm_eval.api.task.Task


class SubjectLM(TemplateLM):
    """A subject as lm-eval sees one: log-likelihoods of continuations, in batches; greedy texts.

    A batch holds inputs of similar length, padded on the right: the model is causal and its scales
    are static, so that a result does not depend on the batch. The state after a context is not
    shared between its continuations: it would be stored between two calls, in the recipe's type
    and off a chunk boundary, which changes the results of INT8.
    """

    def __init__(self, subject: Subject, track: Track = silent) -> None:
        super().__init__()
        self._subject, self._track = subject, track
        self._encoder = open_tokenizer(subject.tokenizer)

    @property
    def eot_token_id(self) -> int:
        """Ends a text, and stands for an empty context where no special token starts a text.

        Raises:
            UsageError: nothing says what ends a text.
        """
        if not self._subject.end_ids:
            raise UsageError(
                f"{self._subject.source} names no end of text and its tokenizer has no "
                f"{CUSTOMARY_ENDS[0]}, which an empty context needs;",
                "name the model's own --tokenizer.",
            )
        return self._subject.end_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """Stands for an empty context."""
        start: list[int] = self._encoder.start_ids("a")
        return start[-1] if start else self.eot_token_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        ids: list[int] = self._encoder.encode(string)
        start = 0 if add_special_tokens is not False else len(self._encoder.start_ids(string))
        return ids[start:]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Answer]:
        answers: list[Answer] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> Any:
        raise NotImplementedError("perplexity is measured by ssdi8_edge.evaluate.windows")

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The greedy text after each context, to an end of text or to one of its stop texts.

        Raises:
            UsageError: a task wants to sample, or leaves no room for its contexts.
        """
        label = f"evaluating {self._subject.name} zero-shot"
        texts = []
        for request in self._track(requests, label):
            with during(label, "end other programs, or name fewer models at once"):
                texts.append(self._text(*request.args))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def _text(self, context: str, settings: Mapping[str, Any]) -> str:
        if settings.get("do_sample") and settings.get("temperature"):
            raise UsageError(
                "the task samples its texts, and here the likeliest token is taken;",
                "set do_sample: false in its generation_kwargs.",
            )
        given = (settings[name] for name in NEW_TOKENS_NAMES if settings.get(name) is not None)
        limit = int(next(given, NEW_TOKENS))
        if limit >= MAX_TOKENS:
            raise UsageError(
                f"the task generates {limit} tokens, which leaves no room for its contexts;",
                f"set max_gen_toks in its generation_kwargs below {MAX_TOKENS}.",
            )
        until = settings.get("until") or []
        stop = StopTexts([text for text in ([until] if isinstance(until, str) else until) if text])
        ids = (self.tok_encode(context) or [self.prefix_token_id])[limit - MAX_TOKENS :]
        stream = TextStream(self._encoder, ids)
        text = ""
        for token in self._greedy(ids, limit):
            if token in self._subject.end_ids:
                break
            text += stop.add(stream.add(token))
            if stop.found:
                return text
        return text + stop.add(stream.finish()) + ("" if stop.found else stop.flush())

    def _greedy(self, ids: list[int], limit: int) -> Iterator[int]:
        """The likeliest tokens after `ids`, each given back to the model."""
        feed, device = self._subject.sequence(), self._subject.device
        given = [ids[start : start + PIECE] for start in range(0, len(ids), PIECE)]
        for _ in range(limit):
            with torch.inference_mode():
                for piece in given:
                    logits = feed(torch.tensor([piece], device=device))
            token = int(logits[0, -1].argmax())
            yield token
            given = [[token]]

    def _loglikelihood_tokens(self, requests: Sequence[Request], **kwargs: Any) -> list[Answer]:
        """(log-likelihood in nats, whether it is the greedy continuation) of each request."""
        by_input: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            given = tuple((context + continuation)[-(MAX_TOKENS + 1) : -1])
            by_input.setdefault(given, []).append(number)
        answers: dict[int, Answer] = {}
        label = f"evaluating {self._subject.name} zero-shot"
        lower = "end other programs, or name fewer models at once"
        for batch in self._track(self._batches(list(by_input)), label):
            wanted = [[requests[number][2] for number in by_input[tokens]] for tokens in batch]
            with during(label, lower):
                scored = self._score(batch, wanted)
            for tokens, found in zip(batch, scored, strict=True):
                answers.update(zip(by_input[tokens], found, strict=True))
        return [answers[number] for number in range(len(requests))]

    def _batches(self, inputs: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
        """Inputs together, the longest first, up to so many tokens in whole chunks."""
        budget = TOKENS_PER_BATCH if self._subject.device == "cpu" else GPU_TOKENS_PER_BATCH
        batches: list[list[tuple[int, ...]]] = []
        room = 0
        for tokens in sorted(inputs, key=len, reverse=True):
            if not room:
                batches.append([])
                room = max(1, budget // (-(-len(tokens) // CHUNK) * CHUNK))
            batches[-1].append(tokens)
            room -= 1
        return batches

    def _score(
        self, inputs: list[tuple[int, ...]], continuations: list[list[list[int]]]
    ) -> list[list[Answer]]:
        """Answers for each input's continuations; each ends one token after its input."""
        # A single token would take the path of decoding, whose state is not quantized.
        width = max(2, len(inputs[0]))
        ids = torch.zeros(len(inputs), width, dtype=torch.int64)
        for row, tokens in zip(ids, inputs, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        starts = [
            len(tokens) - max(map(len, wanted))
            for tokens, wanted in zip(inputs, continuations, strict=True)
        ]
        first = min(starts)
        logits = self._subject.logits(ids, width - first)
        scored = []
        for row, tokens, wanted in zip(logits, inputs, continuations, strict=True):
            log_p = row[: len(tokens) - first].log_softmax(-1)
            scored.append([_answer(log_p[len(log_p) - len(tail) :], tail) for tail in wanted])
        return scored


def _answer(log_p: Tensor, continuation: list[int]) -> Answer:
    """log_p (T, V) at the positions that predict the T tokens of the continuation."""
    target = torch.tensor(continuation, device=log_p.device)
    likelihood = log_p.gather(1, target[:, None]).sum()
    return likelihood.item(), bool((log_p.argmax(-1) == target).all())


@contextmanager
def open_tasks(
    tasks: Sequence[Task], rows: Mapping[str, list[Row]]
) -> Iterator[dict[str, OpenTask]]:
    """lm-eval's tasks by our names, on `rows` of each, or on the hub's data sets for lack of them.

    The definitions are those of the installed lm-eval; only where the rows come from is replaced.

    Raises:
        UsageError: the hub cannot be reached.
    """
    if rows:
        disable_progress_bars()  # nothing is fetched
    with tempfile.TemporaryDirectory(prefix="ssdi8-") as scratch:
        folder = Path(scratch)
        for task in tasks:
            definition: dict[str, Any] = {
                "include": str(files("lm_eval") / "tasks" / task.definition),
                "task": task.harness,
            }
            if task.name in rows:
                definition |= _on_local_rows(task, rows[task.name], folder)
            # JSON is YAML.
            (folder / f"{task.name}.yaml").write_text(json.dumps(definition), encoding="utf-8")
        manager = TaskManager(include_path=scratch, include_defaults=False)
        opened = {}
        for task in tasks:
            try:
                loaded = manager.load([task.harness])["tasks"]
            except (OSError, ValueError) as error:
                if task.name in rows:
                    raise
                raise UsageError(
                    f"cannot fetch the data of {task.name} from the hub ({type(error).__name__});",
                    "name a folder with the data sets by --data.",
                ) from error
            opened[task.name] = OpenTask(task, loaded[task.harness])
        yield opened


def _on_local_rows(task: Task, rows: list[Row], folder: Path) -> dict[str, Any]:
    """What replaces a definition's data source; the rows go into `folder`."""
    path = folder / f"{task.name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {task.split: str(path)},
            "cache_dir": str(folder / "cache"),
        },
        "training_split": None,
        "validation_split": task.split if task.split == "validation" else None,
        "test_split": task.split if task.split == "test" else None,
    }


def run_tasks(lm: LM, tasks: Mapping[str, OpenTask], limit: int | None) -> dict[str, Any]:
    """lm-eval's own results and samples of any of its models, on the first `limit` items."""
    by_harness = {each.task.harness: each.loaded for each in tasks.values()}
    results: dict[str, Any] = evaluator.evaluate(
        lm, {"tasks": by_harness}, limit=limit, bootstrap_iters=0
    )
    return results


def accuracies(
    subject: Subject,
    tasks: Mapping[str, OpenTask],
    limit: int | None = None,
    track: Track = silent,
) -> list[Accuracy]:
    """The paper's metric of each task, on its first `limit` items."""
    results = run_tasks(SubjectLM(subject, track), tasks, limit)
    found = []
    for task in (each.task for each in tasks.values()):
        outcomes = [float(sample[task.metric]) for sample in results["samples"][task.harness]]
        # Of a mean, as lm-eval computes it; its own comes only with hours of bootstrapping lambada.
        deviation = statistics.stdev(outcomes) if len(outcomes) > 1 else 0.0
        found.append(
            Accuracy(
                model=subject.name,
                engine=subject.engine,
                task=task.name,
                metric=task.metric,
                items=len(outcomes),
                accuracy=float(results["results"][task.harness][f"{task.metric},none"]),
                stderr=deviation / len(outcomes) ** 0.5,
            )
        )
    return found
