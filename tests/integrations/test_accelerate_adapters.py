"""accelerate(): models of `adapters` on kernels, against the same as that library runs them."""

import copy
import pickle

import pytest

pytest.importorskip("adapters")

import adapters
import torch
import transformers
from adapters.composition import Stack
from adapters_models import (
    COMPOSITIONS,
    IDS,
    KERNEL,
    LORA,
    assert_as_theirs,
    bottleneck,
    lora,
    make_bert,
    make_gemma,
    make_gpt2,
    make_llama,
    make_t5,
    models,
    run,
    with_adapters,
)
from torch import nn

import peft_kernels


@models
class TestBottleneck:
    @pytest.mark.parametrize("options", [
        {},
        {"preset": "double_seq_bn"},
        {"preset": "par_bn"},
        {"scaling": "learned", "non_linearity": "gelu"},
        {"scaling": "channel", "non_linearity": "leakyrelu"},
        {"ln_before": True, "ln_after": True},
        {"ln_after": True, "adapter_residual_before_ln": True},
        {"preset": "par_bn", "ln_after": True},
        {"preset": "double_seq_bn", "ln_before": True, "non_linearity": "gelu_new"},
        {"residual_before_ln": False, "non_linearity": "tanh"},
        {"residual_before_ln": "post_add"},
        {"original_ln_after": False},
    ], ids=lambda options: "-".join(map(str, options.values())) or "seq_bn")  # fmt: skip
    def test_one_adapter(self, make, options):
        if make is make_gemma and options.get("original_ln_after") is False:
            pytest.skip("adapters refuses it for hooks")
        if options.get("residual_before_ln") == "post_add" and make in (
            make_gpt2,
            make_llama,
            make_t5,
        ):
            pytest.skip("adapters has no sum to take there")
        model = with_adapters(make, a=bottleneck(**options))
        report = assert_as_theirs(model, {KERNEL})
        assert all(layer.reason is None for layer in report.layers)

    def test_float32_on_kernels(self, make):
        model = with_adapters(make, torch.float32, a=bottleneck())
        assert all(layer.backend == "cpu" for layer in peft_kernels.accelerate(model).layers)
        assert_as_theirs(model, {KERNEL}, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", [make_bert, make_llama])
@pytest.mark.parametrize("options", [
    {},
    {"factorized_phm_W": False, "factorized_phm_rule": True},
    {"shared_W_phm": True, "factorized_phm_rule": True},
    {"factorized_phm_W": False, "shared_phm_rule": False},
], ids=lambda options: "-".join(options) or "plain")  # fmt: skip
def test_compacter(make, options):
    config = adapters.AdapterConfig.load("compacter", reduction_factor=2, **options)
    assert_as_theirs(with_adapters(make, a=config), {KERNEL})


@pytest.mark.parametrize("options", [
    {},
    {"preset": "par_bn", "ln_after": True},
    {"ln_before": True, "ln_after": True, "adapter_residual_before_ln": True},
], ids=str)  # fmt: skip
def test_gates(options):
    model = with_adapters(make_bert, a=bottleneck(use_gating=True, **options))
    assert_as_theirs(model, {KERNEL})
    expected = model(IDS, output_adapter_gating_scores=True).adapter_gating_scores
    peft_kernels.accelerate(model)
    found = model(IDS, output_adapter_gating_scores=True).adapter_gating_scores
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("make", [make_bert, make_gpt2, make_llama])
@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_compositions(make, composition):
    configs = {
        "a": bottleneck(),
        "b": bottleneck(non_linearity="swish"),
        "c": bottleneck(scaling=2.0),
    }
    model = with_adapters(make, **configs)
    model.set_active_adapters(COMPOSITIONS[composition]())
    assert_as_theirs(model, {KERNEL})


def test_a_stack_of_which_a_layer_has_one():
    model = with_adapters(make_bert, a=bottleneck(), b=bottleneck("double_seq_bn"))
    model.set_active_adapters(Stack("a", "b"))
    assert_as_theirs(model, {KERNEL})


def make_roberta():
    config = make_bert().config.to_dict() | {"model_type": "roberta", "pad_token_id": 1}
    return transformers.RobertaModel(transformers.RobertaConfig(**config))


def make_distilbert():
    return transformers.DistilBertModel(
        transformers.DistilBertConfig(vocab_size=32, dim=16, n_layers=2, n_heads=2, hidden_dim=24)
    )


def make_bart():
    sizes = {
        f"{part}_{name}": size
        for part in ("encoder", "decoder")
        for name, size in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 24))
    }
    return transformers.BartModel(transformers.BartConfig(vocab_size=32, d_model=16, **sizes))


