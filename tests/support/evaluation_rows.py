"""Rows of an evaluation, made up."""

from __future__ import annotations

from dataclasses import replace

from ssdi8_edge.evaluate.evaluation import Evaluation
from ssdi8_edge.evaluate.tasks import Accuracy
from ssdi8_edge.evaluate.windows import Perplexity

FIRST = Perplexity("fp32", "torch", "a|b [x].txt", 3, 2048, 2047, 10.0)
OTHER = replace(
    FIRST,
    model="edge-w8a8",
    engine="torch reference",
    perplexity=10.2,
    kl=0.00123,
    top1_agreement=0.987,
    change_stderr=0.0012,
    saturation={"u": 0.001, "r": 0.00002},
)


def row(result: Perplexity, accuracy: float, **contexts: float) -> Evaluation:
    who = (result.model, result.engine)
    return Evaluation(
        "a/folder",
        *who,
        perplexities=[result],
        accuracies=[
            Accuracy(*who, "lambada", "acc", 400, accuracy, 0.02),
            Accuracy(*who, "hellaswag", "acc_norm", 100, accuracy + 0.1, 0.0),
        ],
        long_context=[
            replace(result, window_tokens=int(length[1:]), scored_tokens=256, perplexity=value)
            for length, value in contexts.items()
        ],
    )
