"""How well a fine-tuned model answers, and what its loss is."""

from __future__ import annotations

from .evaluate import TaskData, evaluate
from .extraction import extract_answer, is_correct
from .generation import GREEDY, PAPER, Answer, Generation, exact_answers
from .interval import wilson_interval
from .results import Accuracy, Loss, TaskResult
from .settings import PROTOCOLS, EvaluationSettings, Protocol

__all__ = [
    "GREEDY",
    "PAPER",
    "PROTOCOLS",
    "Accuracy",
    "Answer",
    "EvaluationSettings",
    "Generation",
    "Loss",
    "Protocol",
    "TaskData",
    "TaskResult",
    "evaluate",
    "exact_answers",
    "extract_answer",
    "is_correct",
    "wilson_interval",
]
