"""Models over bitsandbytes' layers, and the same with their values in plain ones."""

import copy

import pytest
import torch
from tiny_models import make_llama
from torch import nn

from peft_kernels.codes.layers import codes_of, is_in_codes
from peft_kernels.ops import dequantize

bitsandbytes = pytest.importorskip("bitsandbytes")

KINDS = ("nf4", "fp4", "int8")


def layer_in_codes(linear, kind="nf4", nested=True, storage=torch.uint8):
    """The library's layer, of the values of an nn.Linear."""
    k, n, bias = linear.in_features, linear.out_features, linear.bias is not None
    own = bitsandbytes.nn
    if kind == "int8":
        layer = own.Linear8bitLt(k, n, bias, has_fp16_weights=False)
        layer.weight = own.Int8Params(linear.weight.data.clone(), requires_grad=False)
    else:
        layer = own.Linear4bit(
            k, n, bias, compress_statistics=nested, quant_type=kind, quant_storage=storage
        )
        layer.weight.data = linear.weight.data.clone()
    if bias:
        layer.bias.data = linear.bias.data.clone()
    return layer.to("cpu").train(linear.training)


def make_plain_llama():
    """One with layers of whole blocks."""
    torch.manual_seed(0)
    return make_llama(hidden_size=64, intermediate_size=128).eval()


def in_codes(model, kind="nf4", without=("lm_head",), **options):
    """The model with its linear layers in codes, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name not in without:
                setattr(parent, name, layer_in_codes(child, kind, **options))
    return model


def dequantised(model, dtype=torch.float64):
    """A copy of the model with the values of its codes in nn.Linear."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if is_in_codes(child):
                setattr(parent, name, plain(child))
    return model.to(dtype)


def plain(layer):
    found = codes_of(layer)
    n, k = found.shape
    linear = nn.Linear(k, n, layer.bias is not None).train(layer.training)
    linear.weight.data = dequantize(found)
    if layer.bias is not None:
        linear.bias.data = layer.bias.data.clone()
    return linear.requires_grad_(False)
