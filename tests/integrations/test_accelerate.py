"""accelerate(): PEFT's models on this package's kernels, against the same model as PEFT runs it."""

import copy

import pytest
import torch
from accelerated_models import (
    DORA,
    IDS,
    KERNEL,
    OTHER,
    ROWS,
    TARGETS,
    assert_as_peft,
    config,
    error,
    llama,
    make_base,
    make_model,
    models,
    run,
    second,
)
from tiny_models import make_bert, make_gpt2, make_llama
from torch import nn

import peft_kernels

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings"),
    pytest.mark.filterwarnings("ignore:.*Already found a `peft_config`"),
]


@models
class TestEveryModel:
    @pytest.mark.parametrize("options", [
        {},
        {"use_rslora": True},
        {"r": 2, "rank_pattern": {".*query|q_proj|c_attn": 7}, "alpha_pattern": {".*1.*": 3}},
        {"lora_bias": True},
        {"bias": "all"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
    ], ids=lambda options: next(iter(options), "plain"))  # fmt: skip
    def test_one_adapter(self, make, options):
        targets = TARGETS[make]
        if "lora_bias" in options and make is make_llama:
            pytest.skip("Llama's layers have no bias, which lora_bias asks for")
        if "lora_bias" in options:
            targets = [name for name in targets if name != "lm_head"]
        if options.get("init_lora_weights") == "olora" and make is make_gpt2:
            pytest.skip("PEFT's OLoRA takes no Conv1D")
        dtype = torch.float32 if "init_lora_weights" in options else torch.float64
        model = peft.get_peft_model(make_base(make, dtype), config(targets, **options))
        model.train()
        tolerances = {"rtol": 1e-4, "atol": 1e-4} if dtype is torch.float32 else {}
        assert_as_peft(model, {KERNEL}, **tolerances)

    def test_float32_on_kernels(self, make):
        model = make_model(make, torch.float32)
        assert all(layer.backend == "cpu" for layer in peft_kernels.accelerate(model).layers)
        assert_as_peft(model, {KERNEL}, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "autocast"])
    def test_half_precision(self, make, dtype):
        """A base in half precision under float32 adapters, or all under autocast."""
        model = make_model(make, torch.float32)
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if not parameter.requires_grad and dtype != "autocast":
                    setattr(module, name, nn.Parameter(parameter.to(dtype), requires_grad=False))
        report = peft_kernels.accelerate(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
            run(model)
        assert set(report.counts()) == {KERNEL}

    def test_several_active(self, make):
        model = make_model(make)
        second(model, make)
        model.base_model.set_adapter(["default", "other"])
        assert_as_peft(model.train(), {KERNEL})

    def test_names_by_row(self, make):
        model = make_model(make)
        second(model, make)
        names = ["other", "__base__", "default", "other"]
        with torch.no_grad():
            assert_as_peft(model, {ROWS}, {"adapter_names": names})

    def test_merged_and_disabled(self, make):
        model = make_model(make)
        model.merge_adapter()
        assert_as_peft(model, {"merged"})
        model.unmerge_adapter()
        with model.disable_adapter():
            assert_as_peft(model, {"disabled"})
        assert_as_peft(model, {KERNEL})

    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_dora(self, make, dropout):
        options = {"use_dora": True, "lora_dropout": dropout}
        targets = [name for name in TARGETS[make] if name != "lm_head"]
        model = peft.get_peft_model(make_base(make), config(targets, **options))
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                nn.init.uniform_(parameter, 0.5, 2.0)
        for mode in (True, False):
            assert_as_peft(model.train(mode), {DORA})
        model.merge_adapter()
        assert_as_peft(model, {"merged"})
        model.unmerge_adapter()
        second(model, make)
        model.base_model.set_adapter(["default", "other"])
        assert_as_peft(model, {"DoRA beside other adapters", DORA, KERNEL})

    def test_adapters_come_and_go(self, make):
        model = make_model(make)
        report = peft_kernels.accelerate(model)
        second(model, make)
        model.set_adapter("other")
        expected = set(report.missing())
        assert expected and all(name.endswith(OTHER[make][1]) for name in expected)
        assert f"{len(expected)} came later" in str(report)
        assert peft_kernels.accelerate(model).missing() == []
        assert_as_peft(model.train(), {KERNEL, "no active adapter"})
        model.delete_adapter("default")
        assert_as_peft(model, {KERNEL, "no active adapter"})


def test_names_train_the_adapters_they_name():
    """PEFT refuses adapter_names in training; the sum of two runs, each on its own rows."""
    model = llama()
    second(model, make_llama)
    model.base_model.set_adapter(["default", "other"])  # both are trained
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(4, 5, layer.in_features, dtype=torch.float64)
    weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight,
               layer.lora_A["other"].weight, layer.lora_B["other"].weight]  # fmt: skip
    expected = 0
    for name, rows in (("default", [0, 2]), ("other", [1])):
        layer.set_adapter(name)
        for weight in weights:
            weight.requires_grad_()
        expected = expected + layer(x[rows]).sin().sum()
    expected = torch.autograd.grad(expected, weights)
    report = peft_kernels.accelerate(model)
    y = layer(x, adapter_names=["default", "other", "default", "__base__"])
    found = torch.autograd.grad(y[:3].sin().sum(), weights)
    torch.testing.assert_close(found, expected)
    assert report.counts() == {ROWS: 1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "autocast"])
