"""Models of transformers' small enough to build in a test."""

import pytest
from torch import nn

transformers = pytest.importorskip("transformers")


def make_bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
    )
    return transformers.BertModel(config)


def make_gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


def make_llama(layers: int = 2, hidden_size: int = 16, intermediate_size: int = 24) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config)
