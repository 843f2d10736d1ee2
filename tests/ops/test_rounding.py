"""Rounding on CPUs: sums of thousands of products are as exact as torch's own in float32.

Each result's error against float64, over several seeds: its rms is at most 1.2 times that of the
same maths done by torch, and the largest at most 1.5 times; or it is the rounding of the result.
"""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import peft_kernels
from peft_kernels.ops import adapter, lora_linear, multi_lora_linear, prefix_attention
from peft_kernels.ops import prompt_lookup as lookup
from peft_kernels.ops.adapter import example_inputs as adapter_inputs
from peft_kernels.ops.adapter_fusion import absorb, adapter_fusion
from peft_kernels.ops.adapter_fusion import example_inputs as fusion_inputs
from peft_kernels.ops.multi_lora_linear import example_bank, example_ids, example_trained
from peft_kernels.ops.prefix_attention import example_inputs as prefix_inputs
from peft_kernels.ops.prompt_lookup import example_inputs as prompt_inputs

RMS, LARGEST = 1.2, 1.5
HALF_UNIT = 2**-24  # of the last place, at most, over the value
FEWEST = 2000
TAIL = 10**7  # the largest of so many is a matter of a few in the tail
KINDS = ["uniform", "normal"]
OPS = ("lora_linear", "multi_lora_linear", "adapter", "adapter_fusion", "prefix_attention")


@pytest.fixture(autouse=True)
def one_thread():
    """torch's products are rounded otherwise on other numbers of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def draw(kind, *shape):
    """Uniform in [0, 1), where all of a sum's terms may have one sign, or normal."""
    return torch.rand(shape) if kind == "uniform" else torch.randn(shape)


def weights(kind, rows, depth):
    """As nn.Linear begins, or normal with the same scale."""
    drawn = torch.rand(rows, depth) * 2 - 1 if kind == "uniform" else torch.randn(rows, depth)
    return drawn * depth**-0.5


@dataclasses.dataclass
class Error:
    """Squares and the largest, of the differences and the values, in units of each tensor's rms."""

    squares: float = 0.0
    largest: float = 0.0
    exact_squares: float = 0.0
    exact_largest: float = 0.0
    count: int = 0

    def add(self, result, exact):
        unit = exact.square().mean().sqrt().clamp_min(1e-300)
        difference, exact = (result.double() - exact) / unit, exact / unit
        self.count += difference.numel()
        self.squares += difference.square().sum().item()
        self.largest = max(self.largest, difference.abs().max().item())
        self.exact_squares += exact.square().sum().item()
        self.exact_largest = max(self.exact_largest, exact.abs().max().item())

    def assert_as_good_as(self, other, name, largest):
        rms, bound = self.squares**0.5, HALF_UNIT * self.exact_squares**0.5
        assert rms <= max(RMS * other.squares**0.5, bound), (
            f"{name}: {rms / other.squares**0.5:.2f} times the rms error of torch"
        )
        bound = max(LARGEST * other.largest, HALF_UNIT * self.exact_largest)
        # Of a few numbers the largest error is a matter of luck.
        assert not largest or self.count < FEWEST or self.largest <= bound, (
            f"{name}: {self.largest / other.largest:.2f} times the largest error of torch"
        )


