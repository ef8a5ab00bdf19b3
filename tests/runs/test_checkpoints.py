"""Damaged checkpoints are named and the one before is offered; a resume that could not be exact says so."""

from __future__ import annotations

import io
import json
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.trainer_utils import HPSearchBackend

from ist import IST, SparseTuner, check_checkpoint, last_checkpoint, read_history
from ist.integrations.attachment import in_training, resumes_from
from ist.integrations.resume import checkpoint_folder
from ist.runs.checkpoints import MANIFEST_FILE, write_manifest
from ist.runs.fingerprint import base_fingerprint
from tests.helpers.tiny import tiny_llama, tiny_lora
from tests.helpers.trainers import make_trainer

ADAPTER, STATE, OPTIMIZER = "adapter_model.safetensors", "trainer_state.json", "optimizer.pt"


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    make_trainer(folder).train()
    return folder


@pytest.fixture
def run(whole_run: Path, tmp_path: Path) -> Path:
    """A run with checkpoints 3, 6 and 9, to be damaged."""
    return Path(shutil.copytree(whole_run, tmp_path / "run"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "cut short": (ADAPTER, cut, rf"{ADAPTER} has \d+ of \d+ bytes"),
    "a flipped bit": (OPTIMIZER, flip, f"{OPTIMIZER} was changed after it was written"),
    "missing": ("rng_state.pth", Path.unlink, "rng_state.pth is missing"),
    "a damaged manifest": (MANIFEST_FILE, cut, f"{MANIFEST_FILE} cannot be read"),
}
UNLISTED_DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "never finished": (STATE, Path.unlink, f"it was never finished, {STATE} is missing"),
    "half a state": (STATE, cut, f"{STATE} is cut short or no JSON object"),
    "half an adapter": (ADAPTER, cut, f"{ADAPTER} is cut short or no safetensors file"),
    "half an optimizer": (OPTIMIZER, cut, f"{OPTIMIZER} is cut short or no archive of torch"),
    "half a header": (
        ADAPTER,
        lambda path: path.write_bytes(path.read_bytes()[:20]),
        f"{ADAPTER} is cut short or no safetensors file",
    ),
    "an empty file": (ADAPTER, lambda path: path.write_bytes(b""), f"{ADAPTER} is cut short or no safetensors file"),
}


@pytest.mark.parametrize("damage", [*DAMAGES, *UNLISTED_DAMAGES])
def test_damage_is_named_and_the_one_before_offered(run: Path, damage: str) -> None:
    name, harm, said = {**DAMAGES, **UNLISTED_DAMAGES}[damage]
    last = run / "checkpoint-9"
    if damage in UNLISTED_DAMAGES:
        (last / MANIFEST_FILE).unlink()
        assert last_checkpoint(run) == last, "a checkpoint that was killed just before its manifest is whole"
    harm(last / name)
    with pytest.raises(ValueError, match=rf"checkpoint-9 is damaged \({said}\): resume from .*checkpoint-6, the last"):
        check_checkpoint(last)
    with pytest.warns(UserWarning, match=rf"checkpoint-9: {said}\): checkpoint-6 is taken"):
        assert last_checkpoint(run) == run / "checkpoint-6"
    make_trainer(run).train(resume_from_checkpoint=str(run / "checkpoint-6"))
    assert last_checkpoint(run) == last, "written anew"


def header(value: Any) -> bytes:
    text = json.dumps(value).encode()
    return len(text).to_bytes(8, "little") + text


def with_tuner(**fields: Any) -> bytes:
    return json.dumps({"global_step": 9, "stateful_callbacks": {"IST": {"tuner": fields}}}).encode()


def bomb() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(1 << 20))
    return data.getvalue()


