"""save_adapter and load_adapter: the files, round trips and errors. PEFT itself: test_peft.py."""

import json
import os

import pytest
import safetensors.torch
import torch
from small_adapters import make_base
from torch import nn
from torch.nn.utils import parametrizations, prune

from peft_kernels import load_adapter, save_adapter, swap_linear
from peft_kernels.nn import LoRALinear

X = torch.linspace(-1, 1, 24).reshape(3, 8)


def make_model(targets=("up", "down"), r=2, **options) -> nn.Module:
    """A base with adapters as if trained."""
    model = swap_linear(make_base(), list(targets), r, **{"alpha": 6, **options})
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_b" in name:
            nn.init.normal_(parameter)
    return model


def config_of(folder) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def edit_config(folder, **changes) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(config_of(folder) | changes))


def tensors_of(folder) -> dict:
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


def write_tensors(folder, tensors) -> None:
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "adapter"
    save_adapter(make_model(), folder)
    return folder


def assert_refused(error, named, folder, model=None):
    """Loading raises, and changes neither modules nor values nor requires_grad."""
    model = model or make_base()
    modules = [*model.modules()]
    values = [(p.requires_grad, p.clone()) for p in model.parameters()]
    scales = [m.scale for m in modules if isinstance(m, LoRALinear)]
    with pytest.raises(error, match=named):
        load_adapter(model, folder)
    assert modules == [*model.modules()]
    assert scales == [m.scale for m in modules if isinstance(m, LoRALinear)]
    for (flag, value), parameter in zip(values, model.parameters(), strict=True):
        assert parameter.requires_grad is flag
        assert torch.equal(parameter.nan_to_num(), value.nan_to_num())


# ---- files -----------------------------------------------------------------------------------


def test_files(saved):
    assert sorted(os.listdir(saved)) == ["adapter_config.json", "adapter_model.safetensors"]
    assert config_of(saved) == {
        "alpha_pattern": {},
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 6,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": 2,
        "rank_pattern": {},
        "target_modules": ["down", "up"],
        "task_type": None,
        "use_rslora": False,
    }
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors_of(saved).items()}
    expected = {}
    for i in range(2):
        for name, n, k in (("up", 12, 8), ("down", 8, 12)):
            expected[f"base_model.model.{i}.{name}.lora_A.weight"] = (2, k)
            expected[f"base_model.model.{i}.{name}.lora_B.weight"] = (n, 2)
    assert shapes == expected


def test_the_majority_is_the_rule_and_the_rest_are_patterns(tmp_path):
    model = make_model(rank_pattern={"1.down": 5}, alpha_pattern={"0.up": 9, "1.down": 7.5})
    model[1].up.scale = torch.tensor(0.25)
    save_adapter(model, tmp_path)
    config = config_of(tmp_path)
    assert (config["r"], config["lora_alpha"]) == (2, 9)
    assert config["rank_pattern"] == {r"^1\.down": 5}
    assert config["alpha_pattern"] == {r"^0\.down": 6, r"^1\.down": 7.5, r"^1\.up": 0.5}


@pytest.mark.parametrize(
    ("targets", "written"),
    [
        (["0.up"], ["0.up"]),
        (["0.up", "1.up"], ["up"]),
        (["0.up", "1.down"], ["0.up", "1.down"]),
    ],
)
def test_target_modules_select_what_was_swapped(tmp_path, targets, written):
    model = make_model(targets)
    save_adapter(model, tmp_path)
    assert config_of(tmp_path)["target_modules"] == written
    torch.testing.assert_close(load_adapter(make_base(), tmp_path)(X), model(X), rtol=0, atol=0)


def test_full_names_that_are_endings_of_others_become_a_regular_expression(tmp_path):
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"up": nn.Linear(8, 8), "x": nn.ModuleDict({"up": nn.Linear(8, 8)})})

    model = swap_linear(make(), "up", 2, alpha=4)
    save_adapter(model, tmp_path)
    assert config_of(tmp_path)["target_modules"] == "up"
    loaded = load_adapter(make(), tmp_path)
    assert isinstance(loaded["up"], LoRALinear) and type(loaded["x"]["up"]) is nn.Linear


