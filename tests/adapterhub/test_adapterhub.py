"""Adapters of AdapterHub's `adapters` under IST, in an environment of their own: `make test-adapterhub`."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

adapters = pytest.importorskip("adapters", reason="it pins transformers 4: make test-adapterhub has it")

from adapters.composition import Parallel
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from adapters import (
    AdapterModelInterface,
    AdapterTrainer,
    CompacterConfig,
    CompacterPlusPlusConfig,
    ConfigUnion,
    DoRAConfig,
    DoubleSeqBnConfig,
    IA3Config,
    LoRAConfig,
    LoReftConfig,
    MAMConfig,
    ParBnConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    SeqBnConfig,
    SeqBnInvConfig,
    UniPELTConfig,
)
from ist import IST, SparseTuner, discover_layers, read_history
from ist.adapters.layers import parameters_outside
from ist.adapters.responses import scaled_response
from ist.probing.suppression import suppress
from tests.helpers.tiny import snapshot, tiny_rows, traces, trainable

# adapters 1.3.0 calls T5's blocks with a name that transformers 4.57 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_value` is deprecated:FutureWarning")

BETAS = [0.0, 0.25, 0.5, 1.0]
TOLERANCE = 1e-12  # relative to the largest response; float64
TOKENS = {
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "attn_implementation": "eager",  # see the page: prefixes are lost under SDPA
}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
PAGE = Path(__file__).parents[2] / "docs" / "adapterhub.md"

MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TOKENS, **SIZES, num_key_value_heads=2)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**TOKENS, n_embd=32, n_layer=3, n_head=4, n_positions=32)),
    "bert": lambda: BertForSequenceClassification(BertConfig(**TOKENS, **SIZES, max_position_embeddings=32)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**TOKENS, **SIZES, num_key_value_heads=2, head_dim=8)),
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(
            **TOKENS,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            max_position_embeddings=32,
        )
    ),
}
# The library has no code for Qwen3: this says where its parts are, and hooks put the adapters there.
INTERFACE = AdapterModelInterface(
    adapter_methods=["bottleneck", "lora", "reft", "invertible"],
    model_embeddings="embed_tokens",
    model_layers="layers",
    layer_self_attn="self_attn",
    layer_cross_attn=None,
    attn_q_proj="q_proj",
    attn_k_proj="k_proj",
    attn_v_proj="v_proj",
    attn_o_proj="o_proj",
    layer_intermediate_proj="mlp.up_proj",
    layer_output_proj="mlp.down_proj",
    layer_pre_self_attn="input_layernorm",
    layer_pre_ffn="post_attention_layernorm",
)
PREFIX = PrefixTuningConfig(bottleneck_size=8, prefix_length=3)
BOTTLENECK = SeqBnConfig(reduction_factor=4)

METHODS: dict[str, Callable[[], Any]] = {
    "mam": lambda: MAMConfig(PREFIX, ParBnConfig(reduction_factor=4)),
    "unipelt": lambda: UniPELTConfig(PREFIX, BOTTLENECK),
    "compacter": lambda: CompacterConfig(reduction_factor=4),
    "compacter++": lambda: CompacterPlusPlusConfig(reduction_factor=4),
    "seq_bn": lambda: BOTTLENECK,
    "seq_bn_inv": lambda: SeqBnInvConfig(reduction_factor=4),
    "double_seq_bn": lambda: DoubleSeqBnConfig(reduction_factor=4),
    "par_bn": lambda: ParBnConfig(reduction_factor=4),
    "lora": lambda: LoRAConfig(r=4, intermediate_lora=True, output_lora=True),
    "lora and bottlenecks": lambda: ConfigUnion(METHODS["lora"](), METHODS["double_seq_bn"]()),
    "dora": lambda: DoRAConfig(r=4),
    "ia3": IA3Config,
    "loreft": lambda: LoReftConfig(suffix_positions=1, dropout=0.0),
}
PREFIXED = ("mam", "unipelt")
SHIFTED = [("t5", method) for method in PREFIXED]
CASES = [
    (model, method)
    for model in MODELS
    for method in METHODS
    if (model, method) not in SHIFTED
    if model != "bart" or method in PREFIXED
    if model != "qwen3" or method in ("lora", "seq_bn_inv", "double_seq_bn", "lora and bottlenecks")
    if (model, method) != ("gpt2", "dora")  # the library has no DoRA on fused projections
]
EXAMPLES = [case for case in CASES if case[0] == "llama"] + [("bert", "unipelt"), ("t5", "lora"), ("bart", "mam")]

# The adapter modules of a layer of a Llama.
ADAPTERS = {
    "mam": {"self_attn", "output_adapters"},
    "unipelt": {"self_attn", "output_adapters"},
    "compacter": {"attention_adapters", "output_adapters"},
    "compacter++": {"output_adapters"},
    "seq_bn": {"output_adapters"},
    "seq_bn_inv": {"output_adapters"},
    "double_seq_bn": {"attention_adapters", "output_adapters"},
    "par_bn": {"output_adapters"},
    "lora": {"self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"},
    "lora and bottlenecks": {
        "self_attn.q_proj",
        "self_attn.v_proj",
        "attention_adapters",
        "mlp.up_proj",
        "mlp.down_proj",
        "output_adapters",
    },
    "dora": {"self_attn.q_proj", "self_attn.v_proj"},
    "ia3": {"self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"},
    "loreft": {"reft_layer"},
}

# A part of the names of what all layers share.
SHARED = {
    "mam": "pool.",
    "unipelt": "pool.",
    "compacter": "phm_rule",
    "compacter++": "phm_rule",
    "seq_bn_inv": "invertible_adapters",
}


def make(model: str, method: str | None = None, config: Any = None) -> Any:
    """A tiny random model with a trained-looking adapter `a`, in training."""
    torch.manual_seed(0)
    made = MODELS[model]()
    adapters.init(made, interface=INTERFACE if model == "qwen3" else None)
    if method is not None or config is not None:
        made.add_adapter("a", config=config or METHODS[method]())
        made.train_adapter("a")
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if parameter.requires_grad and "parametrizations" not in name:
                    parameter.normal_(std=0.3)
    return made


def make_batch(model: str) -> dict[str, Tensor]:
    """Two sequences, one of them padded."""
    ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1]) if model == "bert" else ids}


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def hub_traces(model: nn.Module) -> dict[str, Any]:
    """What a visitor could leave behind, with the attributes that this library sets while it measures."""
    own = {name: set(vars(module)) & {"forward", "get_active_setup"} for name, module in model.named_modules()}
    return {**traces(model), "own": own, "active": str(model.active_adapters)}


def run_and_record(model: nn.Module, module: nn.Module, batch: dict[str, Tensor]) -> tuple[Any, Any, Tensor]:
    """Positional and keyword arguments of a module in the model's forward, and its output."""
    calls: list[Any] = []
    handle = module.register_forward_hook(
        lambda _, args, kwargs, output: calls.append((args, kwargs, first(output))),
        with_kwargs=True,
        prepend=True,  # the library's hooks are other adapters
    )
    with handle:
        model(**batch)
    (call,) = calls
    return call


