"""lora_linear_sum: several adapters on all rows, each with a dropout of its own."""

import pytest
import torch
import torch.nn.functional as F
from test_multi_lora_linear import BACKENDS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import peft_kernels
from peft_kernels._library import backend_of
from peft_kernels.ops import LoRAFactors, dequantize, quantize
from peft_kernels.ops._dropout import dropout_factor
from peft_kernels.ops._lora_sum import lora_linear_sum

M, K, N, RANKS, SCALES = 7, 29, 37, (3, 8, 5), (2.0, 0.5, -1.5)
SEEDS = torch.tensor([11, 2**62 + 3, 11])
F32, F64, HALF = torch.float32, torch.float64, torch.bfloat16


def problem(dtype=F32, adapters=(F32, F32, F32), m=M):
    """x, the weight, A of each adapter and B of each, which learn, and the bias."""
    x, weight = torch.randn(m, K).to(dtype), torch.randn(N, K).div(K**0.5).to(dtype)
    a = [torch.randn(r, K).div(K**0.5).to(own) for r, own in zip(RANKS, adapters, strict=True)]
    b = [torch.randn(N, r).div(r**0.5).to(own) for r, own in zip(RANKS, adapters, strict=True)]
    for tensor in (x, *a, *b):
        tensor.requires_grad_()
    return x, weight, a, b, torch.randn(N).to(dtype)


def in_place_of(x, weight, a, b, bias, p, seeds=SEEDS, scales=SCALES, dtype=F64):
    """The sum as it is written, with the masks of these seeds."""
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    y = F.linear(x, weight, bias)
    for one, other, scale, share, seed in zip(a, b, scales, p, seeds, strict=True):
        mask = dropout_factor(seed, share, *x.shape, dtype) if share else 1.0
        y = y + scale * (x * mask) @ one.to(dtype).T @ other.to(dtype).T
    return y


def results(y, dy, x, a, b):
    return [y.detach(), *torch.autograd.grad(y, (x, *a, *b), dy.to(y.dtype))]


def errors(found, truth):
    pairs = zip(found, truth, strict=True)
    return [((one.double() - true).norm() / true.norm()).item() for one, true in pairs]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [(0.1, 0.5, 0.9), (0.0, 0.3, 0.3), (0.4, 0.0, 0.2), (0.0,) * 3])
@pytest.mark.parametrize(
    ("dtype", "adapters"),
    [(F32, (F32,) * 3), (HALF, (HALF,) * 3), (HALF, (F32, HALF, F32)), (F64, (F64,) * 3)],
)
def test_against_float64(backend, p, dtype, adapters):
    """With the same masks, no farther from it than PyTorch's own operations are."""
    if backend == "triton" and dtype is F64:
        pytest.skip("float64 is the reference's")
    x, weight, a, b, bias = problem(dtype, adapters)
    dy = torch.randn(M, N)
    truth = results(in_place_of(x, weight, a, b, bias, p), dy, x, a, b)
    eager = results(in_place_of(x, weight, a, b, bias, p, dtype=dtype), dy, x, a, b)
    with peft_kernels.backend(backend):
        y = lora_linear_sum(x, weight, LoRAFactors(a, b, SCALES), p, bias=bias, seeds=SEEDS)
        found = results(y, dy, x, a, b)
    assert y.dtype is dtype
    limit = {F32: 1e-6, HALF: 0.0, F64: 1e-14}[dtype]
    for own, other in zip(errors(found, truth), errors(eager, truth), strict=True):
        assert own <= max(1.5 * other, limit)


def test_a_kernel_computes_it():
    assert backend_of("lora_linear", torch.device("cpu"), F32) == "cpu"
    assert backend_of("multi_lora_linear", torch.device("cpu"), F32) == "cpu"


class Calls(TorchDispatchMode):
    """The ops of this package that are called, and how many products PyTorch's are."""

    def __init__(self):
        super().__init__()
        self.ours, self.products = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func.name().split("::")
        if namespace == "peft_kernels":
            self.ours.append(name.partition(".")[0])
        self.products += name.partition(".")[0] in ("mm", "addmm", "matmul", "linear", "bernoulli_")
        return func(*args, **(kwargs or {}))


def test_the_bases_products_are_taken_once():
    """And all others by kernels."""
    x, weight, a, b, bias = problem()
    with Calls() as forward:
        y = lora_linear_sum(x, weight, LoRAFactors(a, b, SCALES), (0.5, 0.5, 0.5), bias=bias)
    assert forward.ours == ["lora_linear_fwd", *["multi_lora_linear_add"] * 2]
    with Calls() as backward:
        y.sum().backward()
    assert backward.ours == [*["multi_lora_linear_bwd"] * 2, "lora_linear_bwd"]
    assert forward.products == backward.products == 0


