"""A Trainer whose weights are no longer finite stops before it saves them, and names its last checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..runtime.distributed import current_ranks
from ..runtime.sharding import check_saves
from ..step.boundary import Boundary
from ..step.finite import CHECK_INTERVAL, BrokenStartError, FiniteWeights, NotFiniteError
from ..step.skipped import SkippedError, check_skipped

__all__ = ["FiniteWeightsCallback", "checked_weights", "logs_at"]


@contextmanager
def checked_weights(trainer: Any, check: Callable[[], object]) -> Iterator[None]:
    """Around a training: no checkpoint is written, and none deleted for it, before the weights were checked.

    Args:
        trainer: about to train.
        check: raises NotFiniteError where the weights are not finite.

    Raises:
        NotFiniteError: as `check` or a callback raises it, with the checkpoint that this training saved last.
    """
    own, write = vars(trainer).get("_save_checkpoint"), trainer._save_checkpoint
    saved = ""

    def check_and_save(*args: Any, **kwargs: Any) -> Any:
        nonlocal saved
        check()
        write(*args, **kwargs)
        saved = f"{trainer.args.output_dir}/{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"

    vars(trainer)["_save_checkpoint"] = check_and_save
    try:
        yield
    except (BrokenStartError, SkippedError):
        raise
    except NotFiniteError as error:
        left = f": the last good checkpoint is {saved}." if saved else "."
        raise NotFiniteError(f"{error} They were not saved{left}") from None
    finally:
        if own is None:
            vars(trainer).pop("_save_checkpoint", None)
        else:
            vars(trainer)["_save_checkpoint"] = own


class FiniteWeightsCallback(TrainerCallback):
    """Stops a training without `IST` where its weights are not finite, or a GradScaler skips every step."""

    def __init__(self) -> None:
        self._weights: FiniteWeights | None = None
        self._boundary: Boundary | None = None
        self._step = 0

    @contextmanager
    def watching(self, trainer: Any) -> Iterator[None]:
        """Around a training of a Trainer that has this callback: see `checked_weights`. Optimizers are let alone after
        any end of it; a Trainer tells a callback of none but the regular one.
        """
        try:
            with checked_weights(trainer, self.check):
                yield
        finally:
            self.close()

    def check(self) -> None:
        """Raise NotFiniteError, on every rank, where the weights are not finite."""
        if self._weights is not None:
            self._weights.check(self._step)

    def close(self) -> None:
        """Let optimizers and weights alone."""
        if self._boundary is not None:
            self._boundary.close()
        self._boundary = self._weights = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Get to know the weights; raise ValueError where an adapter's could not be saved."""
        self.close()
        model = kwargs["model"]
        check_saves(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._weights, self._step = FiniteWeights(model, trained, current_ranks()), state.global_step
        groups = getattr(kwargs.get("optimizer"), "param_groups", ())
        self._boundary = Boundary(parameter for group in groups for parameter in group["params"])
        self.check()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check the weights from time to time, and whether steps are made."""
        self._step = state.global_step
        if self._boundary is not None:
            self._boundary.ask(kwargs.get("optimizer"))
            check_skipped(self._boundary)
        if self._step % CHECK_INTERVAL == 0 or logs_at(state, args):
            self.check()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the weights at the end at the latest."""
        self.check()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the optimizer alone; a last checkpoint's weights are checked all the same."""
        if self._boundary is not None:
            self._boundary.close()


def logs_at(state: TrainerState, args: TrainingArguments) -> bool:
    """Whether the Trainer logs at the end of this step, and so waits for the device anyway; the same on every rank."""
    every = int(state.logging_steps or 0)
    return args.logging_strategy == "steps" and every > 0 and state.global_step % every == 0
