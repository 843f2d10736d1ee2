"""read_codes of layers with gptqmodel's attributes, under its modules' names.

What the layouts mean, element by element, is in ops/test_packed.py.
"""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from peft_kernels.codes.layers import is_in_codes, read_codes
from peft_kernels.ops import dequantize

ROOM = "gptqmodel.nn_modules.qlinear"
N, K, GROUP = 16, 64, 32


class TorchLinear(nn.Module):
    """The buffers and attributes that gptqmodel 7.7 has."""

    def __init__(self, bits=4, group_size=GROUP):
        super().__init__()
        self.bits, self.group_size = bits, group_size
        self.in_features, self.out_features, self.planar = K, N, False
        groups = K // group_size if group_size > 0 else 1
        self.register_buffer("qweight", words(K * bits // 32, N))
        self.register_buffer("qzeros", words(groups, -(-N * bits // 32)))
        self.register_buffer("scales", torch.rand(groups, N).half())
        self.register_buffer("g_idx", torch.arange(K, dtype=torch.int32) // (K // groups))
        self.register_buffer("bias", None)


class AwqTorchLinear(nn.Module):
    def __init__(self, bits=4):
        super().__init__()
        self.bits, self.group_size, self.in_features, self.out_features = bits, GROUP, K, N
        self.register_buffer("qweight", words(K, N // 8))
        self.register_buffer("qzeros", words(K // GROUP, N // 8))
        self.register_buffer("scales", torch.rand(K // GROUP, N).half())
        self.register_buffer("bias", None)


def words(*shape):
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)


@pytest.fixture(autouse=True)
def library(monkeypatch):
    for name, kind in (("torch", TorchLinear), ("torch_awq", AwqTorchLinear)):
        module = ModuleType(f"{ROOM}.{name}")
        setattr(module, kind.__name__, kind)
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize("group_size", [GROUP, -1])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq(bits, group_size):
    layer = TorchLinear(bits, group_size)
    found = read_codes(layer)
    assert is_in_codes(layer) and found.codes is layer.qweight and found.shifts is layer.qzeros
    assert found.layout == f"gptq_{bits}" and dequantize(found).shape == (N, K)


def test_awq():
    layer = AwqTorchLinear()
    found = read_codes(layer)
    assert found.codes is layer.qweight and found.scales is layer.scales
    assert found.layout == "awq_4" and dequantize(found).shape == (N, K)


def test_what_is_not_read_says_why():
    layer = TorchLinear()
    layer.planar = True
    assert "other bits" in read_codes(layer)
    assert "other bits" in read_codes(AwqTorchLinear(bits=8))
    layer = TorchLinear()
    layer.online_full_had = True
    assert read_codes(layer) == "x rotated"
