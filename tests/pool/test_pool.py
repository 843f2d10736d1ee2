"""AdapterPool: attaching, loading, routing. Its other tests are named test_pool_<what>.py."""

import copy
import json
import pickle

import pytest
import safetensors.torch
import torch
from small_adapters import (
    MIXED,
    OLD,
    TARGETS,
    Made,
    assert_unchanged,
    load,
    make_adapter,
    make_base,
    make_pool,
    merged,
    poison,
    routed,
    rows_of,
    state_of,
)
from torch import nn

import peft_kernels
from peft_kernels import AdapterPool, swap_linear
from peft_kernels.nn import MultiLoRALinear

# ---- attach and detach -----------------------------------------------------------------------


def test_attach_keeps_parameters_state_dict_and_results():
    model = make_base()
    parameters, before = dict(model.named_parameters()), model.state_dict()
    x = torch.randn(3, 8)
    expected = model(x)
    pool = AdapterPool.attach(model, TARGETS, capacity=20)
    assert {n: id(p) for n, p in model.named_parameters()} == {
        n: id(p) for n, p in parameters.items()
    }
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())
    assert isinstance(model[1].up, MultiLoRALinear)
    torch.testing.assert_close(model(x), expected)
    load(pool, "a", make_adapter(4))
    assert model.state_dict().keys() == before.keys()
    model.load_state_dict(before)
    assert repr(pool) == "AdapterPool(['a'], layers=4, capacity=24, max_rank=24)"


def test_detach_puts_the_very_layers_back():
    model = make_base()
    model[0].up.bias.requires_grad_(False)
    modules = dict(model.named_modules())
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    x = torch.randn(3, 8)
    expected = model(x)
    pool = AdapterPool.attach(model, TARGETS, capacity=16)
    load(pool, "a", make_adapter(4), trainable=True)
    parameters = pool.parameters("a")
    model.eval()
    with pool.route(["a"]), pytest.raises(RuntimeError, match="outside of any route; 1 are open"):
        pool.detach()
    pool.detach()
    assert dict(model.named_modules()) == modules
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert torch.equal(model(x), expected) and not model[0].up.training
    assert torch.equal(parameters[0], make_adapter(4).matrices("0.up")[0])
    assert pool.names() == [] and pool.memory().reserved == 0
    with pytest.raises(RuntimeError, match="detached"), pool.route([None]):
        pass
    with pytest.raises(ValueError, match="layers of the pool"):
        load(pool, "a", make_adapter(4))
    again = AdapterPool.attach(model, TARGETS, capacity=16)
    assert again.names() == []


def test_a_moved_model_is_detached_as_it_is():
    model, pool = make_pool()
    model.double()
    pool.detach()
    assert model(torch.randn(2, 8).double()).dtype is torch.float64


def test_a_module_under_two_names_is_one_layer():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"x": shared, "y": shared, "z": nn.Linear(8, 8)})
    pool = AdapterPool.attach(model, "x|y", capacity=8)
    assert model["x"] is model["y"] and isinstance(model["y"], MultiLoRALinear)
    assert type(model["z"]) is nn.Linear
    pool.detach()
    assert model["x"] is model["y"] is shared


