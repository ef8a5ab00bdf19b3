"""What only a GPU shows: moments that travel, products of bfloat16 parts, Liger's kernels. `make test-gpu`."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from ist import SparseTuner
from ist.probing.batched import batched_losses
from ist.probing.suppression import can_skip_logits, candidate_losses
from ist.step.fused import FusedLora, few
from ist.step.fused.choice import products
from ist.step.fused.function import lora_linear
from ist.step.fused.precision import Split

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
if TYPE_CHECKING or torch.cuda.is_available():
    from ist.step.fused import launch
LAYERS, STEPS = 8, 15
FIVE = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def llama(dtype: torch.dtype = torch.bfloat16, **lora: Any) -> Any:
    """A narrow Llama with LoRA on the GPU; up-projections are random."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=LAYERS, num_attention_heads=4, vocab_size=512
    )
    base: Any = LlamaForCausalLM(config)
    base.to("cuda", dtype)
    options = {"r": 16, "target_modules": FIVE, "init_lora_weights": False, **lora}
    return peft.get_peft_model(base, peft.LoraConfig(**options)).train()  # type: ignore[arg-type]


def batches(num: int = STEPS, rows: int = 2, tokens: int = 64) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(512, (num, rows, tokens), generator=generator).cuda()
    return [{"input_ids": part, "labels": part} for part in ids]


def adapter(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def train(
    make_optimizer: Callable[[Any], Any], look: Callable[..., None] | None = None, **options: Any
) -> dict[str, Tensor]:
    """The adapter after some steps; `look` sees each step before it ends."""
    model = llama()
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])
    torch.manual_seed(2)
    with SparseTuner(model, probe_batches=batches(2), update_interval=4, **options) as tuner:
        for batch in batches():
            tuner.begin_step()
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if look:
                look(model, tuner, optimizer)
            tuner.end_step(optimizer)
    return adapter(model)


def eight_bit(parameters: Any) -> Any:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    return bitsandbytes.optim.AdamW8bit(parameters, lr=1e-3)


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    "fused AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
    "AdamW without loops": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, foreach=True),
    "8-bit AdamW": eight_bit,
}


# ---- Moments that travel


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_offload_trains_what_keep_trains_to_the_bit(optimizer: str) -> None:
    kept = train(OPTIMIZERS[optimizer])
    places: set[tuple[bool, bool]] = set()

    def look(model: Any, tuner: SparseTuner, optimizer: Any) -> None:
        torch.cuda.synchronize()
        for layer in tuner.layers:
            for parameter in layer.parameters:
                for moment in optimizer.state.get(parameter, {}).values():
                    if isinstance(moment, Tensor) and moment.numel() >= 1024:
                        places.add((layer.index in (tuner.active_layers or ()), moment.is_cuda))
                        assert moment.is_cuda or moment.is_pinned()

    offloaded = train(OPTIMIZERS[optimizer], look, optimizer_state="offload")
    assert places == {(True, True), (False, False)}
    assert kept.keys() == offloaded.keys()
    assert all(torch.equal(kept[name], offloaded[name]) for name in kept)


def test_offload_frees_the_moments_of_frozen_layers() -> None:
    held: dict[str, int] = {}
    moments: dict[str, int] = {}

    def look(mode: str, before: int) -> Callable[..., None]:
        def measure(model: Any, tuner: SparseTuner, optimizer: Any) -> None:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # Until then, blocks that another stream has used may still count.
            held[mode] = torch.cuda.memory_allocated() - before
            state = [value for own in optimizer.state.values() for value in own.values()]
            moments[mode] = sum(value.nbytes for value in state if isinstance(value, Tensor) and value.is_cuda)

        return measure

    for mode in ("keep", "offload"):
        gc.collect()  # What earlier trainings left is freed now, not while this one is measured.
        torch.cuda.empty_cache()
        train(OPTIMIZERS["AdamW"], look(mode, torch.cuda.memory_allocated()), optimizer_state=mode)
    assert moments["offload"] * 4 == moments["keep"]  # Two of eight layers are active.
    saved = held["keep"] - held["offload"]
    assert 0.7 * moments["keep"] < saved < 0.8 * moments["keep"]


