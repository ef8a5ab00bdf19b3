"""Series and parallel bottleneck adapters for PEFT, which ships none.

Importing this package makes `BOTTLENECK` a method that `peft` knows, so it has to be imported before such an adapter
is loaded from disk: `import ist.bottleneck`, or `from ist import BottleneckConfig`. A bare `import ist` imports
nothing and is not enough.
"""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

from .config import PEFT_TYPE, BottleneckConfig
from .layer import BottleneckLayer
from .model import BottleneckModel
from .snip import prune_adapter

__all__ = ["BottleneckConfig", "BottleneckLayer", "BottleneckModel", "prune_adapter", "register"]


def register() -> None:
    """Make PEFT know bottleneck adapters; calling it again does nothing. No other code touches PEFT's registries.

    PEFT registers only methods that its enum names, and an enum has no public way to gain a member: the member is
    built and entered by hand, as `enum` does for members of a class body.

    Raises:
        RuntimeError: PEFT has another method of that name.
    """
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(PEFT_TYPE)  # type: ignore[call-overload]
    if registered is BottleneckConfig:
        return
    if registered is not None or PEFT_TYPE in PeftType.__members__:
        raise RuntimeError(f"PEFT has a method {PEFT_TYPE} of its own: use a version of peft without it.")
    member = str.__new__(PeftType, PEFT_TYPE)
    member._name_ = PEFT_TYPE
    member._value_ = PEFT_TYPE
    type.__setattr__(PeftType, PEFT_TYPE, member)
    PeftType._member_names_.append(PEFT_TYPE)
    PeftType._member_map_[PEFT_TYPE] = member
    PeftType._value2member_map_[PEFT_TYPE] = member
    register_peft_method(name=PEFT_TYPE.lower(), config_cls=BottleneckConfig, model_cls=BottleneckModel)


register()
