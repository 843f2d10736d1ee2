"""The classifier of _classifier.py over an encoder whose linear layers have 32 to 4 bits a weight.

PEFT puts LoRA over each, and peft_kernels.accelerate the kernels under it. The last kind is PEFT
by itself over what ``load_in_4bit`` makes: the same codes as nf4's, in bitsandbytes' layers.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import transformers
from _classifier import (
    ALPHA,
    DEVICE,
    TARGETS,
    Classifier,
    R,
    load_encoder,
    mean_pooled,
    model_folder,
)
from torch import Tensor, nn

import peft_kernels

KINDS = {
    "float32": "32 bits, float32",
    "bfloat16": "16 bits, bfloat16",
    "int8": "8 bits, int8",
    "nf4": "4 bits, nf4",
    "bitsandbytes": "4 bits, PEFT alone",
}


def installed_kinds() -> list[str]:
    missing = importlib.util.find_spec("bitsandbytes") is None
    return [kind for kind in KINDS if not (missing and kind == "bitsandbytes")]


def load_in_bits(kind: str) -> nn.Module:
    """The pretrained encoder; what isn't a linear layer of its stays in floats."""
    if kind == "bitsandbytes":
        return _load_in_4bit()
    encoder = load_encoder()
    if kind == "bfloat16":
        encoder.to(torch.bfloat16)
    elif kind != "float32":
        peft_kernels.quantize_linear(encoder, TARGETS, kind)
    return encoder


def _load_in_4bit() -> nn.Module:
    """As transformers and bitsandbytes do it, with the scales in codes too."""
    transformers.logging.set_verbosity_error()  # it reports the pooler's weights as unused
    return transformers.BertModel.from_pretrained(
        model_folder(),
        add_pooling_layer=False,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        local_files_only=True,
        dtype=torch.float32,
        device_map={"": DEVICE},
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
    )


def linear_weights(encoder: nn.Module) -> tuple[int, int]:
    """The number of the linear layers' weights, and their bytes with all that their codes need."""
    count = size = 0
    for name, module in encoder.named_modules():
        if name.endswith(TARGETS):
            count += module.in_features * module.out_features
            state = module.state_dict()
            size += sum(t.nbytes for key, t in state.items() if key != "bias")
    return count, size


class BitsClassifier(Classifier):
    """A classifier whose head computes in float32, whatever the encoder does."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(mean_pooled(self.encoder, input_ids, attention_mask).float())


def build_in_bits(kind: str, seed: int, dropout: float = 0.0) -> Classifier:
    """The classifier with PEFT's LoRA; equal seeds give equal trained weights in every kind."""
    from peft import LoraConfig, get_peft_model

    encoder = load_in_bits(kind)
    torch.manual_seed(seed)
    config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=list(TARGETS), lora_dropout=dropout)
    model = BitsClassifier(get_peft_model(encoder, config))
    if kind != "bitsandbytes":
        peft_kernels.accelerate(model.encoder)
    return model.train()


def load_saved(kind: str, folder: Path) -> nn.Module:
    """An encoder of the kind with the adapter in ``folder``, by PEFT alone."""
    from peft import PeftModel

    return PeftModel.from_pretrained(load_in_bits(kind), folder).to(DEVICE)
