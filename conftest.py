"""Fixtures that several test files share."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import logging
import os
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network

import pytest

pytest_plugins = ["tests.helpers.measured"]

NEED_EXTRAS = [
    "benchmarks",
    "tests/cli",
    "tests/experiments/test_comparison.py",
    "tests/experiments/test_report.py",
    "tests/integrations/test_undoing.py",
]
"""Tests of what the extras bring, which need Python 3.11. `make test-core` has none of them and leaves these out."""
collect_ignore = [] if importlib.util.find_spec("trl") else NEED_EXTRAS

SHARED = Path(__file__).parents[1] / "shared" / "data"


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Bytes and long texts are called by their argument's name: every process must collect the same names, and what a
    packer writes into bytes (the second of the day) differs between two.
    """
    return argname if isinstance(val, bytes) or (isinstance(val, str) and len(val) > 200) else None


HEAVY = ["torch", "transformers.trainer", "peft", "trl", "datasets", "diffusers", "matplotlib.pyplot"]
"""Libraries of many tests, whose import takes several times as long while coverage is measured."""


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """Import them first, unmeasured, in the processes that run tests."""
    config = session.config
    if hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None):
        measured: Any = config.pluginmanager.get_plugin("tests.helpers.measured")
        if measured.lines_walked() is not None:
            with measured.unmeasured(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for name in HEAVY:
                    with contextlib.suppress(ImportError):
                        importlib.import_module(name)
    return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before the first test of a file, spare the garbage collector what lives until the end of the process (modules,
    collected tests): accelerate collects everything in each `Trainer.train`, which otherwise takes half a second.
    """
    if item.path not in files_begun:
        import torch  # not above: the process that hands out tests to others starts without it

        files_begun.add(item.path)
        torch.set_num_threads(1)
        gc.collect()
        gc.freeze()


files_begun: set[Path] = set()


@pytest.fixture(autouse=True)
def log_levels() -> Iterator[None]:
    """`ist train` quietens the library's logs for its process, which is that of other tests too; so do programs that a
    fixture of a whole file runs.
    """
    hear_all()
    yield
    hear_all()


def hear_all() -> None:
    """Let every logger of the library pass on what it hears. Setting a level empties the cache of all
    loggers, so none is set that is right.
    """
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if (name == "ist" or name.startswith("ist.")) and isinstance(logger, logging.Logger) and logger.level:
            logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama of four layers with a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tests.helpers.tiny import tiny_llama

    folder = tmp_path_factory.mktemp("tiny-llama")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {sign: index for index, sign in enumerate(["<pad>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    model = tiny_llama(vocab_size=len(vocabulary))
    model.config.eos_token_id = model.generation_config.eos_token_id = vocabulary["<eos>"]  # pyright: ignore[reportOptionalMemberAccess]
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Data that lies beside the project on some machines."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there: the data of the paper's tasks does not come with the project")
    return SHARED