def results(function, tensors, dy):
    """The output, and the gradient of each tensor; those of name.0, name.1 ... under name."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    y = function(leaves)
    found = {"output": [y.detach()]}
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    for name, gradient in zip(leaves, gradients, strict=True):
        found.setdefault(name.split(".")[0], []).append(gradient)
    return found


def check(make, seeds, eager=None, largest=None):
    """``make()`` gives a function of tensors by name, these, and the output's gradient.

    ``largest`` names the results whose largest error counts; None: of all.
    """
    ours, torchs = {}, {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        function, tensors, dy = make()
        by_torch = eager or function
        wide = {name: tensor.double() for name, tensor in tensors.items()}
        with peft_kernels.backend("reference"):
            exact = results(by_torch, wide, dy.double())
            other = results(by_torch, tensors, dy)
        for name, parts in results(function, tensors, dy).items():
            for result, eagers, wanted in zip(parts, other[name], exact[name], strict=True):
                ours.setdefault(name, Error()).add(result, wanted)
                torchs.setdefault(name, Error()).add(eagers, wanted)
    for name, error in ours.items():
        error.assert_as_good_as(torchs[name], name, largest is None or name in largest)


@pytest.mark.parametrize("op", [*OPS, "prompt_lookup"])
def test_the_kernels_are_there(op):
    """Without them the reference would be compared with itself."""
    assert peft_kernels.backend_of(op, "cpu", torch.float32) == "cpu"


# m, n, k and seeds: the forms for few rows and for many, and gradients that are sums of many rows.
LINEAR = [
    (1, 1000, 1000, 20),
    (4, 1000, 1000, 10),
    (8, 1024, 4096, 4),
    (10, 1000, 1000, 12),
    (10, 1000, 4096, 12),
    (37, 1001, 1003, 4),
    (64, 1000, 2048, 2),
    (4096, 1000, 120, 1),
]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n", "k", "seeds"), LINEAR)
def test_lora_linear(kind, m, n, k, seeds, transposed):
    def make():
        weight = weights(kind, n, k)
        weight = weight.T.contiguous().T if transposed else weight

        def function(t):
            return lora_linear(t["x"], weight.to(t["x"].dtype), t["a"], t["b"], scale=2.0)

        a, b = weights(kind, 16, k), weights(kind, n, 16)
        return function, {"x": draw(kind, m, k), "a": a, "b": b}, draw(kind, m, n)

    check(make, seeds)


@pytest.mark.parametrize("kind", KINDS)
def test_lora_linear_as_the_plain_layer(kind):
    """Ten rows of k = n = 1000, with an update of nothing, against F.linear itself."""
    torch.manual_seed(1000)
    weight, zeros = weights(kind, 1000, 1000), torch.zeros(1000, 1)

    def function(t):
        wide = weight.to(t["x"].dtype), zeros.T.to(t["x"].dtype), zeros.to(t["x"].dtype)
        return lora_linear(t["x"], *wide)

    def eager(t):
        return F.linear(t["x"], weight.to(t["x"].dtype))

    def make():
        return function, {"x": draw(kind, 10, 1000)}, draw(kind, 10, 1000)

    check(make, 8, eager)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n", "k", "seeds"), LINEAR)
def test_multi_lora_linear(kind, m, n, k, seeds):
    ranks = [16, 8, 40, 200]

    def make():
        weight, bank = weights(kind, n, k), example_bank(n, k, ranks)
        ids = example_ids(m, len(ranks), "skewed")
        trained = example_trained(bank, range(len(ranks)))
        present = set(ids.tolist())
        leaves = {f"a.{i}": a for i, a in enumerate(trained.a) if i in present}
        leaves |= {f"b.{i}": b for i, b in enumerate(trained.b) if i in present}

        def function(t):
            def chosen(letter, all_of_them):
                dtype = t["x"].dtype
                return [t.get(f"{letter}.{i}", m.to(dtype)) for i, m in enumerate(all_of_them)]

            dtype = t["x"].dtype
            own = bank._replace(a=bank.a.to(dtype), b=bank.b.to(dtype))
            receivers = trained._replace(a=chosen("a", trained.a), b=chosen("b", trained.b))
            return multi_lora_linear(t["x"], weight.to(dtype), own, ids, trained=receivers)

        return function, {"x": draw(kind, m, k), **leaves}, draw(kind, m, n)

    check(make, seeds)


BOTTLENECKS = [
    (8, 1000, 64, 8),
    (10, 1000, 64, 8),
    (10, 4096, 64, 12),
    (64, 1000, 1000, 2),
    (8192, 70, 8, 8),
    (32768, 64, 16, 1),
]


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "k", "r", "seeds"), BOTTLENECKS)
def test_adapter(kind, m, k, r, seeds, norms):
    def make():
        inputs = adapter_inputs(m, k, r, residual=norms, norm=norms, pre_norm=norms)
        inputs |= {"x": draw(kind, m, k), "down_weight": weights(kind, r, k)}
        return (lambda t: adapter(**t)), inputs | {"up_weight": weights(kind, k, r)}, dy()

    def dy():
        return draw(kind, m, k)

    check(make, seeds)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("m", "n", "sizes", "seeds"),
    [
        (10, 1000, [48, 48, 48], 6),
        (10, 2048, [48, 16], 10),
        (64, 2048, [64, 64], 2),
        (4096, 128, [16, 8], 12),
        (32768, 32, [8, 8], 12),
    ],
)
def test_adapter_fusion(kind, m, n, sizes, seeds):
    names = ("score_weight", "score_bias", "mix_weight", "mix_bias")

    def make():
        inputs = fusion_inputs(m, n, sizes)
        ups = inputs["up_weights"], inputs["up_biases"]
        attention = (inputs[f"{n}"] for n in ("query_weight", "query_bias", "key_weight"))
        absorbed = absorb(*ups, *attention, inputs["value_weight"])
        tensors = {"x": draw(kind, m, n)} | {name: getattr(absorbed, name) for name in names}
        for name in ("down_weights", "down_biases"):
            tensors |= {f"{name}.{i}": tensor for i, tensor in enumerate(inputs[name])}

        def function(t):
            downs = (
                [t[f"{name}.{i}"] for i in range(len(sizes))]
                for name in ("down_weights", "down_biases")
            )
            own = dataclasses.replace(absorbed, **{name: t[name] for name in names})
            # Smooth: at relu's kink the last place of z decides over a whole gradient.
            return adapter_fusion(t["x"], *downs, own, activation="swish")[0]

        return function, tensors, draw(kind, m, n)

    check(make, seeds, largest=None if m * n * seeds < TAIL else names)


def attention_by_torch(t):
    """The prefix put before the keys, and one softmax over all."""
    q, k, v = t["q"], t["k"], t["v"]
    group, (length, dim) = q.shape[1] // k.shape[1], t["prefix_k"].shape[-2:]
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])

    def whole(prefix, text):
        front = prefix.expand(len(text), -1, length, dim)
        return torch.cat((front, text), 2).repeat_interleave(group, 1)

    keys, values = whole(t["prefix_k"], k), whole(t["prefix_v"], v)
    mask = F.pad(seen, (length, 0), value=True)
    return F.scaled_dot_product_attention(q, keys, values, mask)


SHAPES = [
    # Few queries over many keys.
    (16, 1, 1000, 8, 8, 32, 100),
    (8, 4, 2000, 4, 4, 64, 100),
    (4, 9, 2000, 4, 4, 64, 100),
    # Many queries, whose gradients are sums of them.
    (2, 512, 512, 4, 2, 64, 100),
    (1, 1024, 1024, 2, 2, 128, 1000),
    (1, 512, 512, 8, 2, 64, 16),
    (8, 1024, 40, 4, 1, 64, 16),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_prefix_attention(kind, shape):
    """Of the gradients the rms alone: a few large probabilities make their largest errors."""
    batch, queries, keys, heads, kv_heads, dim, length = shape

    def make():
        inputs = prefix_inputs(batch, queries, heads, kv_heads, dim, length, keys=keys)
        inputs = {name: draw(kind, *tensor.shape) for name, tensor in inputs.items()}
        return (lambda t: prefix_attention(**t)), inputs, draw(kind, *inputs["q"].shape)

    check(make, 3, attention_by_torch, largest=("output",))


def test_prompt_lookup():
    def make():
        inputs = prompt_inputs(1000, 2, 64, 5)
        tensors = {name: inputs.pop(name) for name in ("embeddings", "prompts")}
        return (lambda t: lookup(**t, **inputs).embeddings), tensors, torch.rand(1000, 7, 64)

    check(make, 4)


@pytest.mark.long
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_other_builds_of_the_kernels(isa):
    if isa == "avx2" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this processor has no avx2")
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__)
    done = subprocess.run(
        [*command, "-k", "not other_builds"],
        env=os.environ | {"PEFT_KERNELS_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
