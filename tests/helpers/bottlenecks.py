"""What the tests of bottleneck adapters share."""

from __future__ import annotations

from typing import Any

import torch

from ist.bottleneck import BottleneckLayer


def randomise(model: Any) -> Any:
    """Give every up-projection values, as training would."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, BottleneckLayer):
            up: Any
            for up in module.bottleneck_up.values():
                up.weight.data.normal_(generator=generator)
    return model
