"""Importance-aware Sparse Tuning with the Trainer of transformers.

To run it, from the folder of the project:

    python examples/trainer.py                             # a tiny random model, seconds on a CPU
    python examples/trainer.py --model Qwen/Qwen3-0.6B     # a model of yours
    accelerate launch --config_file examples/distributed/ddp.yaml examples/trainer.py --model Qwen/Qwen3-0.6B
"""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, get_peft_model
from starter import load, parse_arguments, sums
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from ist import IST


def main() -> Any:
    """Train; returns the Trainer."""
    arguments = parse_arguments(__doc__, steps=60)
    model, tokenizer = load(arguments.model)
    texts = [row["prompt"] + row["chosen"] + tokenizer.eos_token for row in sums(512)]  # your data goes here
    tokens = [tokenizer(text, return_token_type_ids=False) for text in texts]
    rows: Any = [{**row, "labels": row["input_ids"]} for row in tokens]

    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=arguments.output,
            max_steps=arguments.steps,
            per_device_train_batch_size=16,
            learning_rate=1e-2 if arguments.model is None else 3e-4,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),  # no loss on padding, but on the end, though it may pad too
        callbacks=[IST(num_active_layers=0.25, mu=100.0)],  # the one line
    )
    trainer.train()
    trainer.save_model()  # a plain PEFT adapter
    return trainer


if __name__ == "__main__":
    main()
