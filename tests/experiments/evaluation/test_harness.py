"""Tasks of lm-evaluation-harness, from a folder of the test's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ist.experiments.evaluation import Accuracy, evaluate
from ist.experiments.evaluation.harness import check_known, harness_result
from ist.experiments.evaluation.results import Metrics
from ist.experiments.evaluation.scoring import Continuations, score

TASK = """task: ist_test_{name}
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: {kind}
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
{rest}
metric_list:
  - metric: {metric}
    aggregation: {aggregation}
    higher_is_better: true
"""
ROWS = [
    {"question": "Is ice cold?", "choices": ["yes", "never"], "answer": 0},
    {"question": "Is a stone soft?", "choices": ["yes", "no"], "answer": 1},
    {"question": "What is wet?", "choices": ["rain", "sand"], "answer": 0},
]


@pytest.fixture(scope="module")
def loaded(tiny_model_folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(tiny_model_folder), AutoTokenizer.from_pretrained(tiny_model_folder)


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options = 'doc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"'
    text = 'doc_to_target: "{{choices[answer]}}"'
    for name, kind, rest, metric, aggregation in [
        ("choices", "multiple_choice", options, "acc", "mean"),
        ("text", "loglikelihood", text, "perplexity", "perplexity"),
    ]:
        (folder / f"{name}.yaml").write_text(
            TASK.format(name=name, data=data, kind=kind, rest=rest, metric=metric, aggregation=aggregation)
        )
    return str(folder)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the harness and of what it imports
def test_a_task_of_a_folder(
    loaded: tuple[Any, Any], task_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = loaded
    model.train()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    state = torch.random.get_rng_state()
    options: dict[str, Any] = {"task_folder": task_folder, "folder": tmp_path, "batch_size": 2}
    results = evaluate(model, tokenizer, ["ist_test_choices", "ist_test_text"], "lm-eval", **options)
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)
    expected = 0
    model.eval()
    for row in ROWS:
        prompt = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
        ends = [tokenizer(f" {text}")["input_ids"] for text in row["choices"]]
        items = [Continuations((*prompt, *end[:-1]), len(prompt), (end[-1],)) for end in ends]
        values = [value for (value,) in score(model, items)]
        expected += values.index(max(values)) == row["answer"]
    assert results["ist_test_choices"] == Accuracy(expected, 3)
    assert results["ist_test_text"].to_dict()["perplexity,none"] > 1
    assert any((tmp_path / "cache").iterdir())  # and nothing in the user's cache
    lines = (tmp_path / "answers" / "ist_test_choices.jsonl").read_text().splitlines()
    assert [json.loads(line)["doc"]["question"] for line in lines] == [row["question"] for row in ROWS]
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: 1 / 0)  # nothing is computed again
    assert evaluate(model, tokenizer, ["ist_test_choices", "ist_test_text"], "lm-eval", **options) == results


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the harness and of what it imports
def test_no_text_behind_the_tokenizers_end_is_marked(
    loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the model ends answers with another token, rows of a batch would run on until all have ended."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    model, tokenizer = loaded
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(model, "generation_config", GenerationConfig(eos_token_id=len(tokenizer) - 1))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    rest = 'doc_to_target: "{{choices[answer]}}"\ngeneration_kwargs: {until: [], max_gen_toks: 12}'
    values = {"name": "said", "data": tmp_path / "rows.jsonl", "kind": "generate_until", "rest": rest}
    (tmp_path / "said.yaml").write_text(TASK.format(metric="exact_match", aggregation="mean", **values))
    options: dict[str, Any] = {"task_folder": str(tmp_path), "batch_size": 3}

    def answers(folder: Path) -> list[str]:
        evaluate(model, tokenizer, ["ist_test_said"], "lm-eval", folder=folder, **options)
        lines = (folder / "answers" / "ist_test_said.jsonl").read_text().splitlines()
        return [json.loads(line)["resps"][0][0] for line in lines]

    generate = model.generate

    def ending_once(**given: Any) -> Any:
        """The second token of the first answer is the end, as of a model that has learned it."""
        length = given["input_ids"].shape[1]

        def second(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if ids.shape[1] == length + 1:
                scores = scores.clone()
                scores[0, tokenizer.eos_token_id] = 1e9
            return scores

        return generate(**given, logits_processor=[second])

    before = answers(tmp_path / "before")
    monkeypatch.setattr(model, "generate", ending_once)
    after = answers(tmp_path / "after")
    changed = [(long, short) for long, short in zip(before, after, strict=True) if long != short]
    assert [(len(short), long.startswith(short)) for long, short in changed] == [(1, True)]
    assert model.generation_config.eos_token_id == len(tokenizer) - 1


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["riddles"], "riddles is no task of lm-evaluation-harness: `lm-eval ls tasks` lists them"),
        (["arc_easy", "riddles"], "^riddles is no task"),
        ([], "^Nothing is no task"),
    ],
)
def test_an_unknown_task_is_refused(names: list[str], said: str) -> None:
    check_known(["arc_easy"], ["arc_easy", "piqa"])
    with pytest.raises(ValueError, match=said):
        check_known(names, ["arc_easy", "piqa"])


def test_without_the_package_its_name_is_said(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(ValueError, match=r"needs lm-evaluation-harness .*pip install 'ist-peft\[eval\] @ git"):
        evaluate(*loaded, ["arc_easy"], "lm-eval")


STRICT = {"filter": "strict", "exact_match": 1.0}
LOOSE = {"filter": "loose", "exact_match": 0.0}


@pytest.mark.parametrize(
    ("values", "samples", "result"),
    [
        ({"acc,none": 0.5}, [{"acc": 1.0, "filter": "none"}, {"acc": 0.0, "filter": "none"}], Accuracy(1, 2)),
        ({"exact_match,strict": 1.0}, [STRICT, LOOSE, STRICT, LOOSE], Accuracy(2, 2)),
        ({"alias": "x", "acc,none": 0.3, "acc_stderr,none": "N/A"}, [], Metrics({"acc,none": 0.3})),
        ({"acc,none": 0.5}, [{"acc": 0.5, "filter": "none"}], Metrics({"acc,none": 0.5})),
    ],
)
def test_what_the_harness_found(values: dict[str, Any], samples: list[dict[str, Any]], result: Any) -> None:
    assert harness_result(values, samples) == result
