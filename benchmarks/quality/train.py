"""One training: a method on a task from the common start, timed, with its validation losses and tests."""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ist import SparseTuner, discover_layers
from ist.experiments.analysis import batch_weights, loss_increases, losses_without
from ist.experiments.evaluation.scoring import Continuations
from ist.probing.probes import DatasetProbes
from ist.runtime.modes import to_device

from .focusing import PROBE_BATCHES, WarmStart, chosen_focus, start_adapters
from .judge import collate, computing, evaluation_rows, mean_loss, test
from .plan import SPEED_WARM, WHOLE
from .tasks import Prepared

__all__ = ["train"]

ADAPTER = ("use_dora",)
"""Options of a method that are its adapter's, not the tuner's."""
NOT_TUNER = (*ADAPTER, "focus", "warm_start", "init", "own_step")
"""Options that no tuner takes: `init: gradient` starts LoRA's A from the gradient, `own_step` trains all adapters that
there are with this library's step, not PEFT's."""


def order_of_rows(num_rows: int, num: int, seed: int) -> list[int]:
    """The rows of a training in their order, epoch after epoch: it depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < num:
        order += torch.randperm(num_rows, generator=generator).tolist()
    return order[:num]


def batches_of(rows: Sequence[Continuations], training: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The batches of a training."""
    size = training["setting"]["batch_size"]
    order = order_of_rows(len(rows), training["steps"] * size, training["seed"])
    for start in range(0, len(order), size):
        yield collate([rows[index] for index in order[start : start + size]])


def train(
    training: Mapping[str, Any],
    base: Any,
    tokenizer: Any,
    task: Prepared,
    device: torch.device,
    compiled: bool = False,
) -> dict[str, Any]:
    """What a training came to.

    Args:
        training: of a plan.
        base: the model without adapters, on the CPU in float32; it is copied.
        tokenizer: the model's.
        task: in tokens.
        device: where to train.
        compiled: whether layers with adapters are compiled for the steps; what only looks at the model runs without.

    Returns:
        Seconds of the steps alone, validation losses `[step, seconds, nats a token]`, tests, memory, and what the
        method chose and learned. Of a training for the importance also that, of one for the speed nothing else.
    """
    model, focus = make_model(training, base, task, device)
    if device.type == "cuda":
        round_frozen(model)
    model.to(device)
    with computing(device):
        init = training["options"].get("init", "random")
        start_adapters(model, init, probe_batches(task, training), training["seed"])
    run = Run(training, model, task, device, compiled)
    run.focus = focus
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        result = run.go()
    finally:
        run.close()
    with uncompiled():
        if training["kind"] == "importance":
            result["importance"] = true_importance(model, task, device)
        elif training["kind"] == "training":
            result["test"] = test(model, tokenizer, task, device)
    if device.type == "cuda":
        result["device_memory_bytes"] = torch.cuda.max_memory_reserved(device)
    return result


def make_model(
    training: Mapping[str, Any], base: Any, task: Prepared | None, device: torch.device
) -> tuple[Any, dict[str, Any] | None]:
    """The model with its adapters, whose first weights depend on the seed alone; without for whole layers. And what
    was found where the method chooses layers before it trains.
    """
    model = copy.deepcopy(base)
    options, setting = training["options"], training["setting"]
    if options["selector"] in WHOLE:
        return model, None
    from peft import LoraConfig, get_peft_model

    config, found = LoraConfig(
        r=setting["rank"],
        lora_alpha=setting["alpha"],
        lora_dropout=setting["dropout"],
        target_modules=list(setting["modules"]),
        task_type="CAUSAL_LM",
        **{name: options[name] for name in ADAPTER if name in options},
    ), None  # fmt: skip
    if "focus" in options and task is not None:
        model.to(device)
        with computing(device):
            batches = [to_device(batch, device) for batch in probe_batches(task, training)]
            config, found = chosen_focus(model, config, options["focus"], batches, training["seed"])
        model.cpu()  # The first weights of adapters are drawn there, as those of all methods.
    torch.manual_seed(training["seed"])
    return get_peft_model(model, config), found


