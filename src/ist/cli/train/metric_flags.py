"""The flags of `ist train` for a metric on rows of the user's own, those of `ist eval` under the same names."""

from __future__ import annotations

from dataclasses import dataclass

from ...config import check_choice, check_whole
from ...experiments.evaluation.metrics import METRICS
from ..metric import check_marks

__all__ = ["MetricArguments"]


@dataclass
class MetricArguments:
    """How answers to the validation rows are marked before and after training; these docstrings are the flags' help."""

    metric: str | None = None
    """Let the model answer validation rows before and after training, and mark the answers: `exact_match` or
    `label_accuracy`."""

    labels: list[str] | None = None
    """Labels of `--metric label_accuracy`; the different answers of the validation rows by default."""

    metric_function: str | None = None
    """A metric of your own, FILE.py:FUNCTION or MODULE:FUNCTION: f(response, expected) or f(response, expected, row)
    returns a number. From the command line alone."""

    metric_rows: int | None = None
    """Validation rows that are answered for the metric, evenly spread; 100 by default."""

    max_new_tokens: int | None = None
    """Tokens of an answer for the metric; by default as many as the longest of the rows' outputs, 32 to 256."""

    def check_metric(self) -> None:
        """Raise ValueError where a flag is not allowed."""
        if self.metric is not None:
            check_choice("metric", self.metric, METRICS)
        check_marks(self.metric, self.labels, self.metric_function)
        for name in ("metric_rows", "max_new_tokens"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), at_least=1, why="leave it out for the default")
                if not self.marks:
                    raise ValueError(f"--{name} is for a metric: add --metric or --metric_function.")

    @property
    def marks(self) -> bool:
        """Whether answers are marked."""
        return bool(self.metric or self.metric_function)
