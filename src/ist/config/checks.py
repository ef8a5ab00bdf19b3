"""Checks of single values: each message says the value, what is allowed, and the way out."""

from __future__ import annotations

from typing import Any

__all__ = [
    "check_choice",
    "check_layer_number",
    "check_loss_function",
    "check_seed",
    "check_stack_names",
    "check_whole",
    "is_number",
    "plain",
]


def plain(value: Any) -> Any:
    """A number of NumPy (or of any library whose scalars have `item()`) as Python's own; other values as they are."""
    return value.item() if getattr(value, "shape", None) == () and callable(getattr(value, "item", None)) else value


def is_number(value: Any) -> bool:
    """Whether `value` is a real number other than a truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_choice(name: str, value: Any, allowed: Any) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in tuple(allowed):
        near = next((choice for choice in allowed if str(choice).lower() == str(value).lower()), None)
        hint = f" (did you mean {near!r}?)" if near is not None else ""
        choices = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"{name}={value!r} is unknown{hint}: choose one of {choices}.")


def check_whole(name: str, value: Any, *, at_least: int, why: str) -> None:
    """Raise ValueError unless `value` is a whole number of at least `at_least`; NumPy's whole numbers are some."""
    number = plain(value)
    if not isinstance(number, int) or isinstance(number, bool) or number < at_least:
        raise ValueError(f"{name}={value!r} is not a whole number of at least {at_least}: {why}.")


def check_layer_number(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a count of at least 1 or a fraction in (0, 1]."""
    value = plain(value)
    allowed = is_number(value) and (0 < value <= 1 if isinstance(value, float) else value >= 1)
    if not allowed:
        raise ValueError(
            f"{name}={value!r} is neither a count of layers (a whole number of at least 1) nor a fraction of them "
            "(a float above 0 and up to 1): write 8 for eight layers or 0.25 for a quarter."
        )


def check_stack_names(layers: Any, found: str = "") -> None:
    """Raise ValueError unless `layers` is a name or a list of names of stacks; `found` says which there are."""
    names = layers if isinstance(layers, (list, tuple)) else [layers]
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"layers={layers!r} is not a name or a list of names of stacks: {found or 'give one, or None'}. How many "
            "layers to train is num_active_layers, or num_layers of focus()."
        )


def check_loss_function(loss_function: Any) -> None:
    """Raise ValueError unless `loss_function` can be called, or is None."""
    if loss_function is not None and not callable(loss_function):
        raise ValueError(f"loss_function={loss_function!r} is no function: give `(model, batch) -> loss`, or None.")


def check_seed(seed: Any) -> None:
    """Raise ValueError unless `seed` is a whole number of at least 0."""
    check_whole("seed", seed, at_least=0, why="it seeds a random generator; give 0 or more")
