"""accelerate(): models of `adapters` on kernels, against the same as that library runs them."""

import copy
import pickle

import pytest
import torch
from tiny_models import make_bert, make_gpt2, make_llama
from torch import nn

pytest.importorskip("adapters")

import adapters
import transformers
from adapters.composition import Average, BatchSplit, Fuse, Parallel, Split, Stack

import peft_kernels

KERNEL, FUSION, LORA, ROWS = "adapter", "adapter_fusion", "lora_linear", "multi_lora_linear"
IDS = torch.randint(0, 32, (4, 6), generator=torch.Generator().manual_seed(0))


def make_t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=32,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    )
    return transformers.T5Model(config)


def make_gemma() -> nn.Module:
    """One that `adapters` knows by hooks alone."""
    config = transformers.Gemma2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return transformers.Gemma2Model(config)


MAKERS = [make_bert, make_gpt2, make_llama, make_t5, make_gemma]
models = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)


def with_adapters(make, dtype=torch.float64, **configs) -> nn.Module:
    """A model with these adapters, all weights large enough to make a difference."""
    torch.manual_seed(0)
    model = make()
    adapters.init(model)
    for name, config in configs.items():
        model.add_adapter(name, config=config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.to(dtype)
    if configs:
        model.set_active_adapters(next(iter(configs)))
    for parameter in model.parameters():
        parameter.requires_grad_()
    return model.eval()


def bottleneck(preset="seq_bn", **options):
    return adapters.AdapterConfig.load(preset, reduction_factor=4, **options)


def lora(**options):
    settings = {"r": 4, "alpha": 8, "attn_matrices": ["q", "v"], "output_lora": True}
    return adapters.LoRAConfig(**{**settings, **options})


def run(model, **inputs):
    """The output, and the gradients of all that is trained."""
    model.zero_grad()
    torch.manual_seed(5)
    if isinstance(model, transformers.T5Model):
        inputs["decoder_input_ids"] = IDS.flip(1)
    output = model(input_ids=IDS, **inputs)[0]
    if output.requires_grad:
        weights = torch.linspace(-1, 1, output.shape[-1], dtype=output.dtype)
        (output.sin() * weights).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output.detach(), gradients


def assert_as_theirs(model, ways, **tolerances):
    """The accelerated model gives what theirs gives, by these ways, and goes back to that."""
    peft_kernels.restore(model)
    classes = [type(module) for module in model.modules()]
    expected, gradients = run(model)
    report = peft_kernels.accelerate(model)
    output, ours = run(model)
    torch.testing.assert_close(output, expected, **tolerances)
    torch.testing.assert_close(ours, gradients, **tolerances)
    assert set(report.counts()) == set(ways), report.counts()
    peft_kernels.restore(model)
    assert [type(module) for module in model.modules()] == classes
    assert not any("peft_kernels" in key for module in model.modules() for key in vars(module))
    assert torch.equal(run(model)[0], expected)
    return report


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


COMPOSITIONS = {
    "stack": lambda: Stack("a", "b"),
    "split": lambda: Split("a", "b", splits=[2, 4]),
    "batch_split": lambda: BatchSplit("a", "b", batch_sizes=[1, 3]),
    "parallel": lambda: Parallel("a", "b"),
    "average": lambda: Average("a", "b", weights=[0.3, 0.7]),
    "stack_of_parallel": lambda: Stack("a", Parallel("b", "c")),
    "split_of_stack": lambda: Split(Stack("a", "b"), "c", splits=[2, 4]),
}


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


# ---- fusion ------------------------------------------------------------------------------------


def fused(make, dtype=torch.float64, fusion="dynamic", setup=None, **configs):
    """A model whose adapters are fused."""
    configs = configs or {
        "a": bottleneck(),
        "b": bottleneck(scaling=2.0),
        "c": bottleneck("par_bn"),
    }
    model = with_adapters(make, dtype, **configs)
    setup, names = setup or Fuse(*configs), ["b", "c"] if setup else list(configs)
    model.add_adapter_fusion(names, adapters.AdapterFusionConfig.load(fusion, dropout_prob=0.0))
    for name, parameter in model.named_parameters():
        if "adapter_fusion_layer" in name:
            nn.init.normal_(parameter, std=0.3)
    model.set_active_adapters(setup)
    return model.to(dtype).eval()


@pytest.mark.parametrize("make", [make_bert, make_gpt2, make_llama])
@pytest.mark.parametrize("fusion", ["static", "dynamic"])
def test_fusion(make, fusion):
    model = fused(make, fusion=fusion)
    assert_as_theirs(model, {FUSION})
    with torch.no_grad():  # by matrices that are kept
        assert_as_theirs(model, {FUSION})


@pytest.mark.parametrize("setup", [
    Stack("a", Fuse("b", "c")),
    Fuse(Stack("a", "b"), "c"),
], ids=str)  # fmt: skip
def test_fusion_in_compositions(setup):
    configs = {"a": bottleneck(), "b": bottleneck(scaling=2.0), "c": bottleneck()}
    model = fused(make_bert, setup=setup, **configs)
    ways = {"Fuse of compositions"} if isinstance(setup, Fuse) else {FUSION}
    assert_as_theirs(model, {KERNEL, *ways})


def test_fused_matrices_follow_the_parameters():
    model = fused(make_bert)
    report = peft_kernels.accelerate(model)
    with torch.no_grad():
        before = run(model)[0]
        assert torch.equal(run(model)[0], before)
        for name, parameter in model.named_parameters():
            if "adapter_up" in name or "adapter_fusion_layer" in name:
                parameter.mul_(-1.5)
        after = run(model)[0]
        assert not torch.allclose(after, before)
        assert set(report.counts()) == {FUSION}
        peft_kernels.restore(model)
        torch.testing.assert_close(run(model)[0], after)


def test_temperature_and_attentions_of_a_fusion():
    model = fused(make_bert, fusion=adapters.AdapterFusionConfig.load("dynamic", temperature=True))
    both = [copy.deepcopy(model), model]
    peft_kernels.accelerate(model)
    for _ in range(3):
        theirs, ours = (m(IDS, output_adapter_fusion_attentions=True) for m in both)
        torch.testing.assert_close(ours[0], theirs[0])
        for name, layers in theirs.adapter_fusion_attentions.items():
            for layer, places in layers.items():
                for place, weights in places.items():
                    own = ours.adapter_fusion_attentions[name][layer][place]
                    torch.testing.assert_close(torch.tensor(own), torch.tensor(weights),
                                               check_dtype=False, rtol=1e-5, atol=1e-6)  # fmt: skip
    temperatures = [[x.T for x in m.modules() if hasattr(x, "reduction")] for m in both]
    assert temperatures[0] == temperatures[1] and temperatures[0][0] == pytest.approx(49.85)


def test_fusion_under_autocast():
    model = fused(make_bert, torch.float32)
    truth = run(copy.deepcopy(model).double())[0]
    with torch.autocast("cpu", torch.bfloat16):
        theirs = run(model)[0]
        report = peft_kernels.accelerate(model)
        ours = run(model)[0]
    assert set(report.counts()) == {FUSION} and ours.dtype is theirs.dtype
    assert (ours - truth).norm() <= 1.2 * (theirs - truth).norm()


@pytest.mark.parametrize("options", [
    {},
    {"ln_after": True},
    {"ln_after": True, "adapter_residual_before_ln": True},
    {"preset": "par_bn", "ln_after": True},
], ids=str)  # fmt: skip
def test_dropout_of_scores_is_theirs(options):
    model = fused(make_bert, a=bottleneck(**options), b=bottleneck(**options))
    for module in model.modules():
        if hasattr(module, "reduction"):
            module.dropout.p = 0.5
            module.dropout.train()
    assert_as_theirs(model, {"fusion: dropout of scores", KERNEL})


# ---- LoRA --------------------------------------------------------------------------------------


@models
class TestLoRA:
    @pytest.mark.parametrize("options", [
        {},
        {"attn_matrices": ["q", "k", "v"], "r": 2, "alpha": 3, "intermediate_lora": True},
        {"attn_matrices": ["k"], "output_lora": False},
    ], ids=lambda options: "-".join(options) or "plain")  # fmt: skip
    def test_one_adapter(self, make, options):
        model = with_adapters(make, a=lora(**options))
        report = assert_as_theirs(model, {LORA})
        assert all(layer.reason is None for layer in report.layers)

    def test_float32_on_kernels(self, make):
        model = with_adapters(make, torch.float32, a=lora())
        assert all(layer.backend == "cpu" for layer in peft_kernels.accelerate(model).layers)
        assert_as_theirs(model, {LORA}, rtol=1e-3, atol=1e-3)

    def test_merged(self, make):
        model = with_adapters(make, a=lora())
        expected = run(model)[0]
        report = peft_kernels.accelerate(model)
        model.merge_adapter("a")
        with torch.no_grad():
            torch.testing.assert_close(run(model)[0], expected)
        assert set(report.counts()) == {"merged"}
        model.reset_adapter()
        assert_as_theirs(model, {LORA})


@pytest.mark.parametrize("make", [make_bert, make_llama])
@pytest.mark.parametrize(("composition", "ways"), [
    ("batch_split", {ROWS}),
    ("parallel", {ROWS, "Parallel"}),
    ("average", {LORA}),
])  # fmt: skip
def test_compositions_of_lora(make, composition, ways):
    model = with_adapters(make, a=lora(), b=lora(r=2, alpha=5))
    model.set_active_adapters(COMPOSITIONS[composition]())
    assert_as_theirs(model, ways)


# ---- prefixes ----------------------------------------------------------------------------------


def prefix(**options):
    return adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=7, **options)


