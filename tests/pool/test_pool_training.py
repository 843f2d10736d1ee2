"""Training adapters in a pool: alone, among others, and beside adapters that are only served."""

import json
import warnings

import pytest
import torch
from small_adapters import LAYERS, make_adapter, make_base, rows_of
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_kernels import AdapterPool, load_adapter, swap_linear
from peft_kernels.nn import LoRALinear
from peft_kernels.pool.adapter_pool import PoolFullError

TARGETS = ["up", "down"]
SETTINGS = {
    "a": {"r": 4, "alpha": 8},
    "b": {"r": 17, "alpha": 3, "use_rslora": True, "dropout": 0.3},
    "c": {
        "r": 2,
        "alpha": 5,
        "rank_pattern": {"1.up": 9},
        "dropout": 0.5,
        "target_modules": ["up"],
    },
}


def make_pool(names="abc", **options) -> tuple[nn.Module, AdapterPool]:
    """A pool with adapters to train, B as if trained; each is the same in whatever company."""
    model = make_base()
    pool = AdapterPool.attach(model, TARGETS, **({"capacity": 64} | options))
    for name in names:
        torch.manual_seed(ord(name))
        pool.create(name, **SETTINGS[name])
        for key, parameter in pool.named_parameters(name):
            if key.endswith("lora_B"):
                nn.init.normal_(parameter, std=0.3)
    return model, pool


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (model(x) - torch.linspace(-1, 1, 8)).square().sum()


def gradients(pool: AdapterPool, name: str) -> dict[str, torch.Tensor | None]:
    return {key: parameter.grad for key, parameter in pool.named_parameters(name)}


def step(pool, model, ids, x, run=None, seed=5) -> torch.Tensor:
    """A forward and backward in a route; the loss."""
    torch.manual_seed(seed)
    with pool.route(ids):
        loss = loss_of(run or model, x)
        loss.backward()
    return loss.detach()


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key, gradient in one.items():
        assert gradient.any(), key
        torch.testing.assert_close(gradient, other[key], rtol=1e-4, atol=1e-6, msg=key)


# ---- one step --------------------------------------------------------------------------------


@pytest.mark.parametrize("by_token", [False, True])
def test_a_step_over_several_adapters_is_several_steps(by_token):
    """Mixed ranks, scales and dropout, layers that some lack, rows without: each as if alone."""
    ids = ["b", None, "a", "c", "b", "c"]
    x = torch.randn(6, 3, 8)
    model, pool = make_pool()
    step(pool, model, [[name] * 3 for name in ids] if by_token else ids, x)
    for name in "abc":
        own = [i for i, other in enumerate(ids) if other == name]
        alone, alone_pool = make_pool(name)
        step(alone_pool, alone, [name], x[own])
        assert_same(gradients(pool, name), gradients(alone_pool, name))
        assert set(pool.ranks(name)) == {key.rpartition(".")[0] for key in gradients(pool, name)}
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_an_adapter_trains_as_lora_linear_does(dropout):
    """From the same start, and with seed=0 down to the dropout masks."""
    single, model = make_base(), make_base()
    torch.manual_seed(3)
    swap_linear(single, TARGETS, 4, alpha=8, dropout=dropout)
    pool = AdapterPool.attach(model, TARGETS, capacity=32)
    load_beside(pool, "other")
    torch.manual_seed(3)
    pool.create("a", 4, alpha=8, dropout=dropout, seed=0)
    layers = {n: m for n, m in single.named_modules() if isinstance(m, LoRALinear)}
    pairs = []
    for name, parameter in pool.named_parameters("a"):
        layer, _, which = name.rpartition(".")
        theirs = layers[layer].lora_a if which == "lora_A" else layers[layer].lora_b
        pairs.append((parameter, theirs, which == "lora_B"))
        if which == "lora_A":
            assert torch.equal(parameter, theirs)
    optimizers = [torch.optim.AdamW([pair[i] for pair in pairs], lr=0.05) for i in range(2)]
    x = torch.randn(5, 8)
    for seed in range(4):
        mine = step(pool, model, ["a"], x, seed=seed)
        torch.manual_seed(seed)
        loss = loss_of(single, x)
        loss.backward()
        torch.testing.assert_close(mine, loss.detach(), rtol=1e-4, atol=1e-4)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for parameter, theirs, transposed in pairs:
        expected = theirs.T if transposed else theirs
        torch.testing.assert_close(parameter, expected, rtol=1e-2, atol=1e-3)


def load_beside(pool: AdapterPool, name: str, **options) -> None:
    made = make_adapter(3, 7)
    pool.load(name, made.tensors, config=made.config, **options)


