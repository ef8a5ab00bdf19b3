"""The Trainer that tests of checkpoints and of faults run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainingArguments

from ist import IST
from tests.helpers.tiny import tiny_lora, tiny_rows


def make_trainer(folder: Path, *callbacks: TrainerCallback, model: Any = None, **options: Any) -> Any:
    """A Trainer of nine short steps with a checkpoint at every third, IST in it unless other callbacks are given."""
    settings = {
        "max_steps": 9,
        "save_steps": 3,
        "learning_rate": 1e-2,
        "report_to": [],
        "disable_tqdm": True,
        **options,
    }
    return Trainer(
        model=tiny_lora() if model is None else model,
        args=TrainingArguments(
            output_dir=str(folder), use_cpu=True, per_device_train_batch_size=4, **{**settings, **options}
        ),
        train_dataset=tiny_rows(64),  # type: ignore[arg-type]
        eval_dataset=tiny_rows(8, seed=4),  # type: ignore[arg-type]
        callbacks=list(callbacks) or [IST(update_interval=2)],
    )