DEEP = b"[" * 200_000
HOSTILE: list[tuple[str, bytes, bool]] = [
    *((MANIFEST_FILE, text, True) for text in (b"[]", b"7", b"null", b'"files"', b"{}", b"", b"\xff\xfe", DEEP)),
    *(
        (MANIFEST_FILE, b'{"files": %s}' % text, True)
        for text in (b"[]", b"null", b"7", b'{"a.pt": 7}', b'{"a.pt": {}}')
    ),
    (MANIFEST_FILE, b'{"files": {"a.pt": {"bytes": "7", "sha256": 7}}}', True),
    (MANIFEST_FILE, b'{"files": {"../checkpoint-6/optimizer.pt": {"bytes": 7, "sha256": ""}}}', True),
    (MANIFEST_FILE, b'{"files": {"/dev/zero": {"bytes": 0, "sha256": ""}}}', True),
    (MANIFEST_FILE, b'{"files": {"%s.pt": {"bytes": 0, "sha256": ""}}}' % (b"a" * 900), True),
    *((STATE, text, False) for text in (b"[]", b"7", b"null", b"", b"{}", DEEP, b'{"global_step": "9"}')),
    *((STATE, b'{"global_step": %s}' % number, False) for number in (b"-1", b"1e400", b"true", b"9" * 5000)),
    *(
        (STATE, b'{"global_step": 9, "stateful_callbacks": %s}' % text, False)
        for text in (b"[7]", b"7", b'{"IST": [7]}', b'{"IST": 7}', b'{"IST": {"tuner": [7]}}')
    ),
    *(
        (STATE, b'{"global_step": 9, %s}' % text, False)
        for text in (
            b'"log_history": {}',
            b'"log_history": [3]',
            b'"save_steps": "x"',
            b'"logging_steps": 0',
            b'"train_batch_size": "x"',
            b'"epoch": "x"',
            b'"stateful_callbacks": null',
        )
    ),
    (STATE, b'{"global_step": 8}', False),
    *((STATE, with_tuner(num_processes=number), False) for number in (10**9, -1, 0, 2.5, "2", [2], None)),
    *((ADAPTER, header(value), False) for value in ([], 7, {"a": 7}, {"a": {}}, {"a": {"data_offsets": "07"}})),
    (ADAPTER, header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 10**18]}}), False),
    (ADAPTER, (2**63).to_bytes(8, "little") + b"{}", False),
    (OPTIMIZER, bomb(), False),
    (OPTIMIZER, b"not an archive", False),
]


@pytest.mark.parametrize(("name", "content", "listed"), HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_file_is_damage_and_nothing_else(run: Path, name: str, content: bytes, listed: bool) -> None:
    last = run / "checkpoint-9"
    if not listed:
        (last / MANIFEST_FILE).unlink()
    (last / name).write_bytes(content)
    with pytest.warns(UserWarning, match=r"^Damaged checkpoints in .*\(checkpoint-9: [ -~]+\): checkpoint-6 is taken"):
        assert last_checkpoint(run) == run / "checkpoint-6"
    with pytest.raises(ValueError, match=r"^The checkpoint .*checkpoint-9 is damaged"):
        check_checkpoint(last)


@pytest.mark.parametrize("name", ["README.md", "adapter_config.json", "training_args.bin"])
def test_what_a_resume_does_not_need_does_not_count(run: Path, name: str) -> None:
    last = run / "checkpoint-9"
    (last / name).write_text("{}")
    check_checkpoint(last)
    (last / name).unlink()
    check_checkpoint(last)
    assert last_checkpoint(run) == last


def test_a_change_on_purpose_has_a_way_out(run: Path) -> None:
    last = run / "checkpoint-9"
    (last / STATE).write_text((last / STATE).read_text().replace("\n", " "))
    with pytest.raises(ValueError, match=f"where the change was meant, remove its {MANIFEST_FILE}"):
        check_checkpoint(last)
    (last / MANIFEST_FILE).unlink()
    check_checkpoint(last)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"layers": 7}, "layers"),
        ({"layers": [7]}, "layers"),
        ({"config": []}, "config"),
        ({"selector": None}, "selector"),
        ({"selector": {"importance": "abcd", "num_updates": 1}}, "selector"),
        ({"selector": {"importance": [0.0] * 4, "num_updates": "1"}}, "selector"),
        ({"selector": {"a": 1}}, "importance, num_updates"),
        ({"batched_trusted": "x"}, "batched_trusted"),
        ({"batched_trusted": [1]}, "batched_trusted"),
        ({"num_steps": "9"}, "num_steps"),
        ({"num_probes": -1}, "num_probes"),
        ({"num_processes": [2]}, "num_processes"),
        ({"last_update": {"candidates": 7}}, "last_update"),
    ],
)
def test_a_hostile_state_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    tuner = SparseTuner(tiny_lora())
    before = tuner.state_dict()
    with pytest.raises(ValueError, match=f"no usable {named}: the checkpoint is damaged"):
        tuner.load_state_dict({**before, **change})
    assert tuner.state_dict() == before


@pytest.mark.parametrize("head", [True, False], ids=["new head", "base"])
def test_a_new_head_does_not_count_and_another_base_does(head: bool) -> None:
    def fingerprint(process: int) -> str | None:
        model: Any = tiny_llama()
        torch.manual_seed(process)
        layer = model.lm_head if head else model.model.layers[0].self_attn.o_proj
        torch.nn.init.normal_(layer.weight)
        return base_fingerprint(
            get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
        )

    assert (fingerprint(1) == fingerprint(2)) is head


