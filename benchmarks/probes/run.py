"""How the ranking of layers depends on the rows of a probe batch: python benchmarks/probes/run.py NAME [--options].

A small language model with an adapter that has been trained a little. The losses of random candidate sets are measured
row by row once; a probe batch of any size is then a choice of rows, so that thousands of importance loops can be played
through. What they learn is compared with what the rows that are held back say.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from harness import FIVE, Recorder, settings  # noqa: E402
from ist import SparseTuner  # noqa: E402
from ist.adapters.layers import discover_layers  # noqa: E402
from ist.method.importance import candidate_rewards, init_importance, update_importance  # noqa: E402
from ist.probing.suppression import suppress  # noqa: E402
from ist.runtime.modes import evaluation_mode  # noqa: E402

BETA, MU, CANDIDATES = 0.25, 100.0, 3
PROBE_ROWS = (1, 2, 4, 8, 16)


def kendall_tau(first: Tensor, second: Tensor) -> float:
    """Rank correlation of two lists: 1 for the same order, −1 for the reverse, near 0 for none."""
    signs = [(values[:, None] - values[None, :]).sign() for values in (first, second)]
    pairs = torch.ones_like(signs[0]).triu(1).bool()
    return float((signs[0] * signs[1])[pairs].mean())


def batch_losses(sums: Tensor, counts: Tensor, rows: Sequence[int]) -> Tensor:
    """The loss of each candidate set on a batch of some rows, in nats a token."""
    chosen = list(rows)
    return sums[:, chosen].sum(1) / counts[chosen].sum()


def layer_effects(losses: Tensor, members: Tensor) -> Tensor:
    """How much a layer's response lowers the loss: the mean loss of the sets without it minus that of those with it."""
    members = members.double()
    with_it = (losses @ members) / members.sum(0)
    without = (losses @ (1 - members)) / (1 - members).sum(0)
    return without - with_it


def learn(
    sums: Tensor, counts: Tensor, members: Tensor, pool: Sequence[int], size: int, updates: int, rng: Any
) -> Tensor:
    """The scores after some turns of the importance loop, each with its own probe batch of `size` rows (eq. 9, 10)."""
    state = init_importance(members.shape[1])
    for _ in range(updates):
        losses = batch_losses(sums, counts, rng.sample(list(pool), size))
        chosen = rng.sample(range(len(losses)), CANDIDATES)
        sets = [members[j].nonzero()[:, 0].tolist() for j in chosen]
        state = update_importance(state, sets, candidate_rewards(losses[chosen]), MU)
    return state.scores


def compare(
    sums: Tensor,
    counts: Tensor,
    members: Tensor,
    num_reference: int,
    sizes: Sequence[int],
    updates: Sequence[int],
    repeats: int,
) -> dict[str, Any]:
    """For each size of a probe batch: how well it orders sets and layers, and what the loop learns from it.

    Args:
        sums: loss of candidate set j on row r, summed over its tokens.
        counts: tokens of each row that have a label.
        members: whether layer l keeps its response in set j.
        num_reference: how many rows, from the first, tell the truth; batches come from the others.
        sizes: rows of a probe batch.
        updates: turns of the importance loop after which scores are compared.
        repeats: how often each is played through.
    """
    reference = batch_losses(sums, counts, range(num_reference))
    truth = layer_effects(reference, members)
    pool = range(num_reference, len(counts))
    rows = {}
    for size in sizes:
        rng = random.Random(size)
        found: dict[str, list[float]] = {}
        for _ in range(repeats):
            losses = batch_losses(sums, counts, rng.sample(pool, size))
            found.setdefault("sets", []).append(kendall_tau(losses, reference))
            found.setdefault("layers", []).append(kendall_tau(layer_effects(losses, members), truth))
            for number in updates:
                scores = learn(sums, counts, members, pool, size, number, rng)
                found.setdefault(f"learned {number}", []).append(kendall_tau(scores, truth))
        rows[str(size)] = {name: {"tau": mean(taus), "spread": stdev(taus)} for name, taus in found.items()}
    whole = batch_losses(sums, counts, pool)
    rows[str(len(pool))] = {
        "sets": {"tau": kendall_tau(whole, reference)},
        "layers": {"tau": kendall_tau(layer_effects(whole, members), truth)},
    }
    return rows


