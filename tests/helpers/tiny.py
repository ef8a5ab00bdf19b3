"""A tiny Llama with LoRA, its data and its loop, for tests that train."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 64


def tiny_llama(num_layers: int = 4, seed: int = 0, vocab_size: int = VOCABULARY) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=vocab_size,
        )
    )


def tiny_lora(num_layers: int = 4, seed: int = 0, **lora: Any) -> Any:
    """LoRA on a tiny Llama, a `PeftModel`; up-projections are random unless `init_lora_weights` says otherwise."""
    options = {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"], "init_lora_weights": False}
    model = get_peft_model(tiny_llama(num_layers, seed), LoraConfig(**{**options, **lora}))
    assert isinstance(model, PeftModel)
    return model


def checkpoint_activations(model: Any, **options: Any) -> None:
    """Turn activation checkpointing on, by the name that the installed transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options or None)


def tiny_rows(num: int = 64, length: int = 12, seed: int = 1) -> list[dict[str, Tensor]]:
    """Rows that can be learned: sequences that count upwards."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(VOCABULARY, (num, 1), generator=generator)
    ids = (starts + torch.arange(length)) % VOCABULARY
    return [{"input_ids": row, "labels": row} for row in ids]


def tiny_batches(num: int, size: int = 4, seed: int = 1) -> list[dict[str, Tensor]]:
    rows = tiny_rows(num * size, seed=seed)
    return [
        {key: torch.stack([row[key] for row in rows[start : start + size]]) for key in rows[0]}
        for start in range(0, len(rows), size)
    ]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def layer_of(name: str) -> int | None:
    """The layer in a parameter's name, or None outside of the stack."""
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts else None


def moved_layers(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[int | None]:
    return {layer_of(name) for name in before if not torch.equal(before[name], after[name])}


def traces(model: nn.Module) -> dict[str, Any]:
    """All of a model's state that a visitor could leave changed, parameters' values aside."""
    modules = dict(model.named_modules())
    return {
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "training": {name: module.training for name, module in modules.items()},
        "hooks": {name: count_hooks(module) for name, module in modules.items()},
        "scaling": {
            n: dict(scaling) for n, m in modules.items() if isinstance(scaling := getattr(m, "scaling", 0), dict)
        },
        "disabled": {name: getattr(module, "_disable_adapters", None) for name, module in modules.items()},
    }


def count_hooks(module: nn.Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks)


def cycle(batches: list[Any]) -> Iterator[Any]:
    while True:
        yield from batches
