"""Probe streams: the same batch for the same index, and a training run that notices nothing."""

import random
import weakref
from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from ist.probing.probes import DatasetProbes, IterableProbes, RecordedProbes
from ist.probing.sources import probe_stream
from ist.runtime.modes import to_device
from ist.runtime.randomness import keyed_seed, private_randomness


def global_states() -> tuple[list[int], object, str]:
    """The three global random states as values that can be compared bit for bit."""
    state: Any = np.random.get_state()
    name, keys, position, has_gauss, cached = state
    return torch.get_rng_state().tolist(), random.getstate(), repr((name, keys.tolist(), position, has_gauss, cached))


def draw_all() -> tuple[float, ...]:
    """A number of each global generator."""
    return (*torch.rand(2).tolist(), random.random(), random.gauss(0, 1), float(np.random.rand()))


@pytest.fixture(autouse=True)
def _restored_generators():
    """Tests here move the global generators."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    yield
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])


def stir(seed: int) -> None:
    """Set the global generators to some other state, as training does all the time."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def numbers(count: int) -> Any:
    """A dataset of the numbers below `count`: a range is one, whatever torch's types say."""
    return range(count)


# DatasetProbes


def dataset_probes(size: int, batch_size: int, seed: int = 0) -> DatasetProbes:
    return DatasetProbes(range(size), batch_size, lambda examples: {"rows": examples}, seed)


@pytest.mark.parametrize(("size", "batch_size"), [(12, 3), (10, 3), (7, 7), (5, 1), (1, 1)])
def test_an_epoch_repeats_no_example_and_the_next_is_in_another_order(size, batch_size):
    probes = dataset_probes(size, batch_size)
    per_epoch = size // batch_size
    epochs = []
    for epoch in range(4):
        batches = [probes.batch(epoch * per_epoch + position)["rows"] for position in range(per_epoch)]
        assert all(len(batch) == batch_size for batch in batches)
        rows = [row for batch in batches for row in batch]
        assert len(set(rows)) == len(rows) == per_epoch * batch_size
        assert set(rows) <= set(range(size))
        epochs.append(tuple(rows))
    if size > 1:
        assert len(set(epochs)) == 4


def test_every_example_is_reached_though_the_last_of_an_epoch_are_left_out():
    probes = dataset_probes(10, 4)
    assert {row for index in range(40) for row in probes.batch(index)["rows"]} == set(range(10))


@pytest.mark.parametrize("size", [1, 3])
def test_a_dataset_smaller_than_a_batch_is_the_batch(size):
    probes = dataset_probes(size, 16)
    assert all(sorted(probes.batch(index)["rows"]) == list(range(size)) for index in range(5))


def test_the_index_and_the_seed_determine_the_batch():
    order = [7, 0, 3, 3, 11, 0]
    probes, again = dataset_probes(12, 3), dataset_probes(12, 3)
    expected = {index: again.batch(index) for index in range(12)}
    before = global_states()
    assert [probes.batch(index) for index in order] == [expected[index] for index in order]
    assert global_states() == before
    other = dataset_probes(12, 3, seed=1)
    assert [other.batch(index) for index in range(12)] != list(expected.values())


def test_examples_are_collated_and_fetched_together_where_the_dataset_can():
    rows = TensorDataset(torch.arange(8))
    plain = DatasetProbes(rows, 4, lambda examples: {"rows": torch.stack([x for (x,) in examples])}, 0)
    assert not hasattr(range(8), "__getitems__")
    assert plain.batch(0)["rows"].tolist() == dataset_probes(8, 4).batch(0)["rows"]

    class Fetching(Dataset):
        calls: list[list[int]] = []  # noqa: RUF012

        def __len__(self):
            return 8

        def __getitems__(self, indices):
            self.calls.append(indices)
            return list(indices)

    fetched = DatasetProbes(Fetching(), 4, lambda examples: {"rows": examples}, 0)
    assert fetched.batch(0) == dataset_probes(8, 4).batch(0)
    assert Fetching.calls == [fetched.batch(0)["rows"]] * 2


def test_a_hugging_face_dataset_works():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"rows": list(range(10)), "text": [str(i) for i in range(10)]})
    probes = DatasetProbes(rows, 3, lambda examples: {name: [e[name] for e in examples] for name in examples[0]}, 0)
    for index in range(6):
        expected = dataset_probes(10, 3).batch(index)["rows"]
        assert probes.batch(index) == {"rows": expected, "text": [str(i) for i in expected]}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


class StreamWithLength(Stream):
    def __len__(self):
        return 3