def test_nothing_whole(run: Path, tmp_path: Path) -> None:
    for step in (3, 6, 9):
        cut(run / f"checkpoint-{step}" / ADAPTER)
    with pytest.warns(UserWarning, match="checkpoint-9: .*; checkpoint-6: .*; checkpoint-3: .*no checkpoint is left"):
        assert last_checkpoint(run) is None
    with pytest.raises(ValueError, match=r"checkpoint-6 is damaged .*: none before it is complete"):
        check_checkpoint(run / "checkpoint-6")
    assert last_checkpoint(tmp_path / "no such run") is None
    with pytest.raises(ValueError, match="there is no such folder"):
        check_checkpoint(run / "checkpoint-12")


def test_a_flipped_bit_is_found_at_the_resume(run: Path) -> None:
    """The Trainer itself would load it."""
    flip(run / "checkpoint-9" / ADAPTER)
    with pytest.raises(ValueError, match=f"checkpoint-9 is damaged .{ADAPTER} was changed"):
        make_trainer(run, max_steps=12).train(resume_from_checkpoint=str(run / "checkpoint-9"))


def test_a_copy_elsewhere_is_the_checkpoint_that_is_checked(run: Path, tmp_path: Path) -> None:
    """And not the one of the same step that was left in the run's folder."""
    copy = Path(shutil.copytree(run / "checkpoint-6", tmp_path / "copy" / "checkpoint-6"))
    flip(run / "checkpoint-6" / ADAPTER)
    make_trainer(run).train(resume_from_checkpoint=str(copy))
    check_checkpoint(run / "checkpoint-9")
    flip(copy / ADAPTER)
    make_trainer(tmp_path / "whole").train()
    for arguments, named in (((str(copy),), {}), ((), {"resume_from_checkpoint": copy})):
        with pytest.raises(ValueError, match=rf"copy/checkpoint-6 is damaged .{ADAPTER} was changed"):
            make_trainer(tmp_path / "whole").train(*arguments, **named)


def test_a_copy_may_have_any_name(run: Path, tmp_path: Path) -> None:
    """The last of the run's folder has another step than its name says, where it was renamed."""
    copy = Path(shutil.copytree(run / "checkpoint-6", tmp_path / "best"))
    flip(copy / ADAPTER)
    with pytest.raises(ValueError, match=rf"best is damaged .{ADAPTER} was changed"):
        make_trainer(tmp_path / "new").train(resume_from_checkpoint=str(copy))
    copy.rename(run / "checkpoint-10")
    with pytest.raises(ValueError, match=rf"checkpoint-10 is damaged .{ADAPTER} was changed"):
        make_trainer(run).train(resume_from_checkpoint=True)


def test_a_copy_without_a_listed_file_says_how_to_resume_all_the_same(run: Path) -> None:
    (run / "checkpoint-3" / OPTIMIZER).unlink()
    with pytest.raises(
        ValueError, match=rf"{OPTIMIZER} is missing\): none .* change was meant, remove its {MANIFEST_FILE}"
    ):
        check_checkpoint(run / "checkpoint-3")
    (run / "checkpoint-3" / MANIFEST_FILE).unlink()
    check_checkpoint(run / "checkpoint-3")