@pytest.mark.parametrize("method", METHODS)
def test_the_adapters_of_a_layer_are_found(method: str) -> None:
    layers = discover_layers(make("llama", method))
    assert [layer.name for layer in layers] == [f"model.layers.{i}" for i in range(3)]
    for layer in layers:
        assert {name.removeprefix(f"{layer.name}.") for name in layer.adapters} == ADAPTERS[method]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_every_parameter_is_a_layers_own_or_shared(name: str, method: str) -> None:
    model = make(name, method)
    layers = discover_layers(model)
    assert len(layers) == (4 if name in ("t5", "bart") else 3)
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    owned = [id(parameter) for layer in layers for parameter in layer.parameters]
    outside = parameters_outside(model, layers)
    assert len(owned) == len(set(owned))
    assert {*owned, *map(id, outside.values())} == set(map(id, trainable(model)))
    for layer in layers:
        assert layer.parameters
        assert all(names[id(parameter)].startswith(f"{layer.name}.") for parameter in layer.parameters)
    shared = SHARED.get(method)
    heads = [key for key in outside if "classifier" in key]
    rest = [key for key in outside if key not in heads]
    assert bool(heads) == (name == "bert")
    assert bool(rest) == bool(shared)
    assert all(shared in key for key in rest)


@pytest.mark.parametrize(("name", "method"), CASES)
@torch.no_grad()
def test_the_response_is_scaled_by_beta(name: str, method: str) -> None:
    model = make(name, method).double().eval()
    model.config.use_cache = False
    batch = make_batch(name)
    before = hub_traces(model)
    for layer in discover_layers(model):
        for adapter in layer.adapters.values():
            args, kwargs, full = run_and_record(model, adapter, batch)
            model.set_active_adapters(None)
            base = first(adapter.forward(*args, **kwargs))
            model.set_active_adapters("a")
            response = full - base
            assert response.abs().max() > 1e-6
            for beta in BETAS:
                with scaled_response(adapter, beta):
                    suppressed = run_and_record(model, adapter, batch)[2]
                assert (suppressed - base - beta * response).abs().max() < TOLERANCE * response.abs().max(), beta
    assert hub_traces(model) == before


