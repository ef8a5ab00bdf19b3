"""Tiny random models: one of each architecture, and toys whose arithmetic is written out by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForCTC,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoModelForZeroShotImageClassification,
)

from ist.probing.suppression import LossFunction, model_loss

VOCABULARY = 64
TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED: dict[str, Any] = {**TOKENS, **SIZES, "num_key_value_heads": 2}
VISION: dict[str, Any] = {**SIZES, "image_size": 32, "patch_size": 8}
PATCHES = 16
GPT: dict[str, Any] = {**TOKENS, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32}


@dataclass(frozen=True)
class Architecture:
    """How to make a tiny model, and what LoRA needs to know about it."""

    auto: Any
    config: Any
    attention: tuple[str, ...]
    """Names of the query and value projections, or of the fused one."""
    mlp: tuple[str, ...]
    """Names of the MLP's linear modules, without those that bear the name of another module elsewhere."""
    lora: dict[str, Any] = field(default_factory=dict)
    """Options that LoRA needs for this architecture."""
    batch: Callable[[torch.Generator], dict[str, Tensor]] | None = None
    """Two random rows, where they are neither a text with labels nor an image with its class."""
    layers: str | list[str] | None = None
    """What to give as `layers=`."""
    loss: LossFunction = model_loss
    """How the loss is computed."""


@dataclass(frozen=True)
class Diffusers:
    """A model class of diffusers, which is imported when a model is made."""

    name: str

    def from_config(self, config: dict[str, Any]) -> nn.Module:
        diffusers = pytest.importorskip("diffusers", reason="diffusion transformers need diffusers")
        return getattr(diffusers, self.name)(**config)


def random_ids(generator: torch.Generator) -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 8), generator=generator)


def random_images(generator: torch.Generator) -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=generator)


def spectrograms_and_text(generator: torch.Generator) -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, 8, 16, generator=generator), "labels": random_ids(generator)}


def waves_and_text(generator: torch.Generator) -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 800, generator=generator), "labels": random_ids(generator)}


def images_within_text(generator: torch.Generator) -> dict[str, Tensor]:
    """Places for the patches of an image, then a text, which alone has labels."""
    text = random_ids(generator).clamp(max=IMAGE_TOKEN - 1)
    ids = torch.cat([torch.full((2, PATCHES), IMAGE_TOKEN), text], dim=1)
    labels = ids.masked_fill(ids == IMAGE_TOKEN, -100)
    mask = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": random_images(generator)}


def images_and_captions(generator: torch.Generator) -> dict[str, Tensor]:
    return {"input_ids": random_ids(generator), "pixel_values": random_images(generator)}


def noisy_images(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "hidden_states": torch.randn(2, 2, 8, 8, generator=generator),
        "timestep": torch.tensor([3, 5]),
        "class_labels": torch.tensor([1, 2]),
        "target": torch.randn(2, 2, 8, 8, generator=generator),
    }


