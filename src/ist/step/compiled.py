"""Layers that are compiled one by one need a graph for every kind of layer: frozen or active, probed or trained.

Whole and padded batches, one length and others double and redouble their number, and PyTorch gives up after eight: from
then on it computes without graphs, at several times the cost and with one line in the log.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from ..adapters.view import ModelView

__all__ = ["as_written", "make_room_for_graphs"]

ROOM = 64
"""Graphs of one piece of code. Six kinds of layer, twice for padding, three times for lengths, and as much again."""


def make_room_for_graphs(view: ModelView) -> None:
    """Raise PyTorch's limit on graphs, for the whole process, where one of the layers is compiled by itself."""
    if view.compiled:
        from torch._dynamo import config

        config.recompile_limit = max(config.recompile_limit, ROOM)


def as_written(view: ModelView) -> AbstractContextManager[object]:
    """A context in which layers compute as they are written, also where they are compiled: a forward of another kind or
    length than those of training needs graphs of its own, and PyTorch makes training's slower for it too.
    """
    return torch.compiler.set_stance("force_eager") if view.compiled else nullcontext()
