"""TRL's trainers on a tiny model and a few rows."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import trl
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ist import IST

LORA: dict[str, Any] = {
    "r": 4,
    "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"],
    "init_lora_weights": False,
}


def arguments(folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 5,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **options,
    }


WORDS = ["one", "two", "three", "four"] * 4


def sft_row(word: str, index: int) -> dict[str, Any]:
    return {"prompt": f"{word} ", "completion": word * 2}


def preference_row(word: str, index: int) -> dict[str, Any]:
    return {"prompt": f"{word} ", "chosen": word * 2, "rejected": "zz"}


def judged_row(word: str, index: int) -> dict[str, Any]:
    return {"prompt": f"{word} ", "completion": word * 2, "label": index % 2 == 0}


def prompt_row(word: str, index: int) -> dict[str, Any]:
    return {"prompt": f"{word} ", "answer": word * 2}


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(completion))) for completion in completions]


ROWS = {"SFT": sft_row, "DPO": preference_row, "KTO": judged_row, "GRPO": prompt_row, "RLOO": prompt_row}
ROWS |= dict.fromkeys(("Reward", "CPO", "ORPO"), preference_row)
SAMPLING = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
OPTIONS: dict[str, dict[str, Any]] = {"GRPO": SAMPLING, "RLOO": SAMPLING}


def make_trl_trainer(
    kind: str,
    folder: Path,
    out: Path,
    ist: IST,
    *callbacks: Any,
    wrapped: bool = False,
    module: ModuleType = trl,
    **options: Any,
) -> Any:
    """A trainer of TRL, or of a module in it, on a tiny model, which TRL wraps itself unless it is `wrapped` before."""
    is_reward = kind == "Reward"
    config = LoraConfig(**LORA, task_type="SEQ_CLS" if is_reward else "CAUSAL_LM")
    auto, labels = (AutoModelForSequenceClassification, {"num_labels": 1}) if is_reward else (AutoModelForCausalLM, {})
    model = auto.from_pretrained(folder, **labels)
    more: dict[str, Any] = {"reward_funcs": reward} if kind in ("GRPO", "RLOO") else {}
    settings = {"gradient_checkpointing": False, "bf16": False, **OPTIONS.get(kind, {}), **options}
    return getattr(module, f"{kind}Trainer")(
        model=get_peft_model(model, config) if wrapped else model,
        args=getattr(module, f"{kind}Config")(**arguments(out, **settings)),
        train_dataset=datasets.Dataset.from_list([ROWS[kind](word, i) for i, word in enumerate(WORDS)]),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=None if wrapped else config,
        callbacks=[ist, *callbacks],
        **more,
    )
