"""The metric of `ist train` on validation rows of the user's own, before and after training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from ...experiments.data.encoding import encode_pair
from ...experiments.data.own_rows import OwnRow
from ...experiments.evaluation import EvaluationSettings
from ...experiments.evaluation.evaluate import summarise_scores
from ...experiments.evaluation.metrics import Marker, UserMetric, make_marker, metric_identity
from ...experiments.evaluation.own_answers import OWN_NEW_TOKENS, answer_own_rows
from ...runtime.distributed import Ranks
from ...runtime.modes import evaluation_mode
from ..display import Display
from ..metric import load_metric
from .arguments import RunArguments
from .shares import marks_of

__all__ = ["METRIC_ROWS", "OwnMetric", "own_metric", "spread", "user_metric"]

METRIC_ROWS = 100
"""Rows that are answered, where `--metric_rows` says nothing."""
FEWEST_TOKENS = 32
"""Room for an answer that says more than the expected one, as an untrained model's does."""


@dataclass(frozen=True)
class OwnMetric:
    """What answers to validation rows are marked by; without rows it measures nothing."""

    name: str = ""
    """Of its mean among the figures before and after: `exact_match`, `label_accuracy`, or `NAME score`."""
    rows: tuple[OwnRow, ...] = ()
    """Those that are answered."""
    num_rows: int = 0
    """Validation rows in all."""
    marker: Marker | None = None
    share: bool = True
    """Whether the mean is a share of right answers; that of the user's own function is not."""
    settings: EvaluationSettings = field(default_factory=EvaluationSettings)
    identity: dict[str, Any] = field(default_factory=dict)
    """What the marks depend on, for the record."""
    found: dict[str, Any] = field(default_factory=dict)
    """The results so far, by `before` and `after`."""

    def measure(self, trainer: Any, display: Display, when: str, ranks: Ranks) -> dict[str, float]:
        """The mean over the rows that are answered, the same on every rank; shown, and kept for `record`."""
        if self.marker is None:
            return {}
        with display.waiting(f"{len(self.rows)} validation rows {when} training"):
            scores = self.scores(trainer, ranks)
        self.found[when] = summarise_scores(scores, self.share).to_dict()
        figures = {self.name: fmean(scores)}
        display.judged(when, figures)
        return figures

    def scores(self, trainer: Any, ranks: Ranks) -> list[float]:
        """The mark of each row, the same on every rank."""

        def mark(rows: list[OwnRow]) -> list[float]:
            assert self.marker is not None
            scores = [0.0] * len(rows)
            with evaluation_mode(trainer.model):
                for batch in answer_own_rows(trainer.model, trainer.processing_class, rows, self.marker, self.settings):
                    for index, answer in batch:
                        scores[index] = answer["score"]
            return scores

        return marks_of(trainer.model, self.rows, ranks, mark)

    def record(self) -> dict[str, Any]:
        """What the run's result says of it; nothing where nothing was measured."""
        if self.marker is None:
            return {}
        described = {
            "name": self.name,
            **self.identity,
            "rows": len(self.rows),
            "validation_rows": self.num_rows,
            "max_new_tokens": self.settings.max_new_tokens,
        }
        return {"metric": {**described, **self.found}}

    def describe(self) -> str:
        """What is about to be measured, in a line."""
        return (
            f"{self.name.replace('_', ' ')} before and after on {len(self.rows)} of {self.num_rows} validation rows, "
            f"up to {self.settings.max_new_tokens} new tokens each"
        )


def user_metric(run: RunArguments) -> UserMetric | None:
    """The function of `--metric_function`, if there is one, imported before anything takes time.

    Raises:
        ValueError: it cannot be.
    """
    return load_metric(run.ist.metric_function) if run.ist.metric_function else None


def own_metric(
    run: RunArguments, function: UserMetric | None, rows: Sequence[OwnRow], tokenizer: Any, display: Display
) -> OwnMetric:
    """The metric that the flags name, on some of the validation rows; says what it will take.

    Args:
        run: what the flags say.
        function: see `user_metric`.
        rows: all validation rows; empty where no metric is asked for.
        tokenizer: the model's.
        display: shows the line.

    Raises:
        ValueError: the answers of the rows are no labels.
    """
    flags = run.ist
    if not flags.marks:
        return OwnMetric()
    kind: Any = flags.metric or "exact_match"
    labels = tuple(flags.labels or ())
    try:
        marker = make_marker(kind, rows, labels, function)
    except ValueError as error:
        raise ValueError(f"--metric {kind}: the validation set {error}.") from error
    asked = spread(rows, flags.metric_rows or METRIC_ROWS)
    metric = OwnMetric(
        name=f"{function.name.rpartition(':')[2]} score" if function else kind,
        rows=tuple(asked),
        num_rows=len(rows),
        marker=marker,
        share=function is None,
        settings=EvaluationSettings(
            batch_size=run.training.per_device_eval_batch_size,
            max_new_tokens=flags.max_new_tokens or longest_output(asked, tokenizer),
            max_length=run.training.max_length,
        ),
        identity=metric_identity(kind, labels, function),
    )
    display.console.print(metric.describe(), soft_wrap=True)
    return metric


def spread(rows: Sequence[OwnRow], count: int) -> list[OwnRow]:
    """At most `count` rows, evenly spread over all: a file may be sorted."""
    count = min(count, len(rows))
    return [rows[number * len(rows) // count] for number in range(count)]


def longest_output(rows: Sequence[OwnRow], tokenizer: Any) -> int:
    """Tokens of the longest output of some rows with the token that ends it, from 32 to 256."""
    lengths = [len(encode_pair(tokenizer, row.prompt, row.completion, end=True)[1]) for row in rows]
    return min(OWN_NEW_TOKENS, max(FEWEST_TOKENS, *lengths))
