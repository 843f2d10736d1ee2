"""torch.func's transforms, forward-mode AD and gradients of gradients, of every op.

Each op stands beside a composition of PyTorch's own operations that is written here, and must give
what that gives under the same transform.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from errors import assert_as_good_as
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import peft_kernels
from peft_kernels import _library, ops
from peft_kernels.ops._dropout import dropout_factor
from peft_kernels.ops.multi_lora_linear import PAGE, example_bank, example_trained

OPS = tuple(_library.OPS)  # each has a function of its name below
SEED = 1234


@dataclass(frozen=True)
class Case:
    """An op of its inputs that train, and the composition that must equal it."""

    op: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).mul_(0.5).to(dtype)


def lora_linear(dtype: torch.dtype) -> Case:
    bias, m, n, k, r = normal(6, dtype=dtype), 4, 6, 5, 3
    factor = dropout_factor(torch.tensor(SEED), 0.3, m, k, dtype)

    def op(x, weight, a, b):
        options = {"bias": bias, "scale": 2.0, "dropout_p": 0.3, "seed": SEED}
        return ops.lora_linear(x, weight, a, b, **options)

    def plain(x, weight, a, b):
        return F.linear(x, weight, bias) + 2.0 * F.linear(F.linear(x * factor, a), b)

    shapes = (m, k), (n, k), (r, k), (n, r)
    return Case(op, plain, tuple(normal(*shape, dtype=dtype) for shape in shapes))


def dora_linear(dtype: torch.dtype) -> Case:
    bias, m, n, k, r = normal(6, dtype=dtype), 4, 6, 5, 3
    factor = dropout_factor(torch.tensor(SEED), 0.3, m, k, dtype)
    norm = normal(n, dtype=dtype).abs() + 0.5

    def op(x, weight, a, b, magnitude):
        options = {"bias": bias, "scale": 2.0, "norm": norm, "dropout_p": 0.3, "seed": SEED}
        return ops.dora_linear(x, weight, a, b, magnitude, **options)

    def plain(x, weight, a, b, magnitude):
        z = F.linear(x, weight) + 2.0 * F.linear(F.linear(x * factor, a), b)
        return magnitude / norm * z + bias

    shapes = (m, k), (n, k), (r, k), (n, r), (n,)
    return Case(op, plain, tuple(normal(*shape, dtype=dtype) for shape in shapes))


def multi_lora_linear(dtype: torch.dtype) -> Case:
    """Two banks; of the adapters of the first bank, 0 and 2 train."""
    k, widths, ranks = 5, (3, 4), (2, 9, 3, 0)
    banks = [example_bank(n, k, ranks, dtype=dtype) for n in widths]
    ids = torch.tensor([2, 0, -1, 1, 0, 3])
    trained = [example_trained(banks[0], [2, 0]), example_trained(banks[1], [])]
    frozen = [example_trained(bank, [0, 1, 2]) for bank in banks]

    def op(x, weight, *received):
        given = trained[0]._replace(a=received[:2], b=received[2:])
        return ops.multi_lora_linear(x, weight, banks, ids, trained=[given, trained[1]])

    def plain(x, weight, a_2, a_0, b_2, b_0):
        own = {0: (a_0, b_0), 2: (a_2, b_2)}
        lines = []
        for row, slot in zip(x, ids.tolist(), strict=True):
            deltas = []
            for i, n in enumerate(widths):
                delta = row.new_zeros(n)
                if slot in (0, 1, 2):
                    a, b = frozen[i].a[slot].detach(), frozen[i].b[slot].detach()
                    a, b = own.get(slot, (a, b)) if i == 0 else (a, b)
                    delta = banks[i].scales[slot].to(dtype) * ((row @ a.T) @ b)
                deltas.append(delta)
            lines.append(F.linear(row, weight) + torch.cat(deltas))
        return torch.stack(lines)

    def pages(matrix: Tensor, slot: int) -> Tensor:
        first = int(banks[0].table[slot, 0]) * PAGE
        return matrix[first : first + ranks[slot]]

    received = [pages(matrix, slot) for matrix in banks[0][:2] for slot in (2, 0)]
    return Case(op, plain, (normal(6, k, dtype=dtype), normal(7, k, dtype=dtype), *received))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Spelt out: torch 2.13's F.layer_norm has a wrong hessian (weight by x) under torch.func."""
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + 1e-5) * weight + bias


