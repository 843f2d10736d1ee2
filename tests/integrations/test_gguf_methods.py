"""Every method over a GGUF file's codes, embeddings too: as over the weights dequantised."""

import copy

import pytest
import torch
from torch import nn

import peft_kernels
from peft_kernels.integrations.transformers import (
    add_prefix,
    add_prompt,
    insert_adapters,
    prefix_for,
)
from peft_kernels.nn import PromptTuning, QuantizedEmbedding, QuantizedLinear

peft = pytest.importorskip("peft")
from gguf_files import make_model, write_gguf  # noqa: E402  peft may be missing

IDS = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(0))


def bottleneck(model):
    insert_adapters(model, "pfeiffer")
    return model


def prefix(model):
    add_prefix(model, prefix_for(model, 5))
    return model


def prompt(model):
    add_prompt(model, PromptTuning(4, 64))
    return model


def of_peft(kind, **options):
    def tuned(model):
        found = peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", **options))
        peft_kernels.accelerate(found)
        return found

    return tuned


METHODS = {
    "bottleneck": bottleneck,
    "prefix": prefix,
    "prompt": prompt,
    "PEFT's prompt": of_peft("PromptTuningConfig", num_virtual_tokens=3),
    "PEFT's prefix": of_peft("PrefixTuningConfig", num_virtual_tokens=3),
    "PEFT's LoKr": of_peft("LoKrConfig", target_modules=["q_proj"], init_weights=False),
    "PEFT's LoRA on embeddings": of_peft(
        "LoraConfig", target_modules=["embed_tokens", "q_proj"], init_lora_weights=False
    ),
}


def dequantised(model):
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        parent, _, own = name.rpartition(".")
        if isinstance(module, QuantizedLinear):
            setattr(plain.get_submodule(parent), own, module.dequantized())
        elif isinstance(module, QuantizedEmbedding):
            values = module.weight.data.clone()
            setattr(plain.get_submodule(parent), own, nn.Embedding.from_pretrained(values))
    return plain


@pytest.fixture
def model(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", make_model(), "Q4_0")
    return peft_kernels.load_gguf(make_model(), path, embeddings="codes")


@pytest.mark.parametrize("method", METHODS)
def test_a_step(model, method):
    found = []
    for base in (dequantised(model), model):
        torch.manual_seed(0)
        tuned = METHODS[method](base)
        loss = tuned(input_ids=IDS, labels=IDS).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in tuned.parameters() if p.requires_grad)])
    assert len(found[0]) > 1 and any(gradient.any() for gradient in found[0][1:])
    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_an_initialisation_that_writes_the_base_is_refused(model):
    with pytest.raises(TypeError, match="weight is in codes, q4_0, and can't be written"):
        of_peft("LoraConfig", target_modules=["q_proj"], init_lora_weights="pissa")(model)
