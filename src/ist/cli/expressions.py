"""Regular expressions of configurations, of adapters and of quantised models: PEFT and transformers match them with the
names of modules, and some never end.

They are tried before those see them, in a process of their own that can be stopped: this file, run by its path, which
is why it imports nothing but Python's own.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import product
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["check_expressions", "check_quantization"]

SECONDS = 10.0
"""After which expressions count as endless, beside `SECONDS_EACH`."""
SECONDS_EACH = 5e-5
"""For an expression and a name: several times what one that ends takes."""
MOST_TEXTS = 1000
"""Beside four for each name, those of single experts among them."""
MATCHES = {
    "{0}": ("fullmatch", "search"),
    r"(.*\.)?({0})$": ("match",),
    r"(^|.*\.){0}($|\..*)": ("match",),
    r"(?:^|.*?\.){0}\.(?P<idx>\d+)\.": ("match",),
    r".*\.{0}$": ("match",),
    r"(?:{0})(?:(?<=\.)|(?=\.|$))": ("match",),
}
"""How PEFT matches names: targets, then parts of names as keys of patterns, modules to save and lists of blocks; and
how transformers finds what stays as it is."""
SIGNS = ("re:", "+:", "-:")
"""Before expressions among names, in the settings of quantisers."""
EMBEDDINGS = ("embed_tokens", "lm_head")
FUSED, EXPERTS = (".gate_up_proj", ".down_proj"), ("gate", "gate_proj", "up_proj", "w1", "w2", "w3")
"""Ends of names of parameters that hold all experts, and what transformers 4 called the parts of one."""
WAY_OUT = "Try it again, or name the modules, such as q_proj."


def check_expressions(config: Any, model: nn.Module, where: str) -> None:
    """Raise ValueError where a text in an adapter's configuration is a regular expression that does not end.

    Names of modules are not tried. Other texts, such as the base model's name with its slash, take some 30 ms.

    Args:
        config: PEFT's, of any type: its texts are found in every setting, at any depth.
        model: which the adapter is put on; its modules and parameters have the names.
        where: the configuration comes from.
    """
    try_texts((text for value in vars(config).values() for text in texts_in(value)), lambda: model, where)


def check_quantization(settings: Any, make_model: Callable[[], nn.Module], where: str) -> None:
    """Raise ValueError where a text in the settings of a quantised checkpoint is an expression that does not end.

    Args:
        settings: of any quantiser, as JSON has them.
        make_model: makes the model of the checkpoint, without its weights, where there are expressions.
        where: the settings come from.
    """
    found = list(texts_in(settings))
    bare = [text.removeprefix(sign) for text in found for sign in SIGNS if text.startswith(sign)]
    several = settings.get("module_quant_configs") if isinstance(settings, Mapping) else None
    if isinstance(several, Mapping) and several:  # Transformers makes one expression of the keys.
        bare.append("|".join(f"(?P<g{number}>{key})" for number, key in enumerate(several)))
    try_texts([*found, *bare], make_model, where)


def try_texts(texts: Iterable[str], make_model: Callable[[], nn.Module], where: str) -> None:
    """Raise ValueError where one of some texts is an expression that does not end on the names of a model."""
    found = list(dict.fromkeys(texts))
    expressions = [text for text in found if not re.fullmatch(r"[\w.-]*", text)]
    if not expressions and len(found) <= MOST_TEXTS:
        return
    model = make_model()
    names = names_of(model)
    most = MOST_TEXTS + 4 * (len(names) + num_experts(model))
    if len(found) > most:
        raise ValueError(f"{where} holds {len(found)} texts, and for this model {most} at most: it is damaged.")
    if not expressions:
        return
    seconds = SECONDS + SECONDS_EACH * len(expressions) * len(names)
    asked = json.dumps([expressions, names])
    command = [sys.executable or "python3", "-I", "-S", __file__]
    try:
        subprocess.run(command, input=asked.encode(), capture_output=True, timeout=seconds, check=True)
    except OSError as error:
        raise ValueError(f"{untried(where)} {command[0]} did not start ({error.strerror}). {WAY_OUT}") from error
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(said) if line.strip()), "it printed nothing")
        raise ValueError(
            f"{untried(where)} {command[0]} ended with status {error.returncode} ({last}). {WAY_OUT}"
        ) from error
    except subprocess.TimeoutExpired as error:
        if not error.stdout:
            raise ValueError(f"{untried(where)} {command[0]} did not start within {seconds:.0f} s. {WAY_OUT}") from None
        tried = error.stdout.split()[-1]
        raise ValueError(
            f"{where} has the regular expression {expressions[int(tried)]!r}, which did not end within {seconds:.0f} s "
            "on the names of this model's modules: repeat nothing that repeats, as in (.+)+, or name the modules, such "
            "as q_proj."
        ) from None


def untried(where: str) -> str:
    """How a message begins where nothing can be said of the expressions."""
    return f"The regular expressions of {where} could not be tried in a process of their own:"


def names_of(model: nn.Module) -> list[str]:
    """All that PEFT matches: modules, parameters, embeddings by their usual names, and experts by their former ones."""
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    fused = {name.rpartition(".")[0] for name in names if name.endswith(FUSED)}
    return [*names, *EMBEDDINGS, *(f"{place}.{expert}" for place in sorted(fused) for expert in EXPERTS)]


def num_experts(model: nn.Module) -> int:
    """The matrices of all experts that one parameter holds together, which checkpoints may name one by one."""
    fused = (parameter for name, parameter in model.named_parameters() if name.endswith(FUSED))
    return sum(len(parameter) for parameter in fused if parameter.dim() == 3)


def texts_in(value: Any) -> Iterator[str]:
    """The texts in a value, keys among them."""
    if isinstance(value, str):
        yield str(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from texts_in(key)
            yield from texts_in(item)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from texts_in(item)


def try_all(expressions: list[str], names: list[str]) -> None:
    """Match each expression as PEFT may, and print its number before. PEFT names what is no expression."""
    for number, text in enumerate(expressions):
        print(number, flush=True)
        for form, ways in MATCHES.items():
            try:
                pattern = re.compile(form.replace("{0}", text))
            except (re.error, OverflowError, RecursionError):
                continue
            for way, name in product(ways, names):
                getattr(pattern, way)(name)


if __name__ == "__main__":
    try_all(*json.load(sys.stdin))