def adapter(dtype: torch.dtype) -> Case:
    m, k, r = 4, 6, 3
    factor = dropout_factor(torch.tensor(SEED), 0.3, m, k, dtype)

    def op(x, down, down_bias, up, up_bias, scale, norm, norm_bias, pre_norm, residual):
        return ops.adapter(
            x, down, down_bias, up, up_bias, activation="silu", scale=scale, residual=(x, residual),
            dropout_p=0.3, seed=SEED, norm_weight=norm, norm_bias=norm_bias,
            pre_norm_weight=pre_norm,
        )  # fmt: skip

    def plain(x, down, down_bias, up, up_bias, scale, norm, norm_bias, pre_norm, residual):
        h = layer_norm(x, pre_norm)
        u = F.linear(F.silu(F.linear(h, down, down_bias)), up, up_bias)
        return layer_norm(x + residual + scale * u * factor, norm, norm_bias)

    shapes = (m, k), (r, k), (r,), (k, r), (k,), (k,), (k,), (k,), (k,), (m, k)
    return Case(op, plain, tuple(normal(*shape, dtype=dtype) for shape in shapes))


def adapter_fusion(dtype: torch.dtype) -> Case:
    m, n, r = 4, 5, 2

    def op(x, d_1, d_2, b_1, b_2, u_1, u_2, c_1, c_2, q, k, v, residual):
        absorbed = ops.absorb([u_1, u_2], [c_1, c_2], q, None, k, v, temperature=1.5)
        downs = [d_1, d_2], [b_1, b_2]
        return ops.adapter_fusion(x, *downs, absorbed, activation="tanh", residual=residual)[0]

    def plain(x, d_1, d_2, b_1, b_2, u_1, u_2, c_1, c_2, q, k, v, residual):
        bottlenecks = [torch.tanh(F.linear(x, d, b)) for d, b in ((d_1, b_1), (d_2, b_2))]
        outputs = [F.linear(bottlenecks[0], u_1, c_1), F.linear(bottlenecks[1], u_2, c_2)]
        o = torch.stack(outputs, -2)
        scores = (F.linear(x, q)[..., None, :] * F.linear(o, k)).sum(-1) / 1.5
        return residual + (torch.softmax(scores, -1)[..., None] * F.linear(o, v)).sum(-2)

    shapes = (m, n), (r, n), (r, n), (r,), (r,), (n, r), (n, r), (n,), (n,), *((n, n),) * 3, (m, n)
    return Case(op, plain, tuple(normal(*shape, dtype=dtype) for shape in shapes))


def prefix_attention(dtype: torch.dtype) -> Case:
    """Two query heads a key head, a bank of prefixes, a row without one, and padding."""
    rows, heads, tokens, size, length = 3, 2, 3, 4, 2
    ids, lengths = torch.tensor([1, -1, 0]), torch.tensor([3, 3, 2])
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    real = torch.arange(tokens) < lengths[:, None, None, None]
    with_prefix = (ids >= 0)[:, None, None, None].expand(rows, 1, tokens, length)
    mask = torch.cat([with_prefix, (causal & real).expand(rows, 1, tokens, tokens)], -1)

    def op(q, k, v, prefix_k, prefix_v):
        options = {"prefix_ids": ids, "lengths": lengths}
        return ops.prefix_attention(q, k, v, prefix_k, prefix_v, **options)

    def plain(q, k, v, prefix_k, prefix_v):
        chosen = ids.clamp_min(0)
        keys = torch.cat([prefix_k[chosen], k], 2).repeat_interleave(heads, 1)
        values = torch.cat([prefix_v[chosen], v], 2).repeat_interleave(heads, 1)
        scores = (q @ keys.mT * size**-0.5).masked_fill(~mask, float("-inf"))
        return torch.softmax(scores, -1) @ values

    q, k = (rows, heads, tokens, size), (rows, 1, tokens, size)
    bank = (2, 1, length, size)
    return Case(op, plain, tuple(normal(*shape, dtype=dtype) for shape in (q, k, k, bank, bank)))


