"""quantize_linear: which layers are put into codes, and what is left alone."""

import pytest
import torch
from torch import nn

from peft_kernels import quantize_linear
from peft_kernels.nn import QuantizedLinear
from peft_kernels.ops import dequantize, quantize


class Model(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(16, 64)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)
        self.head = nn.Linear(64, 16, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids):
        return self.head(self.down(self.up(self.embed(ids)).relu()))


def in_codes(model):
    return {name for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "fp8"])
def test_all_linear_layers_but_the_head(kind):
    model, ids = Model(), torch.arange(6)
    before, weight = model(ids), model.up.weight.detach().clone()
    bias = model.up.bias
    assert quantize_linear(model, kind=kind) is model
    assert in_codes(model) == {"up", "down"} and model.up.bias is bias
    assert torch.equal(dequantize(model.up.quantized), dequantize(quantize(weight, kind)))
    y = model(ids)
    assert 0 < (y - before).norm() < 0.3 * before.norm()
    y.sum().backward()
    assert model.embed.weight.grad.norm() > 0


def test_layers_by_name_and_options():
    model = Model()
    weight = model.up.weight.detach().clone()
    quantize_linear(model, "up|head", block=32, nested=False, exclude_modules=["head"])
    assert in_codes(model) == {"up"}
    expected = quantize(weight, block=32, nested=False)
    assert torch.equal(model.up.quantized.scales, expected.scales)


def test_bad_input_changes_nothing():
    model = Model(tied=True)
    before = dict(model.named_modules())
    for error, message, arguments in (
        (ValueError, "nothing matches", (["query"],)),
        (ValueError, "up: kind must be one of", (["up"], "int3")),
        (ValueError, "head has a weight that is embed's too", (["up", "head"],)),
        (TypeError, "embed must be", (["embed"],)),
    ):
        with pytest.raises(error, match=message):
            quantize_linear(model, *arguments)
    assert dict(model.named_modules()) == before
    quantize_linear(model, ["up"])
    with pytest.raises(TypeError, match="up has its weight in codes"):
        quantize_linear(model, ["up"])
    with torch.device("meta"):
        bare = Model()
    with pytest.raises(TypeError, match="meta device"):
        quantize_linear(bare)