def test_a_training_leaves_nothing_on_the_gpu() -> None:
    """Also before Python collects garbage: the next model would not find its memory."""
    train(OPTIMIZERS["AdamW"])  # What libraries keep from their first use on.
    gc.collect()
    gc.disable()
    torch.cuda.memory._record_memory_history(context="alloc", stacks="python")
    try:
        before = torch.cuda.memory_allocated()
        train(OPTIMIZERS["AdamW"])
        torch.cuda.synchronize()
        left = torch.cuda.memory_allocated() - before
        assert left < 2**16, where_allocated()  # A module of LoRA takes more.
    finally:
        torch.cuda.memory._record_memory_history(None)
        gc.enable()


def where_allocated() -> str:
    """What is left of what was recorded: bytes, and the calls that allocated them, the most first."""
    found: dict[str, int] = {}
    for segment in torch.cuda.memory._snapshot()["segments"]:
        for block in segment["blocks"]:
            if block["state"] == "active_allocated" and block.get("frames"):
                calls = [f"{Path(frame['filename']).name}:{frame['line']}" for frame in block["frames"][:8]]
                key = " < ".join(calls)
                found[key] = found.get(key, 0) + block["size"]
    return "\n".join(f"{size} bytes: {calls}" for calls, size in sorted(found.items(), key=lambda item: -item[1])[:10])


def test_a_checkpoint_in_the_middle_of_the_journeys_holds_every_moment() -> None:
    states: dict[str, list[dict[str, Any]]] = {}

    def look(mode: str) -> Callable[..., None]:
        def save(model: Any, tuner: SparseTuner, optimizer: Any) -> None:
            state = optimizer.state_dict()["state"]
            states.setdefault(mode, []).append(
                {
                    f"{index} {name}": value.cpu().clone()
                    for index, moments in state.items()
                    for name, value in moments.items()
                }
            )

        return save

    for mode in ("keep", "offload"):
        train(OPTIMIZERS["AdamW"], look(mode), optimizer_state=mode)
    for kept, offloaded in zip(states["keep"], states["offload"], strict=True):
        assert kept.keys() == offloaded.keys()
        assert all(torch.equal(kept[name], offloaded[name]) for name in kept)


# ---- Float32 adapters over bfloat16


def module(adapter_dtype: torch.dtype, dropout: float = 0.0, width: int = 512, out: int = 384) -> Any:
    """One LoRA module with random values."""
    torch.manual_seed(3)
    config = peft.LoraConfig(target_modules=["proj"], r=16, lora_alpha=32, lora_dropout=dropout)
    holder = nn.ModuleDict({"proj": nn.Linear(width, out)})
    found: Any = peft.inject_adapter_in_model(config, holder)["proj"]  # type: ignore[index]
    found.to("cuda")
    for name, parameter in found.named_parameters():
        parameter.data = torch.randn_like(parameter) / 16
        parameter.data = parameter.data.to(adapter_dtype if "lora_" in name else torch.bfloat16)
    return found.train()


