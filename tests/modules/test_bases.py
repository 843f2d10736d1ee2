"""Layers that cannot be a base: each is refused by name and for its real reason."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.utils import prune

from peft_kernels import AdapterPool, load_adapter, swap_linear
from peft_kernels.nn import LoRALinear

WIDTH = 8


def of_module(module: str, *bases: type, **members: object) -> type:
    """A class that says that it comes from ``module``."""
    return type("Linear", bases, {"__module__": module, **members})


def other_forward(self, x):
    return nn.functional.linear(x, self.weight)


class Packed(torch.Tensor):
    """What quantising libraries leave in place of a weight: a subclass that computes by itself."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype)

    def __init__(self, data):
        self.data_8bit = data

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{cls.__name__} dispatch: no {function}")


class Named(nn.Parameter):
    """A Parameter that computes as any other does."""


def with_weight(weight: Any) -> nn.Linear:
    linear = nn.Linear(WIDTH, WIDTH)
    del linear.weight
    linear.register_parameter("weight", weight)
    return linear


def placeholder() -> nn.Linear:
    linear = with_weight(nn.Parameter(torch.empty(0)))
    linear.weight.ds_id = 3
    return linear


def flattened() -> nn.Linear:
    linear = with_weight(nn.Parameter(torch.empty(WIDTH * WIDTH)))
    linear.weight._fsdp_flattened = True
    return linear


def offloaded() -> nn.Linear:
    hook = of_module("accelerate.hooks", offload=True)()
    linear = nn.Linear(WIDTH, WIDTH, device="meta")
    linear._hf_hook, linear.forward = hook, other_forward
    return linear


def replaced() -> nn.Linear:
    linear = nn.Linear(WIDTH, WIDTH)
    linear.forward = other_forward
    return linear


def integers() -> nn.Linear:
    return with_weight(nn.Parameter(torch.zeros(WIDTH, WIDTH, dtype=torch.int8), False))


def bias_packed() -> nn.Linear:
    linear = nn.Linear(WIDTH, WIDTH)
    linear.bias = nn.Parameter(Packed(torch.zeros(WIDTH)))
    return linear


Int8Linear = of_module("bitsandbytes.nn.modules", nn.Linear, forward=other_forward)
Fp8Linear = of_module("transformers.integrations.finegrained_fp8", nn.Linear)
HqqLinear = of_module("hqq.core.quantize", nn.Module)
PeftLinear = of_module("peft.tuners.lora.layer", nn.Module)
Scaled = of_module("my.models", nn.Linear, forward=other_forward)
CASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "bitsandbytes": (
        lambda: Int8Linear(WIDTH, WIDTH),
        r"quantised layer, bitsandbytes\.nn\.modules\.Linear: .* load the model without",
    ),
    "fp8": (
        lambda: Fp8Linear(WIDTH, WIDTH),
        r"transformers\.integrations\.finegrained_fp8\.Linear",
    ),
    "hqq": (HqqLinear, r"quantised layer, hqq\.core\.quantize\.Linear"),
    "peft": (PeftLinear, r"layer of PEFT's, peft\.tuners\.lora\.layer\.Linear: .*unload\(\)"),
    "packed": (
        lambda: with_weight(nn.Parameter(Packed(torch.zeros(WIDTH, WIDTH)))),
        r"weight that is a .*\.Packed, quantised or wrapped: .* load the model without",
    ),
    "packed bias": (bias_packed, r"bias that is a .*\.Packed"),
    "integers": (integers, r"weight that must be float32.*; got torch\.int8"),
    "ZeRO-3": (placeholder, r"placeholder of DeepSpeed's ZeRO-3: .*deepspeed\.zero\.Init"),
    "FSDP": (flattened, "FullyShardedDataParallel.* before wrapping"),
    "a shard": (
        lambda: with_weight(nn.Parameter(torch.empty(WIDTH))),
        r"shape \[8\], that of a shard or a placeholder",
    ),
    "offloaded": (offloaded, r"offloaded by accelerate.*remove_hook_from_module"),
    "replaced": (replaced, r"forward; this one's was replaced by .*\.other_forward"),
    "subclass": (lambda: Scaled(WIDTH, WIDTH), r"own forward; my\.models\.Linear has another"),
    "no linear layer": (
        lambda: nn.LayerNorm(WIDTH),
        r"must be torch\.nn\.Linear .*; got torch\.nn\.modules\.normalization\.LayerNorm",
    ),
    "pruned": (
        lambda: prune.identity(nn.Linear(WIDTH, WIDTH), "weight"),
        "its Parameters are: bias, weight_orig.*pruning",
    ),
    "parametrized": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
        r"Parameter of its own as weight; it is computed: .*remove_parametrizations\(\) first",
    ),
    "lazy": (lambda: nn.LazyLinear(WIDTH), "an initialised Parameter .* run the model once"),
}


