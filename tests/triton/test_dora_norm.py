"""DoRA's norms on a GPU, in the interpreter: right after every change, and W read only then."""

import copy
import gc
from itertools import product
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from turns import launches_on

import peft_kernels
from peft_kernels.nn import LoRALinear
from peft_kernels.nn.norms import Norms
from peft_kernels.ops import _dora_norm, dora_norm
from peft_kernels.ops._dora_norm import NormsOnDevice
from peft_kernels.triton.common import launch as launches
from peft_kernels.triton.dora_linear import norm_kernels, norm_launch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layer_of(n=37, k=150, r=5, dtype=torch.float32, adapter_dtype=torch.float32):
    torch.manual_seed(0)
    weight = torch.randn(n, k).to(dtype)
    return weight, torch.randn(r, k).to(adapter_dtype), torch.randn(n, r).to(adapter_dtype)


def exact(weight, a, b, scale=1.0):
    return (weight.double() + float(scale) * b.double() @ a.double()).norm(dim=1)


class Norm:
    """Of one layer by Triton; counts the programs that read W's tiles."""

    def __init__(self):
        self.norms, self.reads = NormsOnDevice(), 0

    def __call__(self, *of):
        def run(kernel, grid, args, options):
            if kernel is norm_kernels.dora_norm_kernel and args[3].any():
                self.reads += 1
            kernel[grid](*args, **options)

        with peft_kernels.backend("triton"), patch.object(launches, "run", run):
            return self.norms.of(*of)


@pytest.mark.parametrize("adapter_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_float64(dtype, adapter_dtype):
    weight, a, b = layer_of(dtype=dtype, adapter_dtype=adapter_dtype)
    found = Norm()(weight, a, b, 0.5)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), exact(weight, a, b, 0.5), rtol=2e-6, atol=0)


@pytest.mark.parametrize(("n", "k", "r"), [(1, 1, 1), (16, 64, 16), (130, 5000, 3), (9, 7, 100)])
def test_any_shape_and_strides(n, k, r):
    weight, a, b = layer_of(n, k, r)
    scale = torch.tensor(0.7)
    expected = exact(weight, a, b, scale)
    torch.testing.assert_close(Norm()(weight, a, b, scale).double(), expected, rtol=2e-6, atol=0)
    strided = weight.T.contiguous().T, a.T.contiguous().T, b.T.contiguous().T
    torch.testing.assert_close(Norm()(*strided, scale).double(), expected, rtol=2e-6, atol=0)


def test_a_row_that_is_taken_away_has_its_own_small_norm():
    weight, a, _ = layer_of(r=1)
    b = torch.zeros(weight.shape[0], 1)
    weight[3], b[3] = -2 * a[0], 2
    weight[3, 0] += 1e-3
    assert Norm()(weight, a, b, 1.0)[3].item() == pytest.approx(1e-3, rel=1e-2)