@pytest.mark.parametrize("make", [make_roberta, make_distilbert, make_bart])
@pytest.mark.parametrize("config", [bottleneck(), bottleneck("double_seq_bn"), lora()])
def test_other_families(make, config):
    way = LORA if isinstance(config, adapters.LoRAConfig) else KERNEL
    report = assert_as_theirs(with_adapters(make, a=config), {way})
    assert all(layer.reason is None for layer in report.layers)


# ---- what stays theirs -------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "reason"), [
    (bottleneck(non_linearity="mish"), "non_linearity: MishActivation"),
    (lora(use_gating=True), "gating"),
    (lora(use_dora=True), "DoRA"),
    (adapters.IA3Config(), "lora: IA3"),
], ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "")  # fmt: skip
def test_what_stays_theirs(config, reason):
    model = with_adapters(make_bert, a=config)
    report = peft_kernels.accelerate(model)
    assert {layer.reason for layer in report.layers} == {reason}
    assert f"keep adapters': {reason}" in report.summary() and f"adapters: {reason}" in str(report)
    assert_as_theirs(model, {reason})


@pytest.mark.parametrize("place", [
    "adapters.a", "adapters.a.adapter_up", "adapters.a.adapter_down.0", "adapters.a.non_linearity",
    "LayerNorm",
])  # fmt: skip
@pytest.mark.parametrize("kind", ["hook", "forward"])
def test_what_is_called_below_is_called(place, kind):
    model = with_adapters(make_bert, a=bottleneck())
    layer = model.encoder.layer[1].output
    part = layer.get_submodule(place)
    if kind == "forward":
        plain = part.forward
        part.forward = lambda *args, **kwargs: _changed(plain(*args, **kwargs))
    else:
        part.register_forward_hook(lambda module, args, output: _changed(output))
    before = run(model)[0]
    peft_kernels.accelerate(model)
    torch.testing.assert_close(run(model)[0], before)


def _changed(output):
    if isinstance(output, tuple):
        return (output[0] * 2, *output[1:])
    return output * 2


def test_hooks_of_all_modules():
    model = with_adapters(make_bert, a=bottleneck())
    seen = []
    with nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module)):
        assert_as_theirs(model, {"adapter: hooks"})
    assert model.encoder.layer[0].output.adapters["a"].adapter_up in seen


def test_a_wide_bottleneck_trains_in_their_code():
    """Its backward is faster there on a CPU."""
    config = transformers.BertConfig(
        vocab_size=32,
        hidden_size=272,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
    )
    wide = adapters.AdapterConfig.load("par_bn", reduction_factor=2)
    model = with_adapters(lambda: transformers.BertModel(config), torch.float32, a=wide)
    report = peft_kernels.accelerate(model)
    run(model)
    assert report.counts() == {"a wide bottleneck in training": 1}
    with torch.no_grad():
        run(model)
    assert report.counts()[KERNEL] == 1


# ---- dtypes, dropout, training -----------------------------------------------------------------


@pytest.mark.parametrize("config", [bottleneck(), bottleneck("double_seq_bn"), lora()])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "autocast"])
def test_half_precision_is_no_worse(config, dtype):
    """One layer against float64, beside theirs."""
    model = with_adapters(make_bert, torch.float32, a=config)
    half = torch.bfloat16 if dtype == "autocast" else dtype
    layer = model.encoder.layer[0].output
    if dtype != "autocast":
        layer.to(dtype)
    f, i, dy = (torch.randn(40, 30, size).to(half) for size in (24, 16, 16))

    def results(layer, f, i, dy):
        layer.zero_grad()
        f = f.clone().requires_grad_()
        y = layer(f, i)
        y.backward(dy.to(y.dtype))
        return y.detach(), f.grad

    truth = results(copy.deepcopy(layer).double(), f.double(), i.double(), dy.double())
    with torch.autocast("cpu", half, enabled=dtype == "autocast"):
        theirs = results(layer, f, i, dy)
        report = peft_kernels.accelerate(layer)
        ours = results(layer, f, i, dy)
    assert report.counts() == {LORA if isinstance(config, adapters.LoRAConfig) else KERNEL: 1}
    for own, other, true in zip(ours, theirs, truth, strict=True):
        assert own.dtype is other.dtype
        assert (own - true).norm() <= 1.05 * (other - true).norm()


@pytest.mark.parametrize("config", [bottleneck(dropout=0.4), lora(dropout=0.4)])
def test_dropout_is_of_each_call_in_training(config):
    model = with_adapters(make_llama, torch.float32, a=config)
    report = peft_kernels.accelerate(model)
    with torch.no_grad():
        still = model(IDS)[0]
        model.train()
        first, again = model(IDS)[0], model(IDS)[0]
        torch.manual_seed(3)
        seeded = model(IDS)[0]
        torch.manual_seed(3)
        assert torch.equal(model(IDS)[0], seeded)
        assert not torch.equal(first, again) and not torch.equal(first, still)
        assert torch.equal(model.eval()(IDS)[0], still)
    assert set(report.counts()) <= {KERNEL, LORA} and report.counts()