# ---- round trips -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"dropout": 0.25},
        {"rank_pattern": {"1.down": 5, "up": 3}, "alpha_pattern": {"0.*": 3}},
        {"use_rslora": True, "rank_pattern": {"down": 7}, "alpha_pattern": {"1.up": 0.1}},
    ],
)
@pytest.mark.parametrize("into", ["plain", "swapped"])
def test_round_trip(tmp_path, options, into):
    model = make_model(**options).eval()
    save_adapter(model, tmp_path)
    target = make_base() if into == "plain" else swap_linear(
        make_base(), ["up", "down"], 2, **({"alpha": 1} | options)
    )  # fmt: skip
    assert not torch.equal(target(X), model(X))
    assert load_adapter(target, tmp_path) is target
    assert torch.equal(target.eval()(X), model(X))
    assert target[0].up.dropout == options.get("dropout", 0.0)
    assert target[0].up.lora_a.requires_grad and not target[0].up.weight.requires_grad
    assert not target[2].weight.requires_grad


def test_mixed_rslora_keeps_every_scale(tmp_path):
    model = make_model(["up"], r=3, use_rslora=True)
    swap_linear(model, ["down"], 3, alpha=2)
    save_adapter(model, tmp_path)
    assert config_of(tmp_path)["use_rslora"] is False
    loaded = load_adapter(make_base(), tmp_path)
    assert loaded[0].up.scale == pytest.approx(model[0].up.scale, rel=1e-15)
    assert loaded[0].down.scale == model[0].down.scale


def test_a_merged_model_saves_the_same_adapter(tmp_path):
    model = make_model()
    before = model(X)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.merge()
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(make_base(), tmp_path)(X), before)


def test_half_precision_base(tmp_path):
    model = make_model().bfloat16()
    save_adapter(model, tmp_path)
    loaded = load_adapter(make_base().bfloat16(), tmp_path)
    assert loaded[0].up.lora_a.dtype is torch.float32
    assert torch.equal(loaded[0].up.lora_b, model[0].up.lora_b.float())


def test_pickled_weights(saved):
    torch.save(tensors_of(saved), saved / "adapter_model.bin")
    os.remove(saved / "adapter_model.safetensors")
    assert torch.equal(load_adapter(make_base(), saved)(X), make_model()(X))


def test_pickled_code_is_not_run(saved):
    os.remove(saved / "adapter_model.safetensors")
    torch.save({"key": os.system}, saved / "adapter_model.bin")
    assert_refused(ValueError, "adapter_model.bin must be a file of tensors", saved)


@pytest.mark.parametrize(
    ("held", "named"),
    [
        ([1], "it holds a list"),
        (7, "it holds a int"),
        ({"a": 7}, "under 'a' it holds a int"),
        ({7: X}, "under 7 it holds a Tensor"),
    ],
    ids=str,
)
def test_pickled_values_that_are_no_tensors(saved, held, named):
    os.remove(saved / "adapter_model.safetensors")
    torch.save(held, saved / "adapter_model.bin")
    assert_refused(ValueError, f"adapter_model.bin must be a file of tensors.*{named}", saved)


@pytest.mark.parametrize(("r", "other"), [(2, 8), (16, 8)])
def test_a_layer_takes_over_another_rank(tmp_path, r, other):
    model = make_model(r=r, rank_pattern={"0.up": 3})
    save_adapter(model, tmp_path)
    swapped = load_adapter(make_model(r=other), tmp_path)
    assert (swapped[0].up.r, swapped[1].up.r) == (3, r)
    assert torch.equal(swapped(X), model(X))
    assert swapped[0].up.lora_a.requires_grad
    save_adapter(swapped, tmp_path / "again")
    assert config_of(tmp_path / "again") == config_of(tmp_path)


def test_compiled_and_checkpoint_wrapped_models(tmp_path, saved):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = make_model()
    model[0] = checkpoint_wrapper(model[0])
    model[1] = torch.compile(model[1], backend="eager")
    save_adapter(torch.compile(model, backend="eager"), tmp_path)
    assert config_of(tmp_path) == config_of(saved)
    assert tensors_of(tmp_path).keys() == tensors_of(saved).keys()
    loaded = load_adapter(torch.compile(make_base(), backend="eager"), tmp_path)
    assert torch.equal(loaded(X), make_model()(X))


