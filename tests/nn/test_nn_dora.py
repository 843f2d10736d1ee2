"""LoRALinear(use_dora=True): the equation, merging, switching, state dicts, and the kept norm."""

import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft_kernels
from peft_kernels.nn import LoRALinear, norms

X = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))


def make(trained=True, **options):
    torch.manual_seed(0)
    layer = LoRALinear(32, 24, 4, alpha=8, use_dora=True, **options)
    if trained:
        with torch.no_grad():
            layer.lora_b.normal_()
            layer.lora_magnitude.mul_(torch.rand(24) + 0.5)
    return layer


def plain(layer, x):
    adapted = layer.weight + layer.scale * layer.lora_b @ layer.lora_a
    unit = adapted / adapted.detach().norm(dim=1, keepdim=True)
    return F.linear(x, unit * layer.lora_magnitude[:, None], layer.bias)


def test_at_first_it_computes_what_its_base_computes():
    layer = make(trained=False)
    torch.testing.assert_close(layer(X), F.linear(X, layer.weight, layer.bias))
    torch.testing.assert_close(layer.lora_magnitude, layer.weight.norm(dim=1))
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == layer.adapter_names


def test_the_equation_and_its_gradients():
    layer = make()
    found, expected = (
        torch.autograd.grad(y.square().sum(), [getattr(layer, n) for n in layer.adapter_names])
        for y in (layer(X), plain(layer, X))
    )
    torch.testing.assert_close(layer(X), plain(layer, X))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D], ids=["Linear", "Conv1D"])
def test_merging(kind):
    base = kind(24, 32) if kind is Conv1D else kind(32, 24)
    layer = LoRALinear.from_linear(base, 4, alpha=8, use_dora=True)
    nn.init.normal_(layer.lora_b)
    weight, y = layer.weight, layer(X)
    layer.merge()
    torch.testing.assert_close(layer(X), y)
    assert torch.equal(F.linear(X, layer._matrix(layer.weight), layer.bias), layer(X))
    layer.unmerge()
    assert layer.weight is weight and torch.equal(layer(X), y)


def test_a_row_of_zeros_stays_one():
    base = nn.Linear(32, 24)
    nn.init.zeros_(base.weight[3])
    layer = LoRALinear.from_linear(base, 4, alpha=8, use_dora=True)
    y = layer(X)
    assert y.isfinite().all() and torch.equal(y[:, 3], layer.bias[3].expand(5))
    y.sum().backward()
    assert all(getattr(layer, name).grad.isfinite().all() for name in layer.adapter_names)
    layer.merge()
    torch.testing.assert_close(layer(X), y)


def test_switching():
    layer, other = make(), make()
    nn.init.normal_(other.lora_b)
    values = [getattr(other, name).detach().clone() for name in other.adapter_names]
    for merged in (False, True):
        if merged:
            layer.merge()
        layer.switch(*values[:2], magnitude=values[2])
        torch.testing.assert_close(layer(X), other(X))
    with pytest.raises(ValueError, match=r"magnitude must be \[n\] = \[24\]; got None"):
        layer.switch(*values[:2])
    with pytest.raises(ValueError, match=r"magnitude must be \[n\] = \[24\].*\[23\]"):
        layer.switch(*values[:2], magnitude=values[2][1:])
    with pytest.raises(ValueError, match="magnitude must be None"):
        LoRALinear(32, 24, 4, alpha=8).switch(*values[:2], magnitude=values[2])


def test_state_dict_copy_and_pickle():
    layer = make()
    y = layer(X)
    other = LoRALinear(32, 24, 4, alpha=1, use_dora=True)
    other.load_state_dict(layer.state_dict())
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for again in (other, copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(again(X), y)
    layer.merge()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(X), y)


def test_a_plain_state_dict_brings_its_lengths():
    layer, base = make(trained=False), nn.Linear(32, 24)
    layer.load_state_dict(base.state_dict(), strict=False)
    torch.testing.assert_close(layer(X), base(X))


def test_from_the_meta_device():
    base = nn.Sequential(nn.Linear(32, 24))
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(32, 24))
    peft_kernels.swap_linear(model, ["0"], 4, alpha=8, use_dora=True).to_empty(device="cpu")
    model.load_state_dict(base.state_dict(), strict=False)
    torch.testing.assert_close(model(X), base(X))


# ---- the kept norm -----------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """How often the norm's product with A was computed, and the weight's squares."""
    calls = {"dora_norm": 0, "dora_squares": 0}

    def counting(name):
        original = getattr(norms, name)

        def count(*args):
            calls[name] += 1
            return original(*args)

        return count

    for name in calls:
        monkeypatch.setattr(norms, name, counting(name))
    return calls


def test_the_norm_is_kept_while_nothing_changes(counted):
    layer = make()
    for _ in range(3):
        layer(X).sum().backward()
    assert counted == {"dora_norm": 1, "dora_squares": 1}
    optimizer = torch.optim.SGD(layer.parameters(), 0.001)
    for step in range(2, 5):
        optimizer.step()
        torch.testing.assert_close(layer(X), plain(layer, X))
        assert counted == {"dora_norm": step, "dora_squares": 1}


CHANGES = {
    "A": lambda layer: layer.lora_a.data.add_(0.1),
    "B": lambda layer: layer.lora_b.data.add_(0.1),
    "B's last element": lambda layer: layer.lora_b.data[-1, -1].add_(1),
    "the weight": lambda layer: layer.weight.data.mul_(1.5),
    "another weight": lambda layer: setattr(layer.weight, "data", torch.randn(24, 32)),
    "the scale": lambda layer: setattr(layer, "scale", 0.3),
    "the scale, a tensor": lambda layer: setattr(layer, "scale", torch.tensor(0.7)),
    "the dtype": lambda layer: layer.double().float(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_a_change_is_seen(change):
    """Through ``.data`` too, which torch doesn't count."""
    layer = make()
    layer(X)
    change(layer)
    torch.testing.assert_close(layer(X), plain(layer, X))


def test_a_scale_that_is_written_to_is_seen():
    layer = make()
    layer.scale = torch.tensor(0.7)
    layer(X)
    layer.scale.data.mul_(2)
    torch.testing.assert_close(layer(X), plain(layer, X))


def test_it_compiles_and_maps():
    layer = make()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), layer(X))
    parameters = {n: torch.stack([p, 2 * p]) for n, p in layer.named_parameters()}
    mapped = torch.vmap(lambda p: torch.func.functional_call(layer, p, X))(parameters)
    torch.testing.assert_close(mapped[0], layer(X))


def test_under_autocast():
    layer = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(X)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), layer(X), rtol=3e-2, atol=3e-2)