def test_who_gets_gradients():
    model, pool = make_pool()
    load_beside(pool, "served")
    load_beside(pool, "loaded", trainable=True)
    for key, parameter in pool.named_parameters("b"):
        parameter.requires_grad_(key != "0.up.lora_A")
    for parameter in pool.parameters("c"):
        parameter.requires_grad_(False)
    x = torch.randn(5, 8, requires_grad=True)
    step(pool, model, ["b", "c", "served", None, "b"], x)
    assert x.grad.any(1).all()
    assert all(gradient is None for gradient in gradients(pool, "a").values()), "it has no rows"
    assert all(gradient is None for gradient in gradients(pool, "c").values())
    assert all(gradient is None for gradient in gradients(pool, "loaded").values())
    for key, gradient in gradients(pool, "b").items():
        assert (gradient is None) is (key == "0.up.lora_A")
    step(pool, model, ["loaded"], x)
    assert all(gradient.any() for gradient in gradients(pool, "loaded").values())
    with pytest.raises(ValueError, match="'served' isn't trainable; load it with trainable=True"):
        pool.parameters("served")


def test_nothing_is_recorded_when_nothing_is_wanted():
    model, pool = make_pool()
    load_beside(pool, "served")
    x = torch.randn(2, 8)
    with pool.route(["served", None]):
        assert not model(x).requires_grad
    with torch.no_grad(), pool.route(["a", "b"]):
        assert not model(x).requires_grad