def test_half_precision_is_no_worse(dtype):
    """y and the gradients of one layer, against float64 beside PEFT's."""
    torch.manual_seed(0)
    model = peft.inject_adapter_in_model(config(["0"], r=8), nn.Sequential(nn.Linear(64, 48)))
    layer, half = model[0], torch.bfloat16 if dtype == "autocast" else dtype
    if dtype != "autocast":
        layer.base_layer.to(half)
    x, dy = torch.randn(100, 64).to(half), torch.randn(100, 48).to(half)

    def results(layer, x, dy):
        layer.zero_grad()
        x.requires_grad_()
        y = layer(x)
        y.backward(dy.to(y.dtype))
        weights = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        return [y.detach(), x.grad, *(weight.grad.clone() for weight in weights)]

    truth = results(copy.deepcopy(layer).double(), x.double(), dy.double())
    x = x.float() if dtype == "autocast" else x
    with torch.autocast("cpu", half, enabled=dtype == "autocast"):
        theirs = results(layer, x.clone(), dy)
        report = peft_kernels.accelerate(model)
        ours = results(layer, x.clone(), dy)
    assert report.counts() == {KERNEL: 1}
    for own, other, true in zip(ours, theirs, truth, strict=True):
        assert error(own, true) <= 1.05 * error(other, true)


