"""Small seeded trainings on a CPU that together pass through every part of a sparse step.

Only public names of `ist` stand here and in the modules beside, so that these trainings run at any commit, wherever its
modules lie.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from evidence import Result, summarize
from peft import PeftConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from tiny_models import (
    BATCH_SIZE,
    RANK,
    SkippedError,
    adalora,
    batches,
    lora,
    quantised_llama,
    rows,
    stack,
    tiny_gpt2,
    tiny_llama,
)
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, set_seed

from ist import IST, BottleneckConfig, FixedSelector, History, SparseTuner

__all__ = ["CASES", "NUM_STEPS", "train_case"]

NUM_STEPS = 24
UPDATE_INTERVAL = 4
RESUME_STEP = 10
"""A checkpoint between two importance updates."""
SPARSE: dict[str, Any] = {
    "num_active_layers": 2,
    "num_unsuppressed_layers": 2,
    "update_interval": UPDATE_INTERVAL,
    "mu": 1000.0,  # so large that losses of random models, which lie close together, change the choice
    "seed": 3,
}

Spellings = tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Case:
    """One training."""

    train: Callable[[Case, nn.Module, Path], list[float]]
    """Trains a model, leaves its history in a folder, and returns the loss of each optimizer step."""
    adapter: Callable[[], PeftConfig] | None = lora
    """Makes the adapter; None trains whole layers."""
    base: Callable[[], nn.Module] = tiny_llama
    selector: Any = "ist"
    spellings: Spellings = ({},)
    """Options beside `SPARSE`, in the ways in which commits spell them: the first that is accepted counts."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Options of TrainingArguments."""
    probes: Any = None
    """`probe_batches` of a plain loop."""
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None
    """Makes the optimizer of a plain loop; AdamW if None."""

    def make_model(self) -> nn.Module:
        """The model with its adapter, the same at each call."""
        set_seed(0)
        model = self.base()
        return get_peft_model(model, self.adapter()) if self.adapter else model  # type: ignore[arg-type]

    def options(self) -> dict[str, Any]:
        """Selector and options as keywords of `IST` and `SparseTuner`."""
        *earlier, last = self.spellings
        for spelling in earlier:
            options = {"selector": self.selector, **SPARSE, **spelling}
            with suppress(ValueError):
                IST(**options)
                return options
        options = {"selector": self.selector, **SPARSE, **last}
        IST(**options)
        return options


def train_in_loop(case: Case, model: nn.Module, folder: Path) -> list[float]:
    """A plain loop with `begin_step` and `end_step`."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = case.optimizer(model) if case.optimizer else torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    history = History(folder / "history.jsonl")
    losses = []
    model.train()
    with SparseTuner(model, probe_batches=case.probes, history=history, **case.options()) as tuner:
        tuner.attach_optimizer(optimizer)
        for batch in batches(NUM_STEPS):
            tuner.begin_step()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            tuner.end_step(optimizer)
            losses.append(loss.item())
    return losses


def arguments(case: Case, folder: Path) -> dict[str, Any]:
    """Options of TrainingArguments, with the loss of each step logged and not rounded."""
    return {
        "output_dir": str(folder),
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": BATCH_SIZE,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **case.settings,
    }


def logged_losses(trainer: Trainer) -> list[float]:
    """The loss of each optimizer step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train_in_trainer(case: Case, model: nn.Module, folder: Path, checkpoint: Path | None = None) -> list[float]:
    """The Trainer of transformers with the callback."""
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments(case, folder)),
        train_dataset=rows(64),  # type: ignore[arg-type]
        callbacks=[IST(**case.options())],
    )
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return logged_losses(trainer)


def train_and_resume(case: Case, model: nn.Module, folder: Path) -> list[float]:
    """An uninterrupted training, whose second part is done once more from a checkpoint and has to be equal.

    Raises:
        RuntimeError: it is not.
    """
    losses = train_in_trainer(case, model, folder)
    expected = summarize(model, folder, losses)
    resumed = case.make_model()
    losses = train_in_trainer(case, resumed, folder, folder / f"checkpoint-{RESUME_STEP}")
    found = summarize(resumed, folder, losses)
    if different := [name for name, value in expected.items() if found[name] != value]:
        raise RuntimeError(f"the resumed training differs from the uninterrupted one in {', '.join(different)}")
    return losses