@pytest.mark.parametrize("make", [make_bert, make_gpt2])
@pytest.mark.parametrize("config", [bottleneck(), bottleneck("par_bn"), lora()])
def test_training_gives_the_same_losses(make, config):
    def losses(accelerated):
        model = with_adapters(make, torch.float32, a=config)
        model.train_adapter("a")
        report = peft_kernels.accelerate(model) if accelerated else None
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        found = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = model.eval()(IDS)[0].sin().square().mean()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found, report

    expected, _ = losses(False)
    found, report = losses(True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found[-1] < found[0] and set(report.counts()) <= {KERNEL, LORA}


# ---- models that are copied, saved, changed ----------------------------------------------------


def test_copies_run_on_kernels():
    model = with_adapters(make_bert, a=bottleneck(), b=lora())
    peft_kernels.accelerate(model)
    other = copy.deepcopy(model)
    report = peft_kernels.accelerate(other)
    torch.testing.assert_close(run(other), run(model))
    assert report.counts()[KERNEL] == 2
    peft_kernels.restore(other)
    assert type(other.encoder.layer[0].output).__module__.startswith("adapters.")


def test_pickled_layers_run_on_kernels():
    """A whole model of adapters.init() is of a class that pickle doesn't find."""
    model = with_adapters(make_bert, a=bottleneck())
    peft_kernels.accelerate(model)
    layer = model.encoder.layer[0].output
    again = pickle.loads(pickle.dumps(layer))
    assert type(again) is type(layer)
    f, i = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    arguments = (f, i, layer.LayerNorm)
    y = again.bottleneck_layer_forward(*arguments)
    assert torch.equal(y, layer.bottleneck_layer_forward(*arguments))


@pytest.mark.parametrize("config", [bottleneck(), lora()])
def test_saves_and_loads_as_before(config, tmp_path):
    model = with_adapters(make_bert, torch.float32, a=config)
    keys = list(model.state_dict())
    peft_kernels.accelerate(model)
    assert list(model.state_dict()) == keys
    expected = run(model)[0]
    model.save_adapter(tmp_path, "a")
    model.delete_adapter("a")
    plain = run(model)[0]
    assert not torch.allclose(plain, expected, atol=1e-2)
    model.load_adapter(str(tmp_path), load_as="again")
    model.set_active_adapters("again")
    report = peft_kernels.accelerate(model)
    torch.testing.assert_close(run(model)[0], expected)
    assert set(report.counts()) <= {KERNEL, LORA} and report.counts()


def test_adapters_come_and_go():
    model = with_adapters(make_bert, a=bottleneck())
    report = peft_kernels.accelerate(model)
    model.add_adapter("b", config=bottleneck("double_seq_bn"))
    model.double()
    assert report.missing() == [f"encoder.layer.{i}.attention.output" for i in range(2)]
    assert "2 came later" in report.summary() and "adapters: came later" in str(report)
    assert peft_kernels.accelerate(model).missing() == []
    model.set_active_adapters("b")
    assert_as_theirs(model, {KERNEL})
    model.set_active_adapters(None)
    assert_as_theirs(model, {"no active adapter"})


def test_a_setup_of_a_with_block():
    model = with_adapters(make_bert, a=bottleneck(), b=bottleneck())
    with adapters.AdapterSetup("b"):
        assert_as_theirs(model, {KERNEL})


def test_layers_print_as_theirs():
    model = with_adapters(make_bert, a=bottleneck(), b=lora())
    printed = repr(model)
    report = peft_kernels.accelerate(model)
    assert repr(model) == printed
    kinds = {layer.kind for layer in report.layers}
    assert kinds == {"modeling_bert.BertOutputWithAdapters", "lora.LoRALinearTorch"}
    assert "layers of adapters' run on peft_kernels" in report.summary()


@pytest.mark.parametrize("config", [None, adapters.LoReftConfig()])
def test_what_it_cannot_help(config):
    model = with_adapters(make_bert, torch.float32, **({"a": config} if config else {}))
    expected, classes = run(model)[0], [type(module) for module in model.modules()]
    report = peft_kernels.accelerate(model)
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(run(model)[0], expected)
    assert report.counts() == {} and report.missing() == []
    if config:
        assert "0 of 2" in report.summary() and "reft.ReftLayer (2)" in str(report)
    else:
        assert str(report) == "the model has no layers of PEFT's or adapters', and is as it was"


def test_auto_adapter_models():
    config = transformers.BertConfig(**with_adapters(make_bert).config.to_diff_dict())
    model = adapters.AutoAdapterModel.from_config(config)
    model.add_adapter("a", config=bottleneck())
    model.add_classification_head("a", num_labels=3)
    model.set_active_adapters("a")
    model.double()
    assert_as_theirs(model, {KERNEL})
