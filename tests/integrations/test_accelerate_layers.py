"""PEFT's layers on kernels as the rest of a program meets them: hooks, copies, files, reports."""

import copy
import logging
import pickle

import pytest
import torch
from accelerated_models import (
    IDS,
    KERNEL,
    TARGETS,
    assert_as_peft,
    config,
    llama,
    make_base,
    run,
)
from tiny_models import make_llama
from torch import nn
from torch.nn.utils import prune

import peft_kernels

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings"),
    pytest.mark.filterwarnings("ignore:.*Already found a `peft_config`"),
]


@pytest.mark.parametrize("place", ["base_layer", "lora_A", "lora_B", "lora_dropout"])
@pytest.mark.parametrize("kind", ["hook", "pre_hook", "forward"])
def test_what_is_called_below_is_called(place, kind):
    model = llama(lora_dropout=0.1)
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    part = layer.base_layer if place == "base_layer" else getattr(layer, place)["default"]
    if kind == "forward":
        plain = part.forward
        part.forward = lambda x: plain(x) * 2
    elif kind == "hook":
        part.register_forward_hook(lambda module, args, output: output * 2)
    else:
        part.register_forward_pre_hook(lambda module, args: args[0] * 2)
    reason = f"{place}: {'another forward' if kind == 'forward' else 'hooks'}"
    assert_as_peft(model, {KERNEL, reason})


def test_a_layers_own_forward_is_reported():
    """Such as accelerate's hooks put there, around the forward that the layer had."""
    model = llama()
    layer = model.base_model.model.lm_head
    layer.forward = layer.forward
    report = peft_kernels.accelerate(model)
    assert [found.reason for found in report.layers if found.reason] == ["another forward"]
    run(model)
    assert report.counts() == {KERNEL: len(report.layers) - 1}


def test_hooks_of_all_modules():
    model = llama()
    seen = []
    with nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module)):
        assert_as_peft(model, {"base_layer: hooks"})
    assert model.base_model.model.lm_head.base_layer in seen


def test_parametrized_and_other_bases():
    model = llama()
    layers = model.base_model.model.model.layers
    nn.utils.parametrizations.weight_norm(layers[0].self_attn.q_proj.base_layer)
    prune.l1_unstructured(layers[1].self_attn.q_proj.lora_A["default"], "weight", 0.5)
    whole = "lora_A, lora_B: weights that aren't whole matrices"
    report = peft_kernels.accelerate(model)
    assert {"base_layer: ParametrizedLinear", "lora_A: hooks"} <= {
        layer.reason for layer in report.layers
    }
    assert whole not in report.counts()
    assert_as_peft(model, {KERNEL, "base_layer: ParametrizedLinear", "lora_A: hooks"})


@pytest.mark.parametrize("copied", [
    copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))
], ids=["deepcopy", "pickle"])  # fmt: skip
def test_copies_run_on_kernels(copied):
    model = llama()
    peft_kernels.accelerate(model)
    other = copied(model)
    report = peft_kernels.accelerate(other)
    torch.testing.assert_close(run(other), run(model))
    assert report.counts()[KERNEL] == len(report.layers)


def test_saves_and_loads_as_before(tmp_path):
    model = llama(dtype=torch.float32)
    keys = list(model.state_dict())
    peft_kernels.accelerate(model)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make_base(make_llama, torch.float32), tmp_path)
    peft_kernels.accelerate(again)
    assert torch.equal(run(again)[0], run(model)[0])
    merged = model.merge_and_unload()
    torch.testing.assert_close(run(merged)[0], run(again)[0], rtol=1e-4, atol=1e-4)


def test_layers_stay_pefts():
    model = llama()
    layer = model.base_model.model.lm_head
    printed, kind = repr(layer), type(layer)
    peft_kernels.accelerate(model)
    assert repr(layer) == printed and printed.startswith("lora.Linear(")
    assert isinstance(layer, kind) and type(layer) is not kind
    run(model)
    peft_kernels.restore(model)
    assert type(layer) is kind and not any("peft_kernels" in key for key in vars(layer))


