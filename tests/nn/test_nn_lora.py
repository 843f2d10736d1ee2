"""LoRALinear: a drop-in for nn.Linear."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from lora_layers import expected, make_layer
from torch import nn

from peft_kernels.nn import LoRALinear


def conv1d(k: int, n: int) -> nn.Module:
    torch.manual_seed(1)
    layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(n, k)
    nn.init.normal_(layer.bias)
    return layer


# ---- construction ----------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("use_rslora", [True, False])
def test_forward_is_the_equation(bias, use_rslora):
    layer = make_layer(bias=bias, use_rslora=use_rslora)
    assert layer.scale == (6 / math.sqrt(3) if use_rslora else 2.0)
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(layer(x).double(), expected(layer, x), rtol=1e-5, atol=1e-5)


def test_a_new_layer_computes_what_its_base_computes():
    linear = nn.Linear(12, 7)
    layer = LoRALinear.from_linear(linear, 4, alpha=8, init="gaussian")
    x = torch.randn(3, 12)
    torch.testing.assert_close(layer(x), F.linear(x, linear.weight, linear.bias))


def test_initialisation():
    wide = LoRALinear(4096, 2, 16, alpha=1).requires_grad_(False)
    assert wide.lora_a.abs().max() <= 1 / math.sqrt(4096)
    assert wide.lora_a.std() == pytest.approx(1 / math.sqrt(3 * 4096), rel=0.05)
    gaussian = LoRALinear(4096, 2, 16, alpha=1, init="gaussian").requires_grad_(False)
    assert gaussian.lora_a.std() == pytest.approx(1 / 16, rel=0.05)
    assert not wide.lora_b.any()


@pytest.mark.parametrize("use_rslora", [True, False])
def test_alpha_is_what_was_given(use_rslora):
    for r in range(1, 80):
        for alpha in (1, 3, 16, 49):
            layer = LoRALinear(1, 1, r, alpha=alpha, use_rslora=use_rslora)
            assert layer.alpha == alpha and isinstance(layer.alpha, int)


def test_from_linear_keeps_the_parameters_and_freezes_them():
    linear = nn.Linear(5, 4).eval()
    weight, bias = linear.weight, linear.bias
    layer = LoRALinear.from_linear(linear, 2, alpha=4)
    assert layer.weight is weight and layer.bias is bias
    assert not weight.requires_grad and not bias.requires_grad
    assert layer.lora_a.requires_grad and layer.lora_b.requires_grad
    assert not layer.training


def test_conv1d_is_taken_as_it_is_stored():
    base = conv1d(5, 9)
    x = torch.randn(2, 3, 5)
    before = base(x)
    layer = LoRALinear.from_linear(base, 2, alpha=4)
    assert layer.weight is base.weight and layer.fan_in_fan_out
    assert (layer.in_features, layer.out_features) == (5, 9)
    torch.testing.assert_close(layer(x), before)
    nn.init.normal_(layer.lora_b)
    adapted, weight = layer(x), layer.weight.clone()
    assert (adapted - before).abs().max() > 0.1
    layer.merge()
    torch.testing.assert_close(layer(x), adapted, rtol=1e-5, atol=1e-5)
    assert layer.weight.shape == weight.shape
    layer.unmerge()
    assert torch.equal(layer.weight, weight) and torch.equal(layer(x), adapted)


@pytest.mark.parametrize(
    ("base", "adapter", "expected_dtype"),
    [
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_adapter_dtype(base, adapter, expected_dtype):
    layer = make_layer(dtype=base, adapter_dtype=adapter)
    assert layer.lora_a.dtype is layer.lora_b.dtype is expected_dtype
    x = torch.randn(4, 12, dtype=base)
    assert layer(x).dtype is base
    tolerance = 1e-5 if base.itemsize > 2 else 3e-2
    torch.testing.assert_close(
        layer(x).double(), expected(layer, x), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize(
    ("error", "named", "options"),
    [
        (ValueError, "r must be", {"r": 0}),
        (TypeError, "r must be", {"r": 2.0}),
        (TypeError, "alpha must be", {"alpha": "8"}),
        (ValueError, "alpha must be", {"alpha": math.inf}),
        (ValueError, "dropout must be", {"dropout": 1.0}),
        (ValueError, "dropout must be", {"dropout": -0.1}),
        (ValueError, "init must be", {"init": "zeros"}),
        (TypeError, "adapter_dtype must be", {"adapter_dtype": torch.bfloat16}),
        (TypeError, "adapter_dtype must be", {"adapter_dtype": torch.float64}),
        (TypeError, "weight that must be float32", {"dtype": torch.complex64}),
    ],
)
def test_bad_settings(error, named, options):
    with pytest.raises(error, match=named):
        LoRALinear(6, 4, **{"r": 2, "alpha": 4, **options})


def given(name: str) -> nn.Module:
    """A layer with a method of its own in place of its class's."""
    linear = nn.Linear(4, 4)
    setattr(linear, name, lambda *args, **kwargs: None)
    return linear


