"""Every kind of adapter that PEFT and this library have, and what is measured of each: tests and the docs' table.

A row is a PEFT tuner type, a variant of one that works in another way, or a bottleneck adapter of this library. Each is
put on a tiny Llama in float64, with random values as after a training.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from peft import PeftModel, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from ist.adapters.layers import Layer, discover_layers
from ist.adapters.responses import has_exact_factor, scaled_response
from ist.bottleneck import BottleneckConfig
from ist.tuner import SparseTuner
from tests.helpers.models import randomise

NUM_LAYERS = 4
VOCABULARY = 32
BETAS = (0.0, 0.25, 0.5, 1.0)
TARGETS = ("q_proj", "up_proj")


@dataclass(frozen=True)
class Method:
    """How to put one kind of adapter on a model, and what is particular about it."""

    config: Callable[[nn.Module], Any]
    """The model to be adapted -> the adapter's configuration."""
    factor: bool = False
    """Whether one factor scales the response."""
    changes_base: bool = False
    """Whether it takes the start of the adapter off the wrapped weights, so that its base is not the model's."""
    shared: bool = False
    """Whether something beside the layers trains, at every step: what layers share, or an embedding's rows."""
    begins_in: torch.dtype = torch.float32
    """The model's precision when the adapter is put on it; everything is measured in float64."""
    needs: str | None = None
    """A package that it needs."""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """What the model takes beside the batch."""
    prepare: Callable[[PeftModel], None] | None = None
    """What is left to do once the adapter is on the model."""
    optimizer: Callable[[PeftModel], torch.optim.Optimizer] | None = None
    """The method's own optimizer."""


@dataclass(frozen=True)
class Refusal:
    """A kind of adapter that is refused, and a part of the reason."""

    config: Callable[[nn.Module], Any]
    reason: str


def method(name: str, *, of: Mapping[str, Any] | None = None, **options: Any) -> Method:
    """A method by the name of its configuration in peft, on two modules of each layer."""
    settings = {"target_modules": list(TARGETS), **(of or {})}
    return Method(lambda _: getattr(peft, name)(**settings), **options)


def refusal(name: str, reason: str, **settings: Any) -> Refusal:
    return Refusal(lambda _: getattr(peft, name)(**settings), reason)


def lora(**settings: Any) -> Mapping[str, Any]:
    return {"r": 2, "lora_alpha": 3, **settings}


def initialise_eva(model: PeftModel) -> None:
    peft.initialize_lora_eva_weights(model, [make_batch(seed) for seed in range(8)], show_progress_bar=False)


def lora_fa(model: PeftModel) -> torch.optim.Optimizer:
    """Its gradient of B is corrected by A, which stays as it was drawn."""
    return create_lorafa_optimizer(model=model, r=2, lora_alpha=3, lr=1e-2, weight_decay=0.1)


