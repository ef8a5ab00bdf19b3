"""One training by transformers' Trainer, for any engine and number of processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import DistributedType, PartialState
from device import BACKEND, ON_CPUS, on_one_gpu
from transformers import Trainer, TrainerCallback, TrainingArguments

from ist import IST
from tests.helpers.tiny import tiny_lora, tiny_rows

GLOBAL_BATCH = 8
FSDP = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
ENGINES: dict[str, dict[str, Any]] = {
    "DDP": {},
    "DDP, find_unused_parameters=False": {"ddp_find_unused_parameters": False},
    "DDP, static_graph=True": {"ddp_static_graph": True},
    "FSDP2": {"fsdp": True, "fsdp_config": {**FSDP, "version": 2}},
    "FSDP2, gradient_checkpointing": {
        "fsdp": True,
        "fsdp_config": {**FSDP, "version": 2},
        "gradient_checkpointing": True,
    },
    "DDP, gradient_checkpointing, accumulation 2": {
        "gradient_checkpointing": True,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": GLOBAL_BATCH // 4,
    },
    # FSDP1 through Accelerate asks for an accelerator; test_backends.py has it on the CPU.
}


def let_accelerate_shard_on_cpus() -> None:
    """Accelerate turns FSDP on beside GPUs only, and else trains with DDP without a word; FSDP2 itself needs none."""
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def preparation(engine: str) -> Callable[[], None] | None:
    """What must happen before a Trainer of this engine is made."""
    return let_accelerate_shard_on_cpus if "fsdp" in ENGINES[engine] and ON_CPUS else None


class Actives(TrainerCallback):
    """The layers of each step, as this rank chose them."""

    def __init__(self, ist: IST) -> None:
        self._ist = ist
        self.sets: list[list[int]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self._ist.tuner
        self.sets.append(list(self._ist.tuner.active_layers or ()))


def make_trainer(
    folder: Path,
    num_processes: int,
    engine: str = "DDP",
    steps: int = 50,
    prepare: Callable[[], None] | None = None,
    **options: Any,
) -> Any:
    """A Trainer whose steps are of `GLOBAL_BATCH` rows, whatever the number of processes, and its callbacks.

    `prepare` is called when the processes know each other, and before the Trainer is made.
    """
    ist = IST(num_active_layers=2, update_interval=5, mu=20.0, seed=3, probe_batch_size=GLOBAL_BATCH // num_processes)
    actives = Actives(ist)
    settings: dict[str, Any] = {
        "per_device_train_batch_size": GLOBAL_BATCH // num_processes,
        "max_steps": steps,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": ON_CPUS,
        "seed": 11,
        "disable_tqdm": True,
        "ddp_backend": BACKEND if num_processes > 1 else None,
        **(ENGINES[engine] if num_processes > 1 else {}),
        **options,
    }
    arguments = TrainingArguments(output_dir=str(folder), **settings)
    if prepare:
        prepare()
    trainer = Trainer(
        model=tiny_lora(),
        args=on_one_gpu(arguments),
        train_dataset=tiny_rows(256),  # type: ignore[arg-type]
        callbacks=[ist, actives],
    )
    return trainer, ist, actives
