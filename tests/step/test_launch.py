"""What the kernels are launched with, by a twin of each that runs on a CPU. `tests/gpu` has the kernels themselves."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ist.step.fused import again, choice, function, precision, products


class Twin:
    """A kernel as a function, launched as kernels are; each element must be in the grid."""

    def __init__(self, compute: Callable[..., tuple[tuple[int, ...], ...]]) -> None:
        self.compute = compute
        self.launches = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int = 4, num_stages: int = 2, **kwargs: Any) -> None:
            self.launches += 1
            for programs, (size, tile, per_tile) in zip(grid, self.compute(*args, **kwargs), strict=True):
                number, rest = divmod(programs, per_tile)
                assert not rest
                assert (number - 1) * tile < size <= number * tile

        return launch


def view(tensor: Tensor, rows: int, columns: int, row: int, column: int) -> Tensor:
    return tensor.as_strided((rows, columns), (row, column))


def mix(bits: Tensor) -> Tensor:
    bits = bits ^ (bits >> 16)
    bits = bits * 0x7FEB352D % 2**32
    bits = bits ^ (bits >> 15)
    bits = bits * 0x846CA68B % 2**32
    return bits ^ (bits >> 16)


def kept(rows: int, width: int, key: int, other: int, threshold: int) -> Tensor:
    place = torch.arange(rows * width).view(rows, width) % 2**32
    return (mix(place ^ key % 2**32) ^ other % 2**32) >= threshold % 2**32


def check_ranks(rank: int, size: int, blocks: int) -> None:
    """Tiles of a power of two that hold every rank, and none that holds nothing; none larger than fits on a GPU."""
    assert size in (16, 32, 64)
    assert (blocks - 1) * size < rank <= blocks * size


def down_twin(
    x: Tensor, w: Tensor, h: Tensor, rows: int, width: int, rank: int, x_row: int, w_rank: int, w_column: int,
    *drawn: int, DROP: bool, SPLIT: bool, ROWS: int, COLUMNS: int, RANK: int, BLOCKS: int,
) -> tuple[tuple[int, int, int], ...]:  # fmt: skip
    check_ranks(rank, RANK, BLOCKS)
    inputs = view(x, rows, width, x_row, 1).double()
    inputs = inputs * kept(rows, width, *drawn) if DROP else inputs
    h.copy_(inputs @ view(w, rank, width, w_rank, w_column).double().t())
    return ((rows, ROWS, BLOCKS),)


def up_twin(
    y: Tensor, h: Tensor, w: Tensor, rows: int, width: int, rank: int, y_row: int, w_rank: int, w_column: int,
    factor: float, *drawn: int, DROP: bool, SPLIT: bool, ADD: bool, ROWS: int, COLUMNS: int, RANK: int, BLOCKS: int,
) -> tuple[tuple[int, int, int], ...]:  # fmt: skip
    check_ranks(rank, RANK, BLOCKS)
    product = factor * view(h, rows, rank, rank, 1).double() @ view(w, rank, width, w_rank, w_column).double()
    product = product * kept(rows, width, *drawn) if DROP else product
    target = view(y, rows, width, y_row, 1)
    target.copy_(product + target if ADD else product)
    return (rows, ROWS, 1), (width, COLUMNS, 1)


def grad_twin(
    g: Tensor, h: Tensor, x: Tensor, rows: int, width: int, rank: int, x_row: int, g_rank: int, g_column: int,
    factor: float, *drawn: int, DROP: bool, SPLIT: bool, ROWS: int, COLUMNS: int, RANK: int, BLOCKS: int,
) -> tuple[tuple[int, int, int], ...]:  # fmt: skip
    check_ranks(rank, RANK, BLOCKS)
    inputs = view(x, rows, width, x_row, 1).double()
    inputs = inputs * kept(rows, width, *drawn) if DROP else inputs
    view(g, rank, width, g_rank, g_column).copy_(factor * view(h, rows, rank, rank, 1).double().t() @ inputs)
    return ((width, COLUMNS, BLOCKS),)


def parts_twin(
    w: Tensor, parts: Tensor, rank: int, width: int, w_rank: int, w_column: int, LOW: int, COLUMNS: int
) -> tuple[tuple[int, int, int], ...]:
    parts.copy_(precision.Split().parts(view(w, rank, width, w_rank, w_column), LOW))
    return (rank, 1, 1), (width, COLUMNS, 1)


def norm_twin(
    y: Tensor, x: Tensor, w: Tensor, factors: Tensor, width: int, x_row: int, offset: float, ROUNDED: bool, COLUMNS: int
) -> tuple[tuple[int, int, int], ...]:
    rows = view(x, len(factors), width, x_row, 1)
    product = rows.float() * factors[:, None]
    product = product.to(x.dtype) if ROUNDED else product
    y.copy_(product.float() * (w.float() + offset))
    return (len(factors), 1, 1), (width, COLUMNS, 1)


class Generator:
    """The part of a CUDA generator that draws need."""

    def __init__(self) -> None:
        self.offset = 0

    def initial_seed(self) -> int:
        return 7

    def get_offset(self) -> int:
        return self.offset

    def set_offset(self, offset: int) -> None:
        self.offset = offset


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`ist.step.fused.launch` over the twins, on a CPU."""
    kernels: Any = ModuleType("ist.step.fused.kernels")
    kernels.down_kernel, kernels.up_kernel = Twin(down_twin), Twin(up_twin)
    kernels.grad_kernel, kernels.parts_kernel = Twin(grad_twin), Twin(parts_twin)
    kernels.norm_kernel = Twin(norm_twin)
    monkeypatch.setitem(sys.modules, "ist.step.fused.kernels", kernels)
    monkeypatch.setattr(sys.modules["ist.step.fused"], "kernels", kernels, raising=False)
    monkeypatch.delitem(sys.modules, "ist.step.fused.launch", raising=False)
    module = importlib.import_module("ist.step.fused.launch")
    monkeypatch.setattr(module, "wide_product", lambda left, right: left.float() @ right.float())  # Has no CPU.
    monkeypatch.setattr(torch.cuda, "default_generators", (Generator(),))
    draw = module.draw
    monkeypatch.setattr(module, "draw", lambda device, dropout: draw(SimpleNamespace(index=0), dropout))
    yield module
    sys.modules.pop("ist.step.fused.launch", None)
    del sys.modules["ist.step.fused"].launch  # type: ignore[attr-defined]


