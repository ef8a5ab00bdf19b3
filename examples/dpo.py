"""Importance-aware Sparse Tuning with TRL's DPOTrainer.

The model computes no loss from a batch of preferences, so `IST` receives the loss to measure importance by.

    python examples/dpo.py                                      # a tiny random model, seconds on a CPU
    python examples/dpo.py --model Qwen/Qwen2.5-0.5B-Instruct   # a model of yours
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from starter import load, parse_arguments, sums
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import use_adapter

from ist import IST

BETA = 0.1


def dpo_loss(model: Any, batch: Any) -> Tensor:
    """The loss that TRL trains, on its own batches: the first half of the rows is chosen, the second rejected."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)[:, 1:]

    def log_probabilities() -> Tensor:
        logits = model(**inputs).logits[:, :-1].float()
        return -cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)

    policy = log_probabilities()
    with use_adapter(model, "ref" if "ref" in model.peft_config else None):
        reference = log_probabilities()
    chosen, rejected = (policy - reference).chunk(2)
    return -logsigmoid(BETA * (chosen - rejected)).mean()


def main() -> Any:
    """Train; returns the trainer."""
    arguments = parse_arguments(__doc__, steps=60)
    model, tokenizer = load(arguments.model)

    trainer = DPOTrainer(
        model=model,
        processing_class=tokenizer,
        args=DPOConfig(
            output_dir=arguments.output,
            max_steps=arguments.steps,
            per_device_train_batch_size=8,
            learning_rate=1e-2 if arguments.model is None else 5e-5,
            beta=BETA,
            bf16=torch.cuda.is_available(),
            logging_steps=10,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Dataset.from_list(sums(512)),  # your data goes here: prompt, chosen, rejected
        peft_config=LoraConfig(r=16, target_modules="all-linear"),
        callbacks=[IST(num_active_layers=0.25, mu=100.0, loss_function=dpo_loss)],
    )
    trainer.train()
    trainer.save_model()  # a plain PEFT adapter
    return trainer


if __name__ == "__main__":
    main()