def with_attribute() -> nn.Module:
    linear = nn.Linear(4, 4)
    linear.scale = 3
    return linear


def compiled() -> nn.Module:
    linear = nn.Linear(4, 4)
    linear.compile()
    return linear


def parametrized(parameter: str) -> nn.Module:
    linear = nn.Linear(4, 4)
    nn.utils.parametrize.register_parametrization(linear, parameter, nn.Identity())
    return linear


class Saving(nn.Linear):
    def get_extra_state(self):
        return "more"


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("make_base", "named"),
    [
        (lambda: nn.Embedding(4, 4), "got torch.nn.modules.sparse.Embedding"),
        (lambda: LoRALinear(4, 4, 2, alpha=4), "LoRALinear already"),
        (lambda: nn.MultiheadAttention(4, 2).out_proj, "MultiheadAttention"),
        (lambda: Scaled(4, 4), r"own forward; \S*\.Scaled has another"),
        (lambda: Saving(4, 4), "get_extra_state of its own"),
        (lambda: given("forward"), "class's own forward"),
        (lambda: given("train"), "its class's own train"),
        (compiled, "not be compiled by itself"),
        (with_attribute, "nothing called 'scale'"),
        (lambda: parametrized("bias"), "no parametrizations"),
        (lambda: nn.LazyLinear(4), "initialised"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "Parameter of its own"),
    ],
)
def test_bases_that_cannot_be_taken_over(make_base, named):
    base = make_base()
    flags = [p.requires_grad for p in base.parameters()]
    with pytest.raises(TypeError, match=named):
        LoRALinear.from_linear(base, 2, alpha=4)
    assert [p.requires_grad for p in base.parameters()] == flags


# ---- a drop-in -------------------------------------------------------------------------------


def test_it_is_a_linear():
    layer = make_layer(dropout=0.25)
    assert isinstance(layer, nn.Linear)
    assert "in_features=12, out_features=7, bias=True, r=3, scale=2.0, dropout=0.25" in repr(layer)
    assert list(layer.state_dict()) == ["weight", "bias", "lora_a", "lora_b", "_extra_state"]
    assert layer.alpha == 6


def test_gradients_reach_x_and_the_adapter_alone():
    layer = make_layer()
    x = torch.randn(5, 12, requires_grad=True)
    layer(x).square().sum().backward()
    for tensor in (x, layer.lora_a, layer.lora_b):
        assert tensor.grad is not None and tensor.grad.abs().max() > 0
    assert layer.weight.grad is None and layer.bias.grad is None


def test_dropout_in_training_only():
    layer = make_layer(dropout=0.5)
    x = torch.randn(64, 12)
    base = F.linear(x, layer.weight, layer.bias)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x).double(), expected(layer, x), rtol=1e-5, atol=1e-5)
    nn.init.zeros_(layer.train().lora_b)
    torch.testing.assert_close(layer(x), base)


def test_scale_may_become_a_tensor():
    layer = make_layer()
    x = torch.randn(5, 12)
    base = F.linear(x, layer.weight, layer.bias)
    difference = layer(x) - base
    layer.scale = torch.tensor(4.0)
    torch.testing.assert_close(layer(x) - base, 2 * difference, rtol=1e-4, atol=1e-4)
    assert layer.alpha == 12


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))],
    ids=["deepcopy", "pickle"],
)
def test_copies(duplicate, merged):
    layer = make_layer()
    x = torch.randn(5, 12)
    unmerged = layer(x)
    if merged:
        layer.merge()
    other = duplicate(layer)
    assert torch.equal(other(x), layer(x)) and other.merged is merged
    nn.init.zeros_(layer.weight)
    if merged:
        other.unmerge()
    assert torch.equal(other(x), unmerged)


