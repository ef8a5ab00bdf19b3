"""Whole evaluations: each protocol's result, resuming, and what is left as it was."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ist.experiments.data import TASKS, TaskRow, make_row, to_task_row, word_problems
from ist.experiments.data.own_rows import own_row
from ist.experiments.evaluation import PAPER, Accuracy, Generation, Loss, evaluate, extract_answer
from ist.experiments.evaluation.generation import generate_texts
from ist.experiments.evaluation.own_answers import answer_own_rows
from ist.experiments.evaluation.results import Metrics
from ist.experiments.evaluation.settings import EvaluationSettings
from tests.helpers.task_rows import numbered_rows, raw_row
from tests.helpers.tiny import snapshot, tiny_lora, traces

SAMPLED = Generation(do_sample=True, temperature=2.0)


@pytest.fixture
def loaded(tiny_model_folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(tiny_model_folder), AutoTokenizer.from_pretrained(tiny_model_folder)


def rows(num: int = 7) -> list[TaskRow]:
    return [make_row(TASKS["boolq"], row) for row in numbered_rows(num)]


def tasks_of(protocol: str) -> dict[str, Any]:
    texts = {"text": "One text, and more of it. " * 9} if protocol == "loss" else {}
    return {"first": rows(), "second": [make_row(TASKS["ARC-Easy"], raw_row("ARC-Easy"))], **texts}


OPTIONS: dict[str, dict[str, Any]] = {
    "generate": {"max_new_tokens": 3},
    "likelihood": {},
    "loss": {"window": 32},
}


@pytest.mark.parametrize("protocol", OPTIONS)
def test_an_evaluation_that_was_cut_off_goes_on(loaded: tuple[Any, Any], tmp_path: Path, protocol: Any) -> None:
    model, tokenizer = loaded
    options = {"batch_size": 2, **OPTIONS[protocol]}
    whole = evaluate(model, tokenizer, tasks_of(protocol), protocol, folder=tmp_path / "whole", **options)
    assert whole == evaluate(model, tokenizer, tasks_of(protocol), protocol, **options)

    class CutError(Exception):
        pass

    def cut(task: str, done: int, total: int) -> None:
        if (task, total) == ("first", 7) and done >= 4:
            raise CutError

    with pytest.raises(CutError):
        evaluate(model, tokenizer, tasks_of(protocol), protocol, folder=tmp_path / "cut", progress=cut, **options)
    calls: list[tuple[str, int]] = []
    again = evaluate(
        model, tokenizer, tasks_of(protocol), protocol, folder=tmp_path / "cut",
        progress=lambda task, done, total: calls.append((task, done)), **options,
    )  # fmt: skip
    assert again == whole
    assert min(done for task, done in calls if task == "first") > 4
    for name in tasks_of(protocol):
        lines = [
            sorted((tmp_path / folder / "answers" / f"{name}.jsonl").read_text().splitlines())
            for folder in ("whole", "cut")
        ]
        assert [json.loads(line)["index"] for line in lines[0]] == [json.loads(line)["index"] for line in lines[1]]
        assert len({json.loads(line)["id"] for line in lines[0]}) == len(lines[0])
    third: list[Any] = []
    assert evaluate(
        model, tokenizer, tasks_of(protocol), protocol, folder=tmp_path / "cut", batch_size=5,
        progress=lambda *call: third.append(call), **OPTIONS[protocol],
    ) == whole  # fmt: skip
    assert not third  # nothing was computed


def test_sampled_answers_are_the_same_after_a_cut(loaded: tuple[Any, Any]) -> None:
    """What is drawn depends on the seed and the batch, not on what was drawn before."""
    model, tokenizer = loaded
    prompts = [row.prompt for row in rows()]
    options: dict[str, Any] = {"max_new_tokens": 4, "generation": SAMPLED, "batch_size": 3, "seed": 5}

    def drawn(done: tuple[int, ...] = (), **changes: Any) -> dict[int, str]:
        batches = generate_texts(model.eval(), tokenizer, prompts, done=done, **{**options, **changes})
        return dict(pair for batch in batches for pair in batch)

    state = torch.random.get_rng_state()
    whole = drawn()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert drawn() == whole
    assert drawn(done=(0, 4)) == {index: text for index, text in whole.items() if index not in (0, 4)}
    assert drawn(seed=6) != whole


CHANGES: list[tuple[str, dict[str, Any], str]] = [
    ("generate", {"max_new_tokens": 4}, "max_new_tokens 3, now 4"),
    ("generate", {"extraction": "paper"}, "extraction 'careful', now 'paper'"),
    ("generate", {"generation": PAPER}, "num_beams"),
    ("generate", {"seed": 1}, "seed 0, now 1"),
    ("likelihood", {"options": "text"}, "options 'label', now 'text'"),
    ("loss", {"max_length": 50}, "max_length None, now 50"),
]


@pytest.mark.parametrize(("protocol", "change", "said"), CHANGES)
def test_answers_of_other_settings_are_refused(
    loaded: tuple[Any, Any], tmp_path: Path, protocol: Any, change: dict[str, Any], said: str
) -> None:
    model, tokenizer = loaded
    data = {"second": tasks_of(protocol)["second"]}
    evaluate(model, tokenizer, data, protocol, folder=tmp_path, **OPTIONS[protocol])
    with pytest.raises(ValueError, match=said):
        evaluate(model, tokenizer, data, protocol, folder=tmp_path, **{**OPTIONS[protocol], **change})


def test_answers_of_another_model_protocol_or_data_are_refused(tmp_path: Path, loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    data = {"second": tasks_of("loss")["second"]}
    evaluate(model, tokenizer, data, "loss", folder=tmp_path)
    with pytest.raises(ValueError, match="protocol 'loss', now 'likelihood'"):
        evaluate(model, tokenizer, data, "likelihood", folder=tmp_path)
    with pytest.raises(ValueError, match="the data changed"):
        evaluate(model, tokenizer, {"second": rows(1)}, "loss", folder=tmp_path)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    with pytest.raises(ValueError, match=r"weights '[0-9a-f]{16}', now '[0-9a-f]{16}'"):
        evaluate(model, tokenizer, data, "loss", folder=tmp_path)


def test_an_adapter_makes_another_model(tmp_path: Path, loaded: tuple[Any, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    model, tokenizer = loaded
    adapted: Any = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    data = {"second": tasks_of("loss")["second"]}
    evaluate(adapted, tokenizer, data, "loss", folder=tmp_path)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)
    with pytest.raises(ValueError, match="another evaluation"):
        evaluate(adapted, tokenizer, data, "loss", folder=tmp_path)


def change_config(model: Any, tokenizer: Any) -> None:
    model.config.rms_norm_eps = 0.5


def change_rope(model: Any, tokenizer: Any) -> None:
    model.config.rope_parameters = {**(model.config.rope_parameters or {}), "rope_theta": 7.0}


def change_adapter(model: Any, tokenizer: Any) -> None:
    model.peft_config["default"].lora_alpha = 77


def change_template(model: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages[0].content }} "


@pytest.mark.parametrize("change", [change_config, change_rope, change_adapter, change_template])
def test_the_same_weights_computed_otherwise_make_another_model(
    tmp_path: Path, loaded: tuple[Any, Any], change: Any
) -> None:
    from peft import LoraConfig, get_peft_model

    model, tokenizer = copy.deepcopy(loaded)
    adapted: Any = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    data = {"second": tasks_of("loss")["second"]}
    evaluate(adapted, tokenizer, data, "loss", folder=tmp_path)
    adapted.config._name_or_path = adapted.peft_config["default"].base_model_name_or_path = "elsewhere"
    adapted.config.use_cache = not adapted.config.use_cache
    evaluate(adapted, tokenizer, data, "loss", folder=tmp_path)  # Where it lies says nothing.
    change(adapted, tokenizer)
    with pytest.raises(ValueError, match=r"another evaluation \((config|adapter|chat template) .*now '[0-9a-f]{16}'"):
        evaluate(adapted, tokenizer, data, "loss", folder=tmp_path)


@pytest.mark.parametrize("protocol", OPTIONS)
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(loaded: tuple[Any, Any], protocol: Any, fails: bool) -> None:
    model, tokenizer = tiny_lora(), loaded[1]
    model.train()
    next(module for name, module in model.named_modules() if name.endswith("layers.1")).eval()
    base: Any = model.get_base_model()
    base.resize_token_embeddings(len(tokenizer))
    before, weights = traces(model), snapshot(model)
    data = {"first": rows(2)}

    def stop(*_: Any) -> None:
        if fails:
            raise KeyboardInterrupt

    side = tokenizer.padding_side
    try:
        evaluate(model, tokenizer, data, protocol, progress=stop, **OPTIONS[protocol])
    except KeyboardInterrupt:
        assert fails
    assert traces(model) == before
    assert all(torch.equal(weights[name], value) for name, value in snapshot(model).items())
    assert tokenizer.padding_side == side
    assert model.config.use_cache is True


def test_generated_answers_are_marked(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = loaded
    says = {0: "the correct answer is true", 1: "true", 2: "false", 3: "no idea"}  # right are true and false in turn

    def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        prompts = tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        texts = [says[[row.prompt for row in rows(4)].index(prompt)] for prompt in prompts]
        return torch.cat([input_ids, tokenizer(texts, return_tensors="pt", padding=True)["input_ids"]], dim=1)

    model.generate = generate
    result = evaluate(model, tokenizer, {"boolq": rows(4)}, folder=tmp_path)["boolq"]
    assert result == Accuracy(1, 4)
    assert result.to_dict() == {
        "accuracy": 0.25, "low": pytest.approx(0.0456, abs=1e-4), "high": pytest.approx(0.6994, abs=1e-4),
        "correct": 1, "total": 4,
    }  # fmt: skip
    assert str(result) == "25.0% (4.6% to 69.9%), 1 of 4"
    lines = [json.loads(line) for line in (tmp_path / "answers" / "boolq.jsonl").read_text().splitlines()]
    for line in lines:
        row = rows(4)[line["index"]]
        assert line["text"] == says[line["index"]]
        assert line["answer"] == extract_answer(row, line["text"])
        assert line["expected"] == row.answer
        assert line["correct"] == (line["index"] == 0)


def test_the_likeliest_option_is_chosen(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = loaded
    result = evaluate(model, tokenizer, {"boolq": rows()}, "likelihood", folder=tmp_path)["boolq"]
    lines = [json.loads(line) for line in (tmp_path / "answers" / "boolq.jsonl").read_text().splitlines()]
    assert all(line["answer"] == max(line["log_likelihoods"], key=line["log_likelihoods"].get) for line in lines)
    assert result == Accuracy(sum(line["answer"] == rows()[line["index"]].answer for line in lines), 7)


@pytest.mark.parametrize(
    "defaults",
    [
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
        {"num_return_sequences": 2, "num_beams": 2},
        {"return_dict_in_generate": True},
        {"min_new_tokens": 6},
        {"suppress_tokens": list(range(60))},
    ],
    ids=str,
)
def test_a_models_own_defaults_do_not_change_its_answers(loaded: tuple[Any, Any], defaults: dict[str, Any]) -> None:
    """Qwen's chat models come with a penalty on repetition, for one."""
    model, tokenizer = loaded
    options: dict[str, Any] = {"max_new_tokens": 6, "batch_size": 2}
    plain = list(generate_texts(model.eval(), tokenizer, ["a a a a", "b c"], **options))
    former = model.generation_config
    model.generation_config = GenerationConfig(**{**former.to_diff_dict(), **defaults})
    before = model.generation_config.to_dict()
    try:
        assert list(generate_texts(model, tokenizer, ["a a a a", "b c"], **options)) == plain
        assert model.generation_config.to_dict() == before
    finally:
        model.generation_config = former