def prompt_lookup(dtype: torch.dtype) -> Case:
    """Prompts behind the first real token of rows with padding; a row without a prompt."""
    mask, ids = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1]]), torch.tensor([1, 0, -1])

    def op(embeddings, prompts):
        options = {"position": "after_bos", "attention_mask": mask}
        return ops.prompt_lookup(embeddings, prompts, ids, **options).embeddings

    def plain(embeddings, prompts):
        rows = []
        for b, (first, task) in enumerate(zip((1, 0, 2), ids.tolist(), strict=True)):
            own = prompts[task] if task >= 0 else torch.zeros_like(prompts[0])
            rows.append(torch.cat([embeddings[b, : first + 1], own, embeddings[b, first + 1 :]]))
        return torch.stack(rows)

    return Case(op, plain, (normal(3, 3, 4, dtype=dtype), normal(2, 2, 4, dtype=dtype)))


def make(name: str, dtype: torch.dtype) -> Case:
    """The op's case, of the same numbers in every dtype but for their rounding."""
    torch.manual_seed(0)
    return globals()[name](dtype)


each_op = pytest.mark.parametrize("name", OPS)


def loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A number whose second derivatives are those of the function, and more."""
    return lambda *inputs: function(*inputs).sin().sum()


def everything(case: Case) -> tuple[int, ...]:
    return tuple(range(len(case.inputs)))


def assert_same(found, expected) -> None:
    torch.testing.assert_close(found, expected)


# ---- torch.func ------------------------------------------------------------------------------


@each_op
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_grad_and_vjp(name, dtype):
    case = make(name, dtype)
    argnums = everything(case)
    found = grad(loss(case.op), argnums)(*case.inputs)
    assert_same(found, grad(loss(case.plain), argnums)(*case.inputs))
    y, pullback = vjp(case.op, *case.inputs)
    expected, plain_pullback = vjp(case.plain, *case.inputs)
    assert_same(y, expected)
    assert_same(pullback(y), plain_pullback(y))


@each_op
def test_jvp(name):
    case = make(name, torch.float64)
    tangents = tuple(torch.randn_like(tensor) for tensor in case.inputs)
    assert_same(jvp(case.op, case.inputs, tangents), jvp(case.plain, case.inputs, tangents))


@each_op
def test_jacobians(name):
    case = make(name, torch.float64)
    argnums = everything(case)
    expected = jacrev(case.plain, argnums)(*case.inputs)
    assert_same(jacrev(case.op, argnums)(*case.inputs), expected)
    assert_same(jacfwd(case.op, argnums)(*case.inputs), expected)


@each_op
def test_hessian(name):
    case = make(name, torch.float64)
    argnums = everything(case)
    found = hessian(loss(case.op), argnums)(*case.inputs)
    assert_same(found, hessian(loss(case.plain), argnums)(*case.inputs))


@each_op
def test_vmap_over_each_input_and_over_all(name):
    case = make(name, torch.float64)
    stacked = [torch.stack([t, 2 * t, -t]) for t in case.inputs]
    places = [(i,) for i in everything(case)] + [everything(case)]
    for chosen in places:
        dims = tuple(0 if i in chosen else None for i in everything(case))
        given = [stacked[i] if i in chosen else case.inputs[i] for i in everything(case)]
        assert_same(vmap(case.op, dims)(*given), vmap(case.plain, dims)(*given))


@each_op
def test_gradients_of_each_sample(name):
    case = make(name, torch.float64)
    argnums, stacked = everything(case), [torch.stack([t, 2 * t, -t]) for t in case.inputs]
    found = vmap(grad(loss(case.op), argnums))(*stacked)
    assert_same(found, vmap(grad(loss(case.plain), argnums))(*stacked))


# ---- gradients of gradients, and forward-mode AD ---------------------------------------------


@each_op
def test_gradgradcheck(name):
    case = make(name, torch.float64)
    inputs = tuple(tensor.requires_grad_() for tensor in case.inputs)
    assert torch.autograd.gradgradcheck(case.op, inputs, check_batched_grad=True, fast_mode=True)


@each_op
def test_gradcheck_forward_and_batched(name):
    case = make(name, torch.float64)
    inputs = tuple(tensor.requires_grad_() for tensor in case.inputs)
    modes = {"check_forward_ad": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(case.op, inputs, **modes, fast_mode=True)


@each_op
@pytest.mark.parametrize("needed", ["all", "first", "last"])
def test_gradient_penalty_through_kernels(name, needed):
    """The forward is the kernel's; the penalty's gradient is that of the plain composition."""
    case = make(name, torch.float32)
    assert peft_kernels.backend_of(name, "cpu", torch.float32) == "cpu"
    chosen = {"all": everything(case), "first": (0,), "last": (len(case.inputs) - 1,)}[needed]

    def penalty(function, dtype):
        given = [t.detach().to(dtype).clone() for t in case.inputs]
        inputs = [t.requires_grad_(i in chosen) for i, t in enumerate(given)]
        wanted = [inputs[i] for i in chosen]
        total = loss(function)(*inputs)
        first = torch.autograd.grad(total, wanted, create_graph=True)
        norm = sum(g.square().sum() for g in first)
        second = torch.autograd.grad(total + norm, wanted)
        return [torch.cat([g.flatten() for g in gradients]) for gradients in (first, second)]

    found, eager = penalty(case.op, torch.float32), penalty(case.plain, torch.float32)
    exact = penalty(make(name, torch.float64).plain, torch.float64)
    for order, tensors in enumerate(zip(found, eager, exact, strict=True)):
        assert_as_good_as(*tensors, f"order {order + 1}")


@each_op
def test_a_plain_backward_stays_with_the_kernels(name, monkeypatch):
    case = make(name, torch.float32)
    used = []
    get_op = peft_kernels._library.get_op
    monkeypatch.setattr(
        peft_kernels._library, "get_op", lambda op, *rest: used.append(op) or get_op(op, *rest)
    )
    inputs = [tensor.requires_grad_() for tensor in case.inputs]
    loss(case.op)(*inputs).backward()
    assert used == [f"{name}_fwd", f"{name}_bwd"]


def test_dual_numbers_outside_of_torch_func():
    case = make("lora_linear", torch.float64)
    tangent = torch.randn_like(case.inputs[0])
    with forward_ad.dual_level():
        x = forward_ad.make_dual(case.inputs[0], tangent)
        found = forward_ad.unpack_dual(case.op(x, *case.inputs[1:])).tangent
    rest = case.inputs[1:]
    assert_same(found, jvp(lambda x: case.plain(x, *rest), case.inputs[:1], (tangent,))[1])


# ---- what isn't a derivative -----------------------------------------------------------------


DROPPING = {
    "lora_linear": lambda x, inputs: ops.lora_linear(x, *inputs[1:], dropout_p=0.5),
    "dora_linear": lambda x, inputs: ops.dora_linear(x, *inputs[1:], dropout_p=0.5),
    "adapter": lambda x, inputs: ops.adapter(x, *inputs[1:5], dropout_p=0.5),
}


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_under_vmap_follows_its_randomness(name):
    """As F.dropout's: refused by default, one mask for all, or one for each."""
    inputs = make(name, torch.float64).inputs
    x = torch.randn(64, 3 * inputs[0].shape[1], dtype=torch.float64).view(64, 3, -1)

    def dropped(x):
        return DROPPING[name](x, inputs) - DROPPING[name](0 * x, inputs)

    with pytest.raises(RuntimeError, match="randomness"):
        vmap(dropped)(x)
    alike = x[:1].expand_as(x)

    def masks(randomness):
        rows = vmap(lambda x: DROPPING[name](x, inputs), randomness=randomness)(alike)
        return len(torch.unique(rows, dim=0))

    assert masks("same") == 1
    assert masks("different") > 60