def train_with_sft(case: Case, model: nn.Module, folder: Path) -> list[float]:
    """TRL's SFTTrainer on texts of digits.

    Raises:
        SkippedError: TRL is not installed.
    """
    try:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise SkippedError("trl is not installed") from error
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    signs = ["<pad>", "<eos>", *"0123456789 "]
    tokenizer = Tokenizer(models.WordLevel({sign: index for index, sign in enumerate(signs)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    # Texts of several lengths, so that batches are padded.
    texts = [{"prompt": f"{index} ", "completion": str(index) * (1 + index % 3)} for index in range(64)]
    trainer = SFTTrainer(
        model=model,  # type: ignore[arg-type]
        args=SFTConfig(**arguments(case, folder), gradient_checkpointing=False, bf16=False),
        train_dataset=Dataset.from_list(texts),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"),
        callbacks=[IST(**case.options())],
    )
    trainer.train()
    return logged_losses(trainer)


def two_fixed_layers(config: Any, num_layers: int) -> FixedSelector:
    """The first layer and the last but one."""
    return FixedSelector(config, num_layers, (0, num_layers - 2))


def lora_fa(model: nn.Module) -> torch.optim.Optimizer:
    """LoRA-FA's optimizer."""
    return create_lorafa_optimizer(model=model, r=RANK, lora_alpha=8, lr=1e-2, weight_decay=0.1)  # type: ignore[arg-type]


DROPOUT = partial(lora, lora_dropout=0.1)
SERIES = partial(BottleneckConfig, mode="series", bottleneck_size=8)
PARALLEL = partial(BottleneckConfig, mode="parallel", bottleneck_size=8)
CONV1D = partial(lora, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
PROBES = batches(3, seed=5)
LOADER = DataLoader(rows(32, seed=5), batch_size=BATCH_SIZE, collate_fn=stack)  # type: ignore[arg-type]

CASES: dict[str, Case] = {
    "LoRA, Trainer": Case(train_in_trainer, DROPOUT),
    "LoRA, loop": Case(train_in_loop, DROPOUT, probes=LOADER),
    "LoRA, SFTTrainer": Case(train_with_sft, DROPOUT),
    "LoRA, not fused": Case(train_in_loop, DROPOUT, spellings=({"fused": False, "recompute": "frozen"},)),
    "LoRA-FA": Case(train_in_loop, probes=PROBES, optimizer=lora_fa),
    "DoRA": Case(train_in_trainer, partial(lora, use_dora=True)),
    "AdaLoRA": Case(train_in_trainer, partial(adalora, NUM_STEPS)),
    "series bottleneck": Case(train_in_trainer, SERIES),
    "parallel bottleneck": Case(train_in_loop, PARALLEL, probes=PROBES),
    "quantised base": Case(train_in_loop, base=quantised_llama, probes=PROBES),
    "Conv1D": Case(train_in_loop, CONV1D, tiny_gpt2),
    "random layers": Case(train_in_trainer, selector="random"),
    "fixed layers": Case(train_in_loop, selector=two_fixed_layers),
    "LISA": Case(train_in_loop, None, selector="lisa", spellings=({"optimizer_state": "reset"},)),
    "authors' preset": Case(train_in_trainer, spellings=({"preset": "authors"}, {"preset": "reference"})),
    "cost-aware": Case(train_in_trainer, spellings=({"cost_exponent": 1.0}, {"price": 1.0})),
    "accumulation": Case(train_in_trainer, DROPOUT, settings={"gradient_accumulation_steps": 3}),
    "resume": Case(train_and_resume, DROPOUT, settings={"save_strategy": "steps", "save_steps": RESUME_STEP}),
}


def train_case(name: str) -> Result:
    """Train a case and return what is compared of it.

    Raises:
        SkippedError: this machine lacks what it needs.
        RuntimeError: the training was not of the steps and updates that it should have had.
    """
    case = CASES[name]
    folder = Path(tempfile.mkdtemp(prefix="unchanged-"))
    try:
        model = case.make_model()
        losses = case.train(case, model, folder)
        result = summarize(model, folder, losses)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    expected = NUM_STEPS // UPDATE_INTERVAL if case.selector == "ist" else 0
    if (result["num_steps"], result["num_updates"], len(losses)) != (NUM_STEPS, expected, NUM_STEPS):
        raise RuntimeError(
            f"{result['num_steps']} steps, {result['num_updates']} importance updates and {len(losses)} losses: "
            f"expected {NUM_STEPS}, {expected} and {NUM_STEPS}"
        )
    if not all(map(math.isfinite, losses)):
        raise RuntimeError(f"losses that are not finite: {losses}")
    return result
