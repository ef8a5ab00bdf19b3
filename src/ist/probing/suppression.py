"""Measure sets of layers: the loss while the adapters of all other layers are suppressed (eq. 8)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..adapters.adalora import without_orthogonality_loss
from ..adapters.layers import Layer
from ..adapters.responses import Suppression, scaled_response
from ..runtime.distributed import Ranks
from ..runtime.modes import evaluation_mode
from ..runtime.randomness import private_randomness
from ..runtime.sharding import compute_device
from ..runtime.wrappers import base_model
from .reads import Reads, watched_reads

__all__ = [
    "LossFunction",
    "UnsuppressedError",
    "agreed",
    "candidate_losses",
    "check_batch",
    "check_not_read",
    "factors_of",
    "model_loss",
    "scaled_adapters",
    "suppress",
]

T = TypeVar("T")
LossFunction = Callable[[nn.Module, Mapping[str, Any]], Tensor]
"""`(model, batch) -> loss`, a scalar in nats."""
TOKENS = ("input_ids", "attention_mask", "labels")
"""Fields of a batch that every model takes as tensors of numbers."""
SWITCH_OFF = "switch that tool's kernels off (Axolotl's lora_mlp_kernel and the like)"
"""What helps in any case."""
ADVICE = (
    f"{SWITCH_OFF}, train plain LoRA, whose factor such kernels read, or give selector='random', which measures nothing"
)
"""What helps where selectors measure."""


class UnsuppressedError(ValueError):
    """A layer's response cannot be suppressed, so that nothing measured with it would be right.

    Args:
        found: what cannot be suppressed and why, up to the advice.
        advice: what to do.
    """

    def __init__(self, found: str, advice: str = ADVICE) -> None:
        super().__init__(f"{found}: {advice}.")
        self.found = found
        """What cannot be suppressed and why."""


def factors_of(layers: Sequence[Layer], unsuppressed: Collection[int], beta: float) -> list[float]:
    """What multiplies the response `a_i` of each layer: 1 in the layers of a candidate set, β in all others (eq. 8)."""
    return [1.0 if layer.index in unsuppressed else beta for layer in layers]


@contextmanager
def suppress(
    layers: Sequence[Layer], unsuppressed: Collection[int], beta: float, suppression: Suppression = "response"
) -> Iterator[None]:
    """Within the context, equation 8 of the paper: a layer in `unsuppressed` returns `m + a`, and any other `m + β·a`.

    Args:
        layers: all layers of the model that carry adapters.
        unsuppressed: indices of the layers that keep their full response.
        beta: factor on the other layers' response, in [0, 1].
        suppression: what beta multiplies, see `ist.adapters.responses.scaled_response`.

    Raises:
        UnsuppressedError: at the end, where the forward of a block has read an adapter's weights past its suppression.
    """
    factors = factors_of(layers, unsuppressed, beta)
    pairs = [pair for pair in zip(layers, factors, strict=True) if pair[1] != 1]
    with scaled_adapters([(*pair, name) for pair in pairs for name in pair[0].adapters], suppression):
        yield


@contextmanager
def scaled_adapters(factors: Sequence[tuple[Layer, Any, str]], suppression: Suppression = "response") -> Iterator[None]:
    """Within the context, the responses of adapters are multiplied by a factor each.

    Args:
        factors: a layer, a number or a tensor of one, and the name of the adapter in the layer.
        suppression: see `suppress`.

    Raises:
        UnsuppressedError: as `suppress`.
    """
    with ExitStack() as stack:
        scaled = []
        for layer, factor, name in factors:
            adapter = layer.adapters[name]
            scaled.append((layer, adapter, stack.enter_context(scaled_response(adapter, factor, suppression))))
        called = [(layer, adapter) for layer, adapter, was_scaled in scaled if not was_scaled()]
        reads = stack.enter_context(watched_reads(called))
        yield
        unscaled = [adapter for _, adapter, was_scaled in scaled if not was_scaled()]
    check_not_read(unscaled, reads)


def check_not_read(unscaled: Iterable[nn.Module], reads: Reads) -> None:
    """Raise UnsuppressedError where a tool has read one of the adapters whose response was not scaled."""
    for adapter in unscaled:
        if adapter in reads:
            raise UnsuppressedError(unsuppressed(*reads[adapter], adapter))


def unsuppressed(layer: Layer, reader: nn.Module, adapter: nn.Module) -> str:
    """Why a layer cannot be measured, in one line."""
    return (
        f"The forward of a {type(reader).__name__} in {layer.name} was replaced by one that reads the weights of its "
        f"adapters ({type(adapter).__name__}) and calls none, so that their response cannot be suppressed and no "
        "importance be measured"
    )


def agreed(measure: Callable[[], T], ranks: Ranks) -> T:
    """What `measure` returns, on every rank.

    Raises:
        UnsuppressedError: on every rank, where it is raised on one: which adapters a batch reaches may differ.
    """
    raised, result = None, None
    try:
        result = measure()
    except UnsuppressedError as error:
        raised = error
    if ranks.any(raised is not None):
        raise raised or UnsuppressedError("Another process found that a layer's response cannot be suppressed")
    return result  # type: ignore[return-value]


def model_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The loss that the model itself computes for a batch: `model(**batch).loss`, without logits where it can.

    Raises:
        ValueError: the batch is nothing that the model takes, or the model returns no loss.
    """
    check_batch(batch)
    without_logits = {"skip_logits": True} if can_skip_logits(model) and "labels" in batch else {}
    outputs = model(**batch, **without_logits)
    if isinstance(outputs, tuple):
        raise ValueError(
            "The model returned a tuple, in which nothing tells the loss: leave return_dict on, or pass "
            "loss_function=lambda model, batch: … which returns a scalar."
        )
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if loss is None:
        raise ValueError(
            f"The model returned no loss for a probe batch with the fields {', '.join(batch)}: the batch needs "
            "labels, or pass loss_function=lambda model, batch: … which returns a scalar."
        )
    return loss


