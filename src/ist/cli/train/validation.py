"""The validation loss of `ist train`: the mean over predicted tokens, before, during and after training.

The Trainer averages the mean losses of batches, each counted by its rows. A batch with few tokens then counts as much
as one with many, and a block without any, which packing can cut out of a long prompt, counts as a loss of 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl import SFTTrainer

from ...runtime.distributed import current_ranks

__all__ = ["TokenWeightedTrainer", "predicted_tokens", "without_repeats"]

IGNORED = -100
"""The label of a token that is not predicted."""


class TokenWeightedTrainer(SFTTrainer):
    """TRL's trainer with a validation loss in nats a token, whatever the batches and the processes are.

    `eval_loss` is Σ l_t / T over the T predicted tokens of the validation set, l_t = -log p(token t | those before).
    """

    _sums: Tensor

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """The Trainer's loop, with the loss weighed by tokens.

        Raises:
            ValueError: on every rank, where no token is predicted.
        """
        self._sums = torch.zeros(2, dtype=torch.float64)
        output: Any = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss, tokens = current_ranks().mean(self._sums.tolist())
        if tokens == 0:
            raise ValueError(
                "No token of the validation set is predicted, so that it has no loss: give longer answers, or "
                "a greater --max_length."
            )
        output.metrics[f"{metric_key_prefix}_loss"] = loss / tokens
        return output

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's step, on the rows that no other process or batch has had; its loss is added up."""
        state = self.accelerator.gradient_state
        if state.end_of_dataloader and state.remainder > 0:
            inputs = without_repeats(inputs, state.remainder, self.accelerator.process_index)
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        tokens = predicted_tokens(inputs)
        if loss is not None and tokens:
            self._sums += torch.tensor([float(loss) * tokens, tokens], dtype=torch.float64)
        return loss, logits, labels


def predicted_tokens(inputs: Any) -> int:
    """The number of tokens of a batch that are predicted: those with a label, but the first of each row."""
    labels = inputs["shift_labels"] if "shift_labels" in inputs else inputs["labels"][..., 1:]
    return int(labels.ne(IGNORED).sum())


def without_repeats(inputs: Any, remainder: int, rank: int) -> Any:
    """A process's share of the last batch, with no label in rows that only fill it up.

    Processes have to take the same number of rows, so that the last ones begin the validation set anew.

    Args:
        inputs: with `labels` `[rows, tokens]`.
        remainder: rows of the last batch, over all processes, that are the set's last.
        rank: of this process; those of lower ranks come before its own.
    """
    rows = inputs["labels"].shape[0]
    own = max(0, remainder - rank * rows)
    if own >= rows or (rows == 1 and "position_ids" in inputs):  # flattened rows cannot be told apart
        return inputs
    labels = inputs["labels"].clone()
    labels[own:] = IGNORED
    return {**inputs, "labels": labels}