class Whole(nn.Module):
    def __init__(self, parts: nn.ModuleDict) -> None:
        super().__init__()
        self.first, self.block = parts["first"], parts["block"]

    def forward(self, x):
        return self.block["up"](self.first(x))


def model_with(layer: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({"first": nn.Linear(WIDTH, WIDTH), "block": nn.ModuleDict({"up": layer})})


def write_adapter(folder) -> str:
    """A folder of PEFT's for what :func:`model_with` builds."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["first", "up"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {
        f"base_model.model.{name}.lora_{m}.weight": torch.ones(2, 8)
        if m == "A"
        else torch.ones(8, 2)
        for name in ("first", "block.up")
        for m in "AB"
    }
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    return str(folder)


@pytest.fixture
def entries(tmp_path):
    folder = write_adapter(tmp_path / "adapter")
    return {
        "swap_linear": lambda model: swap_linear(model, ["first", "up"], 2, alpha=4),
        "load_adapter": lambda model: load_adapter(model, folder),
        "attach": lambda model: AdapterPool.attach(model, ["first", "up"], capacity=8),
    }


ENTRIES = ("swap_linear", "load_adapter", "attach")


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("case", CASES)
def test_a_layer_that_cannot_be_served_is_refused(entries, case, entry):
    make, reason = CASES[case]
    model = model_with(make())
    modules = list(model.modules())
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(TypeError, match=f"block.up .*{reason}"):
        entries[entry](model)
    assert list(model.modules()) == modules
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize("case", CASES)
def test_a_single_layer_is_refused_alike(case):
    make, reason = CASES[case]
    with pytest.raises(TypeError, match=f"linear .*{reason}"):
        LoRALinear.from_linear(make(), 2, alpha=4)


def test_parameters_of_a_harmless_subclass_serve():
    layer = LoRALinear.from_linear(with_weight(Named(torch.ones(WIDTH, WIDTH))), 2, alpha=4)
    assert layer(torch.ones(1, WIDTH)).shape == (1, WIDTH)


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_sharded_model_is_served(entries, entry, tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        model = Whole(model_with(nn.Linear(WIDTH, WIDTH)))
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        x = torch.ones(2, WIDTH)
        base = model(x)
        entries[entry](model)
        assert type(model.first) is not nn.Linear
        assert torch.allclose(model(x), base) == (
            entry != "load_adapter"
        )  # new ones do nothing yet
    finally:
        torch.distributed.destroy_process_group()


# ---- the libraries themselves, where they are installed ------------------------------------------


def test_inside_peft():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["up"], modules_to_save=["first"])
    model = peft.get_peft_model(model_with(nn.Linear(WIDTH, WIDTH)), config)
    for targets in ("all-linear", ["lora_A.default"], ["base_layer"], ["modules_to_save.default"]):
        with pytest.raises(TypeError, match=r"a part of .*, a layer of PEFT's: .*unload"):
            swap_linear(model, targets, 2, alpha=4)
    with pytest.raises(TypeError, match=r"up is a layer of PEFT's, peft\.tuners\.lora\.layer"):
        AdapterPool.attach(model, ["up"], capacity=8)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    swap_linear(model.unload(), ["up"], 2, alpha=4)


@pytest.mark.parametrize("offload", [False, True])
def test_with_hooks_of_accelerate(offload, entries):
    accelerate = pytest.importorskip("accelerate")
    model = model_with(nn.Linear(WIDTH, WIDTH))
    if offload:
        accelerate.cpu_offload(model)
    else:
        accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    with pytest.raises(TypeError, match=r"first has a hook of accelerate's .*remove_hook_from"):
        entries["swap_linear"](model)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    entries["swap_linear"](model)


def test_quantised_by_torchao(entries):
    quantization = pytest.importorskip("torchao.quantization")
    model = model_with(nn.Linear(WIDTH, WIDTH))
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    match = r"first has(, as a Linear of Int8Tensor, x in codes| a weight that is a torchao\.)"
    for entry in entries.values():
        with pytest.raises(TypeError, match=match):
            entry(model)


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_quantised_by_bitsandbytes(entries, kind):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = model_with(getattr(bitsandbytes.nn, kind)(WIDTH, WIDTH))
    for entry in entries.values():
        match = rf"up (is a quantised layer, bitsandbytes\..*|has, as a ){kind}"
        with pytest.raises(TypeError, match=match):
            entry(model)