def results(found: Any, x: Tensor, dy: Tensor, trained: bool = True) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = found(x)
    parameters = [p for p in found.parameters() if p.requires_grad] if trained else []
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], dy.to(y.dtype))]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize(
    ("adapter_dtype", "most_rows"),
    [(torch.float32, 2048), (torch.bfloat16, 2048), (torch.bfloat16, 0)],
    ids=["float32", "bf16", "bf16 in kernels"],
)
def test_error_is_no_larger_than_that_of_peft(
    adapter_dtype: torch.dtype, most_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At sizes of a real model, for a response that is a twentieth of the output: see benchmarks/LOG.md for larger."""
    monkeypatch.setattr(few, "MOST_ROWS", most_rows)
    found = module(adapter_dtype, width=2048, out=1536)
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            parameter.data /= 8
    x, dy = torch.randn(4, 512, 2048, device="cuda").bfloat16(), torch.randn(4, 512, 1536, device="cuda").bfloat16()
    pefts = results(found, x, dy)
    fused = FusedLora(found, nullcontext())
    ours = results(found, x, dy)
    fused.switch.frozen = True
    frozen = results(found, x, dy, trained=False)
    fused.remove()
    found.double()
    exact = results(found, x.double(), dy.double())
    named = zip(("output", "input", "A", "B"), errors(ours, exact), errors(pefts, exact), strict=True)
    for name, our, theirs in named:
        assert our <= 1.05 * theirs + 2e-5, name  # two bfloat16 numbers add up to a float32 one up to 2⁻¹⁶
    assert [t.dtype for t in ours] == [t.dtype for t in pefts]
    for name, our, theirs in zip(
        ("output", "input"), errors(frozen, exact[:2]), errors(pefts[:2], exact[:2]), strict=True
    ):
        assert our <= 1.1 * theirs, f"{name} of a frozen module"


def test_idle_float32_adapter_gives_the_input_its_gradient() -> None:
    found = module(torch.float32)
    x, dy = torch.randn(210, 512, device="cuda").bfloat16(), torch.randn(210, 384, device="cuda").bfloat16()
    exact = results(found.double(), x.double(), dy.double())[:2]
    frozen = module(torch.float32)
    FusedLora(frozen, nullcontext()).switch.frozen = True
    x.requires_grad_()
    y = frozen(x)
    y.backward(dy)
    assert all(parameter.grad is None for parameter in frozen.parameters())
    assert max(errors([y.detach(), x.grad], exact)) < 4e-3  # type: ignore[list-item]


# ---- Own kernels

CASES = {
    "bf16": (torch.bfloat16, torch.bfloat16, None),
    "float32 over bf16": (torch.float32, torch.bfloat16, None),
    "fp16": (torch.float16, torch.float16, None),
    "bf16 autocast": (torch.float32, torch.bfloat16, torch.bfloat16),
    "bf16 autocast of float32": (torch.float32, torch.float32, torch.bfloat16),
    "fp16 autocast": (torch.float32, torch.float32, torch.float16),
}
"""Dtypes of the adapter and of the activations, and autocast's."""


def mask(kind: Any, shape: tuple[int, int], dropout: float) -> Tensor:
    """What the next draw keeps, ones and zeros; the generator does not move."""
    state = torch.cuda.get_rng_state()
    ones = torch.ones(16, shape[1], device="cuda", dtype=kind.weight_dtype)
    thin = torch.ones(shape[0], 16, device="cuda")
    kept = kind.grad_of_x(thin, ones, launch.draw(thin.device, dropout), dropout, 1.0)
    torch.cuda.set_rng_state(state)
    assert set(kept.unique().tolist()) <= {0.0, 16.0}
    return kept.double() / 16


@pytest.mark.parametrize(
    ("case", "rows", "width", "out", "rank", "dropout"),
    [
        *((case, 210, 512, 384, 16, 0.3) for case in CASES),
        ("float32 over bf16", 64, 384, 1000, 8, 0.0),
        ("float32 over bf16", 1, 96, 72, 4, 0.3),
        ("float32 over bf16", 333, 1100, 200, 40, 0.3),
        ("bf16", 128, 256, 256, 64, 0.0),
        *(("float32 over bf16", 210, 512, 384, rank, 0.3) for rank in (96, 128, 200, 256)),
        *((case, 2300, 320, 200, rank, 0.0) for case in CASES for rank in (8, 64, 65, 129)),
        *((case, 2300, 200, 320, rank, 0.0) for case in CASES for rank in (32, 256)),
        *((case, 2300, 320, 200, rank, 0.3) for case in CASES for rank in (32, 129)),
        *((case, 333, 1100, 200, rank, 0.3) for case in ("bf16", "fp16 autocast") for rank in (96, 256)),
    ],
)
def test_kernels_give_the_products(case: str, rows: int, width: int, out: int, rank: int, dropout: float) -> None:
    """Output and gradients against float64 with the same mask: wide and narrow, of ranks and sizes of every kind."""
    torch.manual_seed(3)
    adapter_dtype, dtype, autocast = CASES[case]
    x, dy = torch.randn(rows, width, device="cuda").to(dtype), torch.randn(rows, out, device="cuda")
    weight = (torch.randn(out, width, device="cuda") / width**0.5).to(dtype)
    a = (torch.randn(rank, width, device="cuda") / width**0.5).to(adapter_dtype)
    b = (torch.randn(out, rank, device="cuda") / rank**0.5).to(adapter_dtype)
    kind = products(a, autocast, dtype)
    assert isinstance(kind, launch.Kernels)
    kept = mask(kind, (rows, width), dropout)
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (x, a, b)]
    with torch.autocast("cuda", autocast or torch.bfloat16, enabled=autocast is not None):
        y = lora_linear(inputs[0], weight, None, inputs[1], inputs[2], None, 0.5, dropout)
    assert y.dtype == (autocast or dtype)
    y.backward(dy.to(y.dtype))
    exact = [tensor.double().requires_grad_() for tensor in (x, a, b)]
    expected = exact[0] @ weight.double().t() + 0.5 / (1 - dropout) * (exact[0] * kept) @ exact[1].t() @ exact[2].t()
    expected.backward(dy.to(y.dtype).double())
    found = errors([y, *(t.grad for t in inputs)], [expected, *(t.grad for t in exact)])  # type: ignore[list-item]
    half = 6e-3 if y.dtype == torch.bfloat16 else 8e-4
    assert max(found[:2]) < half
    assert max(found[2:]) < (3e-5 if kind.split else 2 * half)
    assert [t.grad.dtype for t in inputs] == [dtype, adapter_dtype, adapter_dtype]  # type: ignore[union-attr]


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("rank", [64, 96, 256])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_wide_ranks_give_the_same_bits_again(adapter_dtype: torch.dtype, rank: int, dropout: float) -> None:
    """Blocks of ranks are summed in one order."""
    torch.manual_seed(3)
    x, dy = torch.randn(2500, 512, device="cuda").bfloat16(), torch.randn(2500, 384, device="cuda").bfloat16()
    a, b = torch.randn(rank, 512, device="cuda") / 23, torch.randn(384, rank, device="cuda") / rank**0.5
    weight = torch.randn(384, 512, device="cuda").bfloat16() / 23
    both = []
    for _ in range(2):
        torch.manual_seed(4)
        inputs = [x.clone(), a.to(adapter_dtype), b.to(adapter_dtype)]
        inputs = [tensor.requires_grad_() for tensor in inputs]
        y = lora_linear(inputs[0], weight, None, inputs[1], inputs[2], None, 0.5, dropout)
        both.append([y, *torch.autograd.grad(y, inputs, dy)])
    assert all(torch.equal(one, other) for one, other in zip(*both, strict=True))


