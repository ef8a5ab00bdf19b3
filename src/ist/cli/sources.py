"""Models and adapters by name: a folder here, or OWNER/NAME on the Hugging Face hub; what was looked for, and where."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import HFValidationError

from .quickstart_model import QUICKSTART_MODEL

__all__ = ["ADAPTERS", "check_chat_template", "check_local_model", "looked_for_adapter", "looked_for_model"]

MODELS = (
    f"--model_name_or_path takes a model's folder, OWNER/NAME of the hub, or {QUICKSTART_MODEL} for the quickstart's"
)
ADAPTERS = "--adapter takes a folder with adapter_config.json, such as the --output_dir of `ist train`, or OWNER/NAME"


def is_path(name: str) -> bool:
    """Whether a name can only be a path, and never one of the hub."""
    return name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or name.endswith("/")


@contextmanager
def looked_for_model(name: str) -> Iterator[None]:
    """Where a model that is not a folder here cannot be loaded, raise ValueError: what was looked for, and where."""
    with looked_for(name, "model", MODELS):
        yield


@contextmanager
def looked_for_adapter(name: str) -> Iterator[None]:
    """The same for an adapter."""
    with looked_for(name, "adapter", ADAPTERS):
        yield


@contextmanager
def looked_for(name: str, what: str, way_out: str) -> Iterator[None]:
    """Say what was looked for, and where."""
    here = Path(name).expanduser()
    check_path(name, what, way_out)
    try:
        yield
    except (OSError, ValueError) as error:
        missing = isinstance(error, (OSError, HFValidationError)) or str(error).startswith("Can't find")
        if here.exists() or not missing:
            raise
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{name} is not a folder here ({here.absolute()}), and the Hugging Face hub gave no {what} "
            f"({said[0].rstrip(' .:')}): {way_out}."
        ) from error


def check_path(name: str, what: str, way_out: str) -> None:
    """Raise ValueError where a name can only be a path and nothing is there, or a file."""
    here = Path(name).expanduser()
    if is_path(name) and not here.exists():
        raise ValueError(f"There is no {what} at {name} (looked for {here.absolute()}): {way_out}.")
    if here.is_file():
        raise ValueError(f"{name} is a file, and a{'n' if what == 'adapter' else ''} {what} is a folder: {way_out}.")


def check_local_model(name: str | None) -> None:
    """Raise ValueError where a model's name can only be a path and nothing is there, or its folder's configuration is
    damaged; the hub is not asked for it.
    """
    if not name:
        return
    check_path(name, "model", MODELS)
    for file, key in (("config.json", None), ("adapter_config.json", "peft_type")):
        check_configuration(Path(name).expanduser() / file, key)


def check_chat_template(name: str | None) -> None:
    """Raise ValueError where the value of `--chat_template_path` can only be a file and is none; a folder or a name of
    the hub is a tokenizer's.
    """
    if name and not Path(name).exists() and (is_path(name) or Path(name).suffix in (".jinja", ".jinja2", ".j2")):
        raise ValueError(
            f"There is no chat template {name} (looked for {Path(name).absolute()}): --chat_template_path takes a file "
            "in Jinja, or the folder or name of a tokenizer that has one."
        )


def check_configuration(file: Path, key: str | None) -> None:
    """Raise ValueError where a file is there and is no JSON object, or lacks a key."""
    if not file.is_file():
        return
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}): take the file that came with the model.") from error
    if not isinstance(content, dict) or (key and not content.get(key)):
        raise ValueError(f"{file} is no JSON object with {key or 'keys'}: take the file that came with the model.")
