"""Models for folders of the `adapters` library, and what both sides compute from them."""

from __future__ import annotations

import copy

import adapters
import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 50,
}
BERT, LLAMA = BertConfig(**SIZES), LlamaConfig(**SIZES, num_key_value_heads=2)
MODELS = {"bert": lambda: BertModel(BERT), "llama": lambda: LlamaModel(LLAMA)}
CONFIGS = {
    "seq_bn": adapters.SeqBnConfig(),
    "double_seq_bn": adapters.DoubleSeqBnConfig(),
    "par_bn": adapters.ParBnConfig(),
    "seq_bn_inv": adapters.SeqBnInvConfig(),
}
IDS = torch.arange(21).reshape(3, 7) % 48 + 2


def outputs(model):
    result = model(IDS)
    return result[0]


def randomize(model):
    """Random parameters of adapters; `adapters` reads into float32 ones."""
    kinds = (".adapters.", "adapter_fusion_layer", "invertible_adapters", ".adapter.")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if any(kind in key for kind in kinds):
                parameter.add_(0.2 * torch.randn_like(parameter)).copy_(parameter.float())
    return model.eval()


def with_theirs(base, **configs):
    """A copy of the model with random adapters of the `adapters` library."""
    model = copy.deepcopy(base)
    adapters.init(model)
    for name, config in configs.items():
        model.add_adapter(name, config=config)
    return randomize(model.double())


def assert_equal(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def assert_refused(load, model, match, error=ValueError):
    """The error names the cause, and nothing of the model is changed."""
    modules, hooks = dict(model.named_modules()), [m._forward_hooks.copy() for m in model.modules()]
    values = {key: value.clone() for key, value in model.state_dict().items()}
    trained = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=match):
        load()
    assert dict(model.named_modules()) == modules
    assert [m._forward_hooks for m in model.modules()] == hooks
    assert [p.requires_grad for p in model.parameters()] == trained
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
