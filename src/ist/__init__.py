"""Importance-aware Sparse Tuning: fine-tune the adapters of the layers that matter.

The method is that of Yao et al., "Layer-wise Importance Matters" (Findings of EMNLP 2024). To read the code, begin
with `method`, which is the paper, and `tuner`, which runs a step of it. `adapters` finds the layers, `step` makes a
step cheap, `probing` measures importance, `focusing` chooses layers before training; `runtime` and `runs` are for
processes and files.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .adapters.layers import Layer, discover_layers
    from .adapters.whole_layers import discover_whole_layers
    from .bottleneck import BottleneckConfig
    from .config import ISTConfig
    from .experiments.greedy import greedy_layers
    from .focusing import focus
    from .integrations.trainer import IST
    from .method.registry import FixedSelector, LearnedSelector, RandomSelector
    from .probing.criteria import layer_scores
    from .runs.checkpoints import check_checkpoint, last_checkpoint
    from .runs.history import History, read_history
    from .tuner import SparseTuner

__all__ = [
    "IST",
    "BottleneckConfig",
    "FixedSelector",
    "History",
    "ISTConfig",
    "Layer",
    "LearnedSelector",
    "RandomSelector",
    "SparseTuner",
    "__version__",
    "check_checkpoint",
    "discover_layers",
    "discover_whole_layers",
    "focus",
    "greedy_layers",
    "last_checkpoint",
    "layer_scores",
    "read_history",
]

# Importing a name imports its module, and no module before: `import ist` is instant.
_MODULES = {
    "IST": ".integrations.trainer",
    "BottleneckConfig": ".bottleneck",
    "FixedSelector": ".method.registry",
    "History": ".runs.history",
    "ISTConfig": ".config",
    "Layer": ".adapters.layers",
    "LearnedSelector": ".method.registry",
    "RandomSelector": ".method.registry",
    "SparseTuner": ".tuner",
    "check_checkpoint": ".runs.checkpoints",
    "discover_layers": ".adapters.layers",
    "discover_whole_layers": ".adapters.whole_layers",
    "focus": ".focusing",
    "greedy_layers": ".experiments.greedy",
    "last_checkpoint": ".runs.checkpoints",
    "layer_scores": ".probing.criteria",
    "read_history": ".runs.history",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
