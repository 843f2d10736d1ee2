"""The meta device: trained values are never lost there, and nothing is left undrawn behind it."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trained_modules import MODULES, SHAPES

from peft_kernels import AdapterPool, load_adapter, merge, save_adapter, swap_linear
from peft_kernels.nn import BottleneckAdapter, InvertibleAdapter, LoRALinear, PrefixTuning

META = {"device": "meta"}


@pytest.fixture
def marked_memory():
    """Memory that nobody has written holds NaNs."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", MODULES)
def test_memory_is_drawn_into(kind, marked_memory):
    outer = nn.ModuleDict({"inner": MODULES[kind](**META)})
    outer.to_empty(device="cpu")
    names = {"weight", "bias"} if kind == "LoRALinear" else set()  # a checkpoint's, as of any base
    drawn = {n: p for n, p in outer["inner"].named_parameters() if n not in names}
    wanted = dict(MODULES[kind]().named_parameters())
    for name, parameter in drawn.items():
        expected = wanted[name]
        assert parameter.isfinite().all(), name
        if expected.std(correction=0) == 0:  # zeros and ones
            assert torch.equal(parameter, expected), name
        else:
            assert 0.2 < parameter.std() / expected.std() < 5, name


def test_swapped_on_meta_then_loaded(marked_memory):
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    swap_linear(model, "all-linear", 2, alpha=4).to_empty(device="cpu")
    model.load_state_dict(base.state_dict(), strict=False)
    x = torch.randn(3, 8)
    torch.testing.assert_close(model(x), base(x))
    model(x).sum().backward()
    assert model[1].lora_b.grad.isfinite().all() and model[1].lora_b.grad.any()


def test_values_on_their_way_to_real_memory_stay():
    layer = LoRALinear(8, 8, 2, alpha=4)
    nn.init.ones_(layer.lora_b)
    assert layer.to(torch.float64).lora_b.eq(1).all()


# ---- values that would be lost -----------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    model = swap_linear(nn.Sequential(nn.Linear(8, 8)), ["0"], 2, alpha=4)
    save_adapter(model, tmp_path)
    return tmp_path


def on_meta() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8, **META))


def test_load_adapter(saved):
    model = on_meta()
    with pytest.raises(TypeError, match=r"0 has a weight on the meta device, .*to_empty"):
        load_adapter(model, saved)
    assert type(model[0]) is nn.Linear
    swap_linear(model, ["0"], 2, alpha=4)
    with pytest.raises(RuntimeError, match=r"0\.lora_a is on the meta device"):
        load_adapter(model, saved)


def test_switch():
    layer = LoRALinear(8, 8, 2, alpha=4, **META)
    with pytest.raises(RuntimeError, match="lora_a is on the meta device"):
        layer.switch(torch.ones(3, 8), torch.ones(8, 3))
    assert layer.r == 2


def test_what_has_no_values_is_neither_merged_nor_saved(tmp_path):
    model = swap_linear(on_meta(), ["0"], 2, alpha=4)
    with pytest.raises(RuntimeError, match=r"0: weight is on the meta device, .*to_empty.*accel"):
        merge(model)
    assert not model[0].merged
    with pytest.raises(RuntimeError, match=r"0: lora_b is on the meta device"):
        save_adapter(model, tmp_path / "folder")
    assert not list(tmp_path.iterdir())


def test_a_pool(saved):
    with pytest.raises(TypeError, match="0 has a weight on the meta device"):
        AdapterPool.attach(on_meta(), ["0"], capacity=8)
    model = nn.Sequential(nn.Linear(8, 8))
    pool = AdapterPool.attach(model, ["0"], capacity=8)
    pool.load("a", saved)
    with pytest.raises(RuntimeError, match="detach the pool first"):
        model.to("meta")
    assert not model[0].pages_a.is_meta
    pool.detach()
    model.to("meta")


def test_a_prefix():
    prefix = PrefixTuning(3, SHAPES, **META)
    with pytest.raises(RuntimeError, match="the prefix is on the meta device"):
        prefix.fit([(torch.ones(2, 3, 4), torch.ones(2, 3, 4))] * 2)


# ---- graphs ------------------------------------------------------------------------------------

LAYERS = {
    "lora": lambda: LoRALinear(8, 8, 2, alpha=4, **META),
    "lora with dropout": lambda: LoRALinear(8, 8, 2, alpha=4, dropout=0.1, **META),
    "dora": lambda: LoRALinear(8, 8, 2, alpha=4, use_dora=True, **META),
    "adapter": lambda: BottleneckAdapter(8, 2, scale=2.0, **META),
    "adapter with dropout": lambda: BottleneckAdapter(8, 2, scale=2.0, dropout=0.1, **META),
    "adapter with a scale by channel": lambda: BottleneckAdapter(8, 2, scale="channel", **META),
    "invertible adapter": lambda: InvertibleAdapter(8, **META),
}


class Elsewhere(TorchDispatchMode):
    """Notes the ops that are given, or make, a tensor that isn't on the layer's device."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, out)) if isinstance(t, torch.Tensor)]
        if any(t.device.type != "meta" for t in tensors):
            self.ops.append(str(func))
        return out


@pytest.mark.parametrize("name", LAYERS)
def test_no_other_device_s_tensor_takes_part(name):
    """A number in a tensor of the CPU would split a CUDA graph, which keeps its first value."""
    layer = LAYERS[name]().train()
    with Elsewhere() as elsewhere:
        layer(torch.randn(3, 8, requires_grad=True, **META)).sum().backward()
    assert elsewhere.ops == []
