"""Hooks on a user's model that keep nothing alive and stand in nobody's way."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

__all__ = ["WeakHook"]


class WeakHook:
    """Calls a method while the method's object lives.

    The model can be saved whole or copied with it: the hook of the copy belongs to no object, and does nothing.

    Args:
        method: a bound method; None makes a hook that does nothing.
    """

    def __init__(self, method: Callable[..., Any] | None = None) -> None:
        self._method = None if method is None else weakref.WeakMethod(method)

    def __call__(self, *arguments: Any) -> Any:
        method = self._method and self._method()
        return method and method(*arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()
