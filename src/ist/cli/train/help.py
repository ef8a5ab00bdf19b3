"""`ist train --help`, a page of what most people need, and `--help-all`, every flag."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .parser import FlagParser

__all__ = ["COMMON", "HELP_TEXTS", "format_help", "print_help"]

COMMON: Mapping[str, tuple[str, ...]] = {
    "Model and data": (
        "model_name_or_path", "data_files", "task", "dataset_name", "validation_size", "max_length",
    ),
    "Method: which layers train": ("method", "num_active_layers", "update_interval", "mu", "num_focused_layers"),
    "Adapter": ("adapter", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"),
    "Training": (
        "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
        "warmup_steps", "seed",
    ),
    "Memory and time": ("dtype", "bf16", "load_in_4bit", "recompute", "gradient_checkpointing", "max_train_seconds"),
    "Run": ("output_dir", "resume_from_checkpoint", "overwrite", "logging_steps", "save_steps", "report_to"),
}  # fmt: skip
"""Flags of the page, by the title that they stand under."""

HELP_TEXTS: Mapping[str, str] = {
    "model_name_or_path": "The model: a folder, a name on the Hugging Face hub, `smollm2-135m` for the quickstart's, "
    "or a saved adapter, which then trains further.",
    "max_length": "Tokens of a row; longer rows are cut off there.",
    "lora_r": "Rank of LoRA.",
    "lora_alpha": "LoRA's output is scaled by `lora_alpha / lora_r`.",
    "lora_dropout": "Dropout on LoRA's input.",
    "lora_target_modules": "Names of the modules with LoRA (`q_proj v_proj`), a regular expression, or `all-linear`: "
    "all linear modules of the layers, the default.",
    "learning_rate": "The highest learning rate: 2e-4 for adapters and 2e-5 for whole layers by default.",
    "num_train_epochs": "Passes over the training rows.",
    "max_steps": "Optimizer steps; by default, as many as `num_train_epochs` takes.",
    "per_device_train_batch_size": "Rows of a batch, for each process.",
    "gradient_accumulation_steps": "Batches of an optimizer step.",
    "warmup_steps": "Steps in which the learning rate rises: a count, or a fraction of all steps; none by default.",
    "seed": "Seed of the data's order, the adapter's weights and the choice of layers.",
    "dtype": "Type of the model's weights: auto, bfloat16, float16 or float32.",
    "bf16": "Compute in bfloat16 (mixed precision); on by default where the GPU can.",
    "load_in_4bit": "Quantise the frozen model to 4 bits with bitsandbytes.",
    "gradient_checkpointing": "Keep few activations and compute the others again in the backward: less memory, a "
    "quarter more time.",
    "output_dir": "The folder of the run; by default `runs/` and the recipe's name, numbered (`runs/ist-2`) where that "
    "folder holds another run.",
    "resume_from_checkpoint": "Resume a run: a checkpoint's folder, `last`, or `auto` (the last, or afresh).",
    "logging_steps": "Steps between two lines of the log.",
    "save_steps": "Steps between two checkpoints.",
    "report_to": "Programs that the log goes to: tensorboard, wandb, …",
}
"""Help of TRL's flags on the page, and of those whose default is another one here."""

MEANINGS: Mapping[str, Mapping[str, str]] = {
    "method": {
        "ist": "adapters of a quarter of the layers, drawn by importance at each step (the paper)",
        "random": "the same, drawn at random; nothing is measured",
        "focused": "adapters in half of the layers, chosen by importance before training; they stay",
        "even": "the same, evenly spread; nothing is measured",
        "top-gradient": "the same, the most important ones, wherever they are",
        "peft": "all adapters: LoRA, DoRA, … as PEFT has them",
        "fixed": "the layers of --fixed_layers",
        "greedy": "layers that short trials find before the training",
        "lift-front-to-end": "the next few layers every --update_interval steps, from the input on",
        "lift-end-to-front": "the same, from the output on",
        "lift-random": "the same, in random order",
        "lisa": "the model's own weights: a few whole layers, drawn every --update_interval steps",
        "full": "the model's own weights, all of them (full fine-tuning)",
    },
}
"""What the values of a flag mean, a line each."""