def test_parts_are_those_of_pytorch() -> None:
    kind, other = products(torch.zeros(8, 64, device="cuda"), None, torch.bfloat16), Split()
    for w in (
        torch.randn(12, 1500, device="cuda"),
        torch.randn(700, 20, device="cuda").t(),
        torch.randn(200, 300, device="cuda"),
    ):
        for low in range(3):
            assert torch.equal(kind.parts(w, low), other.parts(w, low))


def test_kernels_read_rows_that_do_not_follow_one_another() -> None:
    kind = products(torch.zeros(8, 64, device="cuda"), None, torch.bfloat16)
    whole = torch.randn(50, 160, device="cuda").bfloat16()
    a = torch.randn(8, 64, device="cuda")
    part, turned = whole[:, 32:96], torch.randn(64, 50, device="cuda").bfloat16().t()
    for x in (part, turned):
        assert max(errors([kind.down(x, a, 0.0)[0]], [x.double() @ a.double().t()])) < 1e-4


def test_kernels_give_the_same_bits_again() -> None:
    found = module(torch.float32, dropout=0.3)
    FusedLora(found, nullcontext())
    x, dy = torch.randn(700, 512, device="cuda").bfloat16(), torch.randn(700, 384, device="cuda").bfloat16()
    both = []
    for _ in range(2):
        torch.manual_seed(4)
        both.append(results(found, x, dy))
    assert all(torch.equal(one, other) for one, other in zip(*both, strict=True))
    assert not torch.equal(results(found, x, dy)[0], both[0][0])


