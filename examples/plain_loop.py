"""Importance-aware Sparse Tuning in a plain PyTorch loop: what the Trainer callback does, by hand.

A small random Llama learns to count. Replace the model and the batches by your own; the lines with `tuner` stay.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from ist import SparseTuner

NUM_STEPS = 120


def main() -> tuple[float, float]:
    """Train; returns the mean loss of the first and of the last ten steps, in nats."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4
    )
    lora = LoraConfig(r=16, target_modules="all-linear", modules_to_save=["lm_head"])
    model = get_peft_model(LlamaForCausalLM(config), lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    sequences = [{"input_ids": ids, "labels": ids} for ids in (torch.arange(16) + torch.arange(48)[:, None])]
    loader = DataLoader(sequences, batch_size=8, shuffle=True)  # pyright: ignore[reportArgumentType]

    losses: list[float] = []
    with SparseTuner(model, num_active_layers=2, mu=100.0, probe_batches=loader) as tuner:
        while len(losses) < NUM_STEPS:
            for batch in loader:
                with tuner.step(optimizer):  # choose two of the eight layers; every ten steps: measure and learn
                    loss = model(**batch).loss
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                losses.append(loss.item())
    return sum(losses[:10]) / 10, sum(losses[-10:]) / 10


if __name__ == "__main__":
    first, last = main()
    print(f"loss {first:.2f} -> {last:.2f}")
