"""PEFT's models with prompts and prefixes, and what an accelerated one must do beside PEFT's."""

import pytest
import torch
from tiny_models import make_bert, make_gpt2, make_llama, transformers
from torch import nn

import peft_kernels

peft = pytest.importorskip("peft")

L = 3
IDS = torch.randint(0, 32, (4, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, 4:] = MASK[2, 2:] = 0
LOOKUP, ONCE = "prompt_lookup", "encoded once"


def make_classifier() -> nn.Module:
    return transformers.BertForSequenceClassification(make_bert().config)


def make_tagger() -> nn.Module:
    return transformers.BertForTokenClassification(make_bert().config)


TASKS = {
    make_gpt2: "CAUSAL_LM",
    make_llama: "CAUSAL_LM",
    make_classifier: "SEQ_CLS",
    make_tagger: "TOKEN_CLS",
    make_bert: "FEATURE_EXTRACTION",
}
METHODS = {
    "prompt": (peft.PromptTuningConfig, {}),
    "mlp": (peft.PromptEncoderConfig, {"encoder_hidden_size": 7}),
    "lstm": (peft.PromptEncoderConfig, {
        "encoder_hidden_size": 7,
        "encoder_reparameterization_type": "LSTM",
        "encoder_num_layers": 2,
    }),
    "prefix": (peft.PrefixTuningConfig, {}),
    "prefix_mlp": (peft.PrefixTuningConfig, {"prefix_projection": True, "encoder_hidden_size": 7}),
}  # fmt: skip
WAYS = {
    "prompt": {LOOKUP},
    "mlp": {LOOKUP, ONCE},
    "lstm": {LOOKUP, ONCE},
    "prefix": {"PREFIX_TUNING", "no projection"},
    "prefix_mlp": {"PREFIX_TUNING", ONCE},
}
ATTENTION = "prefix_attention"


def ways_of(make, method):
    """What serves a call."""
    if method.startswith("prefix") and TASKS[make] == "CAUSAL_LM":
        return {ATTENTION, *WAYS[method]} - {"PREFIX_TUNING"}
    return WAYS[method]


models = pytest.mark.parametrize("make", TASKS, ids=lambda make: make.__name__)
methods = pytest.mark.parametrize("method", METHODS)


def prompted(make, method, dtype=torch.float64):
    torch.manual_seed(0)
    base = make()
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.3)
    kind, options = METHODS[method]
    config = kind(task_type=TASKS[make], num_virtual_tokens=L, **options)
    return peft.get_peft_model(base, config).to(dtype).eval()


def labels_of(model, method):
    if isinstance(model, peft.PeftModelForSequenceClassification):
        return {"labels": torch.tensor([0, 1, 1, 0])}
    if isinstance(model, peft.PeftModelForTokenClassification):
        before = 0 if method.startswith("prefix") else L  # PEFT leaves labels as they are given
        return {"labels": torch.cat([torch.full((4, before), -100), IDS % 2], 1)}
    return {} if isinstance(model, peft.PeftModelForFeatureExtraction) else {"labels": IDS}


def run(model, **inputs):
    """All outputs, and the gradients of all that is trained."""
    model.zero_grad()
    torch.manual_seed(5)
    output = model(**({"input_ids": IDS, "attention_mask": MASK} | inputs))
    result = output[1] if "labels" in inputs else output[0]
    if result.requires_grad:
        result.sin().sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    found = [x.detach() for x in output.to_tuple() if isinstance(x, torch.Tensor)]
    cache = getattr(output, "past_key_values", None)
    cache = getattr(cache, "self_attention_cache", cache)
    for layer in cache.layers if cache is not None else ():
        found += [layer.keys.detach(), layer.values.detach()]
    return found, gradients


def assert_as_peft(model, ways, **inputs):
    peft_kernels.restore(model)
    classes = [type(module) for module in model.modules()]
    expected = run(model, **inputs)
    report = peft_kernels.accelerate(model)
    # Llama's norms round to float32 whatever the model is in.
    rounds = any("RMSNorm" in type(module).__name__ for module in model.modules())
    tolerances = {"rtol": 1e-5, "atol": 1e-5} if rounds else {}
    torch.testing.assert_close(run(model, **inputs), expected, **tolerances)
    assert set(report.counts()) == set(ways)
    peft_kernels.restore(model)
    assert [type(module) for module in model.modules()] == classes
    assert not any("peft_kernels" in key for module in model.modules() for key in vars(module))
    assert torch.equal(run(model, **inputs)[0][0], expected[0][0])
    return report


PREFIXES = pytest.mark.parametrize("method", ["prefix", "prefix_mlp"])
