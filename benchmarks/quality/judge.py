"""Losses and tests of a model in few, large steps: what waits for the device row by row is slow beside others."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ist.experiments.data.encoding import pad
from ist.experiments.evaluation import Accuracy, Loss, evaluate
from ist.experiments.evaluation.scoring import Continuations, by_length
from ist.probing.suppression import model_loss
from ist.runtime.modes import evaluation_mode, to_device

from .tasks import Choice, Prepared

__all__ = ["choose", "collate", "computing", "evaluation_rows", "mean_loss", "test"]

EVALUATION_LOGITS = 32 * 49152
"""Logits of a position of all sequences of a forward pass without a backward: they are the memory of a process."""
GENERATED_ROWS = 256
"""Answers that are generated at once, which have the logits of one position each."""


def evaluation_rows(model: Any) -> int:
    """Sequences in a forward pass without a backward: 32 with SmolLM2's vocabulary, fewer with a larger one."""
    return max(1, min(32, EVALUATION_LOGITS // model.config.vocab_size))


def collate(rows: Sequence[Continuations]) -> dict[str, Any]:
    """A batch, padded on the left: completions end together, and logits are made for their positions alone."""
    ids, mask = pad([(*row.ids, *row.lasts) for row in rows], "left")
    lengths = [len(row.ids) + 1 - row.start for row in rows]
    kept = min(ids.shape[1], max(lengths) + 1)  # and the position before, which predicts the first token
    labels = ids[:, -kept:].clone()
    for label, length in zip(labels, lengths, strict=True):
        label[: kept - length] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "logits_to_keep": kept}


def computing(device: torch.device) -> AbstractContextManager[Any]:
    """The precision of all methods: weights in float32, products in bfloat16 on a GPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def mean_loss(model: Any, rows: Sequence[Continuations], device: torch.device) -> Loss:
    """Nats a token, and the tokens."""
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    with evaluation_mode(model), torch.no_grad(), computing(device):
        for part in by_length([len(row.ids) for row in rows], evaluation_rows(model)):
            batch = collate([rows[index] for index in part])
            tokens = int((batch["labels"] != -100).sum())
            total += model_loss(model, to_device(batch, device)).double() * tokens
            count += tokens
    return Loss(float(total) / count, count)


def choose(model: Any, choices: Sequence[Choice], device: torch.device) -> list[list[float]]:
    """The log-likelihood of every option of every question, in nats."""
    items = [(number, part, own) for number, each in enumerate(choices) for part, own in each.parts]
    values = [[0.0] * sum(len(own) for _, own in each.parts) for each in choices]
    with evaluation_mode(model), torch.no_grad(), computing(device):
        for some in by_length([len(part.ids) for _, part, _ in items], evaluation_rows(model)):
            found = likelihoods(model, [items[index][1] for index in some], device).tolist()
            for index, row in zip(some, found, strict=True):
                number, _, own = items[index]
                for option, value in zip(own, row, strict=False):
                    values[number][option] = value
    return values


def likelihoods(model: Any, items: Sequence[Continuations], device: torch.device) -> Tensor:
    """Log-likelihoods of continuations, `[items, most last tokens]`; what is beyond an item's own means nothing."""
    ids, mask = pad([item.ids for item in items], "left")
    lengths = torch.tensor([len(item.ids) - item.start for item in items])
    lasts, _ = pad([item.lasts for item in items], "right")
    kept = int(lengths.max()) + 1
    ids, mask, lengths, lasts = (value.to(device) for value in (ids, mask, lengths, lasts))
    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=kept, use_cache=False).logits
    logs = logits.float().log_softmax(-1)
    before = logs[:, :-1].gather(2, ids[:, ids.shape[1] - kept + 1 :, None])[..., 0]
    own = torch.arange(kept - 1, 0, -1, device=device) <= lengths[:, None]
    return (before * own).sum(1, keepdim=True) + logs[:, -1].gather(1, lasts)


def test(model: Any, tokenizer: Any, task: Prepared, device: torch.device) -> dict[str, dict[str, float]]:
    """The tests of a task, each with its counts."""
    results: dict[str, dict[str, float]] = {}
    for name, part in task.tests.items():
        if part.protocol == "loss":
            results[name] = mean_loss(model, part.data, device).to_dict()
        elif part.protocol == "likelihood":
            chosen = [max(range(len(row)), key=row.__getitem__) for row in choose(model, part.data, device)]
            right = sum(answer == each.right for answer, each in zip(chosen, part.data, strict=True))
            results[name] = Accuracy(right, len(chosen)).to_dict()
        else:
            with computing(device):
                found = evaluate(
                    model, tokenizer, {name: part.data}, "generate", batch_size=GENERATED_ROWS, **part.options
                )
            results[name] = found[name].to_dict()
    return results
