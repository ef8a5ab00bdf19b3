"""What a model is wrapped in, and what is inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from ist import SparseTuner
from ist.runtime.wrappers import base_model, compiled_call, is_ddp, unwrap, within_fsdp
from tests.helpers.tiny import moved_layers, snapshot, tiny_batches, tiny_lora


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Iterator[None]:
    """A group of one process, in which a model can be wrapped as in one of many."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


WRAPPINGS: dict[str, tuple[Callable[[nn.Module], Any], bool]] = {
    "nothing": (lambda model: model, False),
    "DDP": (DistributedDataParallel, True),
    "torch.compile": (compiled, False),
    "torch.compile of DDP": (lambda model: compiled(DistributedDataParallel(model)), True),
    "DDP of torch.compile": (lambda model: DistributedDataParallel(compiled(model)), True),
}
"""What wraps a model, and whether DDP is in it."""


@pytest.mark.parametrize(("wrap", "ddp"), WRAPPINGS.values(), ids=WRAPPINGS)
def test_a_model_is_found_in_every_wrapper(wrap: Callable[[nn.Module], Any], ddp: bool) -> None:
    model = tiny_lora(2)
    wrapped = wrap(model)
    assert unwrap(wrapped) is model
    assert base_model(wrapped) is model.base_model.model
    assert is_ddp(wrapped) == ddp


@pytest.mark.parametrize(("wrap", "_"), WRAPPINGS.values(), ids=WRAPPINGS)
def test_a_model_that_holds_its_adapters_itself_is_its_own_base(wrap: Callable[[nn.Module], Any], _: bool) -> None:
    """As AdapterHub's do: nothing in it has `get_base_model`, and a part by the name `module` is no wrapping."""
    model = nn.ModuleDict({"module": nn.Linear(2, 2)})
    assert base_model(wrap(model)) is model


@pytest.mark.filterwarnings("ignore:FSDP is switching:UserWarning", "ignore:.*NO_SHARD:FutureWarning")
def test_fsdp_stays_around_a_model_that_is_to_be_called() -> None:
    model = tiny_lora(2)
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    assert unwrap(wrapped) is wrapped
    assert within_fsdp(wrapped) is model
    assert base_model(wrapped) is model.base_model.model
    assert within_fsdp(model) is model


def test_blocks_that_are_compiled_by_themselves() -> None:
    block = nn.Linear(2, 2)
    assert compiled_call(block) is None
    assert compiled_call(compiled(block)) == "forward"
    block.compile(backend="eager")
    assert compiled_call(block) == "_compiled_call_impl"


@pytest.mark.parametrize("wrap", [WRAPPINGS[name][0] for name in WRAPPINGS if "compile" in name])
def test_a_compiled_model_trains_the_chosen_layers(wrap: Callable[[nn.Module], Any]) -> None:
    """DDP is told of the layers that have no gradient, also where it is not the outermost wrapper."""
    model = tiny_lora(2)
    before, wrapped = snapshot(model), wrap(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with torch.compiler.set_stance("force_eager"), SparseTuner(wrapped, selector="fixed:1") as tuner:
        assert tuner.layers[0].name == "base_model.model.model.layers.0"
        for batch in tiny_batches(2):
            with tuner.step(optimizer):
                wrapped(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    assert moved_layers(before, snapshot(model)) == {1}
