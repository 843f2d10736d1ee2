"""QuantizedEmbedding: the rows that are looked up, dequantised; no others."""

import copy

import pytest
import torch
from torch import nn

from peft_kernels.nn import QuantizedEmbedding
from peft_kernels.ops import QuantizedWeight, dequantize, quantize
from peft_kernels.ops._gguf_blocks import BLOCKS

N = 12


def make(layout="q8_0", **options):
    torch.manual_seed(0)
    elements, size = BLOCKS[layout]
    codes = torch.randint(0, 64, (N, 2 * size), dtype=torch.uint8)
    shape = N, 2 * elements
    weight = QuantizedWeight(codes, torch.empty(0), shape, elements, layout=layout)
    return QuantizedEmbedding(weight, **options)


@pytest.mark.parametrize("layout", BLOCKS)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0, 4)])
def test_it_looks_up_rows_of_the_weight(layout, shape):
    layer = make(layout)
    ids = torch.randint(0, N, shape)
    assert torch.equal(layer(ids), dequantize(layer.quantized)[ids])
    assert torch.equal(layer.weight.data.clone(), dequantize(layer.quantized))


def test_casts_copies_and_state_dicts():
    layer = make("q4_K", padding_idx=3, dtype=torch.bfloat16)
    expected, ids = dequantize(layer.quantized), torch.arange(N)
    assert layer(ids).dtype is layer.weight.dtype is torch.bfloat16
    layer.float()
    other = copy.deepcopy(layer)
    other.quantized.codes.zero_()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(ids), expected)
    assert repr(other) == "QuantizedEmbedding(12, 512, padding_idx=3, layout=q4_K, bits=4.50)"


def test_bad_input():
    with pytest.raises(TypeError, match="weight must be a QuantizedWeight"):
        QuantizedEmbedding(nn.Embedding(2, 2))
    with pytest.raises(ValueError, match=r"weight must be in one of q8_0, .*got planes"):
        QuantizedEmbedding(quantize(torch.randn(8, 64)))
    with pytest.raises(IndexError):
        make()(torch.tensor([N]))
    with pytest.raises(TypeError, match="can't be written"):
        make().weight = torch.zeros(N, 64)
