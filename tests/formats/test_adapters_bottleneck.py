"""Against the `adapters` library itself: its modules, its BERT layers, its presets."""

import pytest

pytest.importorskip("adapters")

import adapters
import torch
from adapters.composition import Stack
from adapters.configuration import (
    AdapterPlusConfig,
    BnConfig,
    DoubleSeqBnConfig,
    ParBnConfig,
    SeqBnConfig,
)
from adapters.methods.modeling import Adapter, NICECouplingBlock, ParallelAdapter
from tiny_models import make_bert
from torch import nn

from peft_kernels.nn import BottleneckAdapter, InvertibleAdapter, stack_adapters

K, R, DTYPE = 16, 3, torch.float64
INITS = {"bert": "bert", "mam_adapter": "mam", "houlsby": "houlsby"}
PARTS = {
    "adapter_up": "up",
    "adapter_norm_before": "norm_before",
    "adapter_norm_after": "norm_after",
    "gate": "gate",
}


def randomised(module: nn.Module) -> nn.Module:
    """Every parameter as if trained; weights of norms and scales stay about 1."""
    for name, parameter in module.named_parameters():
        near_one = "scaling" in name or (parameter.dim() == 1 and name.endswith("weight"))
        nn.init.normal_(parameter, mean=float(near_one), std=0.3)
    return module


def theirs(config: BnConfig) -> Adapter:
    kind = ParallelAdapter if config.is_parallel else Adapter
    return randomised(kind("x", K, R, config).to(DTYPE))


def our_name(name: str, config: BnConfig) -> str | None:
    """What a parameter of theirs is called here; None where it is listed a second time."""
    part, _, rest = name.partition(".")
    if part != "adapter_down":
        return f"{PARTS[part]}.{rest}" if rest else part
    index, _, rest = rest.partition(".")
    return f"down.{rest}" if index == str(int(config.ln_before)) else None


def ours(module: Adapter, config: BnConfig) -> BottleneckAdapter:
    """Our module with the settings and the weights of theirs."""
    layer = BottleneckAdapter(
        module.input_size,
        module.down_sample,
        activation=config.non_linearity,
        scale=config.scaling,
        norm_before=config.ln_before,
        norm_after=config.ln_after,
        residual_in_norm=config.ln_after and config.adapter_residual_before_ln,
        gating=config.use_gating,
        dtype=DTYPE,
    )
    state = {our_name(name, config): value for name, value in module.state_dict().items()}
    state.pop(None, None)
    layer.load_state_dict(state, strict=True)
    return layer


def double_seq(a, f, i, ln):
    return a(f, residual=(f, i), norm=ln)


def seq(a, f, i, ln):
    x = f + i
    return a(x, residual=x, pre_norm=ln, norm=ln)


def par(a, f, i, ln):
    return a(i, residual=(f, i), norm=ln)


def plus(a, f, i, ln):
    x = ln(f + i)
    return a(x, residual=x)


def plus_pre_norm(a, f, i, ln):
    x = f + i
    return a(x, residual=x)


def post_add(a, f, i, ln):
    x = f + i
    return a(x, residual=x, pre_norm=ln)


def post_add_ln_after(a, f, i, ln):
    x = f + i
    return a(x, residual=(x, i), pre_norm=ln, norm=ln)


def double_seq_in_norm(a, f, i, ln):
    return ln(i + a(f, residual=f))


def seq_in_norm(a, f, i, ln):
    return ln(i + a(f + i, residual=f, pre_norm=ln))


def seq_normed_residual(a, f, i, ln):
    x = ln(f + i)
    return a(x, residual=(x, i), norm=ln)


