"""Tiny models of random weights, their adapters and their data."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

__all__ = [
    "BATCH_SIZE",
    "RANK",
    "Rows",
    "SkippedError",
    "adalora",
    "batches",
    "lora",
    "quantised_llama",
    "rows",
    "stack",
    "tiny_gpt2",
    "tiny_llama",
]

VOCABULARY, LENGTH, BATCH_SIZE = 64, 12, 4
RANK = 4
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]

Rows = list[dict[str, Tensor]]


class SkippedError(Exception):
    """A case cannot run on this machine, for a reason that has nothing to do with `ist`."""


# --- models and data


def tiny_llama(hidden_size: int = 32) -> LlamaForCausalLM:
    """A Llama of 4 layers."""
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
        )
    )


def tiny_gpt2() -> GPT2LMHeadModel:
    """A GPT-2 of 4 layers, whose linear modules are Conv1D."""
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=4, n_head=4, n_positions=32, vocab_size=VOCABULARY))


def quantised_llama() -> nn.Module:
    """A Llama of 4 layers with 4-bit weights.

    Raises:
        SkippedError: bitsandbytes is not installed, or has no gradient for 4-bit weights on this machine.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise SkippedError("bitsandbytes is not installed") from error
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    with tempfile.TemporaryDirectory() as folder:
        tiny_llama(hidden_size=64).save_pretrained(folder)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder, quantization_config=quantisation, dtype=torch.bfloat16, device_map="cpu"
            ).train()
            embedded = model.get_input_embeddings()(rows(1)[0]["input_ids"][None]).detach().requires_grad_()
            model(inputs_embeds=embedded).logits.sum().backward()
        except (RuntimeError, NotImplementedError) as error:
            raise SkippedError(f"4-bit weights do not train on this CPU: {error}") from error
    return model


def rows(num: int, seed: int = 1) -> Rows:
    """Texts that can be learned: sequences that count upwards."""
    starts = torch.randint(VOCABULARY, (num, 1), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in (starts + torch.arange(LENGTH)) % VOCABULARY]


def stack(examples: Rows) -> dict[str, Tensor]:
    """A batch of examples."""
    return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}


def batches(num: int, seed: int = 1) -> list[dict[str, Tensor]]:
    """Batches of `rows`."""
    examples = rows(num * BATCH_SIZE, seed)
    return [stack(examples[start : start + BATCH_SIZE]) for start in range(0, len(examples), BATCH_SIZE)]


# --- adapters


def lora(**options: Any) -> LoraConfig:
    """LoRA whose up-projections start at random, so that every layer has a response from the first step on."""
    return LoraConfig(**{"r": RANK, "target_modules": TARGETS, "init_lora_weights": False, **options})


def adalora(num_steps: int) -> AdaLoraConfig:
    """AdaLoRA whose schedule ends within a training of so many steps."""
    return AdaLoraConfig(
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
        init_r=RANK,
        target_r=RANK // 2,
        tinit=4,
        tfinal=8,
        deltaT=2,
        total_step=num_steps,
    )