def test_a_given_seed_is_the_same_mask_under_vmap():
    x, *rest = make("lora_linear", torch.float64).inputs
    one = ops.lora_linear(x, *rest, dropout_p=0.5, seed=SEED)
    for randomness in ("error", "same", "different"):
        options = {"dropout_p": 0.5, "seed": SEED}
        found = vmap(lambda x, o=options: ops.lora_linear(x, *rest, **o), randomness=randomness)
        assert_same(found(x.expand(3, -1, -1)), one.expand(3, -1, -1))


def test_ids_of_prefixes_and_prompts_can_be_mapped_over():
    q, k, v, *bank = make("prefix_attention", torch.float64).inputs
    embeddings, prompts = make("prompt_lookup", torch.float64).inputs
    ids = torch.tensor([[0, 1, -1], [1, 1, 0]])

    def attend(ids):
        return ops.prefix_attention(q, k, v, *bank, prefix_ids=ids, is_causal=False)

    def look_up(ids):
        return ops.prompt_lookup(embeddings, prompts, ids)[:3]

    assert_same(vmap(attend)(ids), torch.stack([attend(row) for row in ids]))
    expected = tuple(map(torch.stack, zip(*(look_up(row) for row in ids), strict=True)))
    assert_same(vmap(look_up)(ids), expected)