@pytest.mark.parametrize(("name", "method"), CASES)
@torch.no_grad()
def test_suppressing_to_nothing_is_leaving_the_layers_out(name: str, method: str) -> None:
    """With beta = 0 a model computes what the library computes where it skips adapters in these layers."""
    model = make(name, method).double().eval()
    batch = make_batch(name)
    layers = discover_layers(model)
    whole = model(**batch).logits
    for kept in (set(), {0}, {1, len(layers) - 1}):
        model.set_active_adapters("a", skip_layers=[layer.index for layer in layers if layer.index not in kept])
        expected = model(**batch).logits
        model.set_active_adapters("a")
        with suppress(layers, kept, 0.0):
            suppressed = model(**batch).logits
        assert (suppressed - expected).abs().max() < 1e-12
        assert (suppressed - whole).abs().max() > 1e-6
    assert torch.equal(model(**batch).logits, whole)


@pytest.mark.parametrize(("name", "method"), EXAMPLES)
def test_frozen_layers_do_not_move(name: str, method: str) -> None:
    model = make(name, method)
    batch = make_batch(name)
    before = hub_traces(model)
    tuner = SparseTuner(model, num_active_layers=1, update_interval=4, probe_batches=[batch])
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.1)
    outside = parameters_outside(model, tuner.layers)
    chosen = set()
    for _ in range(10):
        start = snapshot(model)
        (active,) = tuner.begin_step()
        chosen.add(active)
        model(**batch).loss.backward()
        for layer in tuner.layers:
            assert all((p.grad is not None) == (layer.index == active) for p in layer.parameters)
        optimizer.step()
        optimizer.zero_grad()
        tuner.end_step(optimizer)
        moved = {id(p) for key, p in model.named_parameters() if not torch.equal(p, start[key])}
        assert moved == {id(p) for p in (*tuner.layers[active].parameters, *outside.values())}
    assert len(chosen) > 1
    assert tuner.last_update is not None
    assert len(set(tuner.last_update.losses)) > 1
    tuner.close()
    assert hub_traces(model) == before


@pytest.mark.parametrize(("name", "method"), EXAMPLES)
def test_what_is_saved_loads_to_the_bit(name: str, method: str, tmp_path: Path) -> None:
    model = make(name, method)
    batch = make_batch(name)
    with SparseTuner(model, num_active_layers=1, update_interval=2, probe_batches=[batch]) as tuner:
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        for _ in range(3):
            tuner.begin_step()
            model(**batch).loss.backward()
            model.save_adapter(str(tmp_path), "a")  # in the middle of a step: no trace of the frozen layers
            optimizer.step()
            optimizer.zero_grad()
            tuner.end_step(optimizer)
        model.save_adapter(str(tmp_path), "a")
    fresh = make(name)
    fresh.load_adapter(str(tmp_path), set_active=True)
    assert set(fresh.state_dict()) == set(model.state_dict())
    heads = {key: value for key, value in model.state_dict().items() if "classifier" in key}
    fresh.load_state_dict(heads, strict=False)
    for key, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value), key
    with torch.no_grad():
        assert torch.equal(fresh.eval()(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.parametrize("method", ["mam", "unipelt", "compacter"])
def test_recomputed_activations_give_the_same_gradients(method: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = make("llama", method)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with SparseTuner(model, num_active_layers=1) as tuner:
            tuner.begin_step()
            model(**make_batch("llama")).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


@torch.no_grad()
def test_a_cache_is_lengthened_once() -> None:
    model = make("bart", "mam").eval()
    batch = {key: value for key, value in make_batch("bart").items() if key != "labels"}
    lengths = [model(**batch).past_key_values.get_seq_length()]
    with suppress(discover_layers(model), (), 0.5):
        lengths.append(model(**batch).past_key_values.get_seq_length())
    assert lengths == [7, 7]


@torch.no_grad()
def test_an_exception_leaves_no_trace() -> None:
    model = make("llama", "unipelt")
    before = hub_traces(model)
    with pytest.raises(IndexError), suppress(discover_layers(model), (), 0.5):
        model(input_ids=torch.tensor([[64]]))
    assert hub_traces(model) == before


@torch.no_grad()
def test_a_forward_of_the_modules_own_comes_back() -> None:
    model = make("llama", "seq_bn")
    adapter = next(iter(discover_layers(model)[0].adapters.values()))
    adapter.forward = forward = adapter.forward
    with scaled_response(adapter, 0.5):
        assert adapter.forward is not forward
    assert adapter.forward is forward


def test_prefixes_of_a_single_layer_are_no_layers_own() -> None:
    """Prefixes are made before the first layer runs, so no layer's forward could freeze them."""
    prefix = PrefixTuningConfig(bottleneck_size=8, prefix_length=3, leave_out=[1, 2])
    model = make("llama", config=MAMConfig(prefix, ParBnConfig(reduction_factor=4)))
    layers = discover_layers(model)
    assert [len(layer.adapters) for layer in layers] == [2, 1, 1]
    assert len({len(layer.parameters) for layer in layers}) == 1
    assert all("pool." in name for name in parameters_outside(model, layers))


def unfinished() -> Any:
    model = make("llama")
    model.add_adapter("a", config="seq_bn")
    return model


def frozen() -> Any:
    model = make("llama", "seq_bn")
    model.freeze_model(True)
    return model


def merged() -> Any:
    model = make("llama", "lora")
    model.merge_adapter("a")
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: make("llama"), "LlamaForCausalLM has no adapters"),
        (unfinished, r"No active adapter requires a gradient: call model.train_adapter\(name\)"),
        (frozen, r"No active adapter requires a gradient: call model.train_adapter\(name\)"),
        (merged, r"merged into its base weights.*call model.reset_adapter\(\)"),
        (lambda: make("llama", config=PREFIX), "Prompt or prefix tuning alone adds no response.*MAMConfig"),
        (lambda: make("llama", config=PREFIX.replace(use_gating=True)), "Prompt or prefix tuning alone"),
        (lambda: make("bert", config=PromptTuningConfig()), "Prompt or prefix tuning alone"),
        *[(lambda case=case: make(*case), "relative positions, which prefixes shift.*ParBnConfig") for case in SHIFTED],
        (lambda: make("llama", config=SeqBnConfig(leave_out=[0, 1])), "Only one layer of model.layers"),
    ],
)
def test_what_cannot_be_right_is_refused(build: Callable[[], Any], message: str) -> None:
    model = build()
    before = hub_traces(model)
    with pytest.raises(ValueError, match=message) as error:
        SparseTuner(model)
    assert "\n" not in str(error.value)
    assert hub_traces(model) == before


