"""merge(requantize=True) over libraries' codes: what the library makes of the merged values."""

import pytest
import torch
from torch import nn

import peft_kernels
from peft_kernels.codes.layers import read_codes
from peft_kernels.nn import QuantizedLinear
from peft_kernels.ops import QuantizedWeight, dequantize, quantize
from peft_kernels.ops._gguf_blocks import BLOCKS

N, K = 128, 256


def values_of(seed=0):
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


def torchaos(kind):
    quantization = pytest.importorskip("torchao.quantization")
    from torchao.quantization import quant_api

    asymmetric, by_32 = quantization.MappingType.ASYMMETRIC, quantization.PerGroup(32)
    configs = {
        "int8 by row": quantization.Int8WeightOnlyConfig(),
        "int8 by group": quantization.Int8WeightOnlyConfig(granularity=by_32),
        "int8 of all": quantization.Int8WeightOnlyConfig(granularity=quantization.PerTensor()),
        "int4": quantization.IntxWeightOnlyConfig(torch.int4, by_32),
        "int4 with zeros": quantization.IntxWeightOnlyConfig(torch.int4, by_32, asymmetric),
        "float8": quant_api.Float8WeightOnlyConfig(),
    }

    def write(values):
        layer = nn.Linear(K, N, bias=False)
        layer.weight.data = values.clone()
        if kind == "nf4":
            layer.weight = nn.Parameter(quantization.to_nf4(values, 64, 8), requires_grad=False)
        elif kind == "float8 in blocks":
            shared = quantization.granularity.PerBlock([128, 128])
            made = quantization.Float8Tensor.from_hp(values, granularity=shared)
            layer.weight = nn.Parameter(made, requires_grad=False)
        else:
            quantization.quantize_(layer, configs[kind])
        return layer

    return write


def transformers_own(block):
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")

    def write(values):
        layer = fp8.FP8Linear(K, N, block_size=(128, 128))
        layer.block_size, scales = block, layer.weight_scale_inv
        found = quantize(values, "fp8", by="block" if block else "tensor")
        layer.weight.data = found.codes
        scales.data = found.scales.view(scales.shape if block else ())
        return layer

    return write


def ggufs(layout):
    gguf = pytest.importorskip("gguf")

    def write(values):
        made = gguf.quantize(values.numpy(), gguf.GGMLQuantizationType[layout.upper()])
        none = torch.zeros(0)
        weight = QuantizedWeight(torch.from_numpy(made), none, (N, K), BLOCKS[layout][0])
        return QuantizedLinear(weight._replace(layout=layout))

    return write


WRITERS = {
    **{
        f"torchao's {kind}": (torchaos, kind)
        for kind in (
            *("int8 by row", "int8 by group", "int8 of all", "int4", "int4 with zeros"),
            *("float8", "float8 in blocks", "nf4"),
        )
    },
    "FP8Linear": (transformers_own, (128, 128)),
    "FP8Linear of one scale": (transformers_own, None),
    **{layout: (ggufs, layout) for layout in ("q8_0", "q4_0", "q4_1")},
}