NO_DEPTH = {"stochastic_depth": 0.0}  # it needs torchvision, and is not offered here
GATING, BEFORE, AFTER = {"use_gating": True}, {"ln_before": True}, {"ln_after": True}
IN_NORM = AFTER | {"adapter_residual_before_ln": True}
CASES = {
    "double_seq_bn": (DoubleSeqBnConfig(), double_seq),
    "double_seq_bn gating": (DoubleSeqBnConfig(**GATING), double_seq),
    "double_seq_bn ln_before": (DoubleSeqBnConfig(**BEFORE), double_seq),
    "double_seq_bn ln_after": (DoubleSeqBnConfig(**AFTER), double_seq),
    "double_seq_bn in norm": (DoubleSeqBnConfig(**IN_NORM), double_seq_in_norm),
    "seq_bn": (SeqBnConfig(), seq),
    "seq_bn learned": (SeqBnConfig(scaling="learned"), seq),
    "seq_bn channel": (SeqBnConfig(scaling="channel"), seq),
    "seq_bn leakyrelu": (SeqBnConfig(non_linearity="leakyrelu"), seq),
    "seq_bn gelu_new": (SeqBnConfig(non_linearity="gelu_new"), seq),
    "seq_bn gating": (SeqBnConfig(**GATING), seq),
    "seq_bn ln_before": (SeqBnConfig(**BEFORE), seq),
    "seq_bn ln_after": (SeqBnConfig(**AFTER), seq),
    "seq_bn in norm": (SeqBnConfig(**IN_NORM), seq_in_norm),
    "seq_bn everything": (SeqBnConfig(**GATING, **BEFORE, **AFTER, scaling="channel"), seq),
    "seq_bn normed residual": (SeqBnConfig(residual_before_ln=False), seq_normed_residual),
    "post_add": (SeqBnConfig(residual_before_ln="post_add", original_ln_after=False), post_add),
    "post_add ln_after": (SeqBnConfig(residual_before_ln="post_add"), post_add_ln_after),
    "par_bn": (ParBnConfig(), par),
    "par_bn gating": (ParBnConfig(**GATING), par),
    "par_bn ln_before": (ParBnConfig(**BEFORE), par),
    "par_bn ln_after": (ParBnConfig(**AFTER), par),
    "AdapterPlus": (AdapterPlusConfig(**NO_DEPTH), plus),
    "AdapterPlus pre-LayerNorm": (AdapterPlusConfig(**NO_DEPTH), plus_pre_norm),
}