def module_kinds(launch: Any) -> dict[str, Any]:
    return {
        "float32 over bf16": launch.Kernels(None, torch.bfloat16, True, torch.float32),
        "bf16": launch.Kernels(None, torch.bfloat16, False, torch.bfloat16),
        "autocast": launch.Kernels(torch.bfloat16, torch.bfloat16, False, torch.float32),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rounded", "offset"), [(True, 0.0), (False, 1.0)], ids=["as Llama", "as Gemma"])
@pytest.mark.parametrize("width", [48, 3000])
def test_a_norm_is_the_same_in_its_kernel(
    launch: Any, dtype: torch.dtype, rounded: bool, offset: float, width: int
) -> None:
    """Of rows that are a part of wider ones."""
    torch.manual_seed(0)
    x, w = torch.randn(6, width + 8).to(dtype)[:, :width], torch.randn(width).to(dtype)
    factors = x.float().square().mean(1).rsqrt()
    found = launch.norm_output(x, w, factors, offset, rounded)
    assert found.dtype == dtype
    assert torch.equal(found, again.norm_output(x, w, factors, offset, rounded))


@pytest.mark.parametrize("kind", ["float32 over bf16", "bf16", "autocast"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("few_rows", [0, 2048])
@pytest.mark.parametrize(("out", "bias"), [(40, False), (96, False), (96, True)])
@pytest.mark.parametrize("update", [False, True], ids=["linear", "on top of a module"])
@pytest.mark.parametrize("rank", [20, 96])
def test_products_and_gradients(
    launch: Any,
    kind: str,
    dropout: float,
    few_rows: int,
    out: int,
    bias: bool,
    update: bool,
    rank: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Output and gradients against float64, with the mask that the hash says."""
    torch.manual_seed(0)
    own = module_kinds(launch)[kind]
    monkeypatch.setattr(function, "products", lambda *_: own)
    monkeypatch.setattr(products, "FEW_ROWS", few_rows)
    dtype = torch.float32 if kind == "autocast" else torch.bfloat16
    base = nn.Linear(48, out, bias=bias).requires_grad_(False).to(dtype)
    given = [torch.randn(2, 5, 48).to(dtype), torch.randn(rank, 48) / 7, torch.randn(out, rank) / 4]
    given.append(torch.randn(out))
    given[1:] = [tensor.to(own.weight_dtype) for tensor in given[1:]]
    dy = torch.randn(2, 5, out).bfloat16()
    mask = kept(10, 48, *launch.draw(None, dropout)).view(2, 5, 48).double() if dropout else torch.ones(2, 5, 48)
    torch.cuda.default_generators[0].set_offset(0)
    x, a, b, c = inputs = [tensor.clone().requires_grad_() for tensor in given]
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        if update:
            y = function.lora_update(base(x).detach(), x, a, b, c, 0.5, dropout)
        else:
            y = function.lora_linear(x, base.weight, base.bias, a, b, c, 0.5, dropout)
    y.backward(dy)
    x, a, b, c = exact = [tensor.double().requires_grad_() for tensor in given]
    base.double()
    below = base(x).detach() if update else base(x)
    expected = below + 0.5 / (1 - dropout) * (x * mask) @ a.t() @ b.t() + 0.5 * c
    expected.backward(dy.double())
    for found, right in zip(
        [y.detach(), *(t.grad for t in inputs)], [expected.detach(), *(t.grad for t in exact)], strict=True
    ):
        assert found is not None
        assert right is not None
        assert float((found.double() - right).norm() / right.norm()) < 8e-3
    assert torch.cuda.default_generators[0].get_offset() == (4 if dropout else 0)


@pytest.mark.parametrize(
    ("kind", "rank", "dropout", "many", "expected"),
    [
        ("float32 over bf16", 32, 0.0, False, (2, 2, 2)),
        ("float32 over bf16", 32, 0.0, True, (0, 2, 0)),
        ("float32 over bf16", 64, 0.0, True, (0, 2, 0)),
        ("float32 over bf16", 65, 0.0, True, (0, 0, 0)),
        ("float32 over bf16", 128, 0.2, True, (1, 1, 1)),
        ("float32 over bf16", 128, 0.2, False, (2, 2, 2)),
        ("bf16", 128, 0.0, True, (0, 2, 0)),
        ("autocast", 128, 0.0, True, (0, 2, 0)),
        ("bf16", 129, 0.0, True, (0, 0, 0)),
        ("bf16", 32, 0.2, True, (1, 2, 1)),
    ],
)
def test_of_many_rows_pytorch_multiplies_what_it_multiplies_faster(
    launch: Any,
    kind: str,
    rank: int,
    dropout: float,
    many: bool,
    expected: tuple[int, int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """How often the kernels run in a forward and its backward: what drops out, and what is added with small ranks."""
    own = module_kinds(launch)[kind]
    monkeypatch.setattr(function, "products", lambda *_: own)
    monkeypatch.setattr(products, "FEW_ROWS", 0 if many else 2048)
    dtype = torch.float32 if kind == "autocast" else torch.bfloat16
    x, weight = torch.randn(6, 16).to(dtype).requires_grad_(), torch.randn(24, 16).to(dtype)
    a, b = (torch.randn(shape).to(own.weight_dtype).requires_grad_() for shape in ((rank, 16), (24, rank)))
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        y = function.lora_linear(x, weight, None, a, b, None, 1.0, dropout)
    y.sum().backward()
    assert tuple(twin.launches for twin in (launch.down_kernel, launch.up_kernel, launch.grad_kernel)) == expected


def test_the_share_that_is_kept_is_that_of_dropout_and_draws_differ(launch: Any) -> None:
    draws = [kept(500, 400, *launch.draw(None, 0.1)) for _ in range(8)]
    shares = torch.stack([mask.double().mean() for mask in draws])
    assert float((shares - 0.9).abs().max()) < 4 * (0.09 / 200_000) ** 0.5
    centred = (torch.stack(draws).double() - 0.9).flatten(1)
    between = centred @ centred.t() / 200_000 / 0.09
    assert float((between - between.diag().diag()).abs().max()) < 5 / 200_000**0.5


def test_a_restored_generator_draws_the_same_again(launch: Any) -> None:
    first = launch.draw(None, 0.1)
    second = launch.draw(None, 0.1)
    torch.cuda.default_generators[0].set_offset(0)
    assert launch.draw(None, 0.1) == first != second
    assert all(-(2**31) <= number < 2**31 for number in (*first, *second))


@pytest.mark.parametrize(
    ("rank", "expected"),
    [(1, (16, 1)), (16, (16, 1)), (17, (32, 1)), (40, (64, 1)), (64, (64, 1)), (65, (64, 2)), (96, (64, 2)),
     (128, (64, 2)), (200, (64, 4)), (256, (64, 4))],
)  # fmt: skip
def test_blocks_of_ranks(launch: Any, rank: int, expected: tuple[int, int]) -> None:
    assert launch.rank_blocks(rank) == expected
    assert launch.is_wide(rank) == (rank > 64)


def test_where_kernels_serve(launch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    full, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16

    def find(a: torch.dtype, autocast: torch.dtype | None, *activations: torch.dtype, rank: int = 8) -> Any:
        return launch.find_kernels(torch.zeros(rank, 16, dtype=a), autocast, activations)

    split = find(full, None, bf16, bf16)
    assert (split.split, split.dtype, split.autocast, split.weight_dtype) == (True, full, None, full)
    assert not find(bf16, None, bf16).split
    assert not find(fp16, None, fp16).split
    autocast = find(full, bf16, full)
    assert (autocast.split, autocast.half, autocast.autocast, autocast.weight_dtype) == (False, bf16, bf16, full)
    assert all(find(full, None, bf16, rank=rank) for rank in (64, 65, 96, 200, 256))
    for nothing in (
        find(full, None, full),
        find(full, None, fp16, fp16),
        find(full, None, bf16, full),
        find(bf16, None, full),
        find(full, None, bf16, rank=257),
    ):
        assert nothing is None


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU and Triton, as far as one asks for them."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(choice, "find_spec", lambda name: object())
    choice.working_kernels.cache_clear()
    yield
    choice.working_kernels.cache_clear()


CPU = torch.device("cpu")
BROKEN: dict[str, Callable[[Any, pytest.MonkeyPatch], None]] = {
    "Failed to find C compiler. Please specify via CC.": lambda launch, patch: patch.setattr(
        launch, "grad_kernel", Raising(RuntimeError("Failed to find C compiler. Please specify via CC.\nmore"))
    ),
    "libtriton.so is not there": lambda launch, patch: patch.setattr(
        launch, "try_out", Raising(ImportError("libtriton.so is not there"))
    ),
}


class Raising:
    """What raises however it is used."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getitem__(self, grid: Any) -> Any:
        raise self.error

    def __call__(self, *args: Any) -> Any:
        raise self.error


def test_kernels_are_tried_out_and_taken(launch: Any, gpu: None, caplog: pytest.LogCaptureFixture) -> None:
    assert choice.working_kernels(CPU) is launch
    a: Any = SimpleNamespace(is_cuda=True, dtype=torch.float32, device=CPU, shape=(8, 16))
    assert isinstance(choice.products(a, None, torch.bfloat16), launch.Kernels)
    assert not caplog.records


@pytest.mark.parametrize("reason", BROKEN)
def test_pytorch_takes_over_where_kernels_do_not_work(
    launch: Any, gpu: None, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    BROKEN[reason](launch, monkeypatch)
    a: Any = SimpleNamespace(is_cuda=True, dtype=torch.float32, device=CPU, shape=(8, 16))
    for _ in range(2):
        assert isinstance(choice.products(a, None, torch.bfloat16), precision.Split)
    (said,) = [record.getMessage() for record in caplog.records if record.name == "ist.step.fused.choice"]
    assert f"({reason})" in said
    assert "gcc" in said


def test_a_broken_triton_gives_way(gpu: None, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Such as a folder of that name."""
    (tmp_path / "triton").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("ist.step.fused.launch", "ist.step.fused.kernels", "triton"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert choice.working_kernels(CPU) is None
    assert "Triton has to be whole" in caplog.text


def test_old_gpus_and_machines_without_triton_are_not_spoken_of(
    gpu: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value, owner in (
        ("get_device_capability", lambda device: (7, 5), torch.cuda),
        ("find_spec", lambda name: None, choice),
        ("cuda", None, torch.version),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            choice.working_kernels.cache_clear()
            assert choice.working_kernels(CPU) is None
    assert not caplog.records


def test_a_gpu_on_which_wide_tiles_do_not_fit_keeps_the_kernels_for_small_ranks(
    launch: Any, gpu: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    try_out = launch.try_out

    def too_small(device: torch.device, wide: bool) -> None:
        if wide:
            raise RuntimeError("out of resource: shared memory")
        try_out(device)

    monkeypatch.setattr(launch, "try_out", too_small)

    def kind(rank: int) -> Any:
        a: Any = SimpleNamespace(is_cuda=True, dtype=torch.float32, device=CPU, shape=(rank, 16))
        return choice.products(a, None, torch.bfloat16)

    for _ in range(2):
        assert isinstance(kind(64), launch.Kernels)
        assert isinstance(kind(65), precision.Split)
    assert caplog.text.count("out of resource") == 1


def test_wide_tiles_are_tried_out_when_they_are_first_asked_for(launch: Any, gpu: None) -> None:
    a: Any = SimpleNamespace(is_cuda=True, dtype=torch.float32, device=CPU, shape=(256, 16))
    assert isinstance(choice.products(a, None, torch.bfloat16), launch.Kernels)


def test_memory_that_is_full_for_a_moment_decides_nothing(
    launch: Any, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(launch, "up_kernel", Raising(torch.OutOfMemoryError("full")))
        with pytest.raises(torch.OutOfMemoryError):
            choice.working_kernels(CPU)
    assert choice.working_kernels(CPU) is launch


def test_an_input_that_does_not_fit_is_refused(launch: Any) -> None:
    kind = module_kinds(launch)["bf16"]
    with pytest.raises(RuntimeError, match="An adapter of 32 columns on cpu got an input of 64 on cpu"):
        kind.down(torch.ones(5, 64).bfloat16(), torch.ones(4, 32).bfloat16(), 0.0)
