"""Tensors that are computed from others, as by pruning, are neither merged nor taken out."""

import pytest
import torch
from lora_models import trained
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import peft_kernels
from peft_kernels import merge, swap_linear, unload, unmerge
from peft_kernels.nn import LoRALinear

COMPUTED = {
    "pruned": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), r"prune\.remove"),
    "pruned bias": (lambda layer: prune.l1_unstructured(layer, "bias", 0.5), r"prune\.remove"),
    "pruned adapter": (lambda layer: prune.l1_unstructured(layer, "lora_b", 0.5), r"prune\.remove"),
    "weight_norm of hooks": (nn.utils.weight_norm, "remove_weight_norm"),
    "spectral_norm of hooks": (nn.utils.spectral_norm, "remove_spectral_norm"),
    "weight_norm": (parametrizations.weight_norm, "remove_parametrizations"),
    "identity": (
        lambda layer: parametrize.register_parametrization(layer, "weight", nn.Identity()),
        "remove_parametrizations",
    ),
}
CALLS = {
    "merge": merge,
    "unload": lambda model: unload(model, merge=False),
    "unload merged": lambda model: unload(model, merge=True),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_weights_are_refused_before_anything_is_changed(kind, call):
    torch.manual_seed(0)
    compute, named = COMPUTED[kind]
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    trained(swap_linear(model, ["0", "1"], 2, alpha=4))
    compute(model[1])
    x = torch.randn(3, 4)
    if kind == "pruned bias" and call == "merge":
        y = model(x)
        merge(model)
        torch.testing.assert_close(model(x), y)
        return
    before, y = [dict(vars(layer)) for layer in model], model.eval()(x)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises((TypeError, RuntimeError), match=f"^1.*{named}"):
        CALLS[call](model)
    assert [layer.merged for layer in model] == [False, False]
    assert [set(vars(layer)) for layer in model] == [set(names) for names in before]
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(x), y)


def test_computed_weights_of_merged_layers_are_refused_before_anything_is_changed():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    merge(trained(swap_linear(model, ["0", "1"], 2, alpha=4)))
    parametrize.register_parametrization(model[1], "weight", nn.Identity())
    x = torch.randn(3, 4)
    y = model(x)
    layer = model[1]
    for call in (
        lambda: unmerge(model),
        lambda: unload(model, merge=True),
        lambda: unload(model, merge=False),
        layer.unmerge,
    ):
        with pytest.raises((TypeError, RuntimeError), match="remove_parametrizations"):
            call()
        assert [layer.merged for layer in model] == [True, True]
        assert torch.equal(model(x), y)


@pytest.mark.parametrize("kind", ["pruned", "identity"])
def test_computed_weights_in_a_pool_are_refused_before_anything_is_changed(kind):
    compute, named = COMPUTED[kind]
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    pool = peft_kernels.AdapterPool.attach(model, ["0", "1"], capacity=8)
    compute(model[1])
    with pytest.raises(TypeError, match=f"^1 .*{named}"):
        pool.detach()
    pool.create("a", 2, alpha=4)
    assert all("Multi" in type(layer).__name__ for layer in model)


class Doubled(LoRALinear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_layer_of_a_class_with_a_forward_of_its_own_is_not_taken_out():
    model = nn.Sequential(nn.Linear(4, 4), Doubled.from_linear(nn.Linear(4, 4), 2, alpha=4))
    y = model(torch.eye(4))
    for with_updates in (True, False):
        with pytest.raises(TypeError, match=r"^1 must leave the methods .*Doubled has a forward"):
            unload(model, merge=with_updates)
    assert torch.equal(model(torch.eye(4)), y)