@pytest.mark.parametrize("dataset", [[], Stream(), StreamWithLength(), iter([1, 2])], ids=lambda d: type(d).__name__)
def test_a_dataset_that_cannot_be_drawn_from_is_refused(dataset):
    with pytest.raises(ValueError, match=f"a {type(dataset).__name__} that is empty or can only be .*: give a dataset"):
        DatasetProbes(dataset, 2, list, 0)  # pyright: ignore[reportArgumentType]


class Masking:
    """A collator with a generator of its own, which holds the model and what cannot be copied."""

    def __init__(self, model: nn.Module | None = None):
        self.generator = torch.Generator().manual_seed(0)
        self.model = model
        self.weights = torch.ones(3, requires_grad=True) * 2

    def __call__(self, rows):
        return {"rows": rows, "mask": torch.rand(len(rows), generator=self.generator).tolist()}


def test_a_collator_with_a_generator_gives_the_same_batch_for_the_same_index_and_training_its_own():
    collate, twin = Masking(), Masking()
    probes = DatasetProbes(range(12), 4, collate, 0)
    expected = [probes.batch(index) for index in range(3)]
    assert len({tuple(batch["mask"]) for batch in expected}) == 3
    assert DatasetProbes(range(12), 4, Masking(), 0).batch(2) == expected[2]
    assert collate([1, 2]) == twin([1, 2])
    assert probes.batch(2) == expected[2]
    assert DatasetProbes(range(12), 4, Masking(), 1).batch(2)["mask"] != expected[2]["mask"]


def test_a_loaders_collator_is_left_as_it_was():
    collate, twin = Masking(), Masking()
    probes = IterableProbes(DataLoader(Stream(), batch_size=2, collate_fn=collate), 0)
    expected = [probes.batch(index) for index in range(3)]
    again = IterableProbes(DataLoader(Stream(), batch_size=2, collate_fn=Masking()), 0)
    assert [again.batch(2), again.batch(0)] == [expected[2], expected[0]]
    assert collate([1, 2]) == twin([1, 2])


def test_a_model_that_a_collator_holds_is_in_memory_once():
    class Single(nn.Linear):
        def __reduce_ex__(self, protocol):
            raise AssertionError("a copy was made")

    class Owner(Single):
        def collate(self, rows):
            return {"rows": rows}

    for collate in (Masking(Single(2, 2)), Owner(2, 2).collate):
        assert len(DatasetProbes(range(8), 2, collate, 0).batch(0)["rows"]) == 2


# IterableProbes