@pytest.mark.parametrize(
    ("error", "named", "options"),
    [
        (ValueError, "nothing matches", {"target_modules": ["up", "nowhere"]}),
        (TypeError, "2 must be torch.nn.Linear", {"target_modules": ["up", "2"]}),
        (ValueError, "capacity must be at least 1", {"capacity": 0}),
        (TypeError, "capacity must be an int", {"capacity": 8.0}),
        (ValueError, "max_rank must be at least 1", {"max_rank": 0}),
        (ValueError, "max_adapters must be at least 1", {"max_adapters": -1}),
        (ValueError, "evict must be", {"evict": "fifo"}),
        (TypeError, "adapter_dtype must be", {"adapter_dtype": torch.float16}),
    ],
)
def test_a_bad_attach_changes_nothing(error, named, options):
    model = make_base()
    modules = list(model.modules())
    with pytest.raises(error, match=named):
        AdapterPool.attach(model, **({"target_modules": TARGETS, "capacity": 16} | options))
    assert list(model.modules()) == modules
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_can_be_in_one_pool():
    model, _ = make_pool()
    with pytest.raises(TypeError, match=r"serves an AdapterPool already: detach\(\) that first"):
        AdapterPool.attach(model, TARGETS, capacity=8)
    with pytest.raises(TypeError, match="is a LoRALinear already"):
        AdapterPool.attach(swap_linear(make_base(), ["up"], 2, alpha=4), ["up"], capacity=8)
    with pytest.raises(TypeError, match="attach"):
        AdapterPool()


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_a_copy_is_refused_and_says_why(copied):
    model, pool = make_pool()
    with pytest.raises(TypeError, match="in an AdapterPool can't be copied or pickled"):
        copied(model)
    pool.detach()
    copied(model)


def test_torch_s_encoder_takes_no_path_around_the_layers():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    pool = AdapterPool.attach(model, ["linear1", "linear2"], capacity=16)
    shapes = {f"layers.{i}.linear{j}": ((12, 8), (8, 12))[j - 1] for i in (0, 1) for j in (1, 2)}
    load(pool, "a", make_adapter(4, shapes=shapes))
    x = torch.randn(2, 3, 8)
    assert not torch.allclose(routed(pool, model, ["a"], x), model(x), atol=1e-2)
    pool.detach()
    assert model.use_nested_tensor and model.layers[0].activation_relu_or_gelu == 1


# ---- loading and routing ---------------------------------------------------------------------


@pytest.mark.parametrize("ids", [["a", None, "b", "c"], ["c", "c", "a", "b"], [None] * 4, ["b"]])
def test_each_row_gets_its_own(ids):
    model, pool = make_pool()
    for name, made in MIXED.items():
        load(pool, name, made)
        poison(pool)
    x = torch.randn(4, 3, 8)
    outside = model(x)
    y = routed(pool, model, ids, x)
    rows = ids * (4 // len(ids))
    expected = rows_of(make_base(), x, [MIXED.get(name) for name in rows])
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    for row, name in enumerate(rows):
        assert name or torch.equal(y[row], outside[row])


def test_by_token():
    model, pool = make_pool()
    for name, made in MIXED.items():
        load(pool, name, made)
    x = torch.randn(2, 3, 8)
    tokens = [["a", None, "b"], ["c", "a", "a"]]
    y = routed(pool, model, tokens, x)
    flat = [MIXED.get(name) for row in tokens for name in row]
    expected = rows_of(make_base(), x.reshape(6, 8), flat).reshape(2, 3, 8)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("error", "named", "ids"),
    [
        (ValueError, "no adapter 'x'; it has 'a', 'b'", ["a", "x"]),
        (ValueError, "lists of one length", [["a", "b"], ["a"]]),
        (ValueError, "lists of one length", [["a", "b"], "b"]),
        (TypeError, "ids must be a sequence", "a"),
        (TypeError, "ids must be a sequence", None),
        (TypeError, "ids must be a sequence", [0, 1]),
        (TypeError, "ids must be a sequence", [[["a"]]]),
    ],
)
def test_bad_ids(error, named, ids):
    _, pool = make_pool()
    load(pool, "a", MIXED["a"])
    load(pool, "b", MIXED["b"])
    before = state_of(pool)
    with pytest.raises(error, match=named), pool.route(ids):
        raise AssertionError("the route was entered")
    assert_unchanged(pool, before)


