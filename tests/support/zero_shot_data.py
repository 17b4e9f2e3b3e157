"""Small data sets of the zero-shot tasks."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

NO_HARNESS = "lm-eval (extra eval) runs the zero-shot tasks"
ITEMS = 6

LAMBADA = {"text": "She took the lamp and lit the lamp"}
PIQA = {"goal": "open a jar", "sol1": "turn the lid", "sol2": "eat the lid"}
ARC = {"question": "What is wet?", "choices": ["sand", "stone", "water"], "gold": 2}
HELLASWAG = {
    "activity_label": "Baking",
    "ctx_a": "A man [step] mixes flour.",
    "ctx_b": "he",
    "endings": ["pours water.", "flies [title] away.", "sleeps.", "sings."],
    "label": "0",
}
WINOGRANDE = {
    "sentence": "The cup fell off the shelf as the _ was loose.",
    "option1": "cup",
    "option2": "shelf",
    "answer": "2",
}


def words(generator: random.Random, count: int) -> str:
    return " ".join(generator.choices(["sea", "old", "night", "ran", "a", "the", "I"], k=count))


def write_data(folder: Path) -> Path:
    """Six items of each task in the local form; the first as above, the others nonsense."""
    g = random.Random(7)

    def items(first: dict[str, Any], other: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
        return [first, *(other() for _ in range(ITEMS - 1))]

    def arc() -> dict[str, Any]:
        count = g.randint(3, 5)
        choices = [words(g, g.randint(1, 3)) for _ in range(count)]
        return {"question": words(g, 9), "choices": choices, "gold": g.randrange(count)}

    files = {
        "lambada_test.jsonl": items(LAMBADA, lambda: {"text": words(g, g.randint(4, 30))}),
        "piqa_valid.jsonl": items(
            PIQA, lambda: {"goal": words(g, 5), "sol1": words(g, 8), "sol2": words(g, 4)}
        ),
        "arc_easy_test.jsonl": items(ARC, arc),
        "arc_challenge_test.jsonl": items(ARC, arc),
        "hellaswag_val.jsonl": items(
            HELLASWAG,
            lambda: {
                **HELLASWAG,
                "ctx_a": words(g, 12),
                "endings": [words(g, g.randint(2, 9)) for _ in range(4)],
                "label": str(g.randrange(4)),
            },
        ),
        "winogrande_dev.jsonl": items(
            WINOGRANDE,
            lambda: {
                "sentence": f"{words(g, 4)} _ {words(g, 5)}",
                "option1": words(g, 1),
                "option2": words(g, 2),
                "answer": str(g.randint(1, 2)),
            },
        ),
    }
    folder.mkdir()
    for name, rows in files.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    labels = "".join(f"{g.randrange(2)}\n" for _ in range(ITEMS))
    (folder / "piqa_valid-labels.lst").write_text(labels)
    return folder