CHANGES = {
    "a in place": lambda w, a, b: a[2, 3].add_(1e-6),
    "a through data": lambda w, a, b: a.data[-1, -1].mul_(1.001),
    "b through data": lambda w, a, b: b.data[-1, -1].mul_(1.001),
    "w in place": lambda w, a, b: w[0, 5].add_(1),
    "w's diagonal through data": lambda w, a, b: w.data[-1, w.shape[0] - 1].add_(1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_reads_w_where_something_changed_and_only_then(change):
    weight, a, b = layer_of(n=130, k=200, r=40)  # several chunks
    norm = Norm()
    first = norm(weight, a, b, 1.0)
    before = first.clone()
    assert norm(weight, a, b, 1.0) is first and norm.reads == 1
    change(weight, a, b)
    second = norm(weight, a, b, 1.0)
    assert norm.reads == 2 and not torch.equal(second, before)
    torch.testing.assert_close(second.double(), exact(weight, a, b), rtol=2e-6, atol=0)
    assert norm(weight, a, b, 1.0) is second and norm.reads == 2


def test_other_scales_weights_and_ranks_are_changes():
    weight, a, b = layer_of()
    norm, scale = Norm(), torch.tensor(2.0)
    memory = norm(weight, a, b, 1.0)
    for of in (
        (weight, a, b, 2.0), (weight, a, b, scale), (weight.clone(), a, b, 2.0),
        (weight.double().float().mul_(3), a, b, 2.0), (weight, a[:3], b[:, :3].contiguous(), 2.0),
        (weight.bfloat16(), a, b, 2.0), (*layer_of(60), 1.0),
    ):  # fmt: skip
        found = norm(*of)
        torch.testing.assert_close(found.double(), exact(*of), rtol=2e-6, atol=0)
    assert norm.reads == 7  # a scale in a tensor is the same as its number
    assert norm(weight, a, b, 1.0) is not memory


def test_new_weights_of_the_same_shape_keep_the_memory_that_a_graph_may_hold():
    weight, a, b = layer_of()
    norm = Norm()
    memory = norm(weight, a, b, 1.0)
    weight.mul_(2)
    assert norm(weight, a, b, 1.0) is memory
    other = weight.clone()
    assert norm(other, a, b, 1.0) is memory
    torch.testing.assert_close(memory.double(), exact(other, a, b), rtol=2e-6, atol=0)


def test_a_weight_that_is_gone_keeps_no_memory():
    weight, a, b = layer_of()
    norm = Norm()
    norm(weight, a, b, 1.0)
    memory = StorageWeakRef(weight.untyped_storage())
    del weight
    gc.collect()
    assert memory.expired()


def test_shapes_that_do_not_fit_are_left_to_who_says_so():
    weight, a, b = layer_of()
    for of in ((weight, a[:, :-1], b), (weight, a, b[:-1]), (weight, a, b[:, :-1])):
        assert Norm()(*of, 1.0) is None


def test_the_launches_are_those_of_a_first_call():
    """Nothing of a call is kept for one of another shape, scale or precision."""

    def launched(n, k, r, scale, precision):
        with launches_on("sm_90", precision) as found, peft_kernels.backend("triton"):
            NormsOnDevice().of(*layer_of(n, k, r), scale)
        return found

    of = product((37, 130), (150, 500), (5, 33), (1.0, 0.5, torch.tensor(1.0)), ("ieee", "tf32"))
    calls = list(of)
    later = [launched(*call) for call in calls]
    for call, found in zip(calls, later, strict=True):
        norm_launch._launches.cache_clear()
        assert found == launched(*call) and len(found) == 3


def test_nan_is_never_as_kept():
    weight, a, b = layer_of()
    a[0, 0] = torch.nan
    norm = Norm()
    assert norm(weight, a, b, 1.0).isnan().all()
    a[0, 0] = 0
    torch.testing.assert_close(norm(weight, a, b, 1.0).double(), exact(weight, a, b))


def test_what_is_not_kept():
    weight, a, b = layer_of()
    assert NormsOnDevice().of(weight, a, b, 1.0) is None  # a CPU's kernels
    assert Norm()(weight.double(), a.double(), b.double(), 1.0) is None
    found = []
    torch.func.vmap(lambda a: found.append(Norm()(weight, a, b, 1.0)) or a)(a[None])
    assert found == [None]
    with torch.inference_mode():
        assert Norm()(weight.clone(), a, b, 1.0) is None
        assert Norm()(weight, a, b, 1.0) is not None


def test_a_graph_takes_memory_that_was_there_before(monkeypatch):
    weight, a, b = layer_of()
    known, new = Norm(), Norm()
    memory = known(weight, a, b, 1.0)
    monkeypatch.setattr(_dora_norm, "_is_captured", lambda weight: True)
    assert new(weight, a, b, 1.0) is None and known(weight, a, b, 1.0) is memory


def test_layers_train_with_it_as_without():
    torch.manual_seed(0)
    layer = LoRALinear(24, 16, r=4, alpha=8, use_dora=True)
    nn.init.normal_(layer.lora_b)
    other, x = copy.deepcopy(layer), torch.randn(3, 24)
    steps = [torch.optim.SGD(one.parameters(), 0.1) for one in (layer, other)]
    for _ in range(3):
        for one, step, backend in zip((layer, other), steps, ("triton", "reference"), strict=True):
            with peft_kernels.backend(backend):
                one(x).square().sum().backward()
            step.step()
            step.zero_grad()
    with peft_kernels.backend("triton"), torch.no_grad():
        torch.testing.assert_close(layer(x), other(x), rtol=1e-4, atol=1e-4)
        assert layer._norms._on_device._state is not None
        assert copy.deepcopy(layer)._norms._on_device._state is None
        torch.testing.assert_close(
            Norms().of(layer.weight, layer.lora_a, layer.lora_b, layer.scale),
            dora_norm(layer.weight, layer.lora_a, layer.lora_b, layer.scale),
        )


def test_tensors_without_values_have_no_norms_that_are_kept():
    with FakeTensorMode():
        layer, x = LoRALinear(8, 6, 2, alpha=4, use_dora=True), torch.randn(3, 8)
    with peft_kernels.backend("triton"):
        assert layer(x).shape == (3, 6)
