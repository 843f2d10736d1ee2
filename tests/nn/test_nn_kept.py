"""Values made of parameters: made again when these change, and only then."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from peft_kernels.nn import AdapterFusion, BottleneckAdapter, PrefixTuning, PTuning, Template
from peft_kernels.nn._kept import Kept
from peft_kernels.nn._template import Input, Slots


def write(p):
    with torch.no_grad():
        p.add_(1)


CHANGES = {
    "write": write,
    "write through .data": lambda p: p.data.add_(1),
    "one value through .data": lambda p: p.data.view(-1)[-1].add_(1),
    "signs through .data": lambda p: p.data.neg_(),
    "order through .data": lambda p: p.data.copy_(p.detach().flip(-1)),
    "other memory": lambda p: setattr(p, "data", p.detach() + 1),
    "other dtype": lambda p: setattr(p, "data", p.detach().double()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("shape", [(3,), (80, 70), (9000,), (2, 3, 40, 50)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changes_are_seen(change, shape, dtype):
    kept, p = Kept(), nn.Parameter(torch.randn(shape, dtype=dtype))

    def get():
        return kept.get(lambda: 2 * p, [p])

    first = get()
    assert get() is first
    assert not first.requires_grad
    CHANGES[change](p)
    assert torch.equal(get(), 2 * p.detach())
    assert get().dtype is p.dtype


def test_settings_and_autocast_are_seen():
    kept, x = Kept(), torch.ones(2, 2)
    assert kept.get(lambda: "a", [x], 1) == "a"
    assert kept.get(lambda: "b", [x], 1) == "a"
    assert kept.get(lambda: "b", [x], 2) == "b"
    with torch.autocast("cpu", torch.bfloat16):
        assert kept.get(lambda: x @ x, [x], 2).dtype is torch.bfloat16
    assert kept.get(lambda: x @ x, [x], 2).dtype is torch.float32


def test_inference_mode():
    kept, p = Kept(), nn.Parameter(torch.ones(3))
    with torch.inference_mode():
        first = kept.get(lambda: 2 * p, [p])
        made_here = torch.ones(3)
        assert kept.get(lambda: made_here + 1, [made_here]).sum() == 6
        made_here.add_(1)
        assert kept.get(lambda: made_here + 1, [made_here]).sum() == 9
    assert not first.is_inference()
    assert kept.get(lambda: 2 * p, [p]) is first


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_hold_nothing(copied):
    kept, x = Kept(), torch.ones(3)
    kept.get(lambda: "old", [x])
    assert copied(kept).get(lambda: "new", [x]) == "new"


def modules():
    yield AdapterFusion([BottleneckAdapter(8, 2) for _ in range(2)]), lambda m, x: m(x)
    template = Template([Slots(3), Input("x")], model="causal")
    yield PTuning(template, 8, encoder="mlp"), lambda m, x: m.prompts() + x[0]
    prefix = PrefixTuning(3, [(2, 4)], reparametrization="mlp", mid=8)
    yield prefix, lambda m, x: m()["self"][0][0].sum() + x


@pytest.mark.parametrize("index", range(3))
def test_modules_in_another_dtype(index):
    module, call = list(modules())[index]
    module.eval().requires_grad_(False)
    x = torch.randn(4, 8)
    call(module, x)
    y = call(module.double(), x.double())
    assert y.dtype is torch.float64
    fresh = copy.deepcopy(module)
    torch.testing.assert_close(y, call(fresh, x.double()))


@torch.no_grad()
@pytest.mark.parametrize("index", range(3))
def test_modules_whose_parameters_are_written_through_data(index):
    module, call = list(modules())[index]
    module.eval().requires_grad_(False)
    x = torch.randn(4, 8)
    for parameter in module.parameters():
        call(module, x)
        parameter.data.add_(torch.randn_like(parameter))
        torch.testing.assert_close(call(module, x), call(copy.deepcopy(module), x))