@torch.no_grad()
def test_adapters_side_by_side_are_refused() -> None:
    model = make("llama", "seq_bn")
    model.add_adapter("b", config=METHODS["seq_bn"]())
    model.active_adapters = Parallel("a", "b")
    layers = discover_layers(model)
    with suppress(layers, (), 0.5), pytest.raises(ValueError, match="rather than adapters in Parallel"):
        model(**make_batch("llama"))


@pytest.mark.parametrize(
    ("trainer_class", "method"),
    [(AdapterTrainer, "mam"), (AdapterTrainer, "unipelt"), (AdapterTrainer, "compacter"), (Trainer, "mam")],
)
def test_trainers_take_the_callback(
    trainer_class: type[Trainer], method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def train(folder: str, resume: str | None = None) -> Any:
        model = make("llama", method)
        args = TrainingArguments(
            output_dir=str(tmp_path / folder),
            max_steps=8,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            save_steps=4,
            logging_steps=4,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        callback = IST(num_active_layers=1, update_interval=2)
        trainer = trainer_class(model=model, args=args, train_dataset=tiny_rows(), callbacks=[callback])
        trainer.train(resume_from_checkpoint=resume)
        return model

    with caplog.at_level(logging.WARNING, "ist"):
        model = train("whole")
    assert "outside of the layers' adapters train at every step" in caplog.text
    history = read_history(tmp_path / "whole")
    assert [len(row["active"]) for row in history if row["event"] == "step"] == [1] * 8
    assert len([row for row in history if row["event"] == "importance"]) == 4
    results = [train("resumed", str(tmp_path / "whole" / "checkpoint-4"))]
    if trainer_class is AdapterTrainer:  # the other one saves the whole model
        results.append(make("llama"))
        results[1].load_adapter(str(tmp_path / "whole" / "checkpoint-8" / "a"))
    for key, value in model.state_dict().items():
        assert all(torch.equal(result.state_dict()[key], value) for result in results), key


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    torch.manual_seed(0)
    names: dict[str, Any] = {
        "adapters": adapters,
        "MAMConfig": MAMConfig,
        "SparseTuner": SparseTuner,
        "AdamW": torch.optim.AdamW,
        "model": MODELS["llama"](),
        "loader": [make_batch("llama")] * 12,
    }
    exec(code, names)  # noqa: S102
    model = names["model"]
    tuner: Any = names["tuner"]
    assert tuner.num_steps == 12
    assert tuner.last_update is not None
    fresh = make("llama")
    fresh.load_adapter("folder", set_active=True)
    assert all(torch.equal(fresh.state_dict()[key], value) for key, value in model.state_dict().items())