def test_lengths_can_be_mapped_over():
    inputs = make("prefix_attention", torch.float64).inputs
    lengths, ids = torch.tensor([[0, 1, 2], [3, 3, 1]]), torch.tensor([0, 1, 0])
    for side in ("left", "right"):
        options = {"prefix_ids": ids, "padding_side": side}

        def attend(lengths, options=options):
            return ops.prefix_attention(*inputs, lengths=lengths, **options)

        assert_same(vmap(attend)(lengths), torch.stack([attend(row) for row in lengths]))


def test_a_query_that_sees_nothing_has_no_gradient():
    q, k, v, *bank = make("prefix_attention", torch.float64).inputs
    options = {"prefix_ids": torch.tensor([-1, 0, -1]), "lengths": torch.tensor([0, 2, 3])}
    given = [tensor.requires_grad_() for tensor in (q, k, v, *bank)]
    first = torch.autograd.grad(
        loss(lambda *inputs: ops.prefix_attention(*inputs, **options))(*given),
        given,
        create_graph=True,
    )
    second = torch.autograd.grad(sum(g.square().sum() for g in first), given)
    assert all(tensor.isfinite().all() for tensor in (*first, *second))
    assert not any(tensor[0].any() for tensor in (*first[:3], *second[:3]))


def test_ids_of_a_routed_bank_cant_be_mapped_over():
    bank = example_bank(4, 5, (2, 3), dtype=torch.float64)
    x, weight = torch.randn(2, 3, 5).double(), torch.randn(4, 5).double()
    ids = torch.tensor([[0, 1, -1], [1, 1, 0]])
    with pytest.raises(ValueError, match="ids can't be mapped over by vmap"):
        vmap(lambda x, ids: ops.multi_lora_linear(x, weight, bank, ids))(x, ids)


def test_an_update_in_place_under_transforms():
    bank = example_bank(4, 5, (2, 3), dtype=torch.float64)
    x, y, ids = (
        torch.randn(2, 3, 5).double(),
        torch.randn(2, 3, 4).double(),
        torch.tensor([1, -1, 0]),
    )

    def add(y, x):
        return ops.multi_lora_add_(y.clone(), x, bank, ids)

    expected = torch.stack([add(*pair) for pair in zip(y, x, strict=True)])
    assert_same(vmap(add)(y, x), expected)
    delta = ops.multi_lora_linear(x[1], x.new_zeros(4, 5), bank, ids)  # linear in x
    assert_same(jvp(lambda x: add(y[0], x), (x[0],), (x[1],))[1], delta)
    with pytest.raises(ValueError, match="y must be mapped over"):
        vmap(lambda x: ops.multi_lora_add_(y[0].clone(), x, bank, ids))(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_op
def test_half_precision_under_grad(name, dtype):
    """As near to float64 as the plain backward, which runs in the kernels."""
    case, exact = make(name, dtype), make(name, torch.float64)
    argnums = everything(case)
    found = grad(lambda *inputs: case.op(*inputs).double().sin().sum(), argnums)(*case.inputs)
    inputs = [tensor.requires_grad_() for tensor in case.inputs]
    plain = torch.autograd.grad(case.op(*inputs).double().sin().sum(), inputs)
    rounded = [tensor.detach().double() for tensor in case.inputs]
    expected = grad(loss(exact.op), argnums)(*rounded)
    for i, tensors in enumerate(zip(found, plain, expected, strict=True)):
        assert_as_good_as(*tensors, f"gradient {i}")


def test_under_autocast():
    case = make("lora_linear", torch.float32)

    def total(*inputs):
        return case.op(*inputs).float().sin().sum()

    with torch.autocast("cpu", torch.bfloat16):
        value = case.op(*case.inputs)
        found = grad(total, everything(case))(*case.inputs)
        mapped = vmap(case.op, (0, None, None, None))(case.inputs[0][None], *case.inputs[1:])[0]
    assert value.dtype is mapped.dtype is torch.bfloat16
    assert_same(mapped, value)
    exact = grad(loss(case.plain), everything(case))(*case.inputs)
    for tensor, expected in zip(found, exact, strict=True):
        assert tensor.dtype is torch.float32
        assert (tensor - expected).norm() <= 2e-2 * expected.norm()