def test_no_mask_is_saved():
    """Beyond inputs of the call, what is saved is rank-sized."""
    x, weight, a, b, bias = problem(m=500)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda saved: saved):
        lora_linear_sum(x, weight, LoRAFactors(a, b, SCALES), (0.5, 0.5, 0.5), bias=bias)
    known = {x.data_ptr(), weight.data_ptr()}
    most = 500 * 8  # S of the largest rank, a whole page
    assert all(one.numel() <= most for one in saved if one.data_ptr() not in known)


def test_the_masks_are_independent():
    """Adapters that are the same but for their seeds: of each element none, one or both add."""
    m, k, p = 400, 32, 0.25
    eye, x = torch.eye(k), torch.ones(m, k)
    factors = LoRAFactors([eye, eye], [eye, eye], [1 - p, 10 * (1 - p)])
    y = lora_linear_sum(x, torch.zeros(k, k), factors, (p, p))
    first, second = (y.round() % 10 == 1), (y.round() >= 10)
    for share, expected in (
        (first.double().mean(), 1 - p),
        (second.double().mean(), 1 - p),
        ((first & second).double().mean(), (1 - p) ** 2),
        ((first ^ second).double().mean(), 2 * p * (1 - p)),
    ):
        # Five standard deviations of a mean of m k draws are 0.02 or less.
        assert abs(share - expected) < 5 * (expected * (1 - expected) / (m * k)) ** 0.5
    assert not torch.equal(y, lora_linear_sum(x, torch.zeros(k, k), factors, (p, p)))


def test_an_adapter_drops_what_it_drops_alone():
    x, weight, a, b, bias = problem()
    factors = LoRAFactors(a, b, SCALES)
    whole = lora_linear_sum(x, weight, factors, (0.5, 0.3, 0.2), bias=bias, seeds=SEEDS)
    parts = -2 * F.linear(x, weight, bias)
    for i, p in enumerate((0.5, 0.3, 0.2)):
        own = slice(i, i + 1)
        alone = LoRAFactors(a[own], b[own], SCALES[own])
        parts = parts + lora_linear_sum(x, weight, alone, [p], bias=bias, seeds=SEEDS[own])
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-5)


def test_gradcheck():
    shapes = (3, 5), (2, 5), (1, 5), (4, 2), (4, 1)
    given = [torch.randn(shape, dtype=F64, requires_grad=True) for shape in shapes]
    weight = torch.randn(4, 5, dtype=F64)

    def call(x, *matrices):
        factors = LoRAFactors(matrices[:2], matrices[2:], SCALES[:2])
        return lora_linear_sum(x, weight, factors, (0.2, 0.6), seeds=SEEDS[:2])

    assert torch.autograd.gradcheck(call, given)
    assert torch.autograd.gradgradcheck(call, given)


