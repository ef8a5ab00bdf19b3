"""Importance-aware Sparse Tuning with TRL's SFTTrainer: the loss counts the completions alone.

To run it, from the folder of the project:

    python examples/sft.py                             # a tiny random model, seconds on a CPU
    python examples/sft.py --model Qwen/Qwen3-0.6B     # a model of yours
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from starter import load, parse_arguments, sums
from trl import SFTConfig, SFTTrainer

from ist import IST


def main() -> Any:
    """Train; returns the trainer."""
    arguments = parse_arguments(__doc__, steps=60)
    model, tokenizer = load(arguments.model)
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in sums(512)]  # your data goes here

    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        args=SFTConfig(
            output_dir=arguments.output,
            max_steps=arguments.steps,
            per_device_train_batch_size=16,
            learning_rate=1e-2 if arguments.model is None else 3e-4,
            bf16=torch.cuda.is_available(),
            logging_steps=10,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=16, target_modules="all-linear"),
        callbacks=[IST(num_active_layers=0.25, mu=100.0)],  # the one line
    )
    trainer.train()
    trainer.save_model()  # a plain PEFT adapter
    return trainer


if __name__ == "__main__":
    main()