@pytest.mark.parametrize("name", WRITERS)
def test_merged_values_are_as_the_library_writes_them(name):
    make, kind = WRITERS[name]
    write = make(kind)
    net = nn.Sequential(write(values_of()))
    base = dequantize(read_codes(net[0]))
    peft_kernels.swap_linear(net, ["0"], 4, alpha=8)
    nn.init.normal_(net[0].lora_b, std=0.1)
    x = torch.randn(3, K)
    merged = base + 2 * net[0].lora_b.detach() @ net[0].lora_a.detach()
    expected = dequantize(read_codes(write(merged)))

    errors = peft_kernels.merge(net, requantize=True)

    found = dequantize(net[0]._codes())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    error = (found - merged).norm() / merged.norm()
    assert errors["0"] == pytest.approx(float(error), rel=1e-2) and 1e-4 < error < 0.2
    torch.testing.assert_close(net(x), x @ found.T, rtol=1e-4, atol=1e-3)
    plain = peft_kernels.unload(net, merge=True)
    torch.testing.assert_close(dequantize(read_codes(plain[0])), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", WRITERS)
def test_unmerged_is_every_bit_as_before(name):
    make, kind = WRITERS[name]
    net = nn.Sequential(make(kind)(values_of()))
    peft_kernels.swap_linear(net, ["0"], 4, alpha=8)
    nn.init.normal_(net[0].lora_b, std=0.1)
    x, base = torch.randn(3, K), dequantize(read_codes(net[0]._base_layer()))
    before, keys = net(x), net.state_dict().keys()
    peft_kernels.merge(net, requantize=True)
    assert not torch.equal(net(x), before)
    assert torch.equal(dequantize(net[0]._base_codes()), base)
    net[0].switch(net[0].lora_a.detach(), net[0].lora_b.detach() / 2)
    net[0].switch(net[0].lora_a.detach(), net[0].lora_b.detach() * 2)
    peft_kernels.unmerge(net)
    assert torch.equal(net(x), before) and net.state_dict().keys() == keys


@pytest.mark.parametrize("layout", ["q4_K", "q6_K"])
def test_blocks_that_gguf_does_not_write_are_refused(layout):
    pytest.importorskip("gguf")
    k, size = BLOCKS[layout]
    codes = torch.randint(0, 60, (N, size), dtype=torch.uint8)
    weight = QuantizedWeight(codes, torch.zeros(0), (N, k), k, layout=layout)
    net = nn.Sequential(QuantizedLinear(weight))
    peft_kernels.swap_linear(net, ["0"], 4, alpha=8)
    with pytest.raises(TypeError, match=f"0: requantize must be False over {layout}: gguf reads"):
        peft_kernels.merge(net, requantize=True)
    assert not net[0].merged


def test_blocks_of_another_size_are_refused():
    net = nn.Sequential(transformers_own((128, 128))(values_of()))
    net[0].block_size = (64, 64)
    net[0].weight_scale_inv = nn.Parameter(torch.ones(N // 64, K // 64), requires_grad=False)
    peft_kernels.swap_linear(net, ["0"], 4, alpha=8)
    with pytest.raises(TypeError, match=r"requantize must be False over blocks of \[64, 64\]"):
        peft_kernels.merge(net, requantize=True)
    assert not net[0].merged


@pytest.mark.parametrize("name", WRITERS)
def test_what_goes_with_the_codes_is_moved_while_merged(name):
    make, kind = WRITERS[name]
    net = nn.Sequential(make(kind)(values_of()))
    peft_kernels.swap_linear(net, ["0"], 4, alpha=8)
    peft_kernels.merge(net, requantize=True)
    net.to("meta")
    peft_kernels.unmerge(net)
    tensors = *net.parameters(), *net.buffers()
    assert all(one.is_meta for one in tensors)
    assert net(torch.randn(3, K, device="meta")).shape == (3, N)


def test_a_dtype_that_is_taken_on_while_merged_stays():
    net = nn.Sequential(ggufs("q8_0")(values_of()))
    peft_kernels.swap_linear(net, ["0"], 4, alpha=8)
    peft_kernels.merge(net, requantize=True)
    net.half()
    peft_kernels.unmerge(net)
    assert peft_kernels.unload(net, merge=False)[0].weight.dtype is torch.float16


@pytest.mark.parametrize("requantize", [False, True])
def test_what_cannot_hold_the_merged_values_is_refused(requantize):
    net = nn.Sequential(ggufs("q8_0")(values_of())).half()
    peft_kernels.swap_linear(net, ["0"], 4, alpha=8)
    x = torch.randn(3, K)
    before = net(x)
    nn.init.constant_(net[0].lora_a, 1.0)
    nn.init.constant_(net[0].lora_b, 1e7)  # blocks have a factor in float16
    how = "in codes again" if requantize else "in torch.float16"
    with pytest.raises(ValueError, match=f"0: .*not finite {how}; nothing was changed"):
        peft_kernels.merge(net, requantize=requantize)
    nn.init.zeros_(net[0].lora_b)
    assert not net[0].merged and torch.equal(net(x), before)
    peft_kernels.merge(net, requantize=requantize)


def test_a_row_of_zeros_that_torchao_makes_nan_of_is_refused():
    net = nn.Sequential(torchaos("float8")(values_of()))
    peft_kernels.swap_linear(net, ["0"], N, alpha=N)
    net[0].lora_a.data[5] = -net[0].dequantized()[5]
    net[0].lora_b.data[5, 5] = 1.0
    with pytest.raises(ValueError, match=r"0: .*not finite in codes again"):
        peft_kernels.merge(net, requantize=True)
    peft_kernels.merge(net)
    assert not net[0].weight[5].any()