@pytest.mark.parametrize(
    ("ids", "shape"),
    [
        (["a", None], (3, 8)),
        (["a", None], (4, 8)),  # which two entries would divide
        (["a", None, "a", None], (2, 6, 8)),
        (["a"] * 4, (2, 6, 8)),
        (["a", None], (8,)),
        ([["a", None]], (2, 8, 8)),
        ([["a"], [None]], (2, 3, 8)),
        ([["a", None]], (2, 1, 8)),
        ([["a", None]] * 3, (2, 3, 8)),
        ([], (2, 8)),
    ],
)
def test_entries_that_are_not_the_batch_s_rows_or_tokens(ids, shape):
    model, pool = make_pool()
    load(pool, "a", MIXED["a"])
    x = torch.randn(shape)
    with pytest.raises(ValueError, match=r"pool.route has names for .* 0\.up got an input"):
        routed(pool, model, ids, x)
    with pytest.raises(ValueError, match=r"pool.route has names for .* 0\.up got an input"):
        routed(pool, model[0].up, ids, x)


def test_no_rows():
    model, pool = make_pool()
    for ids in ([], [None], [["a"]] * 0):
        assert routed(pool, model, ids, torch.randn(0, 8)).shape == (0, 8)
    assert routed(pool, model, [[], []], torch.randn(2, 0, 8)).shape == (2, 0, 8)


