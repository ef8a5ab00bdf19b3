"""A tiny Llama that bitsandbytes quantises as it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from tests.helpers.tiny import VOCABULARY

BITS: dict[str, dict[str, Any]] = {
    "4 bits": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "4 bits, nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "8 bits": {"load_in_8bit": True},
}


def save_llama(folder: Path, num_layers: int) -> Path:
    """Save a tiny Llama whose widths are whole blocks of the 4-bit format."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def load_quantised(folder: Path, bits: str) -> Any:
    """The quantised model in training mode, which it stays in: it has no dropout, and bitsandbytes 0.50 repacks 4-bit
    weights on some CPUs when they are first used in evaluation mode, after which no gradient passes through them."""
    quantisation = BitsAndBytesConfig(**BITS[bits])
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantisation, dtype=torch.bfloat16, device_map="cpu"
    )
    return model.train()