class Noisy(Dataset):
    """Each example draws from every global generator, as augmentation does."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return {"index": index, "noise": torch.tensor(draw_all(), dtype=torch.float64)}


def as_tuner_does(probes: IterableProbes, index: int) -> dict[str, list]:
    """Ask for a batch within the generators of that probe, as the tuner does."""
    with private_randomness(keyed_seed(0, "probe", index)):
        batch = probes.batch(index)
    assert batch is not None
    return {name: value.tolist() for name, value in batch.items()}


def shuffled_loader() -> DataLoader:
    return DataLoader(Noisy(), batch_size=4, shuffle=True)


def test_a_shuffling_loader_gives_the_same_batch_for_the_same_index():
    stir(1)
    probes = IterableProbes(shuffled_loader(), 0)
    first = [as_tuner_does(probes, index) for index in range(9)]
    stir(2)
    again = IterableProbes(shuffled_loader(), 0)
    assert [as_tuner_does(again, index) for index in range(9)] == first
    orders = [[i for batch in first[start : start + 3] for i in batch["index"]] for start in (0, 3, 6)]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    other = IterableProbes(shuffled_loader(), 1)
    assert as_tuner_does(other, 0) != first[0]


def test_probing_moves_no_global_generator():
    stir(3)
    probes = IterableProbes(shuffled_loader(), 0)
    before = global_states()
    for index in range(7):
        as_tuner_does(probes, index)
        assert global_states() == before


def test_going_back_and_jumping_ahead_give_the_order_of_one_pass():
    probes = IterableProbes(shuffled_loader(), 0)
    expected = [as_tuner_does(probes, index)["index"] for index in range(8)]
    for index in (2, 0, 7, 7, 1, 5):
        assert as_tuner_does(probes, index)["index"] == expected[index]
        assert as_tuner_does(IterableProbes(shuffled_loader(), 0), index)["index"] == expected[index]


def test_jumping_ahead_gives_the_same_noise_as_one_pass():
    """What a resumed run does: its first probe has the index where the interrupted run stopped."""
    probes = IterableProbes(shuffled_loader(), 0)
    expected = [as_tuner_does(probes, index) for index in range(8)]
    for index in range(8):
        assert as_tuner_does(IterableProbes(shuffled_loader(), 0), index) == expected[index]


def test_a_loader_with_a_generator_of_its_own_is_refused():
    """Measuring would advance the generator, and with it the order in which training sees its data."""
    loader = DataLoader(numbers(12), batch_size=4, shuffle=True, generator=torch.Generator())
    with pytest.raises(ValueError, match=r"a DataLoader with a generator, .*: give one without"):
        IterableProbes(loader, 0)


def test_probing_the_training_loader_itself_takes_nothing_from_training():
    loader = DataLoader(numbers(12), batch_size=3, num_workers=1, persistent_workers=True)
    probes = IterableProbes(loader, 0)
    seen = []
    for index, batch in enumerate(loader):
        probes.batch(index)
        seen += batch.tolist()
    probes.close()
    assert seen == list(range(12))


def test_a_list_of_batches_is_gone_round():
    batches = [{"x": torch.tensor([i])} for i in range(3)]
    probes = IterableProbes(batches, 0)
    assert [as_tuner_does(probes, index)["x"] for index in range(7)] == [[0], [1], [2], [0], [1], [2], [0]]


@pytest.mark.parametrize(
    "iterator", [iter([{}]), ({} for _ in range(3)), iter(DataLoader(numbers(3))), zip([1], [2], strict=True)]
)
def test_an_iterator_that_runs_dry_is_refused(iterator):
    with pytest.raises(ValueError, match=rf"one-way iterator \({type(iterator).__name__}\).*give something"):
        IterableProbes(iterator, 0)


@pytest.mark.parametrize("empty", [[], DataLoader(numbers(0)), DataLoader(numbers(3), batch_size=4, drop_last=True)])
def test_an_empty_loader_gives_none_each_time(empty):
    probes = IterableProbes(empty, 0)
    assert [probes.batch(index) for index in (0, 0, 1, 5, 0)] == [None] * 5


def test_closing_lets_go_of_the_loader_and_the_stream_can_go_on():
    closed = []

    class Batches:
        def __iter__(self):
            try:
                yield from ({"x": torch.tensor([i])} for i in range(3))
            finally:
                closed.append(True)

    probes = IterableProbes(Batches(), 0)
    first = as_tuner_does(probes, 0)
    assert closed == []
    probes.close()
    assert closed == [True]
    assert as_tuner_does(probes, 0) == first


# RecordedProbes


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, x, labels=None, **kwargs):
        return self.linear(x)


def test_the_last_training_batch_is_recorded_and_nothing_else():
    model = Model()
    probes = RecordedProbes(model)
    assert probes.batch(0) is None
    batches = [torch.full((3, 2), float(i)) for i in range(6)]
    model(x=batches[0], labels=batches[1])
    assert probes.batch(0) == {"x": batches[0], "labels": batches[1]}
    model(x=batches[1])
    expected = probes.batch(1)
    assert expected is not None
    assert expected.keys() == {"x"}
    assert expected["x"] is batches[1]
    model.eval()
    model(x=batches[2])
    model.train()
    with torch.no_grad():
        model(x=batches[3])
    with torch.inference_mode():
        model(x=batches[4])
    model(batches[5])  # positional arguments have no names to give them back by
    assert probes.batch(7) is expected


def test_what_is_no_input_of_the_model_is_left_out():
    model = Model()
    probes = RecordedProbes(model)
    x = torch.ones(1, 2)
    model(x=x, num_items_in_batch=torch.tensor(7), fused_lm_head=True, attention_mask=None)
    assert probes.batch(0) == {"x": x, "attention_mask": None}


def test_closing_lets_go_of_the_batch_and_the_model():
    model = Model()
    probes = RecordedProbes(model)
    assert len(model._forward_pre_hooks) == 1
    model(x=torch.ones(1, 2))
    probes.close()
    assert probes.batch(0) is None
    assert len(model._forward_pre_hooks) == 0
    model(x=torch.ones(1, 2))
    assert probes.batch(0) is None
    probes.close()


def test_the_hook_goes_with_the_stream():
    model = Model()
    probes = RecordedProbes(model)
    x = torch.ones(1, 2)
    model(x=x)
    kept = weakref.ref(x)
    del probes, x
    assert len(model._forward_pre_hooks) == 0
    assert kept() is None


# probe_stream


def rows_of(num, size=2):
    return [{"x": torch.ones(size, 2)} for _ in range(num)]


class Ready:
    def batch(self, index):
        return {"text": ["a"], "x": torch.ones(3, 2)}

    def close(self):
        pass


@pytest.mark.parametrize("asked", [None, 1, 3, 8, 100])
def test_batches_of_the_size_asked_for_are_drawn_from_a_loaders_dataset(asked):
    loader = DataLoader(numbers(12), batch_size=4)
    batch: Any = probe_stream(loader, Model(), 0, batch_size=asked).batch(0)
    assert len(batch) == min(asked or 4, 12)


DATASET: Any = rows_of(2, 3)


@pytest.mark.parametrize("source", [rows_of(2, 3), Ready(), DataLoader(DATASET, batch_size=None), None])
def test_ready_made_batches_of_another_size_are_said_once(source):
    model = Model()
    for asked in (None, 3):
        probes: Any = probe_stream(source, model, 0, batch_size=asked)
        model(x=torch.ones(3, 2))
        assert probes.batch(0)["x"].shape == (3, 2)
    probes = probe_stream(source, model, 0, batch_size=16)
    model(x=torch.ones(3, 2))
    message = "probe_batch_size=16 has no effect on .*, and these have 3 example.*: set probe_batch_size=3 if"
    with pytest.warns(UserWarning, match=message) as caught:
        first = probes.batch(0)
    assert len(caught) == 1
    assert probes.batch(1)["x"].shape == first["x"].shape
    probes.close()


def test_the_batches_of_a_ready_dataset_are_those_asked_for_or_are_named():
    model = Model()
    small = DatasetProbes(range(5), 16, list, 0)  # pyright: ignore[reportArgumentType]
    assert probe_stream(small, model, 0, batch_size=16) is small
    with pytest.warns(UserWarning, match="these have 5 example"):
        probe_stream(small, model, 0, batch_size=4).batch(0)


# private_randomness


def test_inside_the_seed_decides_and_outside_nothing_has_happened():
    stir(5)
    random.gauss(0, 1)  # leaves half a pair in Python's generator, which its state holds too
    np.random.randn()
    before = global_states()
    with private_randomness(11):
        first = draw_all()
    assert global_states() == before
    stir(6)
    with private_randomness(11):
        assert draw_all() == first
    with private_randomness(12):
        assert set(draw_all()).isdisjoint(first)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, StopIteration])
def test_an_exception_restores_all_generators_too(error):
    stir(5)
    before = global_states()

    def fail():
        with private_randomness(11):
            draw_all()
            raise error

    with pytest.raises(error):
        fail()
    assert global_states() == before


def test_contexts_nest():
    stir(5)
    before = global_states()
    with private_randomness(1):
        expected = [draw_all(), draw_all()]
    with private_randomness(1):
        assert draw_all() == expected[0]
        with private_randomness(2):
            draw_all()
        assert draw_all() == expected[1]
    assert global_states() == before


@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**32, 2**63 - 1])
def test_every_keyed_seed_is_allowed(seed):
    assert 0 <= seed < 2**63
    with private_randomness(seed, torch.device("cpu")):
        first = draw_all()
    with private_randomness(seed):
        assert draw_all() == first


# to_device

Pair = namedtuple("Pair", "x y")


def test_tensors_at_any_depth_are_moved_and_all_else_is_kept():
    label = object()
    value = {"x": torch.ones(2), "nested": {"pair": (torch.ones(3), label), "list": [torch.ones(1), 5, "text", None]}}
    moved = to_device(value, torch.device("meta"))
    assert moved["x"].device.type == "meta"
    assert moved["x"].shape == (2,)
    first, second = moved["nested"]["pair"]
    assert isinstance(moved["nested"]["pair"], tuple)
    assert first.device.type == "meta"
    assert second is label
    assert isinstance(moved["nested"]["list"], list)
    assert moved["nested"]["list"][0].device.type == "meta"
    assert moved["nested"]["list"][1:] == [5, "text", None]
    assert value["x"].device.type == "cpu"


def test_a_transformers_batch_is_moved():
    from transformers import BatchEncoding

    moved = to_device(BatchEncoding({"input_ids": torch.ones(1, 2)}), torch.device("meta"))
    assert moved["input_ids"].device.type == "meta"


def test_a_named_tuple_is_moved():
    moved = to_device(Pair(torch.ones(1), 3), torch.device("meta"))
    assert isinstance(moved, Pair)
    assert moved.x.device.type == "meta"
    assert moved.y == 3