@pytest.mark.parametrize("make", [make_gpt2, make_llama])
def test_a_model_trains_by_names(make):
    """Each row's gradients are those of its own adapter, trained alone on that row."""
    model = make_model(make).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    second(model, make)
    model.base_model.set_adapter(["default", "other"])
    names = ["other", "default", "__base__", "other"]
    with pytest.raises(ValueError, match="training mode"):
        model(IDS, adapter_names=names)
    report = peft_kernels.accelerate(model)
    alone = {}
    for name in ("default", "other"):
        model.base_model.set_adapter(name)
        model.zero_grad()
        rows = [row for row, own in enumerate(names) if own == name]
        model(IDS[rows]).logits.sin().sum().backward()
        alone |= {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.base_model.set_adapter(["default", "other"])
    model.zero_grad()
    model(IDS, adapter_names=names).logits.sin().sum().backward()
    together = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(together, alone)
    assert model.training and model.base_model.training and report.counts()[ROWS] > 0
    peft_kernels.restore(model)
    with pytest.raises(ValueError, match="training mode"):
        model(IDS, adapter_names=names)


@models
def test_names_are_handed_to_what_peft_hands_them(make):
    """With wrapped modules that are trained whole, which take names too."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = (peft.tuners.lora.LoraLayer, AuxiliaryTrainingWrapper)
    saved = {make_bert: "output.dense", make_gpt2: "ln_f", make_llama: "norm"}[make]
    model = make_model(make, modules_to_save=[saved])
    second(model, make)
    peft_kernels.accelerate(model)
    with model.base_model._enable_peft_forward_hooks(adapter_names=["default"]):
        found = {m for m in model.modules() if m._forward_pre_hooks}
    assert found == {m for m in model.modules() if isinstance(m, kinds)}
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_names_and_checkpointing_are_refused():
    model = llama().train()
    model.gradient_checkpointing_enable()
    peft_kernels.accelerate(model)
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        model(IDS, adapter_names=["default"] * 4)


def test_an_error_leaves_no_names_behind():
    model = llama()
    peft_kernels.accelerate(model)
    expected = run(model)[0]
    with pytest.raises(ValueError, match="adapter_names"):
        model(IDS, adapter_names=["default"] * 3)
    assert torch.equal(run(model)[0], expected)


def test_dropout_is_of_each_call_in_training():
    model = llama(dtype=torch.float32, lora_dropout=0.5)
    report = peft_kernels.accelerate(model)
    with torch.no_grad():
        still = model(IDS).logits
        model.train()
        first, again = model(IDS).logits, model(IDS).logits
        torch.manual_seed(3)
        seeded = model(IDS).logits
        torch.manual_seed(3)
        assert torch.equal(model(IDS).logits, seeded)
        assert not torch.equal(first, again) and not torch.equal(first, still)
        model.eval()
        assert torch.equal(model(IDS).logits, still)
    assert set(report.counts()) == {KERNEL}


def test_several_with_dropout():
    """The mean over many draws is what comes without dropout; so is its gradient's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9))
    model = peft.get_peft_model(model, config(["0"], r=3, lora_dropout=0.4))
    model.add_adapter("other", config(["0"], r=2, lora_alpha=6, lora_dropout=0.2))
    model.base_model.set_adapter(["default", "other"])
    layer = model.base_model.model[0]
    report, x = peft_kernels.accelerate(model), torch.randn(1, 12)
    many = x.expand(20000, 12)

    def results(x):
        model.zero_grad()
        (y := layer(x)).mean(0).sum().backward()
        weights = [part[name].weight for part in (layer.lora_A, layer.lora_B) for name in part]
        return [y.mean(0).detach(), *(weight.grad.clone() for weight in weights)]

    model.eval()
    still = results(x)
    model.train()
    for drawn, exact in zip(results(many), still, strict=True):
        assert (drawn - exact).abs().max() < 0.05 * exact.abs().max() + 0.02
    assert layer(many).std(0).min() > 0.05
    assert report.counts() == {KERNEL: 3}


@pytest.mark.parametrize("dtype", [torch.float32, "autocast"])
def test_several_of_several_dtypes(dtype):
    model = peft.get_peft_model(nn.Sequential(nn.Linear(12, 9)).bfloat16(), config(["0"], r=3))
    model.add_adapter("other", config(["0"], r=2), autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    layer.lora_A["other"].to(torch.bfloat16), layer.lora_B["other"].to(torch.bfloat16)
    model.base_model.set_adapter(["default", "other"])
    x = torch.randn(5, 12).bfloat16() if dtype != "autocast" else torch.randn(5, 12)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        expected = layer(x)
        report = peft_kernels.accelerate(model)
        torch.testing.assert_close(layer(x), expected, rtol=0.02, atol=0.02)
    assert report.counts() == {KERNEL: 1}


@pytest.mark.parametrize("scales", [(2.0, 2.0), (2.0, 0.5), (2.0, torch.tensor(0.5))], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_several_at_any_scales(scales, bias):
    """With the biases of B, above a base with one and a base without."""
    base = nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 7, bias=bias)).double()
    model = peft.get_peft_model(base, config(["0", "1"], r=3, lora_bias=bias))
    model.add_adapter("other", config(["0", "1"], r=2, lora_bias=bias))
    for layer in (model.base_model.model[0], model.base_model.model[1]):
        layer.scaling.update(default=scales[0], other=scales[1])
    model.base_model.set_adapter(["default", "other"])
    x, results = torch.randn(5, 12, dtype=torch.float64), []
    for accelerates in (False, True):
        report = (peft_kernels.accelerate if accelerates else peft_kernels.restore)(model)
        model.zero_grad()
        (y := model(x)).sin().sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        results.append((y.detach(), gradients))
    torch.testing.assert_close(*results)
    assert report.counts() == {KERNEL: 2}