# By the name of the member of `peft.PeftType`.
TUNERS: dict[str, Method | Refusal] = {
    "LORA": method("LoraConfig", of=lora(), factor=True),
    "ADALORA": method("AdaLoraConfig", of={"init_r": 3, "target_r": 2, "tinit": 50, "total_step": 100}, factor=True),
    "ADAMSS": method("AdamssConfig", of={"r": 4, "num_subspaces": 2}, begins_in=torch.float64, needs="sklearn"),
    "BOFT": method("BOFTConfig", of={"boft_block_size": 4}),
    "IA3": method("IA3Config", of={"feedforward_modules": ["up_proj"]}),
    "BEFT": method("BeftConfig"),
    "LILY": method("LilyConfig", of={"r": 2}, factor=True, shared=True),
    "LOHA": method("LoHaConfig", of={"r": 2}, factor=True),
    "LOKR": method("LoKrConfig", of={"r": 2}, factor=True),
    "OFT": method("OFTConfig", of={"oft_block_size": 8}),
    "POLY": method(
        "PolyConfig",
        of={"r": 2, "n_tasks": 2, "n_skills": 2, "task_type": "CAUSAL_LM"},
        inputs={"task_ids": torch.tensor([0, 1, 0, 1])},
    ),
    "LN_TUNING": method("LNTuningConfig", of={"target_modules": ["input_layernorm"]}),
    "VERA": method("VeraConfig", of={"r": 4}),
    "FROD": method("FrodConfig"),
    "PVERA": method("PveraConfig", of={"r": 4}),
    "FOURIERFT": method("FourierFTConfig", of={"n_frequency": 20}, factor=True),
    "GLORA": method("GloraConfig"),
    "HRA": method("HRAConfig", of={"r": 4}),
    "VBLORA": method("VBLoRAConfig", of={"r": 2, "num_vectors": 8, "vector_length": 8}, shared=True),
    "MISS": method("MissConfig", of={"r": 4}),
    "RANDLORA": method("RandLoraConfig", of={"r": 4}, factor=True),
    "ROAD": method("RoadConfig", of={"group_size": 16}),
    "HIRA": method("HiraConfig", of={"r": 2}),
    "SHIRA": method("ShiraConfig", of={"r": 2}, factor=True),
    "C3A": method("C3AConfig", of={"block_size": 16}),
    "WAVEFT": method("WaveFTConfig", of={"n_frequency": 20}, factor=True),
    "OSF": method("OSFConfig"),
    "DELORA": method("DeloraConfig", of={"r": 4}),
    "GRALORA": method("GraloraConfig", of={"r": 4, "gralora_k": 2}, factor=True),
    "PSOFT": method("PsoftConfig", of={"r": 4}, factor=True),
    "PEANUT": method("PeanutConfig", of={"r": 4}, factor=True),
    "SUPERTUNING": method("SupertuningConfig"),
    "DEFT": method("DeftConfig", of={"r": 4}),
    "PROMPT_TUNING": refusal("PromptTuningConfig", "prompt-learning", num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "MULTITASK_PROMPT_TUNING": refusal(
        "MultitaskPromptTuningConfig", "prompt-learning", num_virtual_tokens=2, num_tasks=2, task_type="CAUSAL_LM"
    ),
    "P_TUNING": refusal(
        "PromptEncoderConfig",
        "prompt-learning",
        num_virtual_tokens=2,
        encoder_hidden_size=8,
        task_type="CAUSAL_LM",
    ),
    "PREFIX_TUNING": refusal("PrefixTuningConfig", "prompt-learning", num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "CPT": refusal("CPTConfig", "prompt-learning", task_type="CAUSAL_LM"),
    "CARTRIDGE": refusal("CartridgeConfig", "prompt-learning", num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "ADAPTION_PROMPT": refusal(
        "AdaptionPromptConfig", "gated prompts", adapter_len=2, adapter_layers=2, task_type="CAUSAL_LM"
    ),
    "XLORA": Refusal(lambda model: x_lora(model), "gate"),
    "UNILORA": refusal("UniLoraConfig", "one bank", target_modules=list(TARGETS)),
    "TINYLORA": refusal("TinyLoraConfig", "one bank", target_modules=list(TARGETS)),
    "TRAINABLE_TOKENS": refusal(
        "TrainableTokensConfig", "embedding", token_indices=[1, 2], target_modules=["embed_tokens"]
    ),
    "SHADOW": refusal("ShadowConfig", "second hidden state", task_type="CAUSAL_LM"),
}

# What works in another way than its tuner's plain form.
VARIANTS: dict[str, Method] = {
    "rsLoRA": method("LoraConfig", of=lora(use_rslora=True), factor=True),
    "DoRA": method("LoraConfig", of=lora(use_dora=True)),
    "PiSSA": method("LoraConfig", of=lora(init_lora_weights="pissa"), factor=True, changes_base=True),
    "OLoRA": method("LoraConfig", of=lora(init_lora_weights="olora"), factor=True, changes_base=True),
    "EVA": method(
        "LoraConfig",
        of=lora(init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0)),
        factor=True,
        prepare=initialise_eva,
    ),
    "LoRA with biases": method("LoraConfig", of=lora(lora_bias=True), factor=True),
    "LoRA and trainable tokens": method(
        "LoraConfig", of=lora(trainable_token_indices=list(range(16))), factor=True, shared=True
    ),
    "LoRA-FA": method("LoraConfig", of=lora(), factor=True, optimizer=lora_fa),
    "LoKr, decomposed (KronA)": method("LoKrConfig", of={"r": 2, "decompose_both": True}, factor=True),
    "Super-Tuning with LoRA": method("SupertuningConfig", of={"r": 2}),
    "GraLoRA, hybrid": method("GraloraConfig", of={"r": 4, "gralora_k": 2, "hybrid_r": 2}, factor=True),
}

BOTTLENECKS: dict[str, Method] = {
    "series adapter": Method(lambda _: BottleneckConfig(mode="series", bottleneck_size=4), factor=True),
    "parallel adapter": Method(lambda _: BottleneckConfig(mode="parallel", bottleneck_size=4), factor=True),
}

METHODS: dict[str, Method] = {
    **{name: entry for name, entry in TUNERS.items() if isinstance(entry, Method)},
    **VARIANTS,
    **BOTTLENECKS,
}
REFUSALS: dict[str, Refusal] = {name: entry for name, entry in TUNERS.items() if isinstance(entry, Refusal)}


def x_lora(model: nn.Module) -> peft.XLoraConfig:
    """It needs a saved adapter to mix."""
    folder = tempfile.mkdtemp()
    adapted = get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=list(TARGETS)))  # type: ignore[arg-type]
    adapted.save_pretrained(folder)
    return peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters={"0": folder})  # type: ignore[arg-type]


def is_available(entry: Method) -> bool:
    """Whether the package that a method needs is there."""
    return entry.needs is None or importlib.util.find_spec(entry.needs) is not None