def check_batch(batch: Any) -> None:
    """Raise ValueError unless a batch is a mapping whose tokens are in tensors, as `model(**batch)` takes them."""
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"A probe batch is a {type(batch).__name__}, not a mapping of model inputs (trainers with losses of their "
            "own make such batches): pass loss_function=lambda model, batch: … which returns a scalar."
        )
    if bare := next((name for name in TOKENS if is_bare(batch.get(name))), None):
        raise ValueError(
            f"A probe batch has its {bare} as a {type(batch[bare]).__name__}, and the model takes a tensor: collate "
            "the rows first, as DataLoader(rows, batch_size=4, collate_fn=…) does with the training's collator, or "
            "pass loss_function=lambda model, batch: … which returns a scalar."
        )


def is_bare(value: Any) -> bool:
    """Whether numbers are outside of a tensor, as in a tokenizer's lists and in arrays of NumPy."""
    if isinstance(value, (list, tuple)):
        return bool(value) and isinstance(value[0], (int, float, list, tuple))
    return type(value).__module__ == "numpy"


def can_skip_logits(model: nn.Module) -> bool:
    """Whether a model computes its loss without logits when told to, as Liger's do; in evaluation they do not of
    themselves.
    """
    return "skip_logits" in inspect.signature(base_model(model).forward).parameters


@torch.no_grad()
def candidate_losses(
    model: nn.Module,
    layers: Sequence[Layer],
    candidates: Sequence[Collection[int]],
    batch: Mapping[str, Any],
    beta: float,
    loss_function: LossFunction = model_loss,
    suppression: Suppression = "response",
) -> Tensor:
    """The loss of each candidate set on one batch, without gradient and in evaluation mode.

    It is the loss of the task alone: AdaLoRA's orthogonality term, which says nothing of the batch, is left out. A loss
    that draws at random (noise, time steps, masks) draws the same for every set, so that the sets alone differ.

    Args:
        model: the model in training; its mode and its adapters are restored, also after an exception.
        layers: all layers of the model that carry adapters.
        candidates: `N_c` sets of layers that keep their full response.
        batch: what the model takes, on the model's device.
        beta: factor on the response of the layers outside a candidate set, in [0, 1].
        loss_function: `(model, batch) -> loss`, a scalar in nats.
        suppression: what beta multiplies, see `ist.adapters.responses.scaled_response`.

    Returns:
        Losses in nats, float64 of shape `[N_c]` on the CPU.

    Raises:
        UnsuppressedError: see `suppress`; after all candidates.
    """
    losses, raised = [], None
    device, seed = compute_device(model), torch.initial_seed()
    with evaluation_mode(model), without_orthogonality_loss(model):
        for candidate in candidates:
            try:
                with private_randomness(seed, device), suppress(layers, candidate, beta, suppression):
                    losses.append(check_scalar(loss_function(model, batch)))
            except UnsuppressedError as error:
                raised = raised or error
    if raised is not None:  # Only now: other ranks, whose batches may differ, wait for each other in every forward.
        raise raised
    return torch.stack(losses).cpu()


def check_scalar(loss: Any) -> Tensor:
    """The loss in float64.

    Raises:
        ValueError: it is not a tensor of one number.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"loss_function returned {found}: it must return a tensor of one number, the mean loss in nats."
        )
    return loss.detach().double().reshape(())