def test_answers_that_ended_otherwise_are_another_evaluations(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = loaded
    tasks: dict[str, Any] = {"boolq": rows()}
    options: dict[str, Any] = {"folder": tmp_path, "max_new_tokens": 2}
    evaluate(model, tokenizer, tasks, "generate", **options)
    other = copy.deepcopy(tokenizer)
    other.eos_token = "a"
    with pytest.raises(ValueError, match="ends"):
        evaluate(model, other, tasks, "generate", **options)
    evaluate(model, tokenizer, tasks, "generate", **options)


@pytest.mark.parametrize("of_model", ["other", "others", "none"])
def test_an_answer_ends_with_the_tokenizers_end_whatever_the_models_is(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, of_model: str
) -> None:
    """Rows of a training end with the tokenizer's, and some models come with another one, converted files for one."""
    model, tokenizer = loaded
    options: dict[str, Any] = {"max_new_tokens": 8, "batch_size": 1}
    ids = [tokenizer("a a a a")["input_ids"]]
    other, third = (len(tokenizer) - number for number in (1, 2))
    own = {"other": other, "others": [other, third], "none": None}[of_model]
    monkeypatch.setattr(model, "generation_config", GenerationConfig(eos_token_id=own))
    generate, seen = model.generate, []
    monkeypatch.setattr(model, "generate", lambda **given: seen.append(generate(**given)) or seen[-1])
    list(generate_texts(model.eval(), tokenizer, ["a a a a"], **options))
    unended = seen.pop()[0, len(ids[0]) :].tolist()
    assert len(unended) == 8
    ending = copy.deepcopy(tokenizer)
    ending.eos_token = tokenizer.convert_ids_to_tokens(unended[0])
    list(generate_texts(model, ending, ["a a a a"], **options))
    assert seen.pop()[0, len(ids[0]) :].tolist() == unended[:1]


def ending(tokenizer: Any, token: int, *, template: str | None = None) -> Any:
    """A tokenizer in which a token of the vocabulary is one of its own, and no special token."""
    other = copy.deepcopy(tokenizer)
    other.add_tokens([other.convert_ids_to_tokens(token)])
    other.chat_template = template
    return other


def said(model: Any, tokenizer: Any, prompts: Any, **options: Any) -> dict[int, str]:
    given: dict[str, Any] = {"max_new_tokens": 8, "batch_size": 4, **options}
    return {index: text for batch in generate_texts(model, tokenizer, prompts, **given) for index, text in batch}


CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}END{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} {% endif %}"
)