OTHERS = ("More of this library", "The method in detail", "Dataset (TRL)", "Training (TRL and transformers)",
          "Model and LoRA (TRL)", "Mixtures of datasets (TRL)")  # fmt: skip
"""Titles for the other flags of the parser's dataclasses, in their order."""

USAGE = """usage: ist train [--recipe NAME_OR_FILE [--trust_recipe]] [--FLAG VALUE …]

Without a recipe, a model and data it runs the quickstart. A flag goes over the recipe's value."""
WIDTH, INDENT, VALUE_INDENT = 110, 28, 26
"""Columns of the widest page, those before a flag's text, and those before the text of one of its values."""


def print_help(parser: FlagParser, arguments: Sequence[str]) -> None:
    """Print the page that the arguments ask for, and exit with 0; return where they ask for none.

    Raises:
        SystemExit: a page was printed.
    """
    asked = {argument.replace("_", "-") for argument in arguments} & {"-h", "--help", "--help-all"}
    if asked:
        print(format_help(parser, everything="--help-all" in asked, width=shutil.get_terminal_size().columns), end="")
        raise SystemExit(0)


def format_help(parser: FlagParser, everything: bool, width: int = WIDTH) -> str:
    """The help of `ist train`.

    Args:
        parser: with the flags and their defaults.
        everything: all flags with their whole text; else the common ones with the first sentence of each.
        width: columns of the terminal.
    """
    actions: dict[str, list[argparse.Action]] = {}
    for action in parser._actions:
        actions.setdefault(action.dest, []).append(action)
    groups: dict[str, Sequence[str]] = dict(COMMON)
    if everything:
        common = {name for names in COMMON.values() for name in names}
        for title, owner in zip(OTHERS, parser.dataclass_types, strict=True):
            names = [field.name for field in dataclasses.fields(owner) if field.init and field.name not in common]
            groups[title] = names
    lines = [USAGE]
    for title, names in groups.items():
        lines += ["", f"{title}:"]
        for name in names:
            for action in actions[name] if everything else actions[name][:1]:
                lines += format_flag(action, everything, max(60, min(width, WIDTH)))
    if not everything:
        lines += ["", f"`ist train --help-all` lists all {len(actions)} flags; TRL's own are among them."]
    return "\n".join(lines) + "\n"


def format_flag(action: argparse.Action, everything: bool, width: int) -> Iterator[str]:
    """The lines of a flag: its name and value, and its text in a column of its own."""
    name = next(option for option in action.option_strings if option.startswith("--"))
    head = f"  {name} {metavar(action)}".rstrip()
    text = " ".join((action.help or "").replace("%%", "%").replace("`", "").split())
    if not everything:
        text = re.split(r"(?<=[.?!]) (?=[A-Z])", text)[0]
    if action.const is not False and "by default" not in text and (default := describe_default(action)):
        text = f"{text} (default: {default})"
    wrapped = textwrap.wrap(text, width - INDENT, break_on_hyphens=False) or [""]
    if len(head) > INDENT - 2:
        yield head
        head = ""
    yield f"{head:{INDENT}}{wrapped[0]}".rstrip()
    for line in wrapped[1:]:
        yield f"{'':{INDENT}}{line}"
    for value, meaning in MEANINGS.get(action.dest, {}).items():
        first, *others = textwrap.wrap(meaning, width - VALUE_INDENT, break_on_hyphens=False)
        yield f"{f'      {value}':{VALUE_INDENT}}{first}"
        yield from (f"{'':{VALUE_INDENT}}{line}" for line in others)


def metavar(action: argparse.Action) -> str:
    """What stands for a flag's value; nothing where it needs none."""
    if action.nargs in (0, "?"):
        return ""
    kind = "N" if action.type is int else "X" if action.type is float else "VALUE"
    return f"{kind} …" if action.nargs == "+" else kind


def describe_default(action: argparse.Action) -> str:
    """A flag's default, where it says something."""
    default: Any = getattr(action.default, "value", action.default)
    return "" if default in (None, "", False) or default == [] or default == {} else str(default)