@pytest.mark.parametrize("make", [make_bert, make_gpt2, make_llama, make_t5])
def test_prefixes_are_encoded_once(make):
    model = with_adapters(make, a=prefix())
    report = assert_as_theirs(model, {"encoded once"})
    assert {layer.reason for layer in report.layers} == {None, "prefix_tuning.PrefixTuningLayer"}
    assert "on PyTorch's operations, and no kernel" in report.summary()
    with torch.no_grad():
        assert_as_theirs(model, {"encoded once"})
        report = peft_kernels.accelerate(model)
        first = run(model)[0]
        assert torch.equal(run(model)[0], first)
        for name, parameter in model.named_parameters():
            if "control_trans" in name:
                parameter.mul_(-1)
        changed = run(model)[0]
        assert not torch.allclose(changed, first)
        peft_kernels.restore(model)
        torch.testing.assert_close(run(model)[0], changed)


@pytest.mark.parametrize("setup", [
    BatchSplit("a", "b", batch_sizes=[1, 3]), Parallel("a", "b"),
], ids=str)  # fmt: skip
def test_prefixes_in_compositions(setup):
    model = with_adapters(make_bert, a=prefix(), b=prefix(non_linearity="relu"))
    model.set_active_adapters(setup)
    assert_as_theirs(model, {"encoded once"})