@pytest.mark.parametrize("of_model", ["none", "another", "several"])
def test_an_answer_to_a_chat_ends_as_the_template_ends_it(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, of_model: str
) -> None:
    """Chats teach the template's end, which need be neither the tokenizer's `eos_token` nor one of the model's."""
    model, tokenizer = loaded
    last = len(tokenizer) - 1
    own = {"none": None, "another": last, "several": [last, last - 1]}[of_model]
    monkeypatch.setattr(model, "generation_config", GenerationConfig(eos_token_id=own))
    chats = [[{"role": "user", "content": text}] for text in ("a a a a", "b")]
    template = CHAT_TEMPLATE.replace("END", tokenizer.convert_ids_to_tokens(last))
    with_end = ending(tokenizer, last, template=template)
    generated = script(model, monkeypatch, [[5, 6, last, 7, 8], [7, 8, 9, 5, last]])
    letters = tokenizer.batch_decode([[5, 6], [7, 8, 9, 5]])
    assert said(model.eval(), with_end, chats) == dict(enumerate(letters))
    assert last in generated.ends
    assert model.generation_config.eos_token_id == own


class Scripted:
    """What a model says instead of its own answers, and with which tokens it was told to end."""

    ends: Any = None


def script(model: Any, monkeypatch: pytest.MonkeyPatch, rows: list[list[int]]) -> Scripted:
    """Let a model say these tokens to prompts, in order of the prompts' lengths from the longest on."""
    seen = Scripted()

    def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        seen.ends = model.generation_config.eos_token_id
        return torch.cat([input_ids, torch.tensor(rows)], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    return seen


@pytest.mark.parametrize("padding", ["special", "end", "letter", "none"])
def test_nothing_behind_the_end_reaches_a_text(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, padding: str
) -> None:
    """Rows that end early are padded. Neither the end nor the padding need be a special token."""
    model, tokenizer = loaded
    end = len(tokenizer) - 1
    other = ending(tokenizer, end)
    filling = {"special": 0, "end": end, "letter": 9, "none": 1}[padding]
    other.pad_token = None if padding == "none" else other.convert_ids_to_tokens(filling)
    monkeypatch.setattr(model, "generation_config", GenerationConfig(eos_token_id=end))
    script(model, monkeypatch, [[5, 6, end, filling, filling], [7, end, 8, filling, end]])
    assert said(model.eval(), other, ["a a a a", "b"]) == dict(enumerate(tokenizer.batch_decode([[5, 6], [7]])))


def test_the_end_alone_is_an_empty_answer_to_a_metric(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = loaded
    end = len(tokenizer) - 1
    monkeypatch.setattr(model, "generation_config", GenerationConfig(eos_token_id=[end]))
    script(model, monkeypatch, [[end, 5, 6]])
    own = [own_row("rows", 1, {"instruction": "a", "output": "b"})]
    marked: list[str] = []
    settings = EvaluationSettings()
    answers = answer_own_rows(model.eval(), tokenizer, own, lambda row, text: marked.append(text) or 0.0, settings)
    assert [text for batch in answers for _, text in batch] == [{"text": "", "expected": "b", "score": 0.0}]
    assert marked == [""]


def test_a_tokenizer_without_an_end_or_padding_pads_with_the_models_end(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = loaded
    without = copy.deepcopy(tokenizer)
    without.eos_token = without.pad_token = None
    for own in (3, None):
        monkeypatch.setattr(model, "generation_config", GenerationConfig(eos_token_id=own))
        monkeypatch.setattr(model.config, "eos_token_id", own)
        assert set(said(model.eval(), without, ["a a a a", "b"])) == {0, 1}


def test_beams_are_used(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    seen: list[dict[str, Any]] = []
    generate = model.generate

    def spy(**arguments: Any) -> Any:
        seen.append(arguments)
        return generate(**arguments)

    model.generate = spy
    evaluate(model, tokenizer, {"boolq": rows(2)}, generation=PAPER, max_new_tokens=2)
    evaluate(model, tokenizer, {"words": [to_task_row(problem) for problem in word_problems(2)]})
    assert [(call["num_beams"], call["do_sample"], call["max_new_tokens"]) for call in seen] == [
        (4, False, 2),
        (1, False, 8),
    ]
    assert [(call["temperature"], call["top_p"], call["top_k"]) for call in seen] == [(None, None, None)] * 2


def test_the_limit_grows(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = loaded
    totals = [
        evaluate(model, tokenizer, {"boolq": rows()}, "likelihood", folder=tmp_path, limit=limit)["boolq"].to_dict()[
            "total"
        ]
        for limit in (3, 5, 2)
    ]
    assert totals == [3, 5, 2]
    assert len((tmp_path / "answers" / "boolq.jsonl").read_text().splitlines()) == 5


MISTAKES: list[tuple[str, Any, dict[str, Any], str]] = [
    ("guess", rows(1), {}, "protocol='guess' is unknown: choose one of 'generate', 'likelihood', 'loss', 'lm-eval'"),
    ("generate", [], {}, "data has no rows to evaluate on"),
    ("generate", "a text", {}, "data has no answers to mark"),
    ("likelihood", [{"prompt": "a", "completion": "b"}], {}, "data has no answers to mark"),
    ("likelihood", [make_row(TASKS["mawps"], raw_row("mawps"))], {}, "mawps has no options to compare"),
    ("generate", rows(1), {"batch_size": 0}, "batch_size=0 is not a whole number of at least 1"),
    ("generate", rows(1), {"extraction": "best"}, "extraction='best' is unknown: choose one of 'careful', 'paper'"),
    ("likelihood", rows(1), {"options": "best"}, "options='best' is unknown: choose one of 'label', 'text'"),
    ("generate", rows(1), {"limit": 0}, "limit=0 is not a whole number of at least 1"),
    ("lm-eval", [], {"num_fewshot": -1}, "num_fewshot=-1 is not a whole number of at least 0"),
]


@pytest.mark.parametrize(("protocol", "data", "options", "said"), MISTAKES)
def test_mistakes(
    loaded: tuple[Any, Any], tmp_path: Path, protocol: Any, data: Any, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said) as error:
        evaluate(*loaded, {"data": data}, protocol, folder=tmp_path, **options)
    assert "\n" not in str(error.value)
    assert protocol == "lm-eval" or not list(tmp_path.iterdir())


def test_names_without_rows_are_refused(loaded: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="Names alone are for lm-eval: give likelihood the rows of each task"):
        evaluate(*loaded, ["boolq"], "likelihood")


@pytest.mark.parametrize(
    ("value", "said"), [({"num_beams": 0}, "num_beams=0 is not"), ({"temperature": 0.0}, "temperature=0.0 is not")]
)
def test_generation_that_is_refused(value: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Generation(**value)


@pytest.mark.parametrize(
    ("result", "shown"),
    [
        (Loss(1.0, 10), "loss 1.0000 nats a token, perplexity 2.72, 10 tokens"),
        (Loss(1000.0, 1), "loss 1000.0000 nats a token, perplexity inf, 1 tokens"),
        (Metrics({"bleu,none": 0.25, "n": 3}), "bleu,none 0.25"),
    ],
)
def test_results_are_shown(result: Any, shown: str) -> None:
    assert str(result) == shown
