"""Models of transformers' with LoRALinear layers, for what is done to all layers at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft_kernels import swap_linear

transformers = pytest.importorskip("transformers")

IDS = torch.arange(12).reshape(2, 6)


def make_llama(dtype=torch.float32, tied=False) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


def make_gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


MODELS = {
    "llama": (make_llama, ["q_proj", "down_proj", "lm_head"]),
    "llama-bf16": (lambda: make_llama(torch.bfloat16), ["q_proj", "down_proj"]),
    "gpt2": (make_gpt2, ["c_attn", "mlp.c_proj"]),
}
models = pytest.mark.parametrize("kind", MODELS)


def base(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[kind][0]().eval()


def swapped(kind: str) -> nn.Module:
    return trained(swap_linear(base(kind), MODELS[kind][1], 2, alpha=4))


def trained(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_b" in name:
            nn.init.normal_(parameter, std=2.0)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits
