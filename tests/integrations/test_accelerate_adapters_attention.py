"""accelerate(): attention with prefixes of `adapters`, by the op and not concatenated."""

import copy
import pickle

import pytest

pytest.importorskip("adapters")

import adapters
import torch
import transformers
from adapters.composition import BatchSplit, Parallel, Stack
from adapters_models import (
    IDS,
    assert_as_theirs,
    lora,
    make_bert,
    make_gpt2,
    make_llama,
    make_t5,
    run,
    with_adapters,
)
from torch import nn

import peft_kernels

ATTENTION, ONCE = "prefix_attention", "encoded once"
LEFT_OUT = "sdpa, whose mask leaves out the prefix or text"
SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
BART = {
    "vocab_size": 32,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "dropout": 0.0,
}
# In float64, but some softmaxes of the library's are in float32.
CLOSE = {"rtol": 1e-5, "atol": 3e-6}
MASK = torch.ones_like(IDS)
MASK[1, 4:] = 0
MASK[2, :2] = 0


def prefix(**options):
    return adapters.PrefixTuningConfig(**{"prefix_length": 3, "bottleneck_size": 7, **options})


def of(kind, **options):
    sizes, family = SIZES if "d_model" not in options else {}, kind.removesuffix("LMHead")
    return lambda: getattr(transformers, f"{kind}Model")(
        getattr(transformers, f"{family}Config")(**sizes, **options)
    )


def eager(make):
    def made():
        model = make()
        model.set_attn_implementation("eager")
        return model

    return made


bert_eager = of("Bert", attn_implementation="eager")  # which is a class of its own
SERVED = {
    "bert": make_bert,
    "bert_eager": bert_eager,
    "bert_decoder": of("Bert", is_decoder=True, attn_implementation="eager"),
    "roberta": of("Roberta", pad_token_id=31),
    "xlm_roberta": of("XLMRoberta", pad_token_id=31),
    "gpt2": eager(make_gpt2),
    "llama": eager(make_llama),
    "mistral": eager(of("Mistral", num_key_value_heads=1, sliding_window=4)),
    "bart": eager(of("Bart", **BART)),
    "mbart": eager(of("MBart", **BART)),
    "plbart": eager(of("PLBart", **BART)),
    "xmod": of("Xmod", pad_token_id=31, languages=["en"], default_language="en"),
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("make", SERVED.values(), ids=SERVED.keys())
def test_attention_is_served(make, padded):
    model = with_adapters(make, a=prefix())
    inputs = {"attention_mask": MASK} if padded else {}
    tolerances = CLOSE if make in (SERVED["llama"], SERVED["mistral"]) else {}
    report = assert_as_theirs(model, {ATTENTION, ONCE}, inputs=inputs, **tolerances)
    kinds = {(layer.kind, layer.reason) for layer in report.layers}
    assert kinds == {
        ("prefix_tuning.PrefixTuning", None),
        ("prefix_tuning.PrefixTuningLayer", None),
    }
    assert {layer.backend for layer in report.layers} == {"reference", "torch"}  # of float64


def make_vit():
    sizes = {name: size for name, size in SIZES.items() if name != "vocab_size"}
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, **sizes)
    return transformers.ViTModel(config)


def make_whisper():
    config = transformers.WhisperConfig(
        **{**BART, "max_target_positions": 8}, max_source_positions=4, num_mel_bins=3,
        pad_token_id=1, decoder_start_token_id=2, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return transformers.WhisperModel(config)


@pytest.mark.parametrize(("make", "inputs", "calls"), [
    (make_vit, {"pixel_values": (2, 1, 8, 8)}, {ATTENTION: 2, ONCE: 1}),
    (eager(make_whisper), {"input_features": (4, 3, 8)}, {ATTENTION: 6, ONCE: 3}),
], ids=["vit", "whisper"])  # fmt: skip
def test_images_and_sounds_are_served(make, inputs, calls):
    model = with_adapters(make, a=prefix())
    torch.manual_seed(0)
    given = {name: torch.randn(size, dtype=torch.float64) for name, size in inputs.items()}
    if make is not make_vit:
        given["decoder_input_ids"] = IDS
    outputs = [model(**given)[0]]
    report = peft_kernels.accelerate(model)
    outputs.append(model(**given)[0])
    torch.testing.assert_close(outputs[1], outputs[0])
    gradients = [torch.autograd.grad(y.sin().sum(), encoders_of(model)) for y in outputs]
    torch.testing.assert_close(gradients[1], gradients[0])
    assert report.counts() == calls


def encoders_of(model):
    return [p for name, p in model.named_parameters() if "prefix_tunings" in name]


SETUPS = {
    "batch_split": (BatchSplit("a", "b", batch_sizes=[1, 3]), ATTENTION),
    "empty_part": (BatchSplit("a", "b", batch_sizes=[4, 0]), ATTENTION),
    "stack": (Stack("a", "c"), ATTENTION),
    "lengths": (BatchSplit("a", "c", batch_sizes=[1, 3]), "BatchSplit of several lengths"),
    "parallel": (Parallel("a", "b"), "Parallel"),
    "nested": (Stack("a", Parallel("b", "b")), "Stack of compositions"),
    "others": (BatchSplit("a", "other", batch_sizes=[1, 3]), "BatchSplit of others than prefixes"),
}


@pytest.mark.parametrize("make", [make_bert, eager(make_llama)], ids=["bert", "llama"])
@pytest.mark.parametrize("name", SETUPS)
def test_compositions(make, name):
    setup, way = SETUPS[name]
    configs = {"a": prefix(), "b": prefix(non_linearity="relu"), "c": prefix(prefix_length=2)}
    if name == "others":
        configs["other"] = prefix(leave_out=[0])
    model = with_adapters(make, **configs)
    model.set_active_adapters(setup)
    ways = {way, ONCE} | ({ATTENTION} if name == "others" else set())
    assert_as_theirs(model, ways, inputs={"attention_mask": MASK}, **CLOSE)


def test_beside_lora():
    """What one adapter has of both."""
    model = with_adapters(make_bert, a=adapters.ConfigUnion(prefix(), lora(output_lora=False)))
    assert_as_theirs(model, {ATTENTION, ONCE, "lora_linear"})


@pytest.mark.parametrize("make", [make_gpt2, make_llama])
def test_sdpa_that_hides_is_theirs(make):
    model = with_adapters(make, a=prefix())
    for inputs in ({}, {"attention_mask": MASK}):
        report = assert_as_theirs(model, {LEFT_OUT, ONCE}, inputs=inputs)
        assert LEFT_OUT in {layer.reason for layer in report.layers}
    mask, inputs = MASK.bool(), {"attention_mask": MASK, "use_cache": False}
    model.set_attn_implementation("eager")
    right = model(IDS, **inputs)[0][mask]
    model.set_attn_implementation("sdpa")
    report = peft_kernels.accelerate(model, strict=False)
    torch.testing.assert_close(model(IDS, **inputs)[0][mask], right)
    assert set(report.counts()) == {ATTENTION, ONCE}


@pytest.mark.parametrize("make", [bert_eager, eager(make_gpt2), eager(of("Bart", **BART))])
def test_calls_that_no_kernel_serves(make):
    """With the same random numbers, too."""
    model = with_adapters(make, a=prefix())
    assert_as_theirs(model, {"attentions asked for", ONCE}, inputs={"output_attentions": True})
    is_bart = type(model).__name__ == "BartModel"
    served = {ATTENTION} if is_bart else set()  # the decoder's
    inputs = {"head_mask": torch.rand(2, 2, dtype=torch.float64)}
    assert_as_theirs(model, {"head mask", ONCE} | served, inputs=inputs)
    model.train()
    for module in model.modules():
        if is_bart and hasattr(module, "head_dim"):
            module.dropout = 0.1
    assert_as_theirs(model, {"dropout of attention", ONCE})


def test_gates_and_own_rows_are_theirs():
    model = with_adapters(make_bert, a=prefix(use_gating=True))
    report = assert_as_theirs(model, {"gating", ONCE})
    assert "gating" in {layer.reason for layer in report.layers}
    model = with_adapters(make_t5, a=prefix())
    assert_as_theirs(model, {"attention: T5AttentionWithAdapters", ONCE})
    model = with_adapters(
        of("Bert", position_embedding_type="relative_key", attn_implementation="eager"), a=prefix()
    )
    assert_as_theirs(model, {"scores with a bias", ONCE})


@pytest.mark.parametrize("make", [make_bert, eager(make_llama)], ids=["bert", "llama"])
def test_flat_and_ejected_prefixes(make):
    model = with_adapters(make, a=prefix(flat=True))
    assert_as_theirs(model, {ATTENTION, ONCE}, **CLOSE)
    model = with_adapters(make_bert, a=prefix())
    expected = run(model)[0]
    report = peft_kernels.accelerate(model)
    model.eject_prefix_tuning("a")
    torch.testing.assert_close(run(model)[0], expected)
    assert set(report.counts()) == {"a prefix for each row"}
    report = peft_kernels.accelerate(model)
    torch.testing.assert_close(run(model)[0], expected)
    assert set(report.counts()) == {ATTENTION, ONCE}


@pytest.mark.parametrize("options", [
    {"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}, {},
], ids=str)  # fmt: skip
def test_options_and_masks_of_gpt2(options):
    """Its eager attention is causal whatever the mask, and scales in ways of its own."""
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    config = transformers.GPT2Config(vocab_size=32, **sizes, **options)
    model = with_adapters(eager(lambda: transformers.GPT2LMHeadModel(config)), a=prefix())
    free = torch.zeros(4, 1, 6, 6, dtype=torch.float64)
    assert_as_theirs(model, {ATTENTION, ONCE}, inputs={"attention_mask": free})
    long = with_adapters(eager(make_gpt2), a=prefix(prefix_length=12))
    report = peft_kernels.accelerate(long)
    with pytest.raises(RuntimeError, match="size of tensor"):
        long(IDS)
    assert "more positions than the model has" in report.counts()


@pytest.mark.parametrize("make", [
    of("BertLMHead", is_decoder=True), eager(make_gpt2), eager(make_llama),
], ids=["bert", "gpt2", "llama"])  # fmt: skip
def test_generated_text(make):
    """The library's cache is of text alone: every step has the prefix beside it."""
    model = with_adapters(make, torch.float32, a=prefix())
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 31, "eos_token_id": None}
    expected = model.generate(IDS, attention_mask=MASK.flip(1), **options)
    report = peft_kernels.accelerate(model)
    assert torch.equal(model.generate(IDS, attention_mask=MASK.flip(1), **options), expected)
    assert report.counts()[ATTENTION] == 2 * 5


@pytest.mark.parametrize("make", [make_bert, eager(make_llama)], ids=["bert", "llama"])
def test_autocast(make):
    model = with_adapters(make, torch.float32, a=prefix())
    inputs = {"attention_mask": MASK}
    with torch.autocast("cpu", torch.bfloat16):
        assert_as_theirs(model, {ATTENTION, ONCE}, inputs=inputs, rtol=0.1, atol=0.2)


@pytest.mark.parametrize("make", [make_bert, eager(make_llama)], ids=["bert", "llama"])
def test_checkpointed(make):
    model = with_adapters(make, a=prefix()).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    expected = run(model)
    report = peft_kernels.accelerate(model)
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    torch.testing.assert_close(run(model), expected, **CLOSE)
    assert set(report.counts()) == {ATTENTION, ONCE}


def test_dropout_of_sdpa_is_its_configs():
    """BERT's module for sdpa drops at the rate it was made with, whatever its nn.Dropout says."""
    model = with_adapters(make_bert, a=prefix()).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert_as_theirs(model, {"dropout of attention", ONCE})


@pytest.mark.parametrize("make", [make_bert, eager(make_llama)], ids=["bert", "llama"])
def test_copies(make):
    model = with_adapters(make, a=prefix())
    peft_kernels.accelerate(model)
    expected = run(model)[0]
    other = copy.deepcopy(model)
    report = peft_kernels.accelerate(other)
    assert not report.missing()
    torch.testing.assert_close(run(other)[0], expected)
    assert set(report.counts()) == {ATTENTION, ONCE}
    attention = next(m for m in model.modules() if "prefix_tuning" in m._modules and m is not model)
    copies = [copy.copy(attention)]
    if make is make_bert:  # a Llama's attention has hooks that no pickle takes
        copies.append(pickle.loads(pickle.dumps(attention)))
    for copied in copies:
        assert type(copied) is type(attention) and vars(copied).keys() == vars(attention).keys()


@pytest.mark.parametrize("make", [make_bert, eager(make_llama)], ids=["bert", "llama"])
def test_compiled(make):
    model = with_adapters(make, torch.float32, a=prefix())
    expected = run(model)
    peft_kernels.accelerate(model)
    torch._dynamo.reset()
    output, gradients = run(torch.compile(model, backend="aot_eager"))
    gradients = {name.removeprefix("_orig_mod."): grad for name, grad in gradients.items()}
    torch.testing.assert_close((output, gradients), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", [make_bert, eager(make_llama)], ids=["bert", "llama"])
def test_a_class_that_is_derived_from_ours(make):
    """As fully_shard makes one, in a module of its own."""
    model = with_adapters(make, a=prefix()).train()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    expected = run(model)
    report = peft_kernels.accelerate(model)
    for module in model.modules():
        if type(module).__name__.endswith("AttentionWithAdapters"):
            kind = type(module)
            module.__class__ = type(f"FSDP{kind.__name__}", (Derived, kind), {})
    torch.testing.assert_close(run(model), expected, **CLOSE)
    assert set(report.counts()) == {"dropout of attention", ONCE}
    torch.testing.assert_close(run(model.eval()), run(model), **CLOSE)
    assert ATTENTION in report.counts()
    assert not peft_kernels.accelerate(model).missing()
    peft_kernels.restore(model)
    for module in model.modules():
        if type(module).__name__.startswith("FSDP"):
            module.__class__ = type(module).__bases__[1].theirs
            module.__class__ = type(f"FSDP{type(module).__name__}", (Derived, type(module)), {})
    report = peft_kernels.accelerate(model.train())
    torch.testing.assert_close(run(model), expected, **CLOSE)
    assert set(report.counts()) == {"dropout of attention", ONCE}


class Derived:
    """A base that knows nothing of ours."""


def test_hooks_of_a_prefix_layer_see_prefix_and_text():
    model = with_adapters(eager(make_llama), a=prefix())
    seen = []
    model.model.layers[0].self_attn.prefix_tuning.register_forward_hook(
        lambda module, args, output: seen.append(output[0].shape[2])
    )
    assert_as_theirs(model, {"prefix_tuning: hooks", ATTENTION, ONCE}, **CLOSE)
    assert set(seen) == {IDS.shape[1] + 3}


def test_an_attention_with_another_forward():
    """Somebody's own forward, put there before or after."""
    model = with_adapters(eager(make_llama), a=prefix())
    attention = model.model.layers[0].self_attn
    theirs = attention.forward
    attention.forward = lambda *args, **kwargs: theirs(*args, **kwargs)
    assert_as_theirs(model, {ATTENTION, ONCE, "another forward"}, **CLOSE)
    model = with_adapters(eager(make_llama), a=prefix())
    expected = run(model)
    report = peft_kernels.accelerate(model)
    attention = model.model.layers[0].self_attn
    ours = attention.forward
    attention.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    torch.testing.assert_close(run(model), expected, **CLOSE)
    assert set(report.counts()) == {ATTENTION, ONCE, "another forward"}