def test_dropout_of_the_kernels_is_random() -> None:
    """The share that is kept, and that draws, rows and columns have nothing to do with one another."""
    kind = products(torch.zeros(8, 64, device="cuda"), None, torch.bfloat16)
    torch.manual_seed(5)
    draws = []
    for _ in range(6):
        draws.append(mask(kind, (2048, 1024), 0.25))
        launch.draw(draws[0].device, 0.25)
    centred = torch.stack(draws) - 0.75
    size, deviation = draws[0].numel(), (0.25 * 0.75) ** 0.5
    assert float(centred.mean((1, 2)).abs().max()) < 4 * deviation / size**0.5
    assert float(centred.mean(1).abs().max()) < 6 * deviation / 2048**0.5
    assert float(centred.mean(2).abs().max()) < 6 * deviation / 1024**0.5
    flat = centred.flatten(1) / deviation
    between = flat @ flat.t() / size
    assert float((between - between.diag().diag()).abs().max()) < 5 / size**0.5
    for shift in (1, 2, 7, 1024, 1025, 4096):
        assert float((flat * flat.roll(shift, 1)).mean(1).abs().max()) < 5 / size**0.5


def test_an_active_module_launches_few_kernels() -> None:
    found = module(torch.float32, dropout=0.3)
    FusedLora(found, nullcontext())
    x, dy = torch.randn(4, 64, 512, device="cuda").bfloat16().requires_grad_(), torch.randn(4, 64, 384, device="cuda")
    found(x).backward(dy.bfloat16())
    found.zero_grad()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        found(x).backward(dy.bfloat16())
    names = [event.name for event in profiled.events() or () if event.device_type != DeviceType.CPU]
    own = [name for name in names if any(kind in name for kind in ("down_kernel", "up_kernel", "grad_kernel"))]
    assert len(own) == 6
    assert len(names) <= 12, names  # with the two products of the module itself, and the sum of dx


def launched(found: Any) -> int:
    """How many kernels a forward and its backward take, once everything is compiled."""
    x, dy = torch.randn(4, 64, 512, device="cuda").bfloat16().requires_grad_(), torch.randn(4, 64, 384, device="cuda")
    found(x).backward(dy.bfloat16())
    found.zero_grad()
    x.grad = None
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        found(x).backward(dy.bfloat16())
    return sum(event.device_type != DeviceType.CPU for event in profiled.events() or ())


def test_of_few_rows_an_active_module_launches_no_more_kernels_than_peft() -> None:
    pefts, ours = module(torch.bfloat16), module(torch.bfloat16)
    FusedLora(ours, nullcontext())
    assert launched(ours) <= launched(pefts)


def test_of_few_rows_no_more_is_kept_than_by_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    for rows in (0, 2048):
        monkeypatch.setattr(few, "MOST_ROWS", rows)
        model = llama()
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.bfloat16()
        before = after = 0
        with SparseTuner(model, selector="all") as tuner:
            for _ in range(2):  # The first one also fills what libraries keep.
                tuner.begin_step()
                before = torch.cuda.memory_allocated()
                loss = model(**batches(1)[0], use_cache=False).loss
                after = torch.cuda.memory_allocated()
                loss.backward()
                model.zero_grad()
                tuner.end_step()
        held.append(after - before)
    assert held[1] <= held[0]


