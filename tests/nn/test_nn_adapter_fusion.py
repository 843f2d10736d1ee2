"""nn.AdapterFusion: its plans agree, it keeps what doesn't change, and it copies as modules do."""

import copy
import pickle

import pytest
import torch

from peft_kernels.nn import AdapterFusion, BottleneckAdapter

PLANS = ("absorbed", "query", "direct")
SIZE = 12


def a_fusion(count=3, *, preset="dynamic", dtype=torch.float64, **options):
    adapters = [
        BottleneckAdapter(SIZE, 2 + i, activation="silu", scale=scale, dtype=dtype)
        for i, scale in zip(range(count), [1.0, 0.5, "learned", "channel"], strict=False)
    ]
    fusion = AdapterFusion(adapters, preset=preset, **options)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return fusion


def outputs(fusion, x, plan, **arguments):
    """y, and the gradients of its squares' sum by all parameters but the key's bias, and by x."""
    fusion.plan = lambda rows: plan
    x = x.detach().requires_grad_()
    y = fusion(x, **arguments)
    named = {n: p for n, p in fusion.named_parameters() if n != "key.bias"}
    gradients = torch.autograd.grad(y.square().sum(), [x, *named.values()])
    return {"y": y, "x": gradients[0]} | dict(zip(named, gradients[1:], strict=True))


@pytest.mark.parametrize("preset", ["dynamic", "static"])
@pytest.mark.parametrize("count", [1, 3, 4])
@pytest.mark.parametrize("asks", [False, True])
def test_plans_agree(preset, count, asks):
    fusion = a_fusion(count, preset=preset, temperature=1.7)
    x, residual = torch.randn(2, 2, 5, SIZE, dtype=torch.float64)
    arguments = {"residual": (residual, x), "pre_norm": torch.nn.LayerNorm(SIZE).double()}
    if asks:
        arguments["query"] = torch.randn_like(x)
    expected = outputs(fusion, x, "direct", **arguments)
    for plan in PLANS[:2]:
        for name, value in outputs(fusion, x, plan, **arguments).items():
            largest = expected[name].abs().max()
            assert (value - expected[name]).abs().max() <= 1e-12 * largest, name


def test_the_keys_bias_cancels():
    fusion, x = a_fusion(), torch.randn(4, SIZE, dtype=torch.float64)
    before = fusion(x)
    with torch.no_grad():
        fusion.key.bias.add_(3)
    torch.testing.assert_close(fusion(x), before)


def test_the_plan_is_the_cheapest():
    fusion = AdapterFusion([BottleneckAdapter(768, 48) for _ in range(3)])
    assert fusion.plan(1024) == "absorbed"
    assert fusion.plan(100) == "query"
    assert fusion.plan(10) == "direct"
    with torch.no_grad():
        assert fusion.plan(1) == "absorbed"  # the matrices are kept


def test_what_cannot_be_absorbed_is_computed_directly():
    def with_first(**options):
        adapters = [BottleneckAdapter(SIZE, 4, **options), BottleneckAdapter(SIZE, 4)]
        return AdapterFusion(adapters)

    assert with_first().eval().plan(10_000) == "absorbed"
    for options in ({"activation": "tanh"}, {"gating": True}, {"norm_before": True}):
        assert with_first(**options).plan(10_000) == "direct"
    dropping = AdapterFusion([BottleneckAdapter(SIZE, 4)], dropout=0.1)
    assert dropping.plan(10_000) == "direct"
    assert dropping.eval().plan(10_000) == "absorbed"


