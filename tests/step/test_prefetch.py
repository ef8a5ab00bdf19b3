"""Under FSDP2 the backward gathers no layer that it does not get to, and what is gathered ahead otherwise stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from ist import SparseTuner, layer_scores
from tests.helpers.tiny import tiny_batches, tiny_llama, tiny_lora

PREFIX = "FSDP::backward_prefetch for "


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Iterator[None]:
    """A group of one process, in which a model can be sharded as in one of many."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(**lora: Any) -> tuple[Any, list[Any]]:
    """A model of four blocks with LoRA, each a unit of FSDP2, and the blocks."""
    return shard(tiny_lora(4, **lora))


def shard(model: Any) -> tuple[Any, list[Any]]:
    blocks = [module for module in model.modules() if isinstance(module, LlamaDecoderLayer)]
    mesh = init_device_mesh("cpu", (1,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, blocks


def gathered_ahead(model: Any, run: Callable[[], Any] | None = None) -> list[int]:
    """The blocks for which FSDP2 looks ahead in one backward, or in `run`, in the order of the first time."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run() if run else model(**tiny_batches(1)[0]).loss.backward()
    events = sorted(seen.events() or (), key=lambda event: event.time_range.start)
    found = [int(event.name.split(".")[-1]) for event in events if event.name.startswith(PREFIX)]
    return list(dict.fromkeys(found))


def lists_of(blocks: list[Any]) -> list[list[Any]]:
    """What a user told FSDP2 to gather ahead in each block's backward."""
    return [list(block._get_fsdp_state()._states_to_backward_prefetch) for block in blocks]


@pytest.mark.parametrize("active", [(0, 2), (1, 2), (2, 3), (3,)])
def test_nothing_below_the_lowest_active_layer_is_gathered(active: tuple[int, ...]) -> None:
    model, blocks = sharded()
    with SparseTuner(model, selector=f"fixed:{','.join(map(str, active))}", num_active_layers=len(active)) as tuner:
        tuner.begin_step()
        assert gathered_ahead(model) == list(range(3, min(active) - 1, -1))
        tuner.end_step()
        assert lists_of(blocks) == [[], [], [], []]
    assert gathered_ahead(model) == [3, 2, 1, 0]


def test_nothing_below_the_lowest_layer_with_adapters_is_gathered() -> None:
    """As `ist.focus` has it: FSDP2 by itself gathers the block below."""
    model, blocks = sharded(layers_to_transform=[2, 3])
    assert gathered_ahead(model) == [3, 2, 1]
    with SparseTuner(model, selector="all") as tuner:
        tuner.begin_step()
        assert gathered_ahead(model) == [3, 2]
    assert lists_of(blocks) == [[], [], [], []]


def test_nothing_below_the_lowest_layer_is_gathered_to_measure_before_training() -> None:
    model, blocks = shard(tiny_llama(4))
    config = LoraConfig(target_modules=["q_proj"], layers_to_transform=[2, 3])
    found = gathered_ahead(model, lambda: layer_scores(model, config, tiny_batches(2)))
    assert found == [3, 2]
    assert lists_of(blocks) == [[], [], [], []]


def test_a_list_that_a_user_gave_loses_what_lies_below_and_comes_back() -> None:
    model, blocks = sharded()
    model(**tiny_batches(1)[0])
    for block, ahead in ((3, (2, 1)), (2, (1, 0)), (1, (0,))):
        blocks[block].set_modules_to_backward_prefetch([blocks[number] for number in ahead])
    given = lists_of(blocks)
    states = [block._get_fsdp_state() for block in blocks]
    with SparseTuner(model, selector="fixed:1,3", num_active_layers=2) as tuner:
        for _ in range(2):
            tuner.begin_step()
            assert lists_of(blocks) == [[], [states[1]], [states[1]], [states[2], states[1]]]
            tuner.end_step()
            assert lists_of(blocks) == given
        tuner.begin_step()
    assert lists_of(blocks) == given


def test_what_trains_below_the_layers_is_gathered_when_the_backward_gets_there() -> None:
    """The embeddings get the gradient that they get where all layers train."""
    found = []
    for selector in ("fixed:1,3", "all"):
        model, _ = sharded(modules_to_save=["embed_tokens"])
        options: dict[str, Any] = {} if selector == "all" else {"num_active_layers": 2}
        with SparseTuner(model, selector=selector, **options) as tuner:
            tuner.begin_step()
            model(**tiny_batches(1)[0]).loss.backward()
        (embeddings,) = [weight for name, weight in model.named_parameters() if "modules_to_save" in name]
        found.append(embeddings.grad.full_tensor())
    assert found[0].any()
    assert torch.equal(found[0], found[1])
