"""Layers that our modules read and never call must be what they look like."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

from peft_kernels.nn import AdapterFusion, BottleneckAdapter, InvertibleAdapter

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


def make_fusion():
    return AdapterFusion([BottleneckAdapter(8, 4) for _ in range(2)]).eval()


OWNERS = [
    (lambda: BottleneckAdapter(8, 4), "down"),
    (lambda: BottleneckAdapter(8, 4), "up"),
    (lambda: BottleneckAdapter(8, 4, gating=True), "gate"),
    (make_fusion, "query"),
    (make_fusion, "key"),
    (make_fusion, "value"),
    (make_fusion, "adapters.1.up"),
    (lambda: InvertibleAdapter(8), "F.0"),
    (lambda: InvertibleAdapter(8), "G.2"),
]


def run(module):
    return module(X, X) if isinstance(module, AdapterFusion) else module(X)


@pytest.mark.parametrize(("make", "path"), OWNERS, ids=lambda x: x if isinstance(x, str) else "")
def test_what_peft_put_there_would_be_idle(make, path):
    peft = pytest.importorskip("peft")
    owner = make()
    config = peft.LoraConfig(target_modules=[path], r=2)
    peft.get_peft_model(nn.ModuleDict({"it": owner}), config)
    with pytest.raises(TypeError, match=r"must be an nn\.Linear, .* got peft\.tuners\.lora"):
        run(owner)


def pruned(layer):
    return prune.l1_unstructured(layer, "weight", 0.5)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("change", [pruned, weight_norm, torch.nn.utils.spectral_norm])
@pytest.mark.parametrize(("make", "path"), OWNERS, ids=lambda x: x if isinstance(x, str) else "")
def test_a_weight_that_a_hook_makes_at_each_call_isn_t_made(make, path, change):
    owner = make()
    change(owner.get_submodule(path))
    with pytest.raises(TypeError, match=r"must have no weight that a hook computes"):
        run(owner)


@pytest.mark.parametrize(("make", "path"), OWNERS[:2], ids=["down", "up"])
def test_a_weight_with_a_parametrization_is_read(make, path):
    owner = make()
    for linear in (owner.down, owner.up):
        nn.init.normal_(linear.weight)
    before = run(owner)
    layer = owner.get_submodule(path)
    parametrizations.weight_norm(layer)
    torch.testing.assert_close(run(owner), before)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2)
    assert not torch.allclose(run(owner), before, atol=1e-2)
