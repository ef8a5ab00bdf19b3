"""The module that puts bottleneck adapters on another module."""

from __future__ import annotations

from typing import Any, Literal, NoReturn

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .config import NON_LINEARITIES, BottleneckConfig
from .sparse import sparse_pair

__all__ = ["BottleneckLayer", "Position"]

Position = Literal["input", "output", "parallel"]

MERGE_REFUSAL = (
    "Bottleneck adapters cannot be merged: a non-linearity lies between their two projections, so no weight equals "
    "them; keep the adapter, or remove it with unload()."
)


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A module with named bottleneck adapters `a(x) = scaling · f(dropout(x) W_down) W_up`.

    With `m` the wrapped module, an adapter's position says what the layer computes:

    - `input`: `m(x + a(x))`, `a` from the input's width to the same;
    - `output`: `y + a(y)` with `y = m(x)`, `a` from the output's width to the same (equation 13 of the paper);
    - `parallel`: `m(x) + a(x)`, `a` from the input's width to the output's (equation 11 of the paper).

    LoRA beside bottlenecks is `parallel` without `f`. Where several adapters are active their terms are summed, each
    computed from the plain `x` or `m(x)`.

    Args:
        base_layer: the module to adapt, a linear one or (parallel only) any whose first argument and output are
            tensors. Its weights are never touched.
        adapter_name: name of the first adapter.
        config: settings of that adapter.
        position: where that adapter acts.
        in_features: last dimension of the wrapped module's input.
        out_features: last dimension of its output.
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_dropout", "bottleneck_non_linearity", "bottleneck_position", "scaling")

    scaling_is_exact = True
    """Multiplying `scaling[name]` multiplies the response by the same: `ist.adapters.responses` relies on it."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        *,
        config: BottleneckConfig,
        position: Position,
        in_features: int,
        out_features: int,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features = in_features
        self.out_features = out_features
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.bottleneck_dropout = nn.ModuleDict()
        self.bottleneck_non_linearity: dict[str, str] = {}
        self.bottleneck_position: dict[str, Position] = {}
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config=config, position=position)

    def update_layer(self, adapter_name: str, *, config: BottleneckConfig, position: Position) -> None:
        """Add the adapter `adapter_name`, which leaves the output as it is until it is trained."""
        width_in = self.out_features if position == "output" else self.in_features
        width_out = self.in_features if position == "input" else self.out_features
        self.scaling[adapter_name] = float(config.scaling)
        self.bottleneck_position[adapter_name] = position
        self.bottleneck_non_linearity[adapter_name] = config.non_linearity
        self.bottleneck_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        # nn.Linear draws its weight by kaiming_uniform with a = sqrt(5), which is the start that W_down is to have.
        down = nn.Linear(width_in, config.bottleneck_size, bias=False)
        up = nn.Linear(config.bottleneck_size, width_out, bias=False)
        nn.init.zeros_(up.weight)
        down, up = sparse_pair(down, up, sparsity=config.sparsity, pruning=config.pruning)
        self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name] = down, up
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def response(self, adapter_name: str, x: Tensor) -> Tensor:
        """What one adapter adds: `scaling · f(dropout(x) W_down) W_up`, in the dtype of the adapter's parameters.

        Args:
            adapter_name: an adapter of this layer.
            x: the module's input, or its output where the position is `output`, of shape `(..., width)`.
        """
        down, up = self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name]
        activation = NON_LINEARITIES.get(self.bottleneck_non_linearity[adapter_name])
        x = self._cast_input_dtype(x, down.weight.dtype)  # type: ignore[arg-type]
        hidden = down(self.bottleneck_dropout[adapter_name](x))
        hidden = activation(hidden) if activation else hidden
        return up(hidden) * self.scaling[adapter_name]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The wrapped module's output with the active adapters' responses, in the wrapped module's dtype.

        Raises:
            ValueError: the wrapped module returns something other than one tensor.
        """
        if self.disable_adapters:
            return self.base_layer(x, *args, **kwargs)
        output = self.base_layer(self._add_responses("input", x, to=x), *args, **kwargs)
        if not isinstance(output, Tensor):
            raise ValueError(
                f"{type(self.base_layer).__name__} returns a {type(output).__name__}, not a tensor, so no adapter can "
                "be added to it: pass target_modules with the names of linear modules."
            )
        result = self._add_responses("parallel", x, to=output)
        return self._add_responses("output", output, to=result)

    def _add_responses(self, position: Position, x: Tensor, *, to: Tensor) -> Tensor:
        """`to` plus the responses to `x` of the active adapters at `position`."""
        for name in self.active_adapters:
            if self.bottleneck_position.get(name) == position:
                to = to + self.response(name, x).to(to.dtype)
        return to

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
        """As PEFT's own, and for modules without a weight (a whole MLP) those of their first parameter."""
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        first = next(base_layer.parameters(), None)
        if device is None and first is not None:
            return first.device, first.dtype
        return device, dtype

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Refuse: no weight of the wrapped module equals a bottleneck adapter.

        Raises:
            ValueError: always.
        """
        raise ValueError(MERGE_REFUSAL)

    def unmerge(self) -> NoReturn:
        """Refuse: nothing can have been merged.

        Raises:
            ValueError: always.
        """
        raise ValueError(MERGE_REFUSAL)

    def __repr__(self) -> str:
        return "bottleneck." + super().__repr__()
