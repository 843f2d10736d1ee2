"""read_plain(): the quick look at a layer of PEFT's says what read() says, or leaves it to that."""

import sys

import pytest
import torch
from torch import nn

import peft_kernels

peft = pytest.importorskip("peft")
lora_layers = pytest.importorskip("peft_kernels.integrations.peft.lora_layers")
plain = pytest.importorskip("peft_kernels.integrations.peft.plain")
state = pytest.importorskip("peft_kernels.integrations.peft.state")


def make_layer(**options) -> nn.Module:
    config = peft.LoraConfig(target_modules=["0"], r=2, init_lora_weights=False, **options)
    model = peft.inject_adapter_in_model(config, nn.Sequential(nn.Linear(6, 5)))
    peft_kernels.accelerate(model)
    return model[0]


@pytest.mark.parametrize("options", [
    {}, {"lora_dropout": 0.25}, {"lora_alpha": 3}
], ids=lambda options: next(iter(options), "plain"))  # fmt: skip
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("name", ["default", ["default"]])
def test_it_serves_the_common_call(options, trains, name, monkeypatch):
    layer, x = make_layer(**options).train(trains), torch.randn(3, 6)
    layer._active_adapter = name
    base, (adapter,) = state.read(layer, x, None)
    found = plain.read_plain(layer, x)
    assert found[-1] == (0.25 if trains and "lora_dropout" in options else 0.0)
    own = adapter.a, adapter.b, adapter.scale, adapter.dropout_p
    assert all(a is b or a == b for a, b in zip(found, (*base, *own), strict=True))
    monkeypatch.setattr(lora_layers, "read", lambda *_: pytest.fail("the slow look was needed"))
    layer(x)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_it_serves_float32_adapters_on_a_base_in_half_precision(half, monkeypatch):
    layer, x = make_layer(), torch.randn(3, 6).to(half)
    expected = layer.to(torch.float64)(x.double())
    layer.float().base_layer.to(half)
    monkeypatch.setattr(lora_layers, "read", lambda *_: pytest.fail("the slow look was needed"))
    found = layer(x)
    assert found.dtype is half
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2)


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


def other_dtype(part: str):
    def change(layer):
        module = layer.base_layer if part == "base" else getattr(layer, part)["default"]
        module.weight.data = module.weight.data.bfloat16()

    return change


def second(layer) -> None:
    config = peft.LoraConfig(target_modules=["0"], r=3)
    layer.update_layer("other", 3, 1, config=config)
    layer.set_adapter(["default", "other"])


def shard(part: str):
    def change(layer):
        module = layer.base_layer if part == "base" else getattr(layer, part)["default"]
        module.weight.data = module.weight.data.flatten()

    return change


CHANGES = {
    "disabled": lambda layer: layer.enable_adapters(False),
    "merged": lambda layer: layer.merge(),
    "none active": lambda layer: layer.__dict__.update(_active_adapter=[]),
    "another's": lambda layer: layer.__dict__.update(_active_adapter="another"),
    "several": second,
    "variant": lambda layer: layer.lora_variant.update(default=object()),
    "base hook": lambda layer: hook(layer.base_layer),
    "a hook": lambda layer: hook(layer.lora_A["default"]),
    "b hook": lambda layer: hook(layer.lora_B["default"]),
    "dropout hook": lambda layer: hook(layer.lora_dropout["default"]),
    "forward": lambda layer: layer.lora_B["default"].__dict__.update(forward=lambda x: x),
    "base pre hook": lambda layer: layer.base_layer.register_forward_pre_hook(lambda *_: None),
    "a backward hook": lambda layer: layer.lora_A["default"].register_full_backward_hook(print),
    "b backward pre": lambda layer: layer.lora_B["default"].register_full_backward_pre_hook(print),
    "subclass": lambda layer: setattr(layer.base_layer, "__class__", type("L", (nn.Linear,), {})),
    "other dropout": lambda layer: layer.lora_dropout.update({"default": nn.AlphaDropout(0.1)}),
    "all dropped": lambda layer: layer.lora_dropout.update({"default": nn.Dropout(1.0)}),
    "scale": lambda layer: layer.scaling.update(default=torch.tensor(2.0)),
    "b bias": lambda layer: setattr(layer.lora_B["default"], "bias", nn.Parameter(torch.ones(5))),
    "base dtype": other_dtype("base"),
    "bias dtype": lambda layer: setattr(
        layer.base_layer, "bias", nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    ),
    "narrow adapter": lambda layer: (other_dtype("lora_A")(layer), other_dtype("lora_B")(layer)),
    "wide base": lambda layer: layer.base_layer.double(),
    "a dtype": other_dtype("lora_A"),
    "b dtype": other_dtype("lora_B"),
    "base shard": shard("base"),
    "a shard": shard("lora_A"),
    "b shard": shard("lora_B"),
    "no weight": lambda layer: layer.base_layer._parameters.pop("weight"),
    "bias": lambda layer: layer.base_layer._parameters.update(bias=torch.ones(5)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_it_leaves_any_other_state_to_read(change):
    layer, x = make_layer().train(), torch.randn(3, 6)
    assert plain.read_plain(layer, x) is not None
    change(layer)
    assert plain.read_plain(layer, x) is None


def test_it_leaves_what_surrounds_a_call_to_read():
    layer, x = make_layer(), torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert plain.read_plain(layer, x) is None
    with nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert plain.read_plain(layer, x) is None
    assert plain.read_plain(layer, x.double()) is None
    assert plain.read_plain(layer, x) is not None


def test_a_call_takes_few_functions():
    """Beside the kernel a call costs what Python's functions cost: those that it goes through."""
    layer, x, counts = make_layer().eval(), torch.randn(3, 6), []

    def count() -> None:
        seen = []
        sys.setprofile(lambda frame, event, _: seen.append(frame) if event == "call" else None)
        try:
            layer(x)
        finally:
            sys.setprofile(None)
        counts.append(len(seen))

    with torch.no_grad():
        count()
        peft_kernels.restore(layer)
        count()
    ours, theirs = counts
    assert ours <= 0.6 * theirs, counts
