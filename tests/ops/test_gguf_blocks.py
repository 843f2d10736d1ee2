"""The blocks of GGUF files: bit by bit what the gguf package makes of them."""

import numpy as np
import pytest
import torch

from peft_kernels.ops._gguf_blocks import BLOCKS, dequantize_blocks

gguf = pytest.importorskip("gguf")

# Where the float16 numbers of a block start.
HALVES = {"q8_0": [0], "q4_0": [0], "q4_1": [0, 2], "q4_K": [0, 2], "q6_K": [208]}


def random_blocks(layout, count):
    size = BLOCKS[layout][1]
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (count, size), dtype=np.uint8)
    for start in HALVES[layout]:
        numbers = generator.standard_normal((count, 1)).astype(np.float16)
        blocks[:, start : start + 2] = numbers.view(np.uint8)
    return blocks


def kind_of(layout):
    return gguf.GGMLQuantizationType[layout.upper()]


@pytest.mark.parametrize("layout", BLOCKS)
def test_blocks_are_of_the_size_that_the_format_says(layout):
    assert BLOCKS[layout] == gguf.GGML_QUANT_SIZES[kind_of(layout)]


@pytest.mark.parametrize("layout", BLOCKS)
def test_any_bytes(layout):
    blocks = random_blocks(layout, 300)
    n, k = 50, 6 * BLOCKS[layout][0]
    expected = gguf.quants.dequantize(blocks, kind_of(layout)).reshape(n, k)
    found = dequantize_blocks(layout, torch.from_numpy(blocks), n, k)
    assert found.dtype is torch.float32 and found.shape == (n, k)
    assert np.array_equal(found.numpy().view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize("layout", BLOCKS)
def test_no_rows(layout):
    elements, size = BLOCKS[layout]
    codes = torch.empty(0, 2 * size, dtype=torch.uint8)
    assert dequantize_blocks(layout, codes, 0, 2 * elements).shape == (0, 2 * elements)


@pytest.mark.parametrize("layout", ["q8_0", "q4_0", "q4_1"])
def test_what_the_package_quantises(layout):
    plain = torch.randn(7, 96, generator=torch.Generator().manual_seed(0))
    codes = torch.from_numpy(gguf.quants.quantize(plain.numpy(), kind_of(layout)))
    found = dequantize_blocks(layout, codes, 7, 96)
    assert (found - plain).norm() / plain.norm() < 0.12
    expected = gguf.quants.dequantize(codes.numpy(), kind_of(layout))
    assert torch.equal(found, torch.from_numpy(expected))
