"""AdapterBank without gradients: one op for all adapters, with the bits of a call for each."""

import pytest
import torch
from test_nn_bottleneck import K, make, make_norm
from torch import nn

import peft_kernels
import peft_kernels.nn.adapter_bank
import peft_kernels.nn.bottleneck
from peft_kernels.nn import AdapterBank, BottleneckAdapter
from peft_kernels.ops._activations import ACTIVATIONS
from peft_kernels.ops._adapter_apart import adapter_apart

IDS = [1, -1, 0, 1, 2, 0]
SIZES = {"a": 3, "b": 5, "c": 16}


def make_bank(dtype=torch.float32, **options):
    """Adapters of several sizes and scales."""
    scales = {"a": 1.0, "b": "channel", "c": "learned"}
    adapters = {
        name: make(r=size, dtype=dtype, scale=scales[name], **options)
        for name, size in SIZES.items()
    }
    return AdapterBank(adapters).eval()


@pytest.fixture
def calls(monkeypatch):
    """How many calls of the op for one adapter and of the one for several there were."""
    counts = {"adapter": 0, "adapter_apart": 0}

    def counted(module, name):
        op = getattr(module, name)

        def call(*args, **kwargs):
            counts[name] += 1
            return op(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    counted(peft_kernels.nn.bottleneck, "adapter")
    counted(peft_kernels.nn.adapter_bank, "adapter_apart")
    return counts


def in_both_ways(bank, calls, x, residual, ids=IDS, **norms):
    """Without gradients, and with them, which takes a call for each adapter."""
    with torch.no_grad():
        found = bank(x, residual, ids=ids, **norms)
    assert calls == {"adapter": 0, "adapter_apart": 1}
    expected = bank(x, residual, ids=ids, **norms).detach()
    assert calls == {"adapter": len(set(ids) - {-1}), "adapter_apart": 1}
    return found, expected


def inputs_of(dtype=torch.float32, shape=(6, 4, K)):
    return torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("with_norms", [False, True])
def test_has_the_bits_of_a_call_for_each(activation, dtype, with_norms, calls):
    bank, (x, f) = make_bank(dtype, activation=activation), inputs_of(dtype)
    norms = {"pre_norm": make_norm(), "norm": make_norm()} if with_norms else {}
    norms = {name: norm.to(dtype) for name, norm in norms.items()}
    for residual in (None, x, (f, x)):
        calls.update(adapter=0, adapter_apart=0)
        found, expected = in_both_ways(bank, calls, x, residual, **norms)
        assert found.dtype is dtype and torch.equal(found, expected)


def test_float32_adapters_over_bfloat16_and_rows_of_two_dimensions(calls):
    bank, (x, _) = make_bank(torch.float32), inputs_of(torch.bfloat16, (6, K))
    found, expected = in_both_ways(bank, calls, x, x)
    assert found.dtype is torch.bfloat16 and torch.equal(found, expected)


def test_rows_without_an_adapter_are_the_host_s():
    bank, norm, (x, f) = make_bank(), make_norm().float(), inputs_of()
    with torch.inference_mode():
        found = bank(x, (f, x), norm=norm, ids=IDS)
        assert torch.equal(found[[1]], norm((f + x)[[1]]))


def test_only_what_the_batch_has_is_given(monkeypatch):
    given = []

    def apart(x, adapters, ids, **options):
        given.append((len(adapters.scales), ids.tolist()))
        return adapter_apart(x, adapters, ids, **options)

    monkeypatch.setattr(peft_kernels.nn.adapter_bank, "adapter_apart", apart)
    bank, (x, _) = make_bank(), inputs_of()
    with torch.no_grad():
        bank(x, x, ids=[2, 2, -1, 0, 2, 0])
        bank(x, x, ids=[2, 2, -1, -1, 2, 2])
    assert given == [(2, [0, 0, -1, 1, 0, 1])]


def hooked(bank):
    bank.adapters[1].register_forward_hook(lambda module, args, y: y + 1)


def trains_with_dropout(bank):
    bank.adapters[1].dropout = 0.5
    bank.train()


def is_another_class(bank):
    class Own(BottleneckAdapter):
        def forward(self, *args, **kwargs):
            return 2 * super().forward(*args, **kwargs)

    bank.adapters[1].__class__ = Own


def has_a_forward_of_its_own(bank):
    adapter = bank.adapters[1]
    forward = adapter.forward
    adapter.forward = lambda *args, **kwargs: forward(*args, **kwargs)


def has_a_parametrization(bank):
    down = bank.adapters[1].down
    nn.utils.parametrize.register_parametrization(down, "weight", nn.Tanh())


@pytest.mark.parametrize(
    "change",
    [
        hooked,
        trains_with_dropout,
        is_another_class,
        has_a_forward_of_its_own,
        has_a_parametrization,
    ],
)
def test_an_adapter_that_is_more_than_the_op_is_called(change, calls):
    bank, (x, _) = make_bank(), inputs_of()
    change(bank)
    with torch.no_grad():
        torch.manual_seed(0)
        found = bank(x, x, ids=IDS)
    assert calls == {"adapter": 3, "adapter_apart": 0}
    torch.manual_seed(0)
    assert torch.equal(found, bank(x, x, ids=IDS).detach())


@pytest.mark.parametrize(
    "options", [{"norm_before": True}, {"norm_after": True}, {"gating": True}], ids=str
)
def test_an_adapter_with_parts_of_its_own_is_called(options, calls):
    bank, (x, _) = make_bank(**options), inputs_of()
    with torch.no_grad():
        bank(x, x, ids=IDS)
    assert calls == {"adapter": 3, "adapter_apart": 0}


def test_a_norm_that_the_op_doesn_t_know_is_called(calls):
    bank, (x, _), norm = make_bank(), inputs_of(), nn.RMSNorm(K)
    with torch.no_grad():
        found = bank(x, x, ids=IDS, norm=norm)
        assert calls == {"adapter": 3, "adapter_apart": 0}
        torch.testing.assert_close(found, norm(bank(x, x, ids=IDS)))


def test_autocast_and_transforms_have_a_call_for_each(calls):
    bank, (x, _) = make_bank(), inputs_of()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        bank(x, x, ids=IDS)
    assert calls == {"adapter": 3, "adapter_apart": 0}
    tangent = torch.ones_like(x)
    with torch.no_grad():
        _, found = torch.func.jvp(lambda x: bank(x, x, ids=IDS), (x,), (tangent,))
    assert calls == {"adapter": 6, "adapter_apart": 0} and found.any()


@pytest.mark.parametrize("kind", [torch.float16, torch.float64])
def test_dtypes_that_can_t_be_mixed_are_named_as_ever(kind):
    bank, (x, _) = make_bank(), inputs_of(torch.bfloat16)
    bank.adapters[1].to(kind)
    with torch.no_grad(), pytest.raises(TypeError, match=r"down_weight must be torch\.float32"):
        bank(x, x, ids=IDS)


def test_a_write_to_an_adapter_is_seen():
    bank, (x, _) = make_bank(), inputs_of()
    with torch.no_grad():
        before = bank(x, x, ids=IDS)
        for parameter in bank.adapters[1].parameters():
            parameter.data.mul_(2)
        after = bank(x, x, ids=IDS)
    changed = (before != after).flatten(1).any(1)
    assert changed.tolist() == [number == 1 for number in IDS]
    assert torch.equal(after, bank(x, x, ids=IDS).detach())


def test_a_forced_reference_serves(calls):
    bank, (x, _) = make_bank(), inputs_of()
    with peft_kernels.backend("reference"):
        found, expected = in_both_ways(bank, calls, x, x)
    assert torch.equal(found, expected)