def test_names_shapes_and_views():
    model, pool = make_pool("c")
    shapes = {name: tuple(p.shape) for name, p in pool.named_parameters("c")}
    assert shapes == {
        "0.up.lora_A": (2, 8),
        "0.up.lora_B": (2, 12),
        "1.up.lora_A": (9, 8),
        "1.up.lora_B": (9, 12),
    }
    layers = dict(model.named_modules())
    for name, parameter in pool.named_parameters("c"):
        layer = layers[name.rpartition(".")[0]]
        pages = layer.pages_a if name.endswith("A") else layer.pages_b
        assert parameter.untyped_storage().data_ptr() == pages.untyped_storage().data_ptr()
    assert not {id(p) for p in pool.parameters("c")} & {id(p) for p in model.parameters()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_inside_the_route(reentrant):
    x = torch.randn(6, 8, requires_grad=True)
    model, pool = make_pool()
    step(pool, model, list("abccba"), x)
    again, again_pool = make_pool()

    def run(x):
        for block in again:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return x

    step(again_pool, again, list("abccba"), x, run)
    for name in "abc":
        assert_same(gradients(pool, name), gradients(again_pool, name))


def test_autocast():
    model, pool = make_pool()
    x = torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        step(pool, model, list("abc"), x)
    assert all(g.dtype is torch.float32 and g.any() for g in gradients(pool, "a").values())


# ---- dropout ---------------------------------------------------------------------------------


def outputs(pool, model, ids, x, seed=5) -> torch.Tensor:
    torch.manual_seed(seed)
    with torch.no_grad(), pool.route(ids):
        return model(x)


def test_dropout_is_each_adapter_s_own_and_for_training_alone():
    model, pool = make_pool("", max_adapters=8)
    made = make_adapter(4, dropout=0.5)
    for name in ("a", "twin"):
        pool.load(name, made.tensors, config=made.config)
    pool.load("seeded", made.tensors, config=made.config, seed=pool._store.find("a").seed)
    x = torch.randn(1, 8).expand(4, 8)
    y = outputs(pool, model, ["a", "twin", "seeded", "a"], x)
    assert torch.equal(y, outputs(pool, model, ["a", "twin", "seeded", "a"], x))
    assert not torch.equal(y, outputs(pool, model, ["a", "twin", "seeded", "a"], x, seed=6))
    assert not torch.allclose(y[0], y[1], atol=1e-3)
    torch.testing.assert_close(y[0], y[2])
    assert not torch.allclose(y[0], y[3], atol=1e-3)
    model.eval()
    y = outputs(pool, model, ["a", "twin", "seeded", "a"], x)
    torch.testing.assert_close(
        y.double(), rows_of(make_base(), x, [made] * 4), rtol=1e-5, atol=1e-5
    )


def test_masks_don_t_depend_on_the_slot():
    made = make_adapter(4, dropout=0.5)
    x, results = torch.randn(2, 8), []
    for others in ((), ("b", "c")):
        model, pool = make_pool(others)
        pool.load("a", made.tensors, config=made.config)
        results.append(outputs(pool, model, ["a"], x))
    torch.testing.assert_close(*results)


# ---- steps of an optimizer -------------------------------------------------------------------


def test_training_together_is_training_apart():
    ids, x = ["a", "b", "c", "a"], torch.randn(4, 8)
    model, pool = make_pool()
    together = torch.optim.AdamW([p for n in "abc" for p in pool.parameters(n)], lr=0.02)
    apart = {name: make_pool(name) for name in "abc"}
    each = {n: torch.optim.AdamW(own.parameters(n), lr=0.02) for n, (_, own) in apart.items()}
    losses = []
    for seed in range(5):
        losses.append(step(pool, model, ids, x, seed=seed))
        together.step()
        together.zero_grad()
        for name, (alone, alone_pool) in apart.items():
            own = [i for i, other in enumerate(ids) if other == name]
            step(alone_pool, alone, [name], x[own], seed=seed)
            each[name].step()
            each[name].zero_grad()
    for name, (_, alone_pool) in apart.items():
        for mine, theirs in zip(pool.parameters(name), alone_pool.parameters(name), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_a_step_is_in_the_next_forward():
    model, pool = make_pool("a")
    x = torch.randn(4, 8)
    optimizer = torch.optim.SGD(pool.parameters("a"), lr=1e-3)
    losses = []
    for _ in range(5):
        losses.append(step(pool, model, ["a"], x).item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


def test_a_step_between_forward_and_backward_is_caught_for_its_own_adapter_alone():
    model, pool = make_pool("ab")
    x = torch.randn(2, 8)
    losses = {}
    for name in "ab":
        with pool.route([name]):
            losses[name] = loss_of(model, x)
    with torch.no_grad():
        pool.parameters("a")[0].add_(1.0)
    losses["b"].backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses["a"].backward()


def test_moving_the_model_moves_what_is_trained():
    model, pool = make_pool("a")
    x = torch.randn(4, 8)
    optimizer = torch.optim.SGD(pool.parameters("a"), lr=1e-3)
    model.double()
    before = step(pool, model, ["a"], x.double())
    optimizer.step()
    assert step(pool, model, ["a"], x.double()) < before
    assert all(p.dtype is p.grad.dtype is torch.float64 for p in pool.parameters("a"))


def test_saving_what_was_trained(tmp_path):
    x = torch.randn(3, 8)
    model, pool = make_pool(capacity=96)
    model.eval()
    for name in "abc":
        pool.save(name, tmp_path / name)
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config["lora_dropout"] == SETTINGS[name].get("dropout", 0.0)
        assert config["use_rslora"] is SETTINGS[name].get("use_rslora", False)
        loaded = load_adapter(make_base(), tmp_path / name).eval()
        y = outputs(pool, model, [name], x)
        torch.testing.assert_close(y, loaded(x), rtol=1e-5, atol=1e-5)
        pool.load(name + "2", tmp_path / name)
        assert torch.equal(outputs(pool, model, [name + "2"], x), y)


# ---- replacing and unloading what is trained -------------------------------------------------


def test_replacing_keeps_the_parameters_where_it_can():
    model, pool = make_pool("a")
    x = torch.randn(2, 8)
    optimizer = torch.optim.SGD(pool.parameters("a"), lr=1e-3)
    step(pool, model, ["a"], x)
    before = pool.parameters("a")
    made = make_adapter({**dict.fromkeys(LAYERS, 4), "1.up": 5}, 9)
    pool.replace("a", made.tensors, config=made.config)
    after = dict(pool.named_parameters("a"))
    for old, (name, new) in zip(before, after.items(), strict=True):
        assert (old is new) is not name.startswith("1.up")
        assert new.grad is None
    expected = rows_of(make_base(), x, [made, made])
    y = outputs(pool, model, ["a"], x)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    step(pool, model, ["a"], x)
    optimizer.step()
    assert not torch.allclose(outputs(pool, model, ["a"], x), y)


def test_replacing_what_a_route_trains_makes_new_parameters():
    model, pool = make_pool("a")
    x = torch.randn(2, 8)
    made = make_adapter(4, 9)
    with pool.route(["a"]):
        loss = loss_of(model, x)
        old = pool.parameters("a")
        pool.replace("a", made.tensors, config=made.config)
        loss.backward()
    assert all(parameter.grad.any() for parameter in old)
    torch.optim.SGD(old, lr=1.0).step()
    expected = rows_of(make_base(), x, [made, made])
    y = outputs(pool, model, ["a"], x)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_an_optimizer_doesn_t_write_where_its_adapter_was():
    model, pool = make_pool("a", capacity=24)
    x = torch.randn(2, 8)
    parameters = pool.parameters("a")
    step(pool, model, ["a"], x)
    values = [parameter.detach().clone() for parameter in parameters]
    pool.unload("a")
    assert all(map(torch.equal, parameters, values))
    made = make_adapter(24, 3)
    pool.load("b", made.tensors, config=made.config)
    torch.optim.SGD(parameters, lr=1.0).step()
    assert not any(map(torch.equal, parameters, values))
    expected = rows_of(make_base(), x, [made, made])
    y = outputs(pool, model, ["b"], x)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


# ---- creating --------------------------------------------------------------------------------


def test_a_new_adapter_does_nothing_yet():
    model = make_base()
    pool = AdapterPool.attach(model, TARGETS, capacity=16)
    x = torch.randn(2, 8)
    before = model(x)
    pool.create("a", 3, alpha=6, init="gaussian")
    assert torch.equal(outputs(pool, model, ["a"], x), before)
    assert all(p.any() for n, p in pool.named_parameters("a") if n.endswith("A"))


@pytest.mark.parametrize(
    ("error", "named", "options"),
    [
        (ValueError, "r must be at least 1", {"r": 0}),
        (TypeError, "r must be an int", {"r": 2.0}),
        (ValueError, "max_rank 16; got 17 in 0.up", {"r": 17}),
        (ValueError, "max_rank 16; got 20 in 1.up", {"rank_pattern": {"1.up": 20}}),
        (ValueError, "alpha must be finite", {"alpha": float("nan")}),
        (ValueError, "dropout must be", {"dropout": 1.0}),
        (ValueError, "init must be", {"init": "zeros"}),
        (ValueError, r"nothing matches \['nowhere'\]", {"target_modules": ["up", "nowhere"]}),
        (ValueError, "has an adapter 'a' already", {"name": "a"}),
        (TypeError, "name must be a str", {"name": None}),
        (ValueError, "seed must be an int", {"seed": -1}),
        (ValueError, "seed must be an int", {"seed": 2**63}),
        (PoolFullError, "needs 2 pages", {"r": 9}),
    ],
)
def test_a_bad_create_changes_nothing(error, named, options):
    _, pool = make_pool("", capacity=16)
    pool.create("a", 4, alpha=4)
    before = pool.memory(), [p.clone() for p in pool.parameters("a")]
    settings = {"name": "x", "r": 4, "alpha": 8} | options
    with pytest.raises(error, match=named):
        pool.create(settings.pop("name"), settings.pop("r"), **settings)
    assert pool.names() == ["a"] and pool.memory() == before[0]
    assert all(map(torch.equal, before[1], pool.parameters("a")))


# ---- zero_grad -----------------------------------------------------------------------------------


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("of", ["model", "inner", "layer", "wrapper"])
def test_zero_grad_of_a_model_reaches_its_pool(of, set_to_none):
    model = Outer(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    wrapper = torch.compile(model, backend="eager")
    pool = AdapterPool.attach(wrapper, ["inner.0"], capacity=16)
    for name in ("a", "b"):
        pool.create(name, 2, alpha=4)
    for parameter in (*pool.parameters("a"), *pool.parameters("b")):
        nn.init.normal_(parameter)
    x = torch.randn(2, 8)
    asked = {"model": model, "inner": model.inner, "layer": model.inner[0], "wrapper": wrapper}[of]

    def gradients():
        with pool.route(["a", "b"]):
            model(x).square().sum().backward()
        return [p.grad.clone() for name in "ab" for p in pool.parameters(name)]

    first = gradients()
    asked.zero_grad(set_to_none=set_to_none)
    for parameter in (*pool.parameters("a"), *pool.parameters("b")):
        assert parameter.grad is None if set_to_none else not parameter.grad.any()
    torch.testing.assert_close(gradients(), first)
    pool.detach()
    assert not any("zero_grad" in vars(module) for module in wrapper.modules())


@pytest.mark.parametrize("begin", ["create", "load"])
def test_several_processes_are_told_that_ddp_averages_no_gradient_of_a_pool(begin, monkeypatch):
    _, pool = make_pool("a")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.warns(RuntimeWarning, match="averages no gradient of theirs over the 2 processes"):
        if begin == "create":
            pool.create("b", **SETTINGS["b"])
        else:
            load_beside(pool, "b", trainable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_beside(pool, "served")


def test_parameters_in_other_memory_are_refused(tmp_path):
    """They are views of what is served: an average that is put in their .data wouldn't be."""
    model, pool = make_pool("ab")
    parameters = pool.parameters("a")
    former = [parameter.data for parameter in parameters]
    torch.nn.utils.vector_to_parameters(torch.zeros(sum(p.numel() for p in parameters)), parameters)
    says = r"adapter 'a' in 0\.up: its Parameters were given other memory"
    with pytest.raises(RuntimeError, match=says), pool.route(["a"]):
        pass
    with pytest.raises(RuntimeError, match=says):
        pool.save("a", tmp_path / "folder")
    x = torch.randn(1, 8)
    with pool.route(["b"]):
        model(x)
    for parameter, data in zip(parameters, former, strict=True):
        parameter.data = data
        parameter.data.zero_()
    with pool.route(["a"]):
        routed = model(x)
    with pool.route([None]):
        assert torch.equal(routed, model(x))
