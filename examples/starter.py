"""What the examples need to run without a download: a tiny random Llama, a tokenizer of bytes, and sums to learn.

The examples take `--model NAME` for a model of yours; they use the tiny one without it.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def parse_arguments(description: str | None, steps: int) -> argparse.Namespace:
    """The options that all examples share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder of a causal language model; a tiny random one if left out")
    parser.add_argument("--output", default="runs/example", help="folder for the adapter")
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps (default: %(default)s)")
    return parser.parse_args()


def load(name: str | None) -> tuple[Any, Any]:
    """A causal language model and its tokenizer: the named one, or a tiny random Llama of eight layers."""
    if name is not None:
        tokenizer = AutoTokenizer.from_pretrained(name)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return AutoModelForCausalLM.from_pretrained(name), tokenizer
    alphabet = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_only: Any = Tokenizer(models.BPE(vocab={sign: i for i, sign in enumerate(alphabet)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        initializer_range=0.15,  # a random head must be able to tell the signs apart
        pad_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config), tokenizer


def sums(num: int) -> list[dict[str, str]]:
    """Prompts with the right completion and a wrong one: `{"prompt": "3 + 4 =", "chosen": " 7", "rejected": " 9"}`."""
    choices = random.Random(0)
    rows = []
    for _ in range(num):
        a, b, error = choices.randrange(10), choices.randrange(10), choices.randrange(1, 5)
        rows.append({"prompt": f"{a} + {b} =", "chosen": f" {a + b}", "rejected": f" {a + b + error}"})
    return rows


def sum_loader(tokenizer: Any, device: torch.device, batch_size: int = 16) -> DataLoader[Any]:
    """Batches of solved sums for this rank, as a language model takes them; a rank has rows of its own."""

    def collate(texts: list[str]) -> dict[str, Any]:
        batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False).to(device)
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    texts: Any = [row["prompt"] + row["chosen"] + tokenizer.eos_token for row in sums(512)]
    return DataLoader(texts, batch_size=batch_size, sampler=DistributedSampler(texts), collate_fn=collate)
