"""InvertibleAdapter: the coupling, its inverse, and a module's manners."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from peft_kernels.nn import InvertibleAdapter


def make(k=8, *, dtype=torch.float64, **options) -> InvertibleAdapter:
    layer = InvertibleAdapter(k, dtype=dtype, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def part(linears: nn.ModuleDict, h: torch.Tensor, activation=torch.relu) -> torch.Tensor:
    down, up = linears.values()
    return activation(h @ down.weight.T + down.bias) @ up.weight.T + up.bias


def expected(layer: InvertibleAdapter, x: torch.Tensor, activation=torch.relu) -> torch.Tensor:
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    y1 = x1 + part(layer.F, x2, activation)
    return torch.cat([y1, x2 + part(layer.G, y1, activation)], -1)


@pytest.mark.parametrize("reduction", [1, 2, 1.5])
@pytest.mark.parametrize("k", [2, 5, 8, 9])
@pytest.mark.parametrize("inverse", [False, True])
def test_forward_and_gradients_are_the_equation(inverse, k, reduction):
    layer = make(k, reduction=reduction, activation="gelu")
    x = torch.randn(2, 3, k, dtype=torch.float64, requires_grad=True)
    y = layer(x, inverse=inverse)
    if inverse:
        y1, y2 = x[..., : k // 2], x[..., k // 2 :]
        x2 = y2 - part(layer.G, y1, F.gelu)
        formula = torch.cat([y1 - part(layer.F, x2, F.gelu), x2], -1)
    else:
        formula = expected(layer, x, F.gelu)
    torch.testing.assert_close(y, formula, rtol=1e-12, atol=1e-12)
    leaves, grad = [x, *layer.parameters()], torch.randn_like(x)
    exact = torch.autograd.grad(formula, leaves, grad)
    for ours, theirs in zip(torch.autograd.grad(y, leaves, grad), exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [2, 7, 64])
@pytest.mark.parametrize("shape", [(), (5,), (2, 5), (2, 3, 5)])
def test_inverse_in_float64(k, shape):
    layer = make(k)
    x = torch.randn(*shape, k, dtype=torch.float64)
    y = layer(x)
    assert y.shape == x.shape and not torch.allclose(y, x)
    torch.testing.assert_close(layer(y, inverse=True), x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(layer(x, inverse=True)), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 1e-2)]
)
def test_inverse_in_narrow_types(dtype, tolerance):
    layer = InvertibleAdapter(64)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.15)
    x = torch.randn(3, 5, 64, dtype=dtype)
    y = layer(x)
    assert y.dtype is dtype
    torch.testing.assert_close(layer(y, inverse=True), x, rtol=tolerance, atol=tolerance)


def test_strides():
    layer, wide = make(8), torch.randn(3, 16, 4, dtype=torch.float64)
    x = wide[:, ::2].mT
    torch.testing.assert_close(layer(x), expected(layer, x), rtol=1e-12, atol=1e-12)


def test_autocast():
    layer, x = make(8, dtype=torch.float32), torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("init", ["bert", "mam", "houlsby"])
def test_a_new_adapter_is_nearly_the_identity(init):
    layer, x = InvertibleAdapter(64, init=init), torch.randn(4, 64)
    change = (layer(x) - x).norm() / x.norm()
    assert change < 0.05 if init != "mam" else change == 0
    for name, parameter in layer.named_parameters():
        assert not name.endswith("bias") or not parameter.any()


def test_names_and_shapes():
    layer = make(9)
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    assert shapes == {
        "F.0.weight": (2, 5),
        "F.0.bias": (2,),
        "F.2.weight": (4, 2),
        "F.2.bias": (4,),
        "G.0.weight": (2, 4),
        "G.0.bias": (2,),
        "G.2.weight": (5, 2),
        "G.2.bias": (5,),
    }
    assert "hidden_size=9, reduction=2, activation=relu, init=bert" in repr(layer)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))],
    ids=["deepcopy", "pickle"],
)
def test_copies(duplicate):
    layer, x = make(), torch.randn(5, 8, dtype=torch.float64)
    other, y = duplicate(layer), layer(x)
    nn.init.zeros_(layer.F["2"].weight)
    assert torch.equal(other(x), y)


def test_state_dict_round_trip():
    layer, x = make(), torch.randn(5, 8, dtype=torch.float64)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = make()
    other.load_state_dict(torch.load(file), strict=True)
    assert torch.equal(other(x), layer(x))


def test_meta_device_then_reset():
    layer = InvertibleAdapter(9, device="meta", init="houlsby")
    assert layer(torch.empty(5, 9, device="meta")).shape == (5, 9)
    layer = layer.to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.constant_(parameter, 1e6)
    layer.reset_parameters()
    assert all(parameter.abs().max() <= 0.02 for parameter in layer.parameters())


def test_to_dtype():
    layer = make().to(torch.bfloat16)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert layer(torch.randn(5, 8, dtype=torch.bfloat16)).dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("error", "named", "options"),
    [
        (ValueError, "hidden_size must be at least 2", {"hidden_size": 1}),
        (TypeError, "hidden_size must be", {"hidden_size": 8.0}),
        (ValueError, "reduction must be above 0", {"reduction": 0}),
        (ValueError, "activation must be", {"activation": "mish"}),
        (ValueError, "init must be", {"init": "zeros"}),
    ],
)
def test_bad_settings(error, named, options):
    with pytest.raises(error, match=named):
        InvertibleAdapter(**{"hidden_size": 8, **options})


@pytest.mark.parametrize("shape", [(5, 9), (8, 1), ()])
def test_bad_inputs(shape):
    with pytest.raises(ValueError, match="x must end in 8 features"):
        make(8)(torch.randn(shape, dtype=torch.float64))