def test_distributed_data_parallel(tmp_path, saved):
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(make_model())
        before = model(X)
        save_adapter(model, tmp_path / "ddp")
        nn.init.zeros_(model.module[0].up.lora_b)
        assert torch.equal(load_adapter(model, tmp_path / "ddp")(X), before)
    finally:
        torch.distributed.destroy_process_group()
    assert tensors_of(tmp_path / "ddp").keys() == tensors_of(saved).keys()
    assert config_of(tmp_path / "ddp") == config_of(saved)


def test_block_selection_by_the_config(saved):
    kept = {k: t for k, t in tensors_of(saved).items() if ".1.up" in k}
    write_tensors(saved, kept)
    edit_config(saved, exclude_modules=["down", "0.up"])
    loaded = load_adapter(make_base(), saved)
    assert isinstance(loaded[1].up, LoRALinear) and type(loaded[0].up) is nn.Linear


# ---- saving fails ----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_base, lambda: LoRALinear(4, 4, 2, alpha=4)])
def test_nothing_to_save(tmp_path, make):
    with pytest.raises(ValueError, match="LoRALinear layers below it"):
        save_adapter(make(), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_failed_save_leaves_the_old_files(saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    write_bytes = type(saved).write_bytes

    def fail_on_config(self, data):
        if self.name == "adapter_config.json":
            raise OSError("no space left")
        return write_bytes(self, data)

    monkeypatch.setattr(type(saved), "write_bytes", fail_on_config)
    with pytest.raises(OSError, match="no space"):
        save_adapter(make_model(r=4), saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_saving_to_a_file_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(OSError, match="file"):
        save_adapter(make_model(), path)
    assert path.read_text() == "mine"


# ---- loading fails ---------------------------------------------------------------------------


def test_a_folder_that_is_no_adapter(tmp_path, saved):
    assert_refused(FileNotFoundError, "adapter_config.json", tmp_path)
    assert_refused(FileNotFoundError, "adapter_config.json", tmp_path / "nowhere")
    os.remove(saved / "adapter_model.safetensors")
    assert_refused(FileNotFoundError, "no adapter_model.safetensors", saved)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_config_that_is_no_json_object(saved, text):
    (saved / "adapter_config.json").write_bytes(text.encode("latin1"))
    assert_refused(ValueError, "JSON", saved)


def test_a_truncated_file(saved):
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert_refused(ValueError, "must be a file of tensors", saved)


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": "IA3"},
        {"peft_type": None},
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"modules_to_save": ["head"]},
        {"target_parameters": ["weight"]},
        {"layer_replication": [[0, 1]]},
        {"trainable_token_indices": [1]},
        {"alora_invocation_tokens": [1]},
        {"a_later_invention": {"on": True}},
        {"target_modules": None},
        {"rank_pattern": [1]},
        *({"init_lora_weights": i} for i in ("pissa", "pissa_niter_4", "olora", "corda", "loftq")),
    ],
    ids=str,
)
def test_what_is_not_supported_is_named(saved, changes):
    edit_config(saved, **changes)
    assert_refused(ValueError, next(iter(changes)), saved)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"target_modules": "(up"}, "target_modules"),
        ({"exclude_modules": "*up"}, "exclude_modules"),
        ({"rank_pattern": {"up[": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"up)": 2}}, "alpha_pattern or rank_pattern"),
        ({"layers_to_transform": [0], "layers_pattern": ["(a"]}, "layers_pattern"),
    ],
    ids=str,
)
def test_malformed_expressions_are_named(saved, changes, named):
    edit_config(saved, **changes)
    assert_refused(ValueError, f"{named} must be a regular expression.*got '", saved)


@pytest.mark.parametrize("changes", [{"target_modules": 5}, {"exclude_modules": 5}], ids=str)
def test_values_of_another_kind_are_named(saved, changes):
    edit_config(saved, **changes)
    assert_refused(TypeError, f"{next(iter(changes))} must be a str", saved)


