"""The recipes that come with the library: each parses, and gives the paper's method on a tiny model of its kind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from ist import SparseTuner
from ist.bottleneck import BottleneckConfig
from ist.cli.recipes.files import list_recipes
from ist.cli.train.arguments import RunArguments, parse_arguments

RECIPES = [file.stem for file in list_recipes()]
SMALL: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2}


def llama(num_layers: int) -> Any:
    return transformers.LlamaConfig(**SMALL, intermediate_size=24, num_hidden_layers=num_layers)


def gptj(num_layers: int) -> Any:
    return transformers.GPTJConfig(vocab_size=32, n_embd=16, n_head=2, n_layer=num_layers, rotary_dim=4, n_inner=24)


def bloom(num_layers: int) -> Any:
    return transformers.BloomConfig(vocab_size=32, hidden_size=16, n_head=2, n_layer=num_layers)


# From tables 8 and 9: model, N_L, N_u, N_v, mu, learning rate, adapter, adapted modules in each layer.
TABLE: dict[str, tuple[Callable[[int], Any], int, int, int, float, float, str, int]] = {
    "quickstart": (llama, 30, 8, 15, 100.0, 0.0, "lora", 7),
    "paper-llama-7b-lora": (llama, 32, 8, 16, 10.0, 2e-4, "lora", 5),
    "paper-llama-13b-lora": (llama, 40, 10, 20, 10.0, 2e-4, "lora", 5),
    "paper-gpt-j-6b-lora": (gptj, 28, 7, 14, 10.0, 2e-4, "lora", 5),
    "paper-bloomz-7b-lora": (bloom, 30, 8, 15, 10.0, 2e-4, "lora", 3),  # q, k and v are one module
    "paper-llama3-8b-lora": (llama, 32, 8, 16, 10.0, 2e-4, "lora", 5),
    "paper-llama3-8b-lora-arithmetic": (llama, 32, 8, 16, 100.0, 1e-4, "lora", 5),
    "paper-llama-7b-series": (llama, 32, 8, 16, 10.0, 2e-4, "series", 2),
    "paper-llama-13b-series": (llama, 40, 10, 20, 10.0, 2e-4, "series", 2),
    "paper-llama-7b-parallel": (llama, 32, 8, 16, 10.0, 2e-4, "parallel", 2),
    "paper-llama-13b-parallel": (llama, 40, 10, 20, 10.0, 2e-4, "parallel", 2),
}


def parse(recipe: str) -> RunArguments:
    return parse_arguments(["--recipe", recipe, "--bf16=false", "--use_cpu"])


def test_the_table_names_every_recipe() -> None:
    assert sorted(TABLE) == RECIPES


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_builds_its_model(recipe: str) -> None:
    make_config, num_layers, num_active, num_unsuppressed, mu, _, adapter, per_layer = TABLE[recipe]
    run = parse(recipe)
    assert run.ist.adapter == adapter
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_config(make_config(num_layers)), run.peft_config())
    with SparseTuner(model, run.ist_config) as tuner:
        counts = tuner.config.layer_counts(len(tuner.layers))
        assert (counts.total, counts.active, counts.unsuppressed) == (num_layers, num_active, num_unsuppressed)
        assert tuner.config.mu == mu
        assert {len(layer.adapters) for layer in tuner.layers} == {per_layer}
        assert len(tuner.begin_step()) == num_active
        ids = torch.randint(32, (2, 8))
        model(input_ids=ids, labels=ids).loss.backward()
        with_grad = [any(p.grad is not None for p in layer.parameters) for layer in tuner.layers]
        assert sum(with_grad) == num_active


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe.startswith("paper")])
def test_what_tables_8_and_9_say(recipe: str) -> None:
    learning_rate, adapter = TABLE[recipe][5:7]
    run = parse(recipe)
    training = run.training
    assert training.learning_rate == learning_rate
    assert (training.num_train_epochs, training.warmup_steps, training.optim) == (3, 100, "adamw_torch")
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 16
    assert training.max_length == 256
    assert training.completion_only_loss is False
    assert (run.ist_config.beta, run.ist_config.num_candidates, run.ist_config.update_interval) == (0.25, 3, 10)
    peft_config = run.peft_config()
    if adapter == "lora":
        assert (peft_config.r, peft_config.lora_alpha, peft_config.lora_dropout) == (32, 64, 0.05)
    else:
        assert isinstance(peft_config, BottleneckConfig)
        assert (peft_config.bottleneck_size, peft_config.mode) == (256, adapter)


def test_recipes_are_listed_without_trl() -> None:
    """`ist recipes` needs nothing of the extra `train`."""
    code = "import sys; sys.modules['trl'] = None; from ist.cli.main import main; sys.exit(main(['recipes']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines()} >= {*RECIPES, "compare-quick"}
