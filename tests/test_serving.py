"""What `focus` returns is served by others: llama.cpp's conversion, and vLLM on a CPU, where they are installed.

    LLAMA_CPP=folder/of/llama.cpp pytest tests/test_serving.py      # its convert_lora_to_gguf.py, which needs gguf
    pytest -m slow tests/test_serving.py                            # where vLLM is installed

`tests/serving.json` is the log of the last run with both, with the logits of llama.cpp and vLLM beside PEFT's.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ist.focusing import find_focus

SCORES = (1, 5, 2, 2, 3, 9)
KEPT = [1, 2, 5]
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "moved": ({"r": 8, "lora_alpha": 16}, {}),
    "uneven": ({"r": 8, "lora_alpha": 16}, {"rank": "uneven"}),
    "stopped at the smaller side": ({"r": 40, "lora_alpha": 80}, {}),
    "uneven, inverse": ({"r": 8, "lora_alpha": 16}, {"rank": "uneven", "scaling": "inverse"}),
}
"""LoRA for all layers, and how it is focused."""
RANKS_PATTERNED = ("uneven", "stopped at the smaller side")
"""Whose alpha differs by module."""
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""llama.cpp's names of modules, and those of transformers."""


def llama() -> LlamaForCausalLM:
    """Small, with heads of 32 numbers, which vLLM needs at least."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=160,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
        max_position_embeddings=128,
        initializer_range=0.05,
    )
    return LlamaForCausalLM(config).eval()


def focused(case: str, folder: Path) -> Any:
    """A PEFT model with random adapters in half of the layers, which are saved."""
    lora, options = CASES[case]
    base = llama()
    given = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **lora)
    model = get_peft_model(base, find_focus(base, given, scores=SCORES, **options).config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 20)
    model.save_pretrained(str(folder))
    return model


@pytest.mark.parametrize("case", CASES)
def test_servers_that_read_one_rank_and_alpha_are_right_where_there_are_no_patterns(case: str, tmp_path: Path) -> None:
    """The rule of docs/focused.md: llama.cpp scales by `lora_alpha` over the rank of each module's own matrices."""
    model = focused(case, tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert saved["layers_to_transform"] == KEPT
    modules = [module for module in model.modules() if isinstance(getattr(module, "scaling", None), dict)]
    right = all(
        module.scaling["default"] == pytest.approx(saved["lora_alpha"] / module.r["default"]) for module in modules
    )
    assert right == (not saved["alpha_pattern"]) == (case not in RANKS_PATTERNED)


@pytest.mark.skipif(
    not os.environ.get("LLAMA_CPP") or importlib.util.find_spec("gguf") is None,
    reason="the variable LLAMA_CPP names no folder with convert_lora_to_gguf.py, or gguf is not installed",
)
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_converts_the_focused_layers(case: str, tmp_path: Path) -> None:
    import gguf

    model = focused(case, tmp_path / "adapter")
    llama().save_pretrained(tmp_path / "base")
    file = tmp_path / "adapter.gguf"
    converter = Path(os.environ["LLAMA_CPP"]) / "convert_lora_to_gguf.py"
    command = [sys.executable, converter, tmp_path / "adapter", "--base", tmp_path / "base", "--outfile", file]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=120)
    reader = gguf.GGUFReader(file)
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    alpha = reader.fields["adapter.lora.alpha"].contents()
    assert tensors.keys() == {
        f"blk.{layer}.{name}.weight.lora_{part}" for layer in KEPT for name in NAMES for part in "ab"
    }
    for layer in KEPT:
        for name, path in NAMES.items():
            module = model.base_model.model.model.layers[layer].get_submodule(path)
            a, b = (tensors[f"blk.{layer}.{name}.weight.lora_{part}"] for part in "ab")
            assert a.shape == module.lora_A["default"].weight.shape
            assert b.shape == module.lora_B["default"].weight.shape
            if name not in ("attn_q", "attn_k"):  # whose rows llama.cpp orders in its own way
                assert torch.equal(b @ a, module.lora_B["default"].weight @ module.lora_A["default"].weight)
            own = alpha / b.shape[1] == pytest.approx(module.scaling["default"])
            assert own or case in RANKS_PATTERNED


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_answers_as_peft_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU in float32, uneven ranks too: log probabilities of a prompt's tokens."""
    for name, value in {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }.items():
        monkeypatch.setenv(name, value)
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

    ids = torch.randint(0, 320, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    models = {case: focused(case, tmp_path / str(number)) for number, case in enumerate(CASES)}
    llama().save_pretrained(tmp_path / "base")
    server = LLM(
        model=str(tmp_path / "base"),
        dtype="float32",
        enable_lora=True,
        max_lora_rank=128,
        enforce_eager=True,
        max_model_len=64,
        skip_tokenizer_init=True,
        max_num_seqs=1,
    )
    settings = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    for number, (case, model) in enumerate(models.items()):
        request = LoRARequest(case, number + 1, str(tmp_path / str(number)))
        (answer,) = server.generate([{"prompt_token_ids": ids}], settings, lora_request=request, use_tqdm=False)
        found = [own[token].logprob for own, token in zip(answer.prompt_logprobs[1:], ids[1:], strict=True)]
        torch.testing.assert_close(torch.tensor(found), log_probabilities(model, ids), atol=1e-4, rtol=1e-4)


def log_probabilities(model: Any, ids: list[int]) -> Tensor:
    """Of each token but the first, in nats."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