def probe_batches(task: Prepared, training: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Batches of training rows to measure importance by: not the first ones of the training."""
    other = {**training, "seed": training["seed"] + 10_000, "steps": PROBE_BATCHES}
    return [*batches_of(task.train, other)]


def round_frozen(model: Any) -> None:
    """Have frozen linear modules in the precision that `computing` rounds them to at every step anyway; not the head,
    whose weight may be the embeddings' too.
    """
    head = model.get_output_embeddings()
    for module in model.modules():
        if type(module) is torch.nn.Linear and module is not head and not module.weight.requires_grad:
            module.to(torch.bfloat16)


class Run:
    """The steps of a training and the clock that counts them alone."""

    def __init__(
        self, training: Mapping[str, Any], model: Any, task: Prepared, device: torch.device, compiled: bool = False
    ) -> None:
        self.training, self.model, self.task, self.device = training, model, task, device
        self.seconds = 0.0
        self.setting = training["setting"]
        self.compiled = compiled and training["options"]["selector"] not in WHOLE
        if self.compiled:
            compile_layers(model)
        self.tuner = make_tuner(training, model, task)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=training["learning_rate"],
            weight_decay=self.setting["weight_decay"],
            fused=device.type == "cuda",
        )
        self.choices: Counter[int] = Counter()
        self.focus: dict[str, Any] | None = None
        """What chose the layers of a method that keeps some."""
        warm = training["options"].get("warm_start")
        self.warm_start = None if warm is None else WarmStart(warm, training["steps"])

    def go(self) -> dict[str, Any]:
        """All steps."""
        training, speed = self.training, self.training["kind"] == "speed"
        torch.manual_seed(training["seed"])  # dropout
        points = set() if speed else evaluation_steps(training["steps"], self.setting["points"])
        curve = [] if speed or not self.setting["points"] else [[0, 0.0, self.validate()]]
        self.model.train()
        mark = self.now()
        for step, batch in enumerate(batches_of(self.task.train, training), start=1):
            self.step(step, to_device(batch, self.device))
            if speed and step == SPEED_WARM:
                mark = self.now()
            if step in points:
                self.seconds += self.now() - mark
                curve.append([step, round(self.seconds, 3), self.validate()])
                mark = self.now()
        if speed:
            self.seconds = self.now() - mark
            return {"step_seconds": self.seconds / (training["steps"] - SPEED_WARM), **self.learned()}
        return {"train_seconds": round(self.seconds, 3), "curve": curve, **self.learned()}

    def step(self, step: int, batch: Mapping[str, Any]) -> None:
        """One optimizer step with what the method measures after it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.training["learning_rate"] * schedule(
                step, self.training["steps"], self.setting["warmup"]
            )
        if self.tuner:
            self.choices.update(self.tuner.begin_step())
        with computing(self.device):
            loss = self.model(**batch, use_cache=False).loss
        loss.backward()
        if self.setting["clip"]:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.setting["clip"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.tuner:
            with computing(self.device), uncompiled():
                self.tuner.end_step(self.optimizer)
        if self.warm_start and step == self.warm_start.last_step:
            batches = [to_device(batch, self.device) for batch in probe_batches(self.task, self.training)]
            with computing(self.device):
                chosen = self.warm_start.narrow(self.model, batches, self.training["seed"])
            self.focus = {**chosen, "first": self.focus["layers"]} if self.focus else chosen

    def validate(self) -> float | None:
        """Nats a token on the validation rows; None where that is no number."""
        with uncompiled():
            loss = mean_loss(self.model, self.task.validation, self.device).loss
        return loss if math.isfinite(loss) else None

    def learned(self) -> dict[str, Any]:
        """Memory, how often each layer was trained, and the last scores."""
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        result: dict[str, Any] = {"peak_memory_bytes": peak}
        result["compiled"] = self.compiled
        result["trainable"] = sum(parameter.numel() for parameter in self.parameters)
        if self.focus:
            result["focus"] = self.focus
        if self.tuner and not self.training["options"].get("own_step"):
            result["choices"] = [self.choices[index] for index in range(len(self.tuner.layers))]
            result["probe_seconds"] = round(self.tuner.probe_seconds, 3)
            update = self.tuner.last_update
            result["scores"] = update and [round(score, 4) for score in update.importance]
        return result

    def now(self) -> float:
        """Seconds, when everything that was begun is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def close(self) -> None:
        """Leave the model as PEFT made it, and let the moments go."""
        if self.tuner:
            self.tuner.close()
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()


def compile_layers(model: Any) -> None:
    """Each layer by itself: all share a graph of each kind, also with those of the next model of this process."""
    for layer in discover_layers(model):
        layer.module.compile(dynamic=True)


def uncompiled() -> Any:
    """A context in which compiled layers run as they are written: graphs for looking at a model would not pay."""
    return torch.compiler.set_stance("force_eager")


def make_tuner(training: Mapping[str, Any], model: Any, task: Prepared) -> SparseTuner | None:
    """The method's tuner, with probe batches from an own stream over the training rows; None for PEFT alone."""
    options = {name: value for name, value in training["options"].items() if name not in NOT_TUNER}
    selector = options.pop("selector")
    if selector == "all":
        return SparseTuner(model, selector="all") if training["options"].get("own_step") else None
    tuner_options = {"seed": training["seed"], **options}
    size = options.get("probe_batch_size") or (16 if options.get("preset") == "authors" else None)
    probes = DatasetProbes(task.train, size or training["setting"]["batch_size"], collate, training["seed"])
    return SparseTuner(model, probe_batches=probes, selector=selector, **tuner_options)


def evaluation_steps(steps: int, points: int) -> set[int]:
    """Steps after which the validation loss is measured, evenly spaced, the last one among them."""
    return {round(steps * point / points) for point in range(1, points + 1)} - {0} if points else {steps}


def schedule(step: int, steps: int, warmup: float) -> float:
    """The factor on the learning rate: up over the first part of the steps, then down in a line to 0."""
    warm = max(1, round(warmup * steps))
    return step / warm if step <= warm else (steps - step + 1) / max(1, steps - warm)


def true_importance(model: Any, task: Prepared, device: torch.device) -> list[float]:
    """By how much the validation loss rises without each layer's response."""
    layers = discover_layers(model)
    rows, size = task.validation, evaluation_rows(model)
    batches: list[dict[str, Any]] = [
        to_device(collate(rows[start : start + size]), device) for start in range(0, len(rows), size)
    ]
    removed: list[tuple[int, ...]] = [(), *((layer.index,) for layer in layers)]
    with computing(device):
        losses: Tensor = losses_without(model, layers, removed, batches)
    return loss_increases(losses, batch_weights(batches)).tolist()
