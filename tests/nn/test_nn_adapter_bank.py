"""AdapterBank: each row is what its adapter alone makes of it, gradients too."""

import pytest
import torch
from test_nn_bottleneck import DTYPE, K, make, make_norm
from torch import nn

from peft_kernels.nn import AdapterBank
from peft_kernels.nn._row_groups import RowGroups

IDS = [1, -1, 0, 1, 2]


def make_bank() -> AdapterBank:
    """Adapters that differ in all that they may differ in."""
    return AdapterBank(
        {
            "a": make(),
            "b": make(r=5, activation="gelu", scale="channel", norm_before=True),
            "c": make(activation="tanh", scale=0.5, norm_after=True, gating=True),
        }
    )


def alone(bank, x, residual, ids, **norms):
    """Row by row."""
    rows = []
    for row, number in enumerate(ids):
        of = tuple(term[[row]] for term in residual)
        if number < 0:
            rows.append(norms["norm"](sum(of)))
        else:
            rows.append(bank.adapters[number](x[[row]], of, **norms))
    return torch.cat(rows)


@pytest.mark.parametrize("ids", [IDS, [2] * 5, [-1] * 5], ids=str)
@pytest.mark.parametrize("itself", [False, True])
def test_rows_and_their_gradients_are_those_of_each_alone(ids, itself):
    bank, norms = make_bank(), {"pre_norm": make_norm(), "norm": make_norm()}
    x, f = (torch.randn(5, 4, K, dtype=DTYPE, requires_grad=True) for _ in range(2))
    residual = (x,) if itself else (f, x)
    found = bank(x, residual, ids=torch.tensor(ids), **norms)
    expected = alone(bank, x, residual, ids, **norms)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    leaves = [x, *bank.parameters(), *norms["norm"].parameters()]
    grad = torch.randn_like(expected)
    made = torch.autograd.grad(found, leaves, grad, allow_unused=True)
    for ours, exact in zip(
        made, torch.autograd.grad(expected, leaves, grad, allow_unused=True), strict=True
    ):
        assert (ours is None) == (exact is None)
        if exact is not None:
            torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)


def test_without_a_residual_a_row_without_an_adapter_is_zero():
    bank, x = make_bank(), torch.randn(5, K, dtype=DTYPE)
    y = bank(x, ids=[0, -1, 0, -1, 1])
    assert not y[[1, 3]].any() and y[[0, 2, 4]].any(1).all()
    assert bank(x[:0], ids=[]).shape == (0, K)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_rows_have_one_dtype(dtype):
    bank, x = AdapterBank({"a": make(dtype=dtype)}), torch.randn(3, K, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = bank(x, x, ids=[0, -1, 0])
        expected = bank.adapters[0](x[[0, 2]], x[[0, 2]])
    torch.testing.assert_close(found[[0, 2]], expected.to(found.dtype), rtol=0, atol=0)


def test_what_is_wrong_is_named():
    bank, x = make_bank(), torch.randn(2, K, dtype=DTYPE)
    for ids, match in [
        (None, "which of a, b, c each row has; none are given"),
        ([0], r"one entry for each row of x \[2, 6\]; got 1"),
        ([0, 3], r"in \[-1, 3\); got 3"),
        ([0, -2], r"in \[-1, 3\); got -2"),
    ]:
        with pytest.raises(ValueError, match=match):
            bank(x, x, ids=ids)
    with pytest.raises(ValueError, match="at least one adapter; got none"):
        AdapterBank({})
    with pytest.raises(ValueError, match=r"one hidden size; got \{'a': 6, 'b': 8\}"):
        AdapterBank({"a": make(), "b": make(k=8)})
    with pytest.raises(TypeError, match=r"adapters\['a'\] must be a BottleneckAdapter; got Linear"):
        AdapterBank({"a": nn.Linear(2, 2)})


@pytest.mark.parametrize(
    ("x", "residual", "ids", "error", "match"),
    [
        ((2, 4, K), None, torch.tensor([0.9, 1.0]), TypeError, r"ids must be .* of torch.float32"),
        ((2, 4, K), None, torch.tensor([True, False]), TypeError, "ids must be .* of torch.bool"),
        ((2, 4, K), None, torch.tensor([[0], [1]]), TypeError, r"ids must be .* got \[2, 1\]"),
        ((2, 4, K), None, [0.9, 1.0], TypeError, r"ids must be integers \[B\]; got \[0.9"),
        ((2, 4, K), None, ["a", "b"], TypeError, r"ids must be integers \[B\]; got \['a'"),
        ((2, 4, K), None, [True, 0], TypeError, r"ids must be integers \[B\]; got \[True"),
        ((2, 4, K), None, 1, TypeError, r"ids must be integers \[B\]; got 1"),
        ((2, 4, K + 2), None, [-1, -1], ValueError, r"x must be \[B, ..., 6\]; got \[2, 4, 8\]"),
        ((K,), None, [0], ValueError, r"x must be \[B, ..., 6\]; got \[6\]"),
        ((2, 4, K), (5, 4, K), [0, 1], ValueError, r"residual must have .* got \[5, 4, 6\]"),
        ((2, 4, K), (2, 1, K), [-1, -1], ValueError, r"residual must have .* got \[2, 1, 6\]"),
    ],
)
def test_shapes_and_ids_that_would_be_another_thing_silently(x, residual, ids, error, match):
    given = None if residual is None else torch.randn(residual, dtype=DTYPE)
    with pytest.raises(error, match=match):
        make_bank()(torch.randn(x, dtype=DTYPE), given, ids=ids)


def test_a_state_dict_goes_into_a_bank_of_the_same_names():
    bank, same, other = (AdapterBank({n: make() for n in names}) for names in ("ab", "ab", "ba"))
    state = bank.state_dict()
    same.load_state_dict(state)
    x = torch.randn(2, K, dtype=DTYPE)
    torch.testing.assert_close(same(x, ids=[1, 0]), bank(x, ids=[1, 0]), rtol=0, atol=0)
    with pytest.raises(
        RuntimeError, match=r"bank with \{'names': \['b', 'a'\]\}; it has .*'a', 'b'"
    ):
        other.load_state_dict(state)


def test_a_capture_of_several_adapters_rows_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="can't be captured in a CUDA graph"):
        RowGroups([0, 1]).indices(torch.device("cuda"))