@pytest.mark.filterwarnings("ignore:the state dict of a model with merged")
@pytest.mark.parametrize("merged", [False, True])
def test_state_dict_round_trip(merged):
    layer = make_layer(dtype=torch.bfloat16)
    x = torch.randn(5, 12, dtype=torch.bfloat16)
    unmerged, weight = layer(x), layer.weight.clone()
    if merged:
        layer.merge()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    assert list(state) == ["weight", "bias", "lora_a", "lora_b", "_extra_state"]
    assert torch.equal(state["weight"], weight)
    other = LoRALinear(12, 7, 3, alpha=6, dtype=torch.bfloat16)
    other.load_state_dict(state, strict=True)
    assert torch.equal(other(x), unmerged)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("scale", [0.3, torch.tensor(0.3)], ids=["float", "tensor"])
def test_the_state_dict_has_the_scale(scale, merged):
    source, target = make_layer(), nn.Sequential(make_layer(trained=False))
    source.scale = 1 / 3
    target[0].scale = scale
    if merged:
        target[0].merge()
    target.load_state_dict(nn.Sequential(source).state_dict())
    assert type(target[0].scale) is type(scale)
    x = torch.randn(5, 12)
    torch.testing.assert_close(target(x), source(x), rtol=1e-5, atol=1e-5)
    source.scale = 5.0  # what was loaded is the target's own
    assert target[0].scale == pytest.approx(1 / 3)


def test_a_state_dict_without_a_scale_leaves_it():
    layer = make_layer()
    state = layer.state_dict()
    del state["_extra_state"]
    layer.scale = 0.7
    layer.load_state_dict(state, strict=True)
    assert layer.scale == 0.7
    del state["lora_b"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"lora_b\"\."):
        layer.load_state_dict(state)
    assert layer.load_state_dict(nn.Linear(12, 7).state_dict(), strict=False).missing_keys == [
        "lora_a",
        "lora_b",
    ]


def test_loading_into_a_merged_layer_merges_anew():
    source, target = make_layer(), make_layer(trained=False)
    nn.init.normal_(source.weight)
    target.merge()
    target.load_state_dict(source.state_dict())
    x = torch.randn(5, 12)
    torch.testing.assert_close(target(x), source(x), rtol=1e-5, atol=1e-5)
    target.unmerge()
    assert torch.equal(target(x), source(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_to_dtype(dtype):
    layer = make_layer().to(dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    x = torch.randn(5, 12, dtype=dtype)
    torch.testing.assert_close(layer(x).double(), expected(layer, x), rtol=2e-2, atol=2e-2)


def test_half_while_merged_keeps_the_base():
    layer = make_layer()
    half_base = layer.weight.half()
    layer.merge()
    layer.half().unmerge()
    assert torch.equal(layer.weight, half_base)


def test_meta_device_then_reset():
    layer = LoRALinear(12, 7, 3, alpha=6, device="meta")
    assert layer(torch.empty(5, 12, device="meta")).shape == (5, 7)
    layer = layer.to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.constant_(parameter, 1e6)
    layer.reset_parameters()
    bound = 1 / math.sqrt(12)
    for parameter in (layer.weight, layer.bias, layer.lora_a):
        assert 0 < parameter.abs().max() <= bound
    assert not layer.lora_b.any()


def test_tied_weights_stay_tied():
    embedding = nn.Embedding(7, 12)
    head = nn.Linear(12, 7, bias=False)
    head.weight = embedding.weight
    layer = LoRALinear.from_linear(head, 2, alpha=4)
    assert layer.weight is embedding.weight
    layer.double()
    assert layer.weight is embedding.weight and embedding.weight.dtype is torch.float64


def test_a_scale_that_requires_a_gradient_is_refused():
    layer = LoRALinear(4, 3, 2, alpha=4)
    layer.scale = nn.Parameter(torch.tensor(0.5))
    nn.init.normal_(layer.lora_b)
    x = torch.randn(2, 4)
    for trains in (True, False):
        layer.lora_a.requires_grad_(trains), layer.lora_b.requires_grad_(trains)
        with pytest.raises(ValueError, match=r"scale must not require .*scale\.detach\(\)"):
            layer(x)
    with torch.no_grad():
        y = layer(x)
    layer.scale.requires_grad_(False)
    assert torch.equal(layer(x), y)