def test_the_folder_of_a_trial_is_transformers_own(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.state.global_step = 3
    vars(trainer).update(hp_search_backend=HPSearchBackend.OPTUNA, hp_name=None, _trial=SimpleNamespace(number=7))
    assert checkpoint_folder(trainer.args, trainer.state, trainer) == tmp_path / "run-7" / "checkpoint-3"


def test_a_training_that_cannot_begin_leaves_nothing_behind(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    with pytest.raises(TypeError):
        trainer.train(resume_from_checkpoint={"a": 1})
    assert (in_training.get(), resumes_from.get()) == (None, None)


def test_a_manifest_is_written_where_a_trial_saves(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not into a damaged checkpoint of the same step in the folder of all trials."""
    flip(run / "checkpoint-3" / ADAPTER)
    trainer = make_trainer(run, max_steps=3)
    monkeypatch.setattr(trainer, "_get_output_dir", lambda trial: str(run / "run-7"))
    trainer.train()
    assert (run / "run-7" / "checkpoint-3" / MANIFEST_FILE).is_file()
    steps = [[line for line in read_history(folder) if line["event"] == "step"] for folder in (run, run / "run-7")]
    assert list(map(len, steps)) == [9, 3]
    with pytest.raises(ValueError, match="checkpoint-3 is damaged"):
        check_checkpoint(run / "checkpoint-3")


def test_a_manifest_lists_what_a_resume_needs_and_comes_whole(run: Path) -> None:
    last = run / "checkpoint-9"
    listed = json.loads((last / MANIFEST_FILE).read_text())["files"]
    assert set(listed) == {ADAPTER, OPTIMIZER, STATE, "rng_state.pth", "scheduler.pt"}
    write_manifest(last)
    assert json.loads((last / MANIFEST_FILE).read_text())["files"] == listed
    assert not list(last.glob(".*.part"))


def test_best_model_and_rotation_still_work(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=3, save_total_limit=1
    )
    trainer.train()
    left = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert "checkpoint-9" in left
    assert len(left) <= 2
    assert all((tmp_path / name / MANIFEST_FILE).is_file() for name in left)


def other_base() -> Any:
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
    return get_peft_model(tiny_llama(seed=7), LoraConfig(r=4, target_modules=targets))


@pytest.mark.parametrize(
    ("callback", "model", "said"),
    [
        (IST(update_interval=3), tiny_lora, "update_interval was 2 and is 3"),
        (IST(update_interval=2, seed=1), tiny_lora, "seed was 0 and is 1"),
        (
            IST(update_interval=2, selector="random"),
            tiny_lora,
            "with LearnedSelector and would resume with Random",
        ),
        (IST(update_interval=2), other_base, "The frozen weights under the adapter are not those"),
    ],
)
def test_another_run_is_refused(run: Path, callback: IST, model: Callable[[], Any], said: str) -> None:
    before = (run / "ist_history.jsonl").read_text()
    with pytest.raises(ValueError, match=said):
        make_trainer(run, callback, model=model(), max_steps=12).train(resume_from_checkpoint=str(run / "checkpoint-6"))
    assert (run / "ist_history.jsonl").read_text() == before


def test_another_number_of_processes_is_refused(run: Path) -> None:
    file = run / "checkpoint-6" / STATE
    state = json.loads(file.read_text())
    state["stateful_callbacks"]["IST"]["tuner"]["num_processes"] = 4
    file.write_text(json.dumps(state))
    write_manifest(file.parent)  # as the four processes would have
    with pytest.raises(ValueError, match="began with 4 processes and would resume with 1"):
        make_trainer(run).train(resume_from_checkpoint=str(run / "checkpoint-6"))


def test_other_arguments_warn_once_and_by_name(run: Path) -> None:
    trainer = make_trainer(run, learning_rate=5e-3, max_steps=12)
    with pytest.warns(UserWarning, match=r"learning_rate was 0.01 and is 0.005") as caught:
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-9"))
    said = [str(warning.message) for warning in caught if "other arguments" in str(warning.message)]
    assert len(said) == 1
    assert "max_steps was 9 and is 12" in said[0]
    assert [event["step"] for event in read_history(run) if event["event"] == "step"] == list(range(1, 13))


def test_the_same_arguments_do_not_warn(run: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)
        make_trainer(run).train(resume_from_checkpoint=str(run / "checkpoint-6"))


def test_fingerprint_is_of_the_frozen_weights() -> None:
    model = tiny_lora()
    first = base_fingerprint(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    assert base_fingerprint(model) == first, "what trains does not count"
    assert base_fingerprint(model.to(torch.bfloat16)) == first, "nor does the precision"
    assert base_fingerprint(tiny_lora(seed=1)) != first
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "layers.2.self_attn.o_proj" in n).mul_(1.5)
    assert base_fingerprint(model) != first


def test_states_of_before_the_fingerprint_are_read() -> None:
    tuner = SparseTuner(tiny_lora())
    old = {k: v for k, v in tuner.state_dict().items() if k not in ("base_fingerprint", "num_processes")}
    tuner.load_state_dict(old)
    assert tuner.num_steps == 0


def test_a_state_with_the_names_that_options_had_before_is_taken_up() -> None:
    """Old checkpoints say `damping`, `price` and the preset `reference`; nothing is said about it."""
    tuner = SparseTuner(tiny_lora(), preset="authors", cost_exponent=1.0)
    state = tuner.state_dict()
    config = dict(state["config"])
    old = {"preset": "reference", "damping": config.pop("suppression"), "price": config.pop("cost_exponent")}
    tuner.load_state_dict({**state, "num_steps": 4, "config": {**config, **old}})
    assert tuner.num_steps == 4
    with pytest.raises(ValueError, match="suppression was 'response' and is 'scaling'"):
        tuner.load_state_dict({**state, "config": {**config, **old, "damping": "response"}})