def make_base() -> Any:
    """A tiny random Llama in float32, in which some methods insist on beginning."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=NUM_LAYERS, use_cache=False)).eval()


def make_batch(seed: int = 0, device: str = "cpu") -> dict[str, Tensor]:
    """Four random rows of 8 tokens."""
    ids = torch.randint(VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(seed)).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def adapt(entry: Method | Refusal, model: nn.Module) -> PeftModel:
    """Put an adapter on a model."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # What peft has to say about tiny models is not at issue here.
        adapted = get_peft_model(model, entry.config(model))  # type: ignore[arg-type]
        assert isinstance(adapted, PeftModel)
        if isinstance(entry, Method) and entry.prepare:
            entry.prepare(adapted)
    return adapted


def make_adapted(entry: Method, device: str = "cpu") -> PeftModel:
    """A tiny Llama with an adapter that has random values, in float64."""
    model = adapt(entry, make_base().to(entry.begins_in))
    randomise(model)
    return model.double().eval().to(device)


def record_inputs(model: PeftModel, layers: Iterable[Layer], inputs: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What each adapter module is called with in a forward pass: positional and keyword arguments by its name."""
    seen: dict[str, tuple[Any, Any]] = {}
    handles = [
        adapter.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: seen.__setitem__(name, (args, kwargs)), with_kwargs=True
        )
        for layer in layers
        for name, adapter in layer.adapters.items()
    ]
    model(**inputs)
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def forward_error(entry: Method, device: str = "cpu") -> float:
    """The largest deviation of a suppressed module's output from `base + β·(full − base)`, relative to its response.

    The base is what the module gave in the model before an adapter was there, or, where the method changes the wrapped
    weights, with the adapter switched off by peft.
    """
    untouched = make_base().double().to(device)
    model = make_adapted(entry, device)
    layers = discover_layers(model)
    given = {"task_ids": entry.inputs["task_ids"].to(device)} if "task_ids" in entry.inputs else {}
    worst = 0.0
    for name, (args, kwargs) in record_inputs(model, layers, {**make_batch(device=device), **given}).items():
        adapter = model.get_submodule(name)
        full = adapter(*args, **kwargs)
        if entry.changes_base:
            with model.disable_adapter():
                base = adapter(*args, **kwargs)
        else:
            base = untouched.get_submodule(name.removeprefix("base_model.model."))(*args)
        response = full - base
        assert response.abs().max() > 1e-4
        for beta in BETAS:
            with scaled_response(adapter, beta):
                actual = adapter(*args, **kwargs)
            deviation = (actual - (base + beta * response)).abs().max() / response.abs().max()
            worst = max(worst, deviation.item())
    return worst


def uses_factor(entry: Method) -> bool:
    """Whether all modules of a method are suppressed by their factor; the same for all."""
    layers = discover_layers(make_adapted(entry))
    ways = {has_exact_factor(adapter) for layer in layers for adapter in layer.adapters.values()}
    assert len(ways) == 1
    return ways.pop()


def moves_active_layers_only(entry: Method, weight_decay: float | None, device: str = "cpu") -> bool:
    """Whether eight steps with importance updates move the active layers, nothing frozen and nothing of the base.

    Args:
        entry: the method.
        weight_decay: of AdamW (or of the method's own optimizer); None takes plain gradient descent.
        device: where to train.
    """
    model = make_adapted(entry, device).train()
    given = {"task_ids": entry.inputs["task_ids"].to(device)} if "task_ids" in entry.inputs else {}
    batches = [{**make_batch(seed, device), **given} for seed in range(8)]
    optimizer: torch.optim.Optimizer
    if entry.optimizer:
        optimizer = entry.optimizer(model)
    else:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if weight_decay is None:
            optimizer = torch.optim.SGD(parameters, lr=1e-2)
        else:
            optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=weight_decay)
    right = True
    trained: set[int] = set()
    with SparseTuner(model, probe_batches=batches, num_active_layers=1, update_interval=2, mu=100.0) as tuner:
        owner = {id(p): layer.index for layer in tuner.layers for p in layer.parameters}
        tuner.attach_optimizer(optimizer)
        names = {name: owner.get(id(p)) for name, p in model.named_parameters()}
        for batch in batches:
            before = {name: tensor.clone() for name, tensor in everything(model).items()}
            active = tuner.begin_step()
            model(**batch).loss.backward()
            optimizer.step()
            tuner.after_optimizer_step()
            optimizer.zero_grad()
            tuner.end_step(optimizer)
            moved = {name for name, tensor in everything(model).items() if not torch.equal(tensor, before[name])}
            layers = {names[name] for name in moved if names.get(name) is not None}
            rest = {name for name in moved if names.get(name) is None}
            right = right and layers == set(active) and bool(rest) == entry.shared
            trained |= set(active)
        learned = tuner.last_update is not None and tuner.last_update.skipped is None
    return right and learned and len(trained) > 1


def everything(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@torch.no_grad()
def saves_and_loads(entry: Method) -> bool:
    """Whether an adapter that was saved and loaded by PEFT alone gives the same outputs to the bit."""
    base = make_base()
    model = adapt(entry, copy.deepcopy(base))
    randomise(model)
    model = model.eval()
    inputs = {**make_batch(), **entry.inputs}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(base, folder)
    return torch.equal(loaded.eval()(**inputs).logits, model(**inputs).logits)
