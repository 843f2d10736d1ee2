"""accelerate(): PEFT's models on this package's kernels, against the same model as PEFT runs it."""

import copy
import logging
import pickle

import pytest
import torch
from tiny_models import make_bert, make_gpt2, make_llama
from torch import nn
from torch.nn.utils import prune

import peft_kernels

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TARGETS = {
    make_bert: ["query", "value", "intermediate.dense"],
    make_gpt2: ["c_attn", "mlp.c_proj", "lm_head"],
    make_llama: ["q_proj", "v_proj", "down_proj", "lm_head"],
}
OTHER = {
    make_bert: ["query", "key"],
    make_gpt2: ["c_attn", "c_fc"],
    make_llama: ["q_proj", "up_proj"],
}
IDS = torch.randint(0, 32, (4, 6), generator=torch.Generator().manual_seed(0))
KERNEL, ROWS, DORA = "lora_linear", "multi_lora_linear", "dora_linear"

models = pytest.mark.parametrize("make", TARGETS, ids=lambda make: make.__name__)
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings"),
    pytest.mark.filterwarnings("ignore:.*Already found a `peft_config`"),
]


def make_base(make, dtype=torch.float64) -> nn.Module:
    """With weights large enough that adapters make a difference."""
    torch.manual_seed(0)
    model = make()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


def config(targets, **options):
    settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}
    return peft.LoraConfig(target_modules=targets, **{**settings, **options})


def make_model(make, dtype=torch.float64, **options):
    model = peft.get_peft_model(make_base(make, dtype), config(TARGETS[make], **options))
    return model.train(False)


def second(model, make, name="other", **options) -> None:
    torch.manual_seed(2)
    model.add_adapter(name, config(OTHER[make], **{"r": 3, "lora_alpha": 6, **options}))


def run(model, **inputs):
    """The output, and the gradients of all that is trained."""
    model.zero_grad()
    torch.manual_seed(5)
    output = model(input_ids=IDS, **inputs)[0]
    if output.requires_grad:
        (
            output.sin() * torch.linspace(-1, 1, output.shape[-1], dtype=output.dtype)
        ).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output.detach(), gradients


def error(found, truth) -> float:
    """The root mean square of what is off."""
    return (found.double() - truth).square().mean().sqrt().item()


def assert_as_peft(model, ways, inputs=None, **tolerances):
    """The accelerated model gives what PEFT's gives, by these ways, and PEFT's own after."""
    inputs = inputs or {}
    peft_kernels.restore(model)
    expected, gradients = run(model, **inputs)
    report = peft_kernels.accelerate(model)
    output, found = run(model, **inputs)
    counts = report.counts()
    torch.testing.assert_close(output, expected, **tolerances)
    torch.testing.assert_close(found, gradients, **tolerances)
    assert set(counts) == set(ways), counts
    peft_kernels.restore(model)
    assert torch.equal(run(model, **inputs)[0], expected)


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


def llama(**options):
    return make_model(make_llama, **options)


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