def noisy_images_and_text(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "hidden_states": torch.randn(2, 16, 4, generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, 16, generator=generator),
        "pooled_projections": torch.randn(2, 16, generator=generator),
        "timestep": torch.tensor([0.3, 0.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(5, 3),
        "target": torch.randn(2, 16, 4, generator=generator),
    }


def contrastive_loss(model: nn.Module, batch: Any) -> Tensor:
    """CLIP computes its loss when asked to."""
    return model(**batch, return_loss=True).loss


def denoising_loss(model: nn.Module, batch: Any) -> Tensor:
    """A diffusion model returns a sample; the training loop compares it with the batch's `target`."""
    inputs = {name: value for name, value in batch.items() if name != "target"}
    return functional.mse_loss(model(**inputs).sample, batch["target"])


IMAGE_TOKEN = VOCABULARY - 1
LLAMA_MLP = ("gate_proj", "up_proj", "down_proj")
EXPERTS: dict[str, Any] = {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

# One stack, or an encoder's and a decoder's, and a loss that the model computes.
ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture(
        AutoModelForCausalLM, transformers.GPT2Config(**GPT), ("c_attn",), ("c_fc",), {"fan_in_fan_out": True}
    ),
    "opt": Architecture(
        AutoModelForCausalLM,
        transformers.OPTConfig(**TOKENS, **SIZES, ffn_dim=48, max_position_embeddings=32, word_embed_proj_dim=32),
        ("q_proj", "v_proj"),
        ("fc1", "fc2"),
    ),
    "gptj": Architecture(
        AutoModelForCausalLM,
        transformers.GPTJConfig(**GPT, rotary_dim=4),
        ("q_proj", "v_proj"),
        ("fc_in", "fc_out"),
    ),
    "bloom": Architecture(
        AutoModelForCausalLM,
        transformers.BloomConfig(**TOKENS, hidden_size=32, n_layer=3, n_head=4),
        ("query_key_value",),
        ("dense_h_to_4h", "dense_4h_to_h"),
    ),
    "llama": Architecture(
        AutoModelForCausalLM, transformers.LlamaConfig(**GROUPED, attention_bias=True), ("q_proj", "v_proj"), LLAMA_MLP
    ),
    "mistral": Architecture(
        AutoModelForCausalLM, transformers.MistralConfig(**GROUPED), ("q_proj", "v_proj"), LLAMA_MLP
    ),
    "qwen2": Architecture(AutoModelForCausalLM, transformers.Qwen2Config(**GROUPED), ("q_proj", "v_proj"), LLAMA_MLP),
    "qwen3": Architecture(
        AutoModelForCausalLM, transformers.Qwen3Config(**GROUPED, head_dim=8), ("q_proj", "v_proj"), LLAMA_MLP
    ),
    "gemma": Architecture(
        AutoModelForCausalLM, transformers.GemmaConfig(**GROUPED, head_dim=8), ("q_proj", "v_proj"), LLAMA_MLP
    ),
    "phi": Architecture(
        AutoModelForCausalLM, transformers.PhiConfig(**TOKENS, **SIZES), ("q_proj", "v_proj"), ("fc1", "fc2")
    ),
    "gpt-neox": Architecture(
        AutoModelForCausalLM,
        transformers.GPTNeoXConfig(**TOKENS, **SIZES, max_position_embeddings=32),
        ("query_key_value",),
        ("dense_h_to_4h", "dense_4h_to_h"),
    ),
    "falcon": Architecture(
        AutoModelForCausalLM,
        transformers.FalconConfig(**TOKENS, hidden_size=32, num_hidden_layers=3, num_attention_heads=4),
        ("query_key_value",),
        ("dense_h_to_4h", "dense_4h_to_h"),
    ),
    "mixtral": Architecture(
        AutoModelForCausalLM, transformers.MixtralConfig(**GROUPED, num_local_experts=4), ("q_proj", "v_proj"), ()
    ),
    "bert": Architecture(
        AutoModelForSequenceClassification,
        transformers.BertConfig(**TOKENS, **SIZES),
        ("query", "value"),
        ("intermediate.dense",),
    ),
    "vit": Architecture(
        AutoModelForImageClassification,
        transformers.ViTConfig(**SIZES, image_size=32, patch_size=8),
        ("q_proj", "v_proj"),
        ("fc1", "fc2"),
    ),
    "t5": Architecture(
        AutoModelForSeq2SeqLM,
        transformers.T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=3,
            num_decoder_layers=2,
            num_heads=4,
            decoder_start_token_id=0,  # pyright: ignore[reportCallIssue]
            pad_token_id=0,
        ),
        ("q", "v"),
        ("wi", "wo"),
    ),
    "swin": Architecture(
        AutoModelForImageClassification,
        transformers.SwinConfig(
            image_size=32, patch_size=2, embed_dim=8, depths=[2, 2, 3], num_heads=[2, 2, 2], window_size=4
        ),
        ("q_proj", "v_proj"),
        ("fc1", "fc2"),
    ),
    "whisper": Architecture(
        AutoModelForSpeechSeq2Seq,
        transformers.WhisperConfig(
            **TOKENS,
            decoder_start_token_id=1,
            num_mel_bins=8,
            d_model=32,
            encoder_layers=3,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_source_positions=8,
            max_target_positions=16,
        ),
        ("q_proj", "v_proj"),
        ("fc1", "fc2"),
        batch=spectrograms_and_text,
    ),
    "wav2vec2": Architecture(
        AutoModelForCTC,
        transformers.Wav2Vec2Config(
            **TOKENS,
            **SIZES,
            conv_dim=(8, 8),
            conv_stride=(5, 4),
            conv_kernel=(10, 4),
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            ctc_loss_reduction="mean",
            # These two leave layers and frames out at random.
            layerdrop=0.0,
            apply_spec_augment=False,
        ),
        ("q_proj", "v_proj"),
        ("intermediate_dense", "output_dense"),
        batch=waves_and_text,
    ),
    "mamba": Architecture(
        AutoModelForCausalLM,
        transformers.MambaConfig(**TOKENS, hidden_size=32, num_hidden_layers=3, state_size=4, time_step_rank=4),
        ("in_proj",),
        ("x_proj",),
    ),
    "falcon-mamba": Architecture(
        AutoModelForCausalLM,
        transformers.FalconMambaConfig(**TOKENS, hidden_size=32, num_hidden_layers=3, state_size=4, time_step_rank=4),
        ("in_proj",),
        ("x_proj",),
    ),
    "mamba2": Architecture(
        AutoModelForCausalLM,
        transformers.Mamba2Config(
            **TOKENS,
            hidden_size=32,
            num_hidden_layers=3,
            state_size=4,
            num_heads=8,
            head_dim=8,
            n_groups=2,
            chunk_size=4,
        ),
        ("in_proj",),
        (),
    ),
    "qwen2-moe": Architecture(
        AutoModelForCausalLM,
        transformers.Qwen2MoeConfig(**EXPERTS, shared_expert_intermediate_size=16),
        ("q_proj", "v_proj"),
        ("shared_expert.up_proj", "shared_expert.down_proj"),
    ),
    "qwen3-moe": Architecture(
        AutoModelForCausalLM,
        transformers.Qwen3MoeConfig(**EXPERTS, head_dim=8),  # pyright: ignore[reportCallIssue]
        ("q_proj", "v_proj"),
        (),
        {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "switch": Architecture(
        AutoModelForSeq2SeqLM,
        transformers.SwitchTransformersConfig(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=3,
            num_decoder_layers=2,
            num_sparse_encoder_layers=3,
            num_sparse_decoder_layers=2,
            num_heads=4,
            num_experts=4,
            router_jitter_noise=0.0,
            decoder_start_token_id=0,  # pyright: ignore[reportCallIssue]
            pad_token_id=0,
        ),
        ("q", "v"),
        ("wi", "wo"),
    ),
}

# Several stacks, or a loss that is computed outside of the model.
SPECIAL_ARCHITECTURES: dict[str, Architecture] = {
    "llava": Architecture(
        AutoModelForImageTextToText,
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**VISION),
            text_config=transformers.LlamaConfig(**GROUPED),
            image_token_id=IMAGE_TOKEN,  # pyright: ignore[reportCallIssue]
        ),
        ("q_proj", "v_proj"),
        ("fc1", "fc2", *LLAMA_MLP),
        batch=images_within_text,
        layers="language_model.layers",
    ),
    "clip": Architecture(
        AutoModelForZeroShotImageClassification,
        transformers.CLIPConfig(
            text_config={**TOKENS, **SIZES, "max_position_embeddings": 16}, vision_config=VISION, projection_dim=16
        ),
        ("q_proj", "v_proj"),
        ("fc1", "fc2"),
        batch=images_and_captions,
        layers=["text_model.encoder.layers", "vision_model.encoder.layers"],
        loss=contrastive_loss,
    ),
    "dit": Architecture(
        Diffusers("DiTTransformer2DModel"),
        {
            "num_layers": 3,
            "num_attention_heads": 4,
            "attention_head_dim": 8,
            "in_channels": 2,
            "out_channels": 2,
            "sample_size": 8,
            "patch_size": 2,
            "norm_num_groups": 2,
            "num_embeds_ada_norm": 8,
        },
        ("to_q", "to_v"),
        ("ff.net.0.proj",),
        batch=noisy_images,
        loss=denoising_loss,
    ),
    "flux": Architecture(
        Diffusers("FluxTransformer2DModel"),
        {
            "num_layers": 2,
            "num_single_layers": 3,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "patch_size": 1,
            "in_channels": 4,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 16,
            "axes_dims_rope": (2, 2, 4),
        },
        ("to_q", "to_v"),
        ("proj_mlp",),
        batch=noisy_images_and_text,
        layers=["transformer_blocks", "single_transformer_blocks"],
        loss=denoising_loss,
    ),
}

ALL_ARCHITECTURES = {**ARCHITECTURES, **SPECIAL_ARCHITECTURES}


def make_model(name: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A random model of an architecture; `changes` go into its configuration."""
    config = copy.deepcopy(ALL_ARCHITECTURES[name].config)
    config.update(changes)
    torch.manual_seed(seed)
    # Grouped matrix products, the default for experts, know no float64.
    options = {"experts_implementation": "eager"} if name == "mixtral" else {}
    return ALL_ARCHITECTURES[name].auto.from_config(config, **options)


def make_lora(name: str, **options: Any) -> PeftModel:
    """LoRA with random up-projections on a random model: on its attention and MLP unless `target_modules` says."""
    architecture = ALL_ARCHITECTURES[name]
    defaults = {
        "r": 2,
        "init_lora_weights": False,
        "target_modules": [*architecture.attention, *architecture.mlp],
        **architecture.lora,
    }
    return wrap(make_model(name), LoraConfig(**{**defaults, **options}))


def wrap(model: nn.Module, config: Any) -> PeftModel:
    wrapped = get_peft_model(model, config)  # type: ignore[arg-type]
    assert isinstance(wrapped, PeftModel)
    return wrapped


def make_batch(name: str) -> dict[str, Tensor]:
    """Two random rows with labels, as the architecture's loss takes them."""
    generator = torch.Generator().manual_seed(7)
    architecture = ALL_ARCHITECTURES[name]
    auto = architecture.auto
    if architecture.batch is not None:
        return architecture.batch(generator)
    if auto is AutoModelForImageClassification:
        return {"pixel_values": random_images(generator), "labels": torch.tensor([0, 1])}
    ids = random_ids(generator)
    return {"input_ids": ids, "labels": torch.tensor([0, 1]) if auto is AutoModelForSequenceClassification else ids}


def randomise(model: nn.Module, seed: int = 1) -> None:
    """Move every trainable parameter away from its start, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.3 * noise.to(parameter.dtype))


class ToyBlock(nn.Module):
    """`x + down(tanh(up(dropout(norm(x)))))`."""

    def __init__(self, width: int = 8, inner: int = 12, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.dropout(self.norm(x)))))


class ToyModel(nn.Module):
    """Toy blocks under a head, with the mean squared error as its loss."""

    def __init__(self, num_blocks: int = 4, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(ToyBlock(dropout=dropout) for _ in range(num_blocks))
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        for block in self.blocks:
            x = block(x)
        prediction = self.head(x).squeeze(-1)
        return {"prediction": prediction} if y is None else {"loss": functional.mse_loss(prediction, y)}


def toy_batch(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    y = torch.randn(6, generator=generator, dtype=torch.float64)
    return {"x": x.to(dtype), "y": y.to(dtype)}


class Stack(nn.Module):
    """A container of blocks (or several, by name) and nothing else."""

    def __init__(self, **stacks: nn.Module) -> None:
        super().__init__()
        for name, stack in stacks.items():
            self.add_module(name, stack)

    def forward(self, x: Tensor) -> Tensor:
        for stack in self.children():
            for block in stack.children():
                x = block(x)
        return x