@pytest.mark.parametrize("make", [make_gpt2, make_llama, make_bert])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("setup", [Stack("a"), BatchSplit("a", "b", batch_sizes=[1, 3])], ids=str)
def test_prefixes_under_sdpa(make, padded, setup):
    """adapters leaves the prefix out there, or hides text behind it; in eager it is right."""
    model = with_adapters(make, torch.float32, a=prefix(), b=prefix())
    model.set_active_adapters(setup)
    mask = torch.ones_like(IDS)
    mask[1, 4:] = 1 - padded
    inputs = {"attention_mask": mask} if padded else {}

    def results(implementation):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            return model(IDS, **inputs)[0][mask.bool()]

    right, theirs = results("eager"), results("sdpa")
    report = peft_kernels.accelerate(model, strict=False)
    torch.testing.assert_close(results("sdpa"), right, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(results("eager"), right, rtol=1e-4, atol=1e-4)
    assert {layer.reason for layer in report.layers} == {None, "prefix_tuning.PrefixTuningLayer"}
    peft_kernels.accelerate(model)
    torch.testing.assert_close(results("sdpa"), theirs, rtol=1e-5, atol=1e-5)
    peft_kernels.accelerate(model, strict=False)
    assert_as_theirs(model, {"encoded once"}, rtol=1e-4, atol=1e-4)
    if make is not make_bert:  # whose masks are additive
        assert not torch.allclose(theirs, right, atol=1e-2)


def test_a_prefix_with_dropout_is_theirs_in_training():
    model = with_adapters(make_bert, a=prefix(dropout=0.3))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train(module.p == 0.3)
    assert_as_theirs(model, {"dropout by row"})


# ---- what stays theirs -------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "reason"), [
    (bottleneck(use_gating=True), "gating"),
    (adapters.AdapterConfig.load("compacter", reduction_factor=2), "adapter_down: PHMLayer"),
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
