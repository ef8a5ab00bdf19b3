"""What the look of focused training costs, and how sure it is: python benchmarks/probes/focus.py NAME [--options].

The gradient probe (`ist.layer_scores`) is run once for each seed, on rows of its own. Its peak memory is compared with
that of the focused training that follows, on batches of the same size, and the scores of each two seeds by rank.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from harness import FIVE, SHAPES, Recorder, find_device, free, make_model, now, settings, token_batches  # noqa: E402
from ist import SparseTuner, layer_scores  # noqa: E402
from ist.focusing import find_focus  # noqa: E402

Batch = dict[str, Tensor]


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Rank correlation of two lists without ties: 1 for the same order, −1 for the reverse."""
    ranks = [torch.tensor(values, dtype=torch.float64).argsort().argsort().double() for values in (first, second)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def peak_bytes(device: str, run: Callable[[], Any]) -> tuple[int, Any]:
    """The most bytes of tensors during a run over those before it, and what it returns.

    On a CPU every allocation is read from PyTorch's profiler, temporary ones inside of operations too.
    """
    if device == "cuda":
        free(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = run()
        return torch.cuda.max_memory_allocated() - before, found
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        found = run()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events: list[Any] = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(held.cumsum(0).max()), found


def train_focused(base: Any, config: Any, batches: Sequence[Batch]) -> Any:
    """Put the adapters on and train a step on each batch in the library's step; returns the base model again."""
    model: Any = peft.get_peft_model(base, config).train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4)
    with SparseTuner(model, selector="all") as tuner:
        for batch in batches:
            with tuner.step(optimizer):
                model(**batch, use_cache=False).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    return model.unload()


def text_batches(options: Any, tokenizer: Any, seed: int) -> list[Batch]:
    """Batches of random training rows, labels on the answers alone.

    Args:
        options: of the command: which data, how many batches of how many rows.
        tokenizer: the model's.
        seed: which rows.
    """
    from ist.experiments.data import TASKS, read_task
    from ist.experiments.data.encoding import encode_pair
    from ist.experiments.data.word_problems import to_prompt_completion, word_problems

    if options.gsm8k is not None:
        pairs = [row.to_prompt_completion() for row in read_task(options.gsm8k, TASKS["gsm8k"], "train")]
    else:
        pairs = [to_prompt_completion(problem) for problem in word_problems(4000, seed=0)]
    rows = options.rows
    chosen = random.Random(seed).sample(pairs, options.batches * rows)
    tokens = [encode_pair(tokenizer, pair["prompt"], pair["completion"], end=True, max_length=512) for pair in chosen]
    return [collate(tokens[start : start + rows]) for start in range(0, len(tokens), rows)]


def collate(pairs: Sequence[tuple[list[int], list[int]]]) -> Batch:
    """Rows of prompts and answers in tokens as one batch, padded at the right."""
    length = max(len(prompt) + len(answer) for prompt, answer in pairs)
    rows = [(prompt + answer, [-100] * len(prompt) + answer) for prompt, answer in pairs]
    return {
        "input_ids": torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in rows]),
    }


def load(options: Any, device: str) -> tuple[Any, Callable[[int], list[Batch]]]:
    """The base model, and what gives the batches of a seed."""
    if options.model in SHAPES:
        num = options.batches
        batches = token_batches(options.seeds * num, options.rows, options.tokens, device)
        return make_model(options.model, device, options.layers), lambda seed: batches[seed * num : (seed + 1) * num]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ist.cli.quickstart_model import quickstart_model_path

    folder = str(quickstart_model_path()) if options.model == "smollm2" else options.model
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    base.to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def batches_of(seed: int) -> list[Batch]:
        given = text_batches(options, tokenizer, seed)
        return [{name: value.to(device) for name, value in batch.items()} for batch in given]

    return base, batches_of


def describe(options: Any) -> str:
    """The model and the data in a few words."""
    model = {"smollm2": "SmolLM2-135M"}.get(options.model, Path(options.model).name)
    data = "random tokens" if options.model in SHAPES else "word problems" if options.gsm8k is None else "GSM8K"
    return f"{model}, {data}"


def measure(options: Any, result: dict[str, Any]) -> None:
    """Fill a result: the scores of each seed with seconds and memory, and the memory of the training."""
    device = find_device()
    base, batches_of = load(options, device)
    given = peft.LoraConfig(r=32, lora_alpha=64, target_modules=list(FIVE), task_type="CAUSAL_LM")
    # A profiler takes time of its own, so memory is measured in a run apart.
    held, _ = peak_bytes(device, partial(layer_scores, base, given, batches_of(0)))
    scores, seconds = [], []
    for seed in range(options.seeds):
        batches = batches_of(seed)
        start = now(device)
        scores.append(layer_scores(base, given, batches, seed=seed))
        seconds.append(now(device) - start)
        print(f"seed {seed}: {seconds[-1]:.1f} s", flush=True)
    found = find_focus(base, given, scores=scores[0])
    trained, _ = peak_bytes(device, partial(train_focused, base, found.config, batches_of(0)[:2]))
    chosen = [find_focus(base, given, scores=own).layers for own in scores]
    pairs = list(combinations(range(options.seeds), 2))
    result["shape"] = options.model in SHAPES
    result["model"] = describe(options)
    result["tokens"] = sum(batch["input_ids"].numel() for batch in batches_of(0))
    result["weights_bytes"] = sum(p.numel() * p.element_size() for p in base.parameters())
    result["probe_bytes"], result["training_bytes"] = held, trained
    result["seconds"] = seconds
    result["scores"] = scores
    result["chosen"] = chosen
    result["correlations"] = [spearman(scores[i], scores[j]) for i, j in pairs]
    result["in_common"] = [len({*chosen[i]} & {*chosen[j]}) / len(chosen[i]) for i, j in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--model", default="smollm2", help=f"smollm2, a folder, or a shape: {', '.join(SHAPES)}")
    parser.add_argument("--gsm8k", type=Path, help="the folder that holds gsm8k; without it the built-in word problems")
    parser.add_argument("--layers", type=int, help="of a shape, another number of layers")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256, help="of a row of a shape")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=HERE / "results")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error(f"--seeds {options.seeds}: two seeds are compared, so give at least 2.")
    config = {**settings(options), "gsm8k": options.gsm8k is not None}
    recorder = Recorder(options.folder, options.name, config, "focus-probe")
    with recorder.finished() as result:
        measure(options, result["rows"])


if __name__ == "__main__":
    main()