def test_matrices_are_kept_until_something_changes():
    fusion, x = a_fusion(dtype=torch.float32).requires_grad_(False), torch.randn(4, SIZE)
    made = []
    absorb = fusion._absorb
    fusion._absorb = lambda absorb_query: made.append(1) or absorb(absorb_query)
    first = fusion(x)
    assert torch.equal(fusion(x), first)
    assert len(made) == 1

    def add_to(parameter):
        parameter.add_(0.5)

    changes = [
        lambda: add_to(fusion.query.weight),
        lambda: add_to(fusion.adapters[0].up.bias),
        lambda: setattr(fusion.adapters[1], "scaling", 3.0),
        lambda: setattr(fusion, "temperature", 2.0),
        lambda: setattr(fusion.key, "weight", torch.nn.Parameter(torch.eye(SIZE), False)),
    ]
    for count, change in enumerate(changes, 2):
        change()
        second = fusion(x)
        assert len(made) == count
        assert not torch.equal(first, second)
        first = second


def test_training_leaves_no_stale_matrices():
    fusion, x = a_fusion(dtype=torch.float32), torch.randn(200, SIZE)
    optimizer = torch.optim.SGD(fusion.parameters(), lr=0.1)
    with torch.no_grad():
        before = fusion(x)
    fusion(x).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        after = fusion(x)
    fusion.plan = lambda rows: "direct"
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, fusion(x), rtol=1e-4, atol=1e-5)


def test_stage_two_trains_the_fusion_alone():
    fusion, x = a_fusion(), torch.randn(300, SIZE, dtype=torch.float64)
    fusion.adapters.requires_grad_(False)
    fusion(x).square().sum().backward()
    for name, parameter in fusion.named_parameters():
        wants = not name.startswith("adapters.") and name != "key.bias"
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == wants, name


def test_attention():
    fusion, x = a_fusion(), torch.randn(2, 5, SIZE, dtype=torch.float64)
    fusion(x)
    assert fusion.attention.shape == (2, 5, 3)
    torch.testing.assert_close(fusion.attention.sum(-1), torch.ones(2, 5, dtype=torch.float64))
    assert not fusion.attention.requires_grad


def test_starts_as_the_equal_mixture_of_its_adapters():
    adapters = [BottleneckAdapter(SIZE, 3, init="mam") for _ in range(2)]
    x = torch.randn(7, SIZE)
    torch.testing.assert_close(AdapterFusion(adapters)(x, residual=x), x)


def test_regularization():
    fusion = AdapterFusion([BottleneckAdapter(SIZE, 3)])
    assert fusion.regularization() < 1e-10
    with torch.no_grad():
        fusion.value.weight[0, 1] += 2.0
    torch.testing.assert_close(fusion.regularization(), torch.tensor(0.04), rtol=1e-4, atol=0)
    assert AdapterFusion([BottleneckAdapter(SIZE, 3)], preset="static").regularization() == 0


def test_copies_and_files():
    fusion, x = a_fusion(), torch.randn(4, SIZE, dtype=torch.float64)
    with torch.no_grad():
        expected = fusion(x)
    for other in (copy.deepcopy(fusion), pickle.loads(pickle.dumps(fusion))):
        assert other._kept._kept is None
        torch.testing.assert_close(other(x), expected)
    fresh = a_fusion()
    fresh.load_state_dict(fusion.state_dict())
    torch.testing.assert_close(fresh(x), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapters": []}, "adapters must have at least one"),
        ({"adapters": [BottleneckAdapter(4, 2), BottleneckAdapter(6, 2)]}, r"one hidden.*\[4, 6\]"),
        ({"preset": "fancy"}, "preset must be one of dynamic, static; got 'fancy'"),
        ({"temperature": 0.0}, "temperature must be above 0; got 0.0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\); got 1.0"),
    ],
)
def test_bad_input(options, message):
    arguments = {"adapters": [BottleneckAdapter(4, 2)]} | options
    with pytest.raises(ValueError, match=message):
        AdapterFusion(**arguments)


def test_plans_do_not_share_what_is_kept():
    fusion, x = a_fusion(), torch.randn(4, SIZE, dtype=torch.float64)
    found = []
    with torch.no_grad():
        for plan in PLANS:
            fusion.plan = lambda rows, plan=plan: plan
            found.append(fusion(x))
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])
