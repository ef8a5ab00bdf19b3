"""Importance-aware Sparse Tuning with TRL's DPOTrainer.

Importance is measured by the loss that the trainer computes from a batch of preferences.

    python examples/dpo.py                                      # a tiny random model, seconds on a CPU
    python examples/dpo.py --model Qwen/Qwen2.5-0.5B-Instruct   # a model of yours
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from starter import load, parse_arguments, sums
from trl import DPOConfig, DPOTrainer

from ist import IST


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
            beta=0.1,
            bf16=torch.cuda.is_available(),
            logging_steps=10,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Dataset.from_list(sums(512)),  # your data goes here: prompt, chosen, rejected
        peft_config=LoraConfig(r=16, target_modules="all-linear"),
        callbacks=[IST(num_active_layers=0.25, mu=100.0)],
    )
    trainer.train()
    trainer.save_model()  # a plain PEFT adapter
    return trainer


if __name__ == "__main__":
    main()
