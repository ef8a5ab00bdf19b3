"""The flag or name that somebody meant who typed another one."""

from __future__ import annotations

from collections.abc import Collection

from ..config import keywords

__all__ = ["did_you_mean", "nearest", "unknown_flag"]

OTHER_NAMES = {
    "lr": ["learning_rate"],
    "model": ["model_name_or_path"],
    "model_name": ["model_name_or_path"],
    "base_model": ["model_name_or_path"],
    "lora_rank": ["lora_r"],
    "rank": ["lora_r"],
    "r": ["lora_r"],
    "alpha": ["lora_alpha"],
    "dropout": ["lora_dropout"],
    "target_modules": ["lora_target_modules"],
    "torch_dtype": ["dtype"],
    "data": ["data_files", "tasks"],
    "dataset": ["dataset_name", "data_files"],
    "train_file": ["data_files"],
    "batch_size": ["per_device_train_batch_size"],
    "epochs": ["num_train_epochs"],
    "steps": ["max_steps"],
    "max_seq_length": ["max_length"],
    "max_seq_len": ["max_length"],
    "cutoff_len": ["max_length"],
    "output": ["output_dir"],
    "num_layers": ["num_active_layers"],
}
"""What other programs call our flags."""


def nearest(name: str, allowed: Collection[str]) -> str | None:
    """The most similar of the allowed names, or None where none resembles it."""
    known = [other for other in OTHER_NAMES.get(name, ()) if other in allowed]
    return known[0] if known else keywords.nearest(name, allowed)


def did_you_mean(name: str, allowed: Collection[str], dashes: str = "") -> str:
    """` (did you mean …?)` where something resembles the name, and else nothing."""
    near = nearest(name, allowed)
    return f" (did you mean {dashes}{near}?)" if near else ""


def unknown_flag(argument: str, allowed: Collection[str], help_command: str) -> ValueError:
    """The error for an argument that no flag takes.

    Args:
        argument: as it was typed.
        allowed: flags without their dashes.
        help_command: what lists them.
    """
    if not argument.startswith("-"):
        return ValueError(
            f"{argument!r} belongs to no flag: write --FLAG before a value, and quotes around one with spaces; "
            f"`{help_command}` lists the flags."
        )
    typed = argument.partition("=")[0]
    hint = did_you_mean(typed.lstrip("-").replace("-", "_"), allowed, "--")
    return ValueError(f"There is no flag {typed}{hint}: `{help_command}` lists the flags.")
