"""Whatever is raised below a command is one line and status 2; a fault of the library is called one."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

from ist.cli import main as command_line
from ist.cli.failures import describe_failure
from ist.cli.main import main
from ist.cli.recipes.files import check_keys
from ist.cli.sources import check_local_model
from ist.cli.train.arguments import known_flags


def raised_by(function: Any, *arguments: Any) -> Exception:
    with pytest.raises(Exception) as raised:  # noqa: PT011
        function(*arguments)
    return raised.value


def raise_it(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("beta=2 is not allowed"), "beta=2 is not allowed"),
        (FileNotFoundError(2, "No such file", "x"), "[Errno 2] No such file: 'x'"),
        (RuntimeError("size mismatch\n\tfor lora_A"), "RuntimeError: size mismatch; IST_DEBUG=1 shows where"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero; IST_DEBUG=1"),
        (pickle.UnpicklingError("set `weights_only` to `False`"), "UnpicklingError: a file is damaged, or runs code"),
        (RecursionError("maximum"), "RecursionError: something nests too deep; IST_DEBUG=1"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos"),
            "a file could not be written whole",
        ),
        (RuntimeError("I/O error: No space left (os error 28)"), "a file could not be written whole, the disk is full"),
        (KeyError("weight_map"), "KeyError: 'weight_map'; IST_DEBUG=1"),
        (TypeError(""), "TypeError: no message; IST_DEBUG=1"),
    ],
)
def test_an_exception_of_a_file_or_flag(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(command_line.COMMANDS, "train", lambda _: raise_it(error))
    assert main(["train"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"ist train: error: {said}")
    assert shown.count("\n") == 1
    monkeypatch.setenv("IST_DEBUG", "1")
    with pytest.raises(type(error)):
        main(["train"])


def test_a_fault_of_the_library_is_called_one() -> None:
    ours = raised_by(known_flags, 1)  # raised here, outside of the package
    assert "fault" not in describe_failure(ours)
    ours = raised_by(check_keys, "x", 3, set())  # raised by a line of the package
    assert describe_failure(ours).startswith("this is a fault of ist, not yours (TypeError: ")
    theirs = raised_by(json.loads, 3)
    assert "fault" not in describe_failure(theirs)


@pytest.mark.parametrize(
    ("key", "flag"),
    [
        ("lr", "learning_rate"),
        ("model", "model_name_or_path"),
        ("lora_rank", "lora_r"),
        ("torch_dtype", "dtype"),
        ("target_modules", "lora_target_modules"),
        ("leaning_rate", "learning_rate"),
    ],
)
def test_a_hint_names_the_flag_that_was_meant(key: str, flag: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean '{flag}'"):
        check_keys("a recipe", [key], known_flags())


@pytest.mark.parametrize("name", ["./model", "/no/model", "~/no-model", "a/b/c", "model/"])
def test_a_model_path_that_is_not_there(name: str) -> None:
    with pytest.raises(ValueError, match="There is no model at"):
        check_local_model(name)


@pytest.mark.parametrize("name", [None, "x", "owner/name"])
def test_a_name_of_the_hub_is_left_alone(name: str | None) -> None:
    check_local_model(name)