def assert_same_gradients(y, expected, pairs) -> None:
    """Outputs, and gradients by each pair (ours, theirs) of tensors."""
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(expected)
    found = torch.autograd.grad(y, [a for a, _ in pairs], grad)
    exact = torch.autograd.grad(expected, [b for _, b in pairs], grad)
    for (a, _), b in zip(zip(found, pairs, strict=True), exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert b.any()


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(case):
    config, call = CASES[case]
    module = theirs(config)
    layer = ours(module, config)
    ln = randomised(nn.LayerNorm(K, eps=1e-12, dtype=DTYPE))
    f, i = (torch.randn(2, 5, K, dtype=DTYPE, requires_grad=True) for _ in range(2))
    host_norm = None if call is plus_pre_norm else ln
    h, _, residual = module.pre_forward(f, i, host_norm)
    out = module.post_forward(module(h, residual)[0], f, i, host_norm)
    mine = dict(layer.named_parameters())
    pairs = [(mine.pop(our_name(name, config)), p) for name, p in named_once(module, config)]
    assert not mine
    if host_norm is not None:
        pairs += [(p, p) for p in ln.parameters()]
    assert_same_gradients(call(layer, f, i, ln), out, [*pairs, (f, f), (i, i)])


def named_once(module: Adapter, config: BnConfig):
    """named_parameters, with each under a name that :func:`our_name` knows."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if our_name(name, config) is not None:
            yield name, parameter


@pytest.mark.parametrize(
    ("preset", "config"),
    [
        ("pfeiffer", SeqBnConfig()),
        ("houlsby", DoubleSeqBnConfig()),
        ("parallel", ParBnConfig()),
        ("adapterplus", AdapterPlusConfig(**NO_DEPTH)),
    ],
)
@pytest.mark.parametrize("size", [768, 100, 5])
def test_presets_are_theirs(preset, config, size):
    module = Adapter("x", size, int(size // config.reduction_factor), config)
    layer = BottleneckAdapter.from_preset(preset, size)
    same = BottleneckAdapter(size, 1, activation=config.non_linearity)
    assert layer.activation == same.activation
    assert layer.bottleneck_size == module.down_sample
    assert layer.init == INITS[config.init_weights]
    if isinstance(config.scaling, str):
        assert torch.equal(layer.scaling, module.scaling)
    else:
        assert layer.scaling == module.scaling


# ---- whole models ----------------------------------------------------------------------------


def adapted_bert(setup, **configs) -> nn.Module:
    model = make_bert().to(DTYPE).eval()
    adapters.init(model)
    for name, config in configs.items():
        model.add_adapter(name, config=config)
    model.set_active_adapters(setup)
    return randomised(model.to(DTYPE))


def recorded(model: nn.Module, modules) -> list[tuple]:
    """For each of the modules in a forward: f, i and the module's output."""
    seen = {}

    def hook(module, args, output):
        hidden, i = args
        seen[module] = module.dense(hidden), i, output

    for module in modules:
        module.register_forward_hook(hook)
    with torch.no_grad():
        model(torch.arange(12).reshape(2, 6))
    return [seen[module] for module in modules]


@pytest.mark.parametrize("case", ["double_seq_bn", "seq_bn", "seq_bn gating", "par_bn"])
def test_layers_of_bert(case):
    config, call = CASES[case]
    model = adapted_bert("x", x=config)
    modules = [layer.output for layer in model.encoder.layer]
    if config.mh_adapter:
        modules += [layer.attention.output for layer in model.encoder.layer]
    for module, (f, i, out) in zip(modules, recorded(model, modules), strict=True):
        layer = ours(module.adapters["x"], config)
        torch.testing.assert_close(call(layer, f, i, module.LayerNorm), out, rtol=0, atol=1e-12)


def test_stack_in_bert():
    language, task = SeqBnConfig(), SeqBnConfig(reduction_factor=4, non_linearity="gelu")
    model = adapted_bert(Stack("language", "task"), language=language, task=task)
    modules = [layer.output for layer in model.encoder.layer]
    for module, (f, i, out) in zip(modules, recorded(model, modules), strict=True):
        below = ours(module.adapters["language"], language)
        above = ours(module.adapters["task"], task)
        styles = {
            style: stack_adapters(below, above, f, i, norm=module.LayerNorm, style=style)
            for style in ("adapters", "paper")
        }
        torch.testing.assert_close(styles["adapters"], out, rtol=0, atol=1e-12)
        assert not torch.allclose(styles["paper"], out, atol=1e-3)


@pytest.mark.parametrize("reduction", [2, 1.5])
@pytest.mark.parametrize("k", [5, 8])
@pytest.mark.parametrize("inverse", [False, True])
def test_invertible(inverse, k, reduction):
    block = NICECouplingBlock([[k]], non_linearity="gelu", reduction_factor=reduction).to(DTYPE)
    randomised(block)
    layer = InvertibleAdapter(k, reduction=reduction, activation="gelu", dtype=DTYPE)
    layer.load_state_dict(block.state_dict(), strict=True)
    x = torch.randn(2, 5, k, dtype=DTYPE, requires_grad=True)
    theirs_by_name = dict(block.named_parameters())
    pairs = [(p, theirs_by_name[name]) for name, p in layer.named_parameters()]
    assert_same_gradients(layer(x, inverse=inverse), block(x, rev=inverse), [*pairs, (x, x)])


def test_invertible_in_bert():
    model = adapted_bert("x", x="seq_bn_inv")
    block = model.invertible_adapters["x"]
    layer = InvertibleAdapter(K, dtype=DTYPE)
    layer.load_state_dict(block.state_dict(), strict=True)
    seen = []
    block.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        model(torch.arange(12).reshape(2, 6))
    ((x, out),) = seen
    torch.testing.assert_close(layer(x), out, rtol=0, atol=1e-12)