def test_hotswap_without_compiling_again(tmp_path):
    hotswap = pytest.importorskip("peft.utils.hotswap")
    targets, base = ["q_proj", "down_proj"], make_base(make_llama, torch.float32)
    model = peft.get_peft_model(copy.deepcopy(base), config(targets)).train(False)
    other = peft.get_peft_model(base, config(targets, r=2)).train(False)
    other.save_pretrained(tmp_path)
    expected = run(other)[0]
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8)
    report = peft_kernels.accelerate(model)
    assert all(layer.reason is None for layer in report.layers)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(IDS)
        hotswap.hotswap_adapter(model, tmp_path, adapter_name="default")
        with torch._dynamo.config.patch(error_on_recompile=True):
            torch.testing.assert_close(compiled(IDS)[0], expected, rtol=1e-4, atol=1e-4)


def test_compiled_whole():
    model = llama(dtype=torch.float32)
    expected = run(model)
    peft_kernels.accelerate(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(run(compiled)[0], expected[0], rtol=1e-4, atol=1e-4)


def test_compiled_before():
    """What was compiled over PEFT's layers isn't run on."""
    model = llama(dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    expected = run(compiled)[0]
    report = peft_kernels.accelerate(model)
    torch.testing.assert_close(run(compiled)[0], expected, rtol=1e-4, atol=1e-4)
    run(model)
    assert report.counts()[KERNEL] == len(report.layers)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model = llama(dtype=torch.float32, lora_dropout=0.0).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_as_peft(model, {KERNEL}, rtol=1e-4, atol=1e-4)


def test_wrapped(caplog):
    model = nn.Sequential(make_base(make_llama))
    adapted = peft.inject_adapter_in_model(config(TARGETS[make_llama]), model)
    with caplog.at_level(logging.INFO, "peft_kernels"):
        report = peft_kernels.accelerate(adapted)
    assert "7 of 7 layers of PEFT's run on peft_kernels (reference)" in caplog.text
    assert "7 of 7" in report.summary()


def test_a_report_says_what_was_given_back():
    model = llama()
    report = peft_kernels.accelerate(model)
    layers = [layer.name for layer in report.layers]
    peft_kernels.restore(model)
    assert report.missing() == layers
    assert report.summary().endswith("; 7 no longer: accelerate() again")
    _, *table = str(report).splitlines()
    assert [line.split()[0] for line in table] == layers
    assert all(line.endswith("PEFT: no longer, accelerate() again") for line in table)


def test_a_wrapper_that_nobody_keeps():
    model = llama()
    report = peft_kernels.accelerate(nn.Sequential(model))
    run(model)
    assert report.counts() == {KERNEL: len(report.layers)}


@pytest.mark.parametrize("adapted", [True, False])
def test_what_it_cannot_help(adapted):
    model = make_base(make_llama)
    if adapted:
        model = peft.get_peft_model(
            model,
            peft.IA3Config(
                target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
            ),
        )
    expected, classes = run(model)[0], [type(module) for module in model.modules()]
    report = peft_kernels.accelerate(model)
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(run(model)[0], expected)
    assert report.counts() == {} and report.missing() == []
    if adapted:
        assert "0 of 4" in report.summary() and "ia3.Linear (4)" in str(report)
    else:
        assert str(report) == "the model has no layers of PEFT's or adapters', and is as it was"
    peft_kernels.restore(model)


def test_arguments_are_checked():
    for function in (peft_kernels.accelerate, peft_kernels.restore):
        with pytest.raises(TypeError, match="model must be a Module; got 5"):
            function(5)
    model = llama()
    peft_kernels.accelerate(model)
    with pytest.raises(ValueError, match="adapter_names"):
        model(IDS, adapter_names=["default"])