def test_training_of_float32_adapters_is_that_of_peft() -> None:
    """Both are off the float32 model by the rounding of bfloat16, and by no more."""
    losses: dict[str, list[float]] = {}
    runs = (("exact", torch.float32, False), ("peft", torch.bfloat16, False), ("ours", torch.bfloat16, True))
    for name, dtype, fused in runs:
        model = llama(dtype)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        with SparseTuner(model, probe_batches=batches(2), update_interval=100, fused=fused) as tuner:
            for batch in batches():
                tuner.begin_step()
                loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                tuner.end_step(optimizer)
                losses.setdefault(name, []).append(float(loss))
    exact, pefts, ours = (torch.tensor(losses[name]) for name in ("exact", "peft", "ours"))
    assert (ours - exact).abs().mean() <= 1.5 * (pefts - exact).abs().mean() + 1e-3


# ---- Recomputation


@pytest.mark.parametrize("autocast", [False, True])
def test_recomputation_changes_no_bit(autocast: bool) -> None:
    adapters = []
    for mode in ("none", "frozen", "all"):
        model = llama(lora_dropout=0.1)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        torch.manual_seed(2)
        with SparseTuner(model, probe_batches=batches(2), update_interval=4, recompute=mode) as tuner:
            for batch in batches():
                tuner.begin_step()
                with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                    loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                tuner.end_step(optimizer)
        adapters.append(adapter(model))
    for other in adapters[1:]:
        assert all(torch.equal(adapters[0][name], other[name]) for name in other)


# ---- The importance loop


def test_its_time_is_not_that_of_the_step_before() -> None:
    model = llama()
    with SparseTuner(model, probe_batches=batches(1), update_interval=1) as tuner:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        for _ in range(3):
            tuner.begin_step()
            tuner.end_step(optimizer)
        quiet = tuner.probe_seconds / 3
        tuner.begin_step()
        torch.cuda.synchronize()
        start = time.perf_counter()
        busy = torch.randn(8192, 8192, device="cuda")
        for _ in range(100):
            busy = busy @ busy
        before = tuner.probe_seconds
        tuner.end_step(optimizer)
        assert time.perf_counter() - start > 2 * (tuner.probe_seconds - before)
        assert tuner.probe_seconds - before < quiet + 0.2


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_all_candidates_in_one_forward(adapter_dtype: torch.dtype) -> None:
    model = llama()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter_dtype)
    candidates = [(0, 1, 2, 3), (4, 5, 6, 7), (0, 2, 4, 6)]
    batch = batches(1)[0]
    with SparseTuner(model, probe_batches=[batch]) as tuner, tuner._parts.activation.measuring():
        expected = candidate_losses(model, tuner.layers, candidates, batch, 0.25)
        found = batched_losses(model, tuner.layers, candidates, batch, 0.25)
    torch.testing.assert_close(found, expected, rtol=3e-3, atol=0)


def test_liger_measures_the_same_without_logits() -> None:
    liger = pytest.importorskip("liger_kernel.transformers")
    model = llama()
    layers = [(0, 1, 2, 3), (4, 5, 6, 7)]
    tuner = SparseTuner(model, probe_batches=batches(1))
    expected = candidate_losses(model, tuner.layers, layers, batches(1)[0], 0.25)
    assert not can_skip_logits(model)
    liger.apply_liger_kernel_to_llama(model=model.get_base_model())
    assert can_skip_logits(model)
    torch.cuda.reset_peak_memory_stats()
    found = candidate_losses(model, tuner.layers, layers, batches(1)[0], 0.25)
    torch.testing.assert_close(found, expected, rtol=3e-3, atol=0)
    assert len(set(found.tolist())) == 2
    tuner.close()