@pytest.mark.parametrize(
    "changes", [{"r": 0}, {"r": 2.5}, {"lora_alpha": "x"}, {"lora_dropout": 1.5}], ids=str
)
def test_config_values_out_of_range(saved, changes):
    edit_config(saved, **changes)
    assert_refused((ValueError, TypeError), next(iter(changes)).removeprefix("lora_"), saved)


@pytest.mark.parametrize("into", ["plain", "swapped"])
@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("0.up.lora_A.weight", None, "0.up must have lora_A and lora_B"),
        ("0.up.lora_A.weight", "0.up.lora_embedding_A", "embeddings"),
        ("0.up.lora_A.weight", "0.up.lora_magnitude_vector", "lora_magnitude_vector"),
        ("0.up.", "7.up.", r"not in the file: \['0.up'\]; not in the model: \['7.up'\]"),
        ("0.up.", None, r"not in the file: \['0.up'\]"),
    ],
)
def test_keys_that_do_not_fit(saved, into, old, new, named):
    kept = {}
    for key, tensor in tensors_of(saved).items():
        if old not in key:
            kept[key] = tensor
        elif new:
            kept[key.replace(old, new)] = tensor
    write_tensors(saved, kept)
    assert_refused(ValueError, named, saved, None if into == "plain" else make_model())


@pytest.mark.parametrize("into", ["plain", "swapped"])
def test_keys_of_another_layer(saved, into):
    tensors = tensors_of(saved)
    more = {key.replace("0.up", "7.up"): tensor.clone() for key, tensor in tensors.items()}
    write_tensors(saved, tensors | more)
    model = None if into == "plain" else make_model()
    assert_refused(ValueError, r"not in the file: \[\]; not in the model: \['7.up'\]", saved, model)


@pytest.mark.parametrize("matrix", ["A", "B"])
@pytest.mark.parametrize("into", ["plain", "swapped"])
def test_shapes_that_do_not_fit(saved, into, matrix):
    tensors = tensors_of(saved)
    key = f"base_model.model.1.down.lora_{matrix}.weight"
    tensors[key] = tensors[key][:, :-1].contiguous()
    write_tensors(saved, tensors)
    model = None if into == "plain" else make_model()
    assert_refused(ValueError, rf"1\.down\.lora_{matrix} must be", saved, model)


def test_ranks_that_do_not_fit(saved):
    edit_config(saved, rank_pattern={"0.up": 4})
    assert_refused(ValueError, r"0\.up\.lora_A must be \[4, 8\]", saved)


def test_a_merged_model_is_refused(saved):
    model = make_model()
    model[1].up.merge()
    assert_refused(RuntimeError, r"1\.up is merged", saved, model)


def test_targets_that_are_not_linear(saved):
    edit_config(saved, target_modules=["up", "down", "2"])
    assert_refused(TypeError, "2 must be .*LayerNorm", saved)


COMPUTED = {
    "pruned": lambda layer, name: prune.l1_unstructured(layer, name, 0.5),
    "weight_norm of hooks": lambda layer, name: nn.utils.weight_norm(layer, name),
    "weight_norm": lambda layer, name: parametrizations.weight_norm(layer, name),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("matrix", ["lora_a", "lora_b"])
@pytest.mark.parametrize("kind", COMPUTED)
def test_an_adapter_that_is_computed_is_not_written_to(saved, kind, matrix):
    model = make_model()
    layer = model.get_submodule("1.up")
    COMPUTED[kind](layer, matrix)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=rf"1\.up: .*{matrix} .*remove"):
        load_adapter(model, saved)
    for call in (layer.reset_adapter, lambda: layer.switch(layer.lora_a + 1, layer.lora_b + 1)):
        with pytest.raises(RuntimeError, match=rf"{matrix} .*remove"):
            call()
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", COMPUTED)
def test_an_adapter_that_is_computed_is_not_saved(tmp_path, kind):
    model = make_model()
    COMPUTED[kind](model.get_submodule("1.up"), "lora_b")
    for trains in (True, False):
        with pytest.raises(RuntimeError, match=r"1\.up: the layer has a lora_b .*remove"):
            save_adapter(model.requires_grad_(trains), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
