"""How good a model is: perplexity, distance to the original, zero-shot accuracy, long context."""

from __future__ import annotations

from ssdi8_edge.evaluate.evaluation import Evaluation, Measures, evaluate, plan
from ssdi8_edge.evaluate.subject import Subject, open_subject, require_device
from ssdi8_edge.evaluate.windows import Perplexity, perplexity

__all__ = [
    "Evaluation",
    "Measures",
    "Perplexity",
    "Subject",
    "evaluate",
    "open_subject",
    "perplexity",
    "plan",
    "require_device",
]