def test_what_needs_no_gradient_gets_none():
    x, weight, a, b, bias = problem()
    for tensor in (x, a[0], b[2]):
        tensor.requires_grad_(False)
    y = lora_linear_sum(x, weight, LoRAFactors(a, b, SCALES), (0.5,) * 3, bias=bias, seeds=SEEDS)
    expected = in_place_of(x, weight, a, b, bias, (0.5,) * 3, dtype=F32)
    wanted = (*a[1:], *b[:2])
    torch.testing.assert_close(
        torch.autograd.grad(y.sin().sum(), wanted),
        torch.autograd.grad(expected.sin().sum(), wanted),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


def test_rows_in_several_dimensions_strides_and_scales_that_are_tensors():
    x, weight, a, b, bias = problem(m=12)
    p = (0.5, 0.3, 0.0)
    scales = [torch.tensor(scale) for scale in SCALES]
    y = lora_linear_sum(x, weight, LoRAFactors(a, b, SCALES), p, bias=bias, seeds=SEEDS)
    turned = LoRAFactors(
        [one.T.contiguous().T for one in a], [one.T.contiguous().T for one in b], scales
    )
    for shape in ((3, 4, K), (2, 2, 3, K)):
        found = lora_linear_sum(x.view(shape), weight, turned, p, bias=bias, seeds=SEEDS)
        torch.testing.assert_close(found, y.view(*shape[:-1], N))
    row = lora_linear_sum(x[0], weight, turned, p, bias=bias, seeds=SEEDS)
    torch.testing.assert_close(row, y[0])
    none = lora_linear_sum(x[:0], weight, turned, p, bias=bias)
    assert none.shape == (0, N)


def test_under_autocast():
    x, weight, a, b, bias = problem()
    p, factors = (0.5, 0.3, 0.0), LoRAFactors(a, b, SCALES)
    with torch.autocast("cpu", HALF):
        y = lora_linear_sum(x, weight, factors, p, bias=bias, seeds=SEEDS)
    halves = (tensor.to(HALF) for tensor in (x, weight, bias))
    x, weight, bias = halves
    expected = lora_linear_sum(x, weight, factors, p, bias=bias, seeds=SEEDS)
    assert y.dtype is HALF and torch.equal(y, expected)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_over_codes(kind):
    x, _, a, b, _ = problem()
    x, a = torch.randn(M, 64).requires_grad_(), [torch.randn(r, 64).requires_grad_() for r in RANKS]
    weight, p, bias = quantize(torch.randn(N, 64) / 8, kind), (0.5, 0.3, 0.0), torch.randn(N)
    found, expected = (
        results(
            lora_linear_sum(x, one, LoRAFactors(a, b, SCALES), p, bias=bias, seeds=SEEDS),
            torch.ones(M, N), x, a, b,
        )
        for one in (weight, dequantize(weight))
    )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_computed_again_it_drops_the_same(reentrant):
    x, weight, a, b, bias = problem()

    def call(x):
        return lora_linear_sum(x, weight, LoRAFactors(a, b, SCALES), (0.5,) * 3, bias=bias)

    torch.manual_seed(1)
    plain = call(x)
    torch.manual_seed(1)
    again = checkpoint(call, x, use_reentrant=reentrant)
    assert torch.equal(plain, again)
    gradients = []
    for y in (plain, again):
        for tensor in (x, *a, *b):
            tensor.grad = None
        y.sin().sum().backward()
        gradients.append([tensor.grad for tensor in (x, *a, *b)])
    assert all(map(torch.equal, *gradients))


def test_what_drops_otherwise_when_computed_again_is_an_error():
    x, weight, a, b, bias = problem()

    def call(x):
        return lora_linear_sum(x, weight, LoRAFactors(a, b, SCALES), (0.5,) * 3, bias=bias)

    y = checkpoint(call, x, use_reentrant=False, preserve_rng_state=False)
    with pytest.raises(RuntimeError, match="keep preserve_rng_state=True"):
        y.sum().backward()


def call_of(weight, bias, p=(0.5, 0.3, 0.0)):
    def call(x, *matrices):
        factors = LoRAFactors(matrices[:3], matrices[3:], SCALES)
        return lora_linear_sum(x, weight, factors, p, bias=bias, seeds=SEEDS)

    return call


def test_compiles_in_one_graph():
    x, weight, a, b, bias = problem()
    call = call_of(weight, bias)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    found, expected = (one(x, *a, *b) for one in (compiled, call))
    torch.testing.assert_close(found, expected)
    wanted = x, *a, *b
    torch.testing.assert_close(
        torch.autograd.grad(found.sin().sum(), wanted),
        torch.autograd.grad(expected.sin().sum(), wanted),
    )


def test_a_compiled_call_draws_anew():
    x, weight, a, b, bias = problem()
    compiled = torch.compile(
        lambda x: lora_linear_sum(x, weight, LoRAFactors(a, b, SCALES), (0.5,) * 3, bias=bias),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    assert not torch.equal(compiled(x), compiled(x))


def test_transforms():
    x, weight, a, b, bias = problem()
    call, wanted = call_of(weight, bias), (x, *a, *b)
    expected = torch.autograd.grad(call(*wanted).sin().sum(), wanted)
    found = torch.func.grad(lambda *given: call(*given).sin().sum(), tuple(range(7)))(*wanted)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    many = torch.stack([x, x + 1]).detach()
    mapped = torch.func.vmap(lambda x: call(x, *a, *b))(many)
    torch.testing.assert_close(
        mapped, torch.stack([call(one, *a, *b) for one in many]), rtol=1e-4, atol=1e-4
    )


def test_exports():
    x, weight, a, b, bias = problem()
    factors = torch.nn.ParameterList([one.detach() for one in (*a, *b)])

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.factors = factors

        def forward(self, x):
            return call_of(weight, bias)(x, *self.factors)

    layer = Layer()
    expected = torch.autograd.grad(layer(x).sin().sum(), (x, *factors))
    for module in (torch.export.export(layer, (x,)).module(), torch.jit.trace(layer, (x,))):
        y = module(x)
        torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-4)
        wanted = x, *module.parameters()
        found = torch.autograd.grad(y.sin().sum(), wanted)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrong", [-0.1, 1.0])
@pytest.mark.parametrize("place", [0, 2])
def test_a_share_that_none_can_drop_is_named(wrong, place):
    x, weight, a, b, bias = problem()
    p = [0.5, 0.5, 0.5]
    p[place] = wrong
    with pytest.raises(ValueError, match=r"dropout_p must be in \[0, 1\)"):
        lora_linear_sum(x, weight, LoRAFactors(a, b, SCALES), p, bias=bias)


def test_shapes_that_do_not_fit_are_named():
    x, weight, a, b, bias = problem()
    with pytest.raises(ValueError, match="k = 29 columns"):
        lora_linear_sum(
            x, weight, LoRAFactors([*a[:2], a[2][:, 1:]], b, SCALES), (0.5,) * 3, bias=bias
        )
    with pytest.raises(ValueError, match="37 outputs"):
        lora_linear_sum(x, weight, LoRAFactors(a, [*b[:2], b[2][1:]], SCALES), (0.5,) * 3)
