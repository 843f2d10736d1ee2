"""Models inside wrappers: their names, what is matched by them, and what is written under them."""

import itertools
import warnings

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
    offload_wrapper,
)
from torch.optim.swa_utils import AveragedModel

from peft_kernels import AdapterPool, load_adapter, save_adapter, swap_linear
from peft_kernels.modules.names import (
    plain_modules,
    plain_name,
    plain_parameters,
    replace_module,
    submodule,
    unwrapped,
)
from peft_kernels.nn import LoRALinear

X = torch.linspace(-1, 1, 24).reshape(3, 8)


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory):
    store = f"file://{tmp_path_factory.mktemp('gloo') / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x):
        return self.up(x).tanh()


class Base(nn.Module):
    """Has children named as a wrapper's are, and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(8, 8)
        self._orig_mod = nn.Linear(8, 8)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        x = self._orig_mod(self.module(x))
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def make_base() -> Base:
    torch.manual_seed(0)
    return Base().eval()


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def fully_sharded(module: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    return FullyShardedDataParallel(
        module,
        device_id=torch.device("cpu"),
        use_orig_params=True,
        sharding_strategy=ShardingStrategy.NO_SHARD,
    )


WRAPPERS = {
    "compile": compiled,
    "ddp": nn.parallel.DistributedDataParallel,
    "data_parallel": nn.DataParallel,
    "checkpoint": checkpoint_wrapper,
    "offload": offload_wrapper,
    "average": AveragedModel,
    "fsdp": fully_sharded,
}
PAIRS = [
    (outer, inner)
    for outer, inner in itertools.permutations(WRAPPERS, 2)
    # FSDP and DDP refuse each other; an averaged model copies what it is given, which FSDP forbids.
    if not ({"ddp", "fsdp"} == {outer, inner} or (outer, inner) == ("average", "fsdp"))
]


def wrap(model: nn.Module, *names: str) -> nn.Module:
    for name in reversed(names):
        model = WRAPPERS[name](model)
    return model.eval()


def wrap_inside(model: nn.Module, *names: str) -> nn.Module:
    model.layers[0] = wrap(model.layers[0], *names)
    model.layers[1].up = wrap(model.layers[1].up, *names)
    return model


# ---- names -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("outer", "inner"), PAIRS)
def test_names_are_those_of_the_plain_model(outer, inner):
    plain = make_base()
    model = wrap(plain, outer, inner)
    assert type(unwrapped(model)) is Base
    assert list(plain_modules(model)) == [name for name, _ in make_base().named_modules()]
    assert list(plain_parameters(model)) == [name for name, _ in make_base().named_parameters()]
    states = {plain_name(model, key) for key in model.state_dict()} - {"n_averaged"}
    assert states == make_base().state_dict().keys()


@pytest.mark.parametrize("name", [name for name in WRAPPERS if name != "fsdp"])
def test_names_of_wrapped_modules_inside(name):
    model = wrap_inside(make_base(), name)
    assert list(plain_modules(model)) == [name for name, _ in make_base().named_modules()]
    assert list(plain_parameters(model)) == [name for name, _ in make_base().named_parameters()]
    assert submodule(model, "layers.1.up") is plain_modules(model)["layers.1.up"]
    assert type(submodule(model, "layers.1.up")) is nn.Linear
    for path, _ in model.named_modules():
        assert submodule(model, path) is submodule(model, plain_name(model, path))


def test_a_module_named_as_a_wrappers_child_is_kept():
    model = make_base()
    assert unwrapped(model) is model
    assert plain_name(model, "module.weight") == "module.weight"
    assert plain_name(compiled(model), "_orig_mod._orig_mod.weight") == "_orig_mod.weight"
    assert "module" in plain_modules(nn.parallel.DistributedDataParallel(model))


def test_what_is_not_there():
    with pytest.raises(AttributeError, match="has no module '7'"):
        submodule(compiled(make_base()), "layers.7")
    assert plain_name(compiled(make_base()), "_orig_mod.layers.7.weight") == "layers.7.weight"


@pytest.mark.parametrize("names", [("compile",), ("checkpoint",), ("checkpoint", "compile")])
def test_a_replaced_module_is_the_one_that_runs(names):
    model, other = make_base(), nn.Linear(8, 8)
    model.layers[1].up = wrap(model.layers[1].up, *names)
    before = model(X)
    replace_module(model, "layers.1.up", other)
    plain = make_base()
    plain.layers[1].up = other
    assert not torch.equal(model(X), before)
    torch.testing.assert_close(model(X), plain(X))


# ---- swap, save and load ---------------------------------------------------------------------


def trained(model: nn.Module) -> nn.Module:
    """B as if trained, the same in every wrapping."""
    torch.manual_seed(1)
    for layer in plain_modules(model).values():
        if isinstance(layer, LoRALinear):
            nn.init.normal_(layer.lora_b)
    return model


def files_of(folder) -> tuple[str, dict]:
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    return (folder / "adapter_config.json").read_text(), tensors


def assert_same_files(folder, other) -> None:
    (config, tensors), (its_config, its_tensors) = files_of(folder), files_of(other)
    assert config == its_config
    assert tensors.keys() == its_tensors.keys()
    assert all(torch.equal(tensors[key], its_tensors[key]) for key in tensors)


SWAP = {
    "target_modules": ["up", "module"],
    "rank_pattern": {r"^layers\.0\.up": 2},
    "r": 4,
    "alpha": 8,
}


@pytest.fixture
def saved(tmp_path):
    save_adapter(trained(swap_linear(make_base(), **SWAP)), tmp_path / "plain")
    return tmp_path / "plain"


@pytest.mark.parametrize(("outer", "inner"), PAIRS)
def test_a_wrapped_model_writes_the_plain_models_files(tmp_path, saved, outer, inner):
    model = wrap(trained(swap_linear(make_base(), **SWAP)), outer, inner)
    save_adapter(model, tmp_path / "wrapped")
    assert_same_files(tmp_path / "wrapped", saved)


@pytest.mark.parametrize("name", [name for name in WRAPPERS if name != "fsdp"])
def test_wrapped_modules_inside_are_written_as_plain_ones(tmp_path, saved, name):
    model = wrap_inside(trained(swap_linear(make_base(), **SWAP)), name)
    save_adapter(compiled(model), tmp_path / "wrapped")
    assert_same_files(tmp_path / "wrapped", saved)


@pytest.mark.parametrize("names", [("compile",), ("compile", "checkpoint"), ("compile", "average")])
def test_patterns_match_the_names_of_a_wrapped_model(saved, names):
    model = trained(swap_linear(wrap(wrap_inside(make_base(), "compile"), *names), **SWAP))
    layers = {n: m for n, m in plain_modules(model).items() if isinstance(m, LoRALinear)}
    assert {name: layer.r for name, layer in layers.items()} == {
        "module": 4,
        "layers.0.up": 2,
        "layers.1.up": 4,
    }
    torch.testing.assert_close(model(X), load_adapter(make_base(), saved)(X))


def test_all_linear_leaves_the_output_embeddings_of_a_wrapped_model():
    class Model(Base):
        def get_output_embeddings(self):
            return self.module

    model = swap_linear(compiled(checkpoint_wrapper(Model())), "all-linear", 2, alpha=4)
    assert type(unwrapped(model).module) is nn.Linear
    assert isinstance(unwrapped(model)._orig_mod, LoRALinear)


@pytest.mark.parametrize(("outer", "inner"), [("compile", "average"), ("data_parallel", "compile")])
def test_a_folder_is_loaded_into_a_wrapped_model(saved, outer, inner):
    expected = load_adapter(make_base(), saved)(X)
    torch.testing.assert_close(load_adapter(wrap(make_base(), outer, inner), saved)(X), expected)
    swapped = wrap(swap_linear(make_base(), **SWAP), outer, inner)
    torch.testing.assert_close(load_adapter(swapped, saved)(X), expected)


def test_an_averaged_model_writes_its_average(tmp_path):
    model = trained(swap_linear(make_base(), ["module"], 2, alpha=4))
    average = AveragedModel(model)
    average.update_parameters(model)
    with torch.no_grad():
        model.module.lora_b.mul_(3)
    average.update_parameters(model)
    save_adapter(average, tmp_path)
    written = files_of(tmp_path)[1]["base_model.model.module.lora_B.weight"]
    torch.testing.assert_close(written, model.module.lora_b.detach() * 2 / 3)


# ---- a pool ----------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("compile", "ddp"), ("average", "compile"), ("data_parallel",)])
def test_a_pool_of_a_wrapped_model_reads_and_writes_plain_names(tmp_path, saved, names):
    model = wrap(wrap_inside(make_base(), "checkpoint"), *names)
    pool = AdapterPool.attach(model, ["up", "module"], capacity=16)
    pool.load("a", saved)
    assert pool.ranks("a") == {"module": 4, "layers.0.up": 2, "layers.1.up": 4}
    pool.save("a", tmp_path / "again")
    assert_same_files(tmp_path / "again", saved)
    with pool.route(["a"] * 3):
        routed = unwrapped(model)(X)
    torch.testing.assert_close(routed, load_adapter(make_base(), saved)(X))
    pool.detach()
    torch.testing.assert_close(unwrapped(model)(X), make_base()(X))


# ---- what comes too late ---------------------------------------------------------------------


def test_new_parameters_inside_of_ddp_are_said_to_be_left_out(saved):
    with pytest.warns(RuntimeWarning, match="DistributedDataParallel.*swap first"):
        swap_linear(wrap(make_base(), "ddp"), **SWAP)
    with pytest.warns(RuntimeWarning, match="DistributedDataParallel.*load the adapter first"):
        load_adapter(wrap(make_base(), "ddp", "compile"), saved)
    with pytest.warns(RuntimeWarning, match="DistributedDataParallel"):
        load_adapter(wrap(swap_linear(make_base(), **SWAP | {"r": 7}), "ddp"), saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(wrap(swap_linear(make_base(), **SWAP), "ddp"), saved)


def test_new_parameters_inside_of_fsdp_are_refused(saved):
    model = wrap(swap_linear(make_base(), **SWAP | {"r": 7}), "fsdp")
    before = [(name, p.clone()) for name, p in model.named_parameters()]
    with pytest.raises(ValueError, match="load the adapter first, then wrap"):
        load_adapter(model, saved)
    for (name, value), (its_name, parameter) in zip(before, model.named_parameters(), strict=True):
        assert name == its_name and torch.equal(value, parameter)
