"""One process of the same trainings again and again under FSDP2, compared to the bit: `… FOLDER PACE REPEATS VARIANT…`.

The first training of a variant waits for its GPU after each backward; the others do not. With the pace `slow` each
all-gather comes late, which shows at once what does not wait for it. `… burn SECONDS` keeps this process's GPU busy.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from backends import GLOBAL_BATCH, NUM_LAYERS, OPTIONS, collate, fsdp2, local, synchronise
from device import DEVICE, ON_CPUS, join, moved
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from ist import SparseTuner
from tests.helpers.tiny import tiny_lora, tiny_rows, trainable

NUM_STEPS = 9
LATE = 20_000_000
"""GPU cycles by which a slow all-gather is late: some ten milliseconds."""
VARIANTS: dict[str, tuple[dict[str, Any] | None, int, dict[str, Any]]] = {
    "sampled": (OPTIONS, 2, {}),
    "sampled, no measurement": ({**OPTIONS, "update_interval": 1000}, 2, {}),
    "sampled, no accumulation": (OPTIONS, 1, {}),
    "all layers": ({"selector": "all"}, 2, {}),
    "upper layers": ({"selector": "all"}, 2, {"layers_to_transform": [1, 2, 3]}),
    "no tuner": (None, 2, {}),
    "no tuner, upper layers": (None, 2, {"layers_to_transform": [1, 2, 3]}),
}
"""Options of the tuner or None for none, micro-batches of a step, and options of LoRA."""

Log = dict[str, Tensor]
"""What was seen, by a name that says the step, the micro-batch and the tensor, in the order of time."""


class SlowAllGather:
    """All-gathers that are late on their own stream, as where another process has the GPU."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        if not ON_CPUS:
            torch.cuda._sleep(LATE)
        return dist.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)


def train(variant: str, slow: bool = False, settled: bool = False) -> Log:
    """One training, and all that was seen of it.

    Args:
        variant: one of `VARIANTS`.
        slow: each all-gather comes late.
        settled: nothing is under way when a forward begins.
    """
    options, accumulation, lora = VARIANTS[variant]
    rank, size = dist.get_rank(), dist.get_world_size()
    share = GLOBAL_BATCH // size
    model: Any = fsdp2()(tiny_lora(NUM_LAYERS, **lora).double().to(DEVICE))
    for unit in model.modules():
        if slow and isinstance(unit, FSDPModule):
            unit.set_custom_all_gather(SlowAllGather())  # pyright: ignore[reportArgumentType]
    log, place = {}, [""]
    watch_gathered(model, log, place)
    optimizer = torch.optim.AdamW(trainable(model), lr=2e-2, weight_decay=0.1)
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    probes = torch.utils.data.DataLoader(
        tiny_rows(40, seed=3),  # pyright: ignore[reportArgumentType]
        batch_size=share,
        collate_fn=collate,  # type: ignore[arg-type]
    )
    tuner = None if options is None else SparseTuner(model, probe_batches=probes, **options)
    rows = tiny_rows(GLOBAL_BATCH * accumulation * NUM_STEPS)
    for step in range(NUM_STEPS):
        if tuner:
            tuner.begin_step()
        for micro in range(accumulation):
            place[0] = f"step {step}, micro-batch {micro}"
            start = (step * accumulation + micro) * GLOBAL_BATCH + rank * share
            (batch,) = moved([collate(rows[start : start + share])])
            synchronise(model, micro == accumulation - 1)
            loss = model(**batch).loss / accumulation
            loss.backward()
            log[f"{place[0]}: loss"] = loss.detach().cpu()  # Which waits for the stream that computes, and no other.
            if settled and not ON_CPUS:
                torch.cuda.synchronize()
        place[0] = f"step {step}, measurement"
        log.update({f"step {step}: gradient of {n}": local(w.grad).clone() for n, w in named if w.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
        log.update({f"step {step}: weight {name}": local(weight).clone() for name, weight in named})
        if tuner and (update := tuner.end_step(optimizer)):
            log[f"step {step}: losses of candidates"] = torch.tensor(update.losses)
    if tuner:
        tuner.close()
    return {name: value.cpu() for name, value in log.items()}


def watch_gathered(model: nn.Module, log: Log, place: list[str]) -> None:
    """Note the sums of the weights that each layer, and the model around the layers, computes with."""

    def note(name: str) -> Any:
        def hook(module: nn.Module, *_: Any) -> None:
            if torch.is_grad_enabled():
                log[f"{place[0]}: gathered {name}"] = torch.stack([p.detach().sum() for p in module.parameters()])

        return hook

    for name, module in model.named_modules():
        if isinstance(module, LlamaDecoderLayer) or name.endswith("lm_head"):
            module.register_forward_pre_hook(note(name.removeprefix("base_model.model.")))


def difference(first: Log, second: Log) -> str | None:
    """What differs first, by step, micro-batch and tensor, and what else does in the same moment."""
    assert first.keys() == second.keys()
    names = [name for name in first if not torch.equal(first[name], second[name])]
    if not names:
        return None
    moment = names[0].split(":")[0]
    return "; ".join([names[0], *(name.split(": ")[1] for name in names[1:] if name.startswith(f"{moment}:"))])


def burn(seconds: float) -> None:
    """Keep the GPU busy."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    matrix = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(20):
            torch.mm(matrix, matrix)
        torch.cuda.synchronize()


def main(folder: Path, pace: str, repeats: int, variants: list[str]) -> None:
    join(limit=100)
    found: dict[str, Any] = {}
    for variant in variants:
        expected = train(variant, settled=True)
        found[variant] = [
            f"training {number}: {said}"
            for number in range(repeats)
            if (said := difference(expected, train(variant, slow=pace == "slow"))) is not None
        ]
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1] == "burn":
        burn(float(sys.argv[2]))
    else:
        main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:])