def test_a_folder(tmp_path):
    trained = swap_linear(
        make_base(), TARGETS, 4, alpha=8, use_rslora=True, rank_pattern={"1.up": 12},
        alpha_pattern={"0.*": 3},
    )  # fmt: skip
    for name, parameter in trained.named_parameters():
        if "lora_b" in name:
            nn.init.normal_(parameter)
    peft_kernels.save_adapter(trained, tmp_path)
    model, pool = make_pool()
    pool.load("a", tmp_path)
    assert pool.ranks("a") == {"0.up": 4, "0.down": 4, "1.up": 12, "1.down": 4}
    x = torch.randn(5, 8)
    torch.testing.assert_close(routed(pool, model, ["a"], x), trained(x), rtol=1e-5, atol=1e-5)
    pool.save("a", tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_saving_what_lacks_layers_round_trips(tmp_path):
    model, pool = make_pool()
    load(pool, "c", MIXED["c"])
    pool.save("c", tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["1.up"]
    loaded = peft_kernels.load_adapter(make_base(), tmp_path)
    x = torch.randn(5, 8)
    torch.testing.assert_close(routed(pool, model, ["c"], x), loaded(x), rtol=1e-5, atol=1e-5)


@pytest.fixture
def folder(tmp_path):
    peft_kernels.save_adapter(swap_linear(make_base(), TARGETS, 4, alpha=8), tmp_path)
    return tmp_path


def edit(folder, drop=(), **changes) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    kept = {key: t for key, t in tensors.items() if not any(part in key for part in drop)}
    safetensors.torch.save_file(kept, path)


def altered(made: Made, layer: str, **matrices) -> dict:
    keys = {which: f"base_model.model.{layer}.lora_{which}.weight" for which in matrices}
    return made.tensors | {keys[which]: tensor for which, tensor in matrices.items()}


BAD_SOURCES = {
    "no config": (TypeError, "config must be a dict", lambda m, f: (m.tensors, None)),
    "a config twice": (ValueError, "config must be None", lambda m, f: (f, m.config)),
    "no adapter": (FileNotFoundError, "adapter_config.json", lambda m, f: (f / "nowhere", None)),
    "nothing": (ValueError, "'x' has none", lambda m, f: ({}, m.config)),
    "other keys": (ValueError, "keys must be", lambda m, f: ({"w": torch.ones(1)}, m.config)),
    "dora": (ValueError, "use_dora", lambda m, f: (m.tensors, m.config | {"use_dora": True})),
    "dropout": (ValueError, "dropout", lambda m, f: (m.tensors, m.config | {"lora_dropout": 2.0})),
    "another rank": (
        ValueError,
        r"0\.up\.lora_A must be \[4, 8\]; got \[5, 8\]",
        lambda m, f: (altered(m, "0.up", A=torch.ones(5, 8)), m.config),
    ),
    "another width": (
        ValueError,
        r"1\.down\.lora_B must be \[8, 4\]; got \[9, 4\]",
        lambda m, f: (altered(m, "1.down", B=torch.ones(9, 4)), m.config),
    ),
    "integers": (
        TypeError,
        "lora_B must be floating-point; got torch.int64",
        lambda m, f: (altered(m, "1.down", B=torch.ones(8, 4, dtype=torch.int64)), m.config),
    ),
    "another layer": (
        ValueError,
        r"layers of the pool; 'x' has \['2.up'\]",
        lambda m, f: (altered(m, "2.up", A=torch.ones(4, 8), B=torch.ones(12, 4)), m.config),
    ),
    "above max_rank": (
        ValueError,
        "max_rank 16; got 17 in 0.up",
        lambda m, f: make_adapter(17)[:2],
    ),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
@pytest.mark.parametrize("method", ["load", "replace"])
def test_bad_sources_change_nothing(method, case, folder):
    error, named, make = BAD_SOURCES[case]
    source, config = make(make_adapter(4), folder)
    _, pool = make_pool(max_rank=16)
    load(pool, "a", MIXED["a"])
    if method == "replace":
        load(pool, "x", make_adapter(2))
    before = state_of(pool)
    with pytest.raises(error, match=named):
        getattr(pool, method)("x", source, config=config)
    assert_unchanged(pool, before)


def test_a_folder_that_lacks_what_its_config_targets(folder):
    _, pool = make_pool()
    edit(folder, drop=["1.up"])
    with pytest.raises(ValueError, match=r"'x' lacks layers .*\['1.up'\]"):
        pool.load("x", folder)
    edit(folder, target_modules=["0.up", "down"])
    pool.load("x", folder)
    assert "1.up" not in pool.ranks("x")


def test_names():
    _, pool = make_pool()
    load(pool, "b", MIXED["b"])
    load(pool, "a", MIXED["a"])
    assert pool.names() == ["b", "a"] and len(pool) == 2
    assert "a" in pool and "c" not in pool and None not in pool
    with pytest.raises(ValueError, match="has an adapter 'a' already; replace"):
        load(pool, "a", MIXED["c"])
    with pytest.raises(TypeError, match="name must be a str"):
        load(pool, 3, MIXED["c"])
    for method in (pool.unload, pool.pin, pool.unpin, pool.ranks, pool.parameters):
        with pytest.raises(ValueError, match="no adapter 'c'; it has 'b', 'a'"):
            method("c")
    with pytest.raises(ValueError, match="no adapter 'c'"):
        pool.save("c", "nowhere")
    with pytest.raises(ValueError, match="no adapter 'c'"):
        pool.replace("c", MIXED["c"].tensors, config=MIXED["c"].config)


def test_half_precision_and_a_cast():
    model = make_base().bfloat16()
    pool = AdapterPool.attach(model, TARGETS, capacity=64)
    assert model[0].up.pages_a.dtype is torch.bfloat16
    load(pool, "a", MIXED["a"])
    x = torch.randn(4, 8)
    expected = rows_of(make_base(), x, [MIXED["a"]] * 4)
    y = routed(pool, model, ["a"], x.bfloat16())
    torch.testing.assert_close(y.double(), expected, rtol=5e-2, atol=5e-2)
    model, pool = make_pool()
    load(pool, "a", MIXED["a"])
    model.double()
    y = routed(pool, model, ["a"], x.double())
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    load(pool, "b", MIXED["b"])
    y = routed(pool, model, ["b"], x.double())
    expected = rows_of(make_base(), x, [MIXED["b"]] * 4)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)


def test_the_merged_model_of_the_tests_is_not_the_base():
    base = make_base()
    x = torch.randn(1, 8).double()
    assert (merged(base, OLD)(x) - merged(base, None)(x)).abs().max() > 0.1
