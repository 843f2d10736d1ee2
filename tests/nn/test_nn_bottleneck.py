"""BottleneckAdapter: the equations, the norms and residuals around it, and a module's manners."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import peft_kernels.nn.bottleneck
from peft_kernels.nn import BottleneckAdapter, stack_adapters

K, R, DTYPE = 6, 3, torch.float64
ACTIVATIONS = {"relu": torch.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


def randomised(module: nn.Module) -> nn.Module:
    """Every parameter as if trained; weights of norms and scales stay about 1."""
    for name, parameter in module.named_parameters():
        near_one = "scaling" in name or (parameter.dim() == 1 and name.endswith("weight"))
        nn.init.normal_(parameter, mean=float(near_one), std=0.3)
    return module


def make(k=K, r=R, *, dtype=DTYPE, **options) -> BottleneckAdapter:
    return randomised(BottleneckAdapter(k, r, dtype=dtype, **options))


def make_norm(k=K) -> nn.LayerNorm:
    return randomised(nn.LayerNorm(k, eps=1e-3, dtype=DTYPE))


def make_inputs(count=2, shape=(2, 4, K), dtype=DTYPE) -> list[torch.Tensor]:
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(count)]


def update(layer: BottleneckAdapter, h: torch.Tensor) -> torch.Tensor:
    """scaling * u(h), as the paper has it."""
    z = ACTIVATIONS[layer.activation](h @ layer.down.weight.T + layer.down.bias)
    return layer.scaling * (z @ layer.up.weight.T + layer.up.bias)


def assert_same(outputs, leaves) -> None:
    """The outputs, and their gradients with respect to each of the leaves."""
    y, expected = outputs
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(expected)
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    found = torch.autograd.grad(y, leaves, grad)
    for ours, exact in zip(found, torch.autograd.grad(expected, leaves, grad), strict=True):
        assert exact.abs().max() > 0
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


@pytest.fixture
def calls(monkeypatch):
    """The keyword arguments of each call of the op."""
    seen = []
    op = peft_kernels.nn.bottleneck.adapter

    def counted(*args, **kwargs):
        seen.append(kwargs)
        return op(*args, **kwargs)

    monkeypatch.setattr(peft_kernels.nn.bottleneck, "adapter", counted)
    return seen


# ---- the equations ---------------------------------------------------------------------------


HOSTS = {
    "update": (lambda a, f, i, ln: a(f), lambda u, f, i, ln: u(f)),
    "houlsby": (
        lambda a, f, i, ln: a(f, residual=(f, i), norm=ln),
        lambda u, f, i, ln: ln(i + f + u(f)),
    ),
    "pfeiffer": (
        lambda a, x, _, ln: a(x, residual=x, pre_norm=ln, norm=ln),
        lambda u, x, _, ln: ln(x + u(ln(x))),
    ),
    "parallel": (
        lambda a, f, i, ln: a(i, residual=(f, i), norm=ln),
        lambda u, f, i, ln: ln(u(i) + f + i),
    ),
    "adapterplus": (lambda a, x, _, ln: a(x, residual=x), lambda u, x, _, ln: x + u(x)),
    "post add": (
        lambda a, x, i, ln: a(x, residual=(x, i), pre_norm=ln, norm=ln),
        lambda u, x, i, ln: ln(x + i + u(ln(x))),
    ),
}


@pytest.mark.parametrize("scale", [1.0, 0.7, "learned", "channel"])
@pytest.mark.parametrize("host", HOSTS)
def test_one_call_does_what_a_host_needs(host, scale, calls):
    ours, formula = HOSTS[host]
    layer, norm, (f, i) = make(scale=scale), make_norm(), make_inputs()
    y = ours(layer, f, i, norm)
    assert len(calls) == 1
    uses_i = host in ("houlsby", "parallel", "post add")
    uses_norm = host not in ("update", "adapterplus")
    leaves = [f, *([i] * uses_i), *layer.parameters(), *(norm.parameters() if uses_norm else ())]
    assert_same((y, formula(lambda h: update(layer, h), f, i, norm)), leaves)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    layer, (x,) = make(activation=activation), make_inputs(1)
    assert_same((layer(x, residual=x), x + update(layer, x)), [x, *layer.parameters()])


@pytest.mark.parametrize("host_norms", [False, True])
@pytest.mark.parametrize("gating", [False, True])
@pytest.mark.parametrize("after", ["none", "update", "sum"])
@pytest.mark.parametrize("before", [False, True])
def test_its_own_norms_and_gate(before, after, gating, host_norms):
    layer = make(
        norm_before=before,
        norm_after=after != "none",
        residual_in_norm=after == "sum",
        gating=gating,
        scale="channel",
    )
    (x, i), ln_1, ln_2 = make_inputs(), make_norm(), make_norm()
    pre_norm, norm = (ln_1, ln_2) if host_norms else (None, None)
    h = ln_1(x) if host_norms else x
    expected = update(layer, layer.norm_before(h) if before else h)
    if gating:
        gate = torch.sigmoid(h @ layer.gate.weight.T + layer.gate.bias).mean(1)
        expected = expected * gate[:, :, None]
    if after == "update":
        expected = layer.norm_after(expected)
    expected = expected + x + i
    if after == "sum":
        expected = layer.norm_after(expected)
    expected = ln_2(expected) if host_norms else expected
    y = layer(x, residual=(x, i), pre_norm=pre_norm, norm=norm)
    host = [*ln_1.parameters(), *ln_2.parameters()] if host_norms else []
    assert_same((y, expected), [x, i, *layer.parameters(), *host])


@pytest.mark.parametrize(
    ("options", "fused"),
    [
        ({}, {"pre_norm", "norm"}),
        ({"norm_before": True}, {"pre_norm", "norm"}),
        ({"norm_after": True}, {"pre_norm", "norm"}),
        ({"gating": True}, set()),
        ({"gating": True, "norm_before": True}, {"pre_norm"}),
    ],
)
def test_what_is_left_to_the_op(options, fused, calls):
    layer, norm, (x,) = make(**options), make_norm(), make_inputs(1)
    layer(x, residual=x, pre_norm=norm, norm=norm)
    (call,) = calls
    assert {name for name in ("pre_norm", "norm") if f"{name}_weight" in call} == fused


def hooked_norm() -> nn.LayerNorm:
    norm = make_norm()
    norm.register_forward_hook(lambda module, args, out: 2 * out)
    return norm


@pytest.mark.parametrize(
    "make_norm",
    [
        lambda: randomised(nn.RMSNorm(K, dtype=DTYPE)),
        lambda: nn.LayerNorm(K, elementwise_affine=False),
        lambda: nn.Identity(),
        lambda: lambda t: 3 * t,
        hooked_norm,
    ],
    ids=["rms", "no weight", "identity", "function", "hooked"],
)
def test_other_norms_are_called(make_norm):
    layer, norm, (x,) = make(), make_norm(), make_inputs(1)
    leaves = [x, *layer.parameters()]
    if isinstance(norm, nn.Module):
        leaves += norm.parameters()
    y = layer(x, residual=x, pre_norm=norm, norm=norm)
    assert_same((y, norm(x + update(layer, norm(x)))), leaves)


def test_a_norm_without_bias():
    layer, (x,) = make(), make_inputs(1)
    norm = randomised(nn.LayerNorm(K, bias=False, dtype=DTYPE))
    y = layer(x, residual=x, pre_norm=norm, norm=norm)
    assert_same((y, norm(x + update(layer, norm(x)))), [x, norm.weight])


def test_hooks_on_its_own_norms_run():
    layer, (x,) = make(norm_before=True, norm_after=True), make_inputs(1)
    before = layer(x, residual=x)
    seen = []
    for norm in (layer.norm_before, layer.norm_after):
        norm.register_forward_hook(lambda module, *_: seen.append(module))
    torch.testing.assert_close(layer(x, residual=x), before, rtol=1e-12, atol=1e-12)
    assert seen == [layer.norm_before, layer.norm_after]


def test_frozen_norms_get_no_gradient():
    layer, norm, (x,) = make(), make_norm().requires_grad_(False), make_inputs(1)
    layer(x, residual=x, pre_norm=norm, norm=norm).sum().backward()
    assert norm.weight.grad is None and norm.bias.grad is None
    assert layer.down.weight.grad is not None


@pytest.mark.parametrize("shape", [(K,), (5, K), (2, 3, 4, K), (0, K)])
def test_any_leading_dimensions(shape):
    layer, (x,) = make(), make_inputs(1, shape)
    y = layer(x, residual=x)
    assert y.shape == shape
    torch.testing.assert_close(y, x + update(layer, x))


def test_the_gate_is_of_each_sequence():
    layer, (x,) = make(gating=True), make_inputs(1, (3, 2, 4, K))
    for one, y in zip(x.flatten(0, 1), layer(x).flatten(0, 1), strict=True):
        torch.testing.assert_close(y, layer(one))
    with pytest.raises(ValueError, match="x must have at least 2 dimensions"):
        layer(x[0, 0, 0])


@pytest.mark.parametrize("style", ["paper", "adapters"])
def test_stacking(style, calls):
    language, task, norm = make(), make(r=2, activation="gelu"), make_norm()
    f, i = make_inputs()
    y = stack_adapters(language, task, f, i, norm=norm, style=style)
    assert len(calls) == 2
    below = update(language, norm(f + i))
    if style == "paper":
        above = update(task, below + f)
        expected = norm(above + f + i)
    else:
        above = update(task, norm(below + f + i))
        expected = norm(above + below + f + i)
    leaves = [f, i, *language.parameters(), *task.parameters(), *norm.parameters()]
    assert_same((y, expected), leaves)


def test_an_unknown_style():
    layer, (f, i) = make(), make_inputs()
    with pytest.raises(ValueError, match="style must be one of paper, adapters; got 'stack'"):
        stack_adapters(layer, layer, f, i, norm=make_norm(), style="stack")


# ---- dropout, dtypes -------------------------------------------------------------------------


@pytest.mark.parametrize("gating", [False, True])
def test_dropout_in_training_only(gating):
    layer, (x,) = make(dropout=0.5, gating=gating), make_inputs(1, (64, K))
    assert not torch.equal(layer(x), layer(x))
    dropped = layer(x) == 0
    assert 0.3 < dropped.double().mean() < 0.7
    kept = layer(x) / layer.eval()(x)
    assert torch.equal(layer(x), layer(x))
    assert all(abs(value) < 1e-9 or abs(value - 2) < 1e-9 for value in kept.flatten().tolist())


@pytest.mark.parametrize("options", [{}, {"gating": True}, {"norm_before": True}])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs(dtype, wide, options):
    layer, norm = make(norm_after=True, **options), make_norm()
    x, i = (t.detach().to(dtype) for t in make_inputs())
    exact = layer(x.double(), residual=(x.double(), i.double()), pre_norm=norm, norm=norm)
    layer, norm = (m.to(torch.float32 if wide else dtype) for m in (layer, norm))
    y = layer(x, residual=(x, i), pre_norm=norm, norm=norm)
    assert y.dtype is dtype
    torch.testing.assert_close(y.double(), exact, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("gating", [False, True])
def test_autocast(gating):
    layer, norm = make(norm_after=True, gating=gating, dtype=torch.float32), make_norm().float()
    (x,) = make_inputs(1, dtype=torch.float32)
    exact = layer(x, residual=x, pre_norm=norm, norm=norm)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, residual=x, pre_norm=norm, norm=norm)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=5e-2, atol=5e-2)


def test_to_dtype():
    layer = make(scale="channel", norm_before=True, gating=True).to(torch.bfloat16)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert layer(torch.randn(2, K, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_the_scale_may_be_set():
    layer, (x,) = make(), make_inputs(1)
    before = layer(x)
    layer.scaling = -2.0
    torch.testing.assert_close(layer(x), -2 * before)


@pytest.mark.parametrize("options", [{}, {"norm_after": True, "gating": True}])
@pytest.mark.parametrize("host", ["houlsby", "pfeiffer"])
def test_compiles_without_a_break(host, options):
    layer, norm, (f, i) = make(scale="learned", **options), make_norm(), make_inputs()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    call, leaves = HOSTS[host][0], [f, *layer.parameters(), *norm.parameters()]
    assert_same((call(compiled, f, i, norm), call(layer, f, i, norm)), leaves)


# ---- construction ----------------------------------------------------------------------------


def test_presets():
    for preset, reduction, activation, scale, init in (
        ("pfeiffer", 16, "relu", 1.0, "bert"),
        ("houlsby", 16, "silu", 1.0, "bert"),
        ("parallel", 2, "relu", 4.0, "mam"),
        ("adapterplus", 96, "gelu", "channel", "houlsby"),
    ):
        layer = BottleneckAdapter.from_preset(preset, 192)
        assert layer.bottleneck_size == 192 // reduction
        assert (layer.activation, layer.init) == (activation, init)
        if scale == "channel":
            assert torch.equal(layer.scaling, torch.ones(192)) and layer.scaling.requires_grad
        else:
            assert layer.scaling == scale


def test_a_preset_with_changes():
    layer = BottleneckAdapter.from_preset("pfeiffer", 50, reduction=7.5, scale="learned")
    assert layer.bottleneck_size == 6 and layer.scaling.shape == (1,)
    assert BottleneckAdapter.from_preset("pfeiffer", 5).bottleneck_size == 1
    layer = BottleneckAdapter.from_preset("parallel", 50, bottleneck_size=9, dtype=DTYPE)
    assert layer.bottleneck_size == 9 and layer.down.weight.dtype is DTYPE
    with pytest.raises(ValueError, match="reduction can't be given along with bottleneck_size"):
        BottleneckAdapter.from_preset("parallel", 50, bottleneck_size=9, reduction=2)
    with pytest.raises(ValueError, match="reduction must be above 0"):
        BottleneckAdapter.from_preset("parallel", 50, reduction=0)
    with pytest.raises(ValueError, match=r"preset must be one of pfeiffer.*; got 'seq'"):
        BottleneckAdapter.from_preset("seq", 50)


def test_initialisation():
    options = {"gating": True, "scale": "channel", "norm_before": True, "norm_after": True}
    bert, mam, houlsby = (
        BottleneckAdapter(400, 100, init=init, **options).requires_grad_(False)
        for init in ("bert", "mam", "houlsby")
    )
    for layer in (bert, mam, houlsby):
        assert not layer.down.bias.any() and not layer.up.bias.any() and not layer.gate.bias.any()
        assert (layer.scaling == 1).all() and (layer.norm_after.weight == 1).all()
        assert layer.gate.weight.std() == pytest.approx(0.02, rel=0.2)
    for weight in (bert.down.weight, bert.up.weight):
        assert weight.std() == pytest.approx(0.02, rel=0.05) and weight.abs().max() > 0.05
    for weight in (houlsby.down.weight, houlsby.up.weight):
        assert weight.abs().max() <= 0.02
        # a normal cut at two deviations has 0.8796 of its deviation left
        assert weight.std() == pytest.approx(0.8796e-2, rel=0.02)
    assert mam.down.weight.abs().max() <= 1 / math.sqrt(400)
    assert mam.down.weight.std() == pytest.approx(1 / math.sqrt(3 * 400), rel=0.05)
    assert not mam.up.weight.any()


@pytest.mark.parametrize("init", ["bert", "mam", "houlsby"])
def test_a_new_adapter_is_nearly_the_identity(init):
    layer, x = BottleneckAdapter(256, 16, init=init), torch.randn(8, 256)
    change = (layer(x, residual=x) - x).norm() / x.norm()
    assert change < 0.05 if init != "mam" else change == 0


def test_meta_device_then_reset():
    options = {"scale": "channel", "norm_before": True, "norm_after": True, "gating": True}
    layer = BottleneckAdapter(K, R, init="houlsby", device="meta", **options)
    assert layer(torch.empty(2, 4, K, device="meta")).shape == (2, 4, K)
    layer = layer.to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.constant_(parameter, 1e6)
    layer.reset_parameters()
    assert all(parameter.abs().max() <= 1 for parameter in layer.parameters())
    assert 0 < layer.down.weight.abs().max() <= 0.02


@pytest.mark.parametrize(
    ("error", "named", "options"),
    [
        (ValueError, "hidden_size must be", {"hidden_size": 0}),
        (TypeError, "hidden_size must be", {"hidden_size": 6.0}),
        (ValueError, "bottleneck_size must be", {"bottleneck_size": 0}),
        (TypeError, "bottleneck_size must be", {"bottleneck_size": True}),
        (ValueError, "activation must be", {"activation": "mish"}),
        (ValueError, "scale must be", {"scale": "channels"}),
        (ValueError, "scale must be", {"scale": math.inf}),
        (ValueError, "scale must be", {"scale": None}),
        (ValueError, "dropout must be", {"dropout": 1.0}),
        (ValueError, "dropout must be", {"dropout": -0.1}),
        (ValueError, "init must be one of bert, mam, houlsby; got 'zeros'", {"init": "zeros"}),
        (ValueError, "residual_in_norm needs norm_after", {"residual_in_norm": True}),
    ],
)
def test_bad_settings(error, named, options):
    with pytest.raises(error, match=named):
        BottleneckAdapter(**{"hidden_size": 6, "bottleneck_size": 2, **options})


# ---- a module's manners ----------------------------------------------------------------------

FULL = {"scale": "channel", "norm_before": True, "norm_after": True, "gating": True}


def test_names():
    layer = make(**FULL)
    expected = {"scaling"} | {
        f"{part}.{name}"
        for part in ("down", "up", "norm_before", "norm_after", "gate")
        for name in ("weight", "bias")
    }
    assert set(layer.state_dict()) == expected
    own = {"down.weight", "down.bias", "up.weight", "up.bias"}
    assert set(make().state_dict()) == own | {"_extra_state"}


def test_repr():
    text = repr(make(scale=4, activation="swish", dropout=0.25))
    assert "hidden_size=6, bottleneck_size=3, activation=silu, scale=4.0, dropout=0.25" in text
    assert "scale=learned" in repr(make(scale="learned"))
    text = repr(make(scale="channel", norm_after=True, residual_in_norm=True))
    assert "scale=channel" in text and "residual_in_norm=True" in text and "norm_after" in text


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))],
    ids=["deepcopy", "pickle"],
)
def test_copies(duplicate):
    layer, (x,) = make(**FULL), make_inputs(1)
    other, y = duplicate(layer), layer(x)
    assert torch.equal(other(x), y)
    nn.init.zeros_(layer.up.weight)
    assert torch.equal(other(x), y)


def test_state_dict_round_trip():
    layer, (x,) = make(**FULL), make_inputs(1)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = make(**FULL)
    other.load_state_dict(torch.load(file), strict=True)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("scale", [0.3, "learned", "channel"])
def test_the_state_dict_has_the_scaling(scale):
    source, target = BottleneckAdapter(8, 3, scale=scale), BottleneckAdapter(8, 3, scale=scale)
    state = source.state_dict()
    assert ("_extra_state" in state, "scaling" in state) == (scale == 0.3, scale != 0.3)
    if scale == 0.3:
        target.scaling = 2.0
    target.load_state_dict(state, strict=True)
    x = torch.randn(5, 8)
    assert torch.equal(target(x), source(x))
    state.pop("_extra_state", None)
    target.load_state_dict(state, strict=True)
    assert torch.equal(target(x), source(x))