def encode(tokenizer: Any, problems: Sequence[Any], pad: int) -> list[dict[str, Tensor]]:
    """Rows of one length, with labels on the answers alone."""
    from ist.experiments.data.word_problems import to_prompt_completion

    rows = []
    for problem in problems:
        texts = to_prompt_completion(problem)
        prompt = tokenizer(texts["prompt"])["input_ids"]
        answer = [*tokenizer(texts["completion"])["input_ids"], tokenizer.eos_token_id]
        ids, labels = prompt + answer, [-100] * len(prompt) + answer
        rows.append((ids, labels))
    length = max(len(ids) for ids, _ in rows)
    return [
        {
            "input_ids": torch.tensor(ids + [pad] * (length - len(ids))),
            "attention_mask": torch.tensor([1] * len(ids) + [0] * (length - len(ids))),
            "labels": torch.tensor(labels + [-100] * (length - len(labels))),
        }
        for ids, labels in rows
    ]


def stack(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch, without columns of padding alone."""
    length = max(int(row["attention_mask"].sum()) for row in rows)
    return {name: torch.stack([row[name][:length] for row in rows]) for name in rows[0]}


def make_lora(folder: str, seed: int) -> tuple[Any, Any]:
    """The model with LoRA of rank 32, and its tokenizer."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=32, lora_alpha=64, lora_dropout=0.05, target_modules=list(FIVE), task_type="CAUSAL_LM")
    return peft.get_peft_model(base, config).train(), AutoTokenizer.from_pretrained(folder)


def train(model: Any, batches: Sequence[dict[str, Tensor]], lr: float) -> list[float]:
    """Train a quarter of the layers a step, chosen at random; returns the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    with SparseTuner(model, selector="random", probe_batches=batches) as tuner:
        for batch in batches:
            tuner.begin_step()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            tuner.end_step(optimizer)
            losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def row_losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The loss of each row, summed over its tokens; logits are made where there is a label."""
    inner = model.get_base_model()
    hidden = inner.model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).last_hidden_state
    labels = batch["labels"][:, 1:]
    rows, places = (labels != -100).nonzero(as_tuple=True)
    losses = cross_entropy(inner.lm_head(hidden[rows, places]).float(), labels[rows, places], reduction="none")
    return losses.new_zeros(len(labels)).index_add(0, rows, losses)


def measure(model: Any, batches: Sequence[dict[str, Tensor]], num_sets: int, seed: int) -> tuple[Tensor, Tensor]:
    """Losses of random sets of half of the layers on every row, and which layers each set holds."""
    layers = discover_layers(model)
    generator = torch.Generator().manual_seed(seed)
    members = torch.zeros(num_sets, len(layers), dtype=torch.bool)
    sums = []
    with evaluation_mode(model):
        for j in range(num_sets):
            chosen = torch.randperm(len(layers), generator=generator)[: len(layers) // 2].tolist()
            members[j, chosen] = True
            with suppress(layers, chosen, BETA):
                sums.append(torch.cat([row_losses(model, batch) for batch in batches]).double())
            print(f"set {j + 1} of {num_sets}", flush=True)
    return torch.stack(sums), members


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--model", help="a folder; without it the quickstart's model")
    parser.add_argument("--train-steps", type=int, default=60)
    parser.add_argument("--train-rows", type=int, default=16)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--sets", type=int, default=48)
    parser.add_argument("--rows", type=int, default=96, help="half of them tell the truth")
    parser.add_argument("--sizes", type=int, nargs="+", default=PROBE_ROWS)
    parser.add_argument("--updates", type=int, nargs="+", default=(10, 30, 100))
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--folder", type=Path, default=HERE / "results")
    options = parser.parse_args()
    recorder = Recorder(options.folder, options.name, settings(options), "probes")
    with recorder.finished() as result:
        from ist.cli.quickstart_model import quickstart_model_path
        from ist.experiments.data.word_problems import word_problems

        model, tokenizer = make_lora(options.model or str(quickstart_model_path()), seed=0)
        problems = word_problems(options.train_steps * options.train_rows + options.rows, seed=0)
        rows = encode(tokenizer, problems, tokenizer.eos_token_id)
        held, training = rows[: options.rows], rows[options.rows :]
        batches = [stack(training[i : i + options.train_rows]) for i in range(0, len(training), options.train_rows)]
        losses = train(model, batches, options.lr)
        result["train_losses"] = losses
        recorder.write()
        counts = torch.stack([(row["labels"] != -100).sum() for row in held]).double()
        probes = [stack(held[i : i + 16]) for i in range(0, len(held), 16)]
        sums, members = measure(model, probes, options.sets, seed=1)
        half = options.rows // 2
        reference = batch_losses(sums, counts, range(half))
        effects = [round(effect, 6) for effect in layer_effects(reference, members).tolist()]
        result["reference"] = {"loss": float(reference.mean()), "spread": float(reference.std()), "effects": effects}
        result["rows"] = compare(sums, counts, members, half, options.sizes, options.updates, options.repeats)
        for size, found in result["rows"].items():
            print(size, {name: round(value["tau"], 2) for name, value in found.items()}, flush=True)


if __name__ == "__main__":
    main()
