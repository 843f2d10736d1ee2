"""accelerate(): PEFT's prompt methods, against the same models as PEFT runs them."""

import copy
import pickle

import pytest
import torch
from tiny_models import make_bert, make_gpt2, make_llama, transformers
from torch import nn

import peft_kernels

peft = pytest.importorskip("peft")

L = 3
IDS = torch.randint(0, 32, (4, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, 4:] = MASK[2, 2:] = 0
LOOKUP, ONCE = "prompt_lookup", "encoded once"


def make_classifier() -> nn.Module:
    return transformers.BertForSequenceClassification(make_bert().config)


def make_tagger() -> nn.Module:
    return transformers.BertForTokenClassification(make_bert().config)


TASKS = {
    make_gpt2: "CAUSAL_LM",
    make_llama: "CAUSAL_LM",
    make_classifier: "SEQ_CLS",
    make_tagger: "TOKEN_CLS",
    make_bert: "FEATURE_EXTRACTION",
}
METHODS = {
    "prompt": (peft.PromptTuningConfig, {}),
    "mlp": (peft.PromptEncoderConfig, {"encoder_hidden_size": 7}),
    "lstm": (peft.PromptEncoderConfig, {
        "encoder_hidden_size": 7,
        "encoder_reparameterization_type": "LSTM",
        "encoder_num_layers": 2,
    }),
    "prefix": (peft.PrefixTuningConfig, {}),
    "prefix_mlp": (peft.PrefixTuningConfig, {"prefix_projection": True, "encoder_hidden_size": 7}),
}  # fmt: skip
WAYS = {
    "prompt": {LOOKUP},
    "mlp": {LOOKUP, ONCE},
    "lstm": {LOOKUP, ONCE},
    "prefix": {"PREFIX_TUNING", "no projection"},
    "prefix_mlp": {"PREFIX_TUNING", ONCE},
}
ATTENTION = "prefix_attention"


def ways_of(make, method):
    """What serves a call."""
    if method.startswith("prefix") and TASKS[make] == "CAUSAL_LM":
        return {ATTENTION, *WAYS[method]} - {"PREFIX_TUNING"}
    return WAYS[method]


models = pytest.mark.parametrize("make", TASKS, ids=lambda make: make.__name__)
methods = pytest.mark.parametrize("method", METHODS)


def prompted(make, method, dtype=torch.float64):
    torch.manual_seed(0)
    base = make()
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.3)
    kind, options = METHODS[method]
    config = kind(task_type=TASKS[make], num_virtual_tokens=L, **options)
    return peft.get_peft_model(base, config).to(dtype).eval()


def labels_of(model, method):
    if isinstance(model, peft.PeftModelForSequenceClassification):
        return {"labels": torch.tensor([0, 1, 1, 0])}
    if isinstance(model, peft.PeftModelForTokenClassification):
        before = 0 if method.startswith("prefix") else L  # PEFT leaves labels as they are given
        return {"labels": torch.cat([torch.full((4, before), -100), IDS % 2], 1)}
    return {} if isinstance(model, peft.PeftModelForFeatureExtraction) else {"labels": IDS}


def run(model, **inputs):
    """All outputs, and the gradients of all that is trained."""
    model.zero_grad()
    torch.manual_seed(5)
    output = model(**({"input_ids": IDS, "attention_mask": MASK} | inputs))
    result = output[1] if "labels" in inputs else output[0]
    if result.requires_grad:
        result.sin().sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    found = [x.detach() for x in output.to_tuple() if isinstance(x, torch.Tensor)]
    cache = getattr(output, "past_key_values", None)
    for layer in cache.layers if cache is not None else ():
        found += [layer.keys.detach(), layer.values.detach()]
    return found, gradients


def assert_as_peft(model, ways, **inputs):
    peft_kernels.restore(model)
    classes = [type(module) for module in model.modules()]
    expected = run(model, **inputs)
    report = peft_kernels.accelerate(model)
    # Llama's norms round to float32 whatever the model is in.
    rounds = any("RMSNorm" in type(module).__name__ for module in model.modules())
    tolerances = {"rtol": 1e-5, "atol": 1e-5} if rounds else {}
    torch.testing.assert_close(run(model, **inputs), expected, **tolerances)
    assert set(report.counts()) == set(ways)
    peft_kernels.restore(model)
    assert [type(module) for module in model.modules()] == classes
    assert not any("peft_kernels" in key for module in model.modules() for key in vars(module))
    assert torch.equal(run(model, **inputs)[0][0], expected[0][0])
    return report


@models
@methods
def test_as_peft(make, method):
    model = prompted(make, method)
    assert_as_peft(model, ways_of(make, method))
    assert_as_peft(model, ways_of(make, method), **labels_of(model, method))
    with torch.no_grad():
        assert_as_peft(model, ways_of(make, method), attention_mask=None)
    if "token_type_ids" in model.get_base_model().forward.__code__.co_varnames:
        assert_as_peft(model, ways_of(make, method), token_type_ids=IDS % 2)


PREFIXES = pytest.mark.parametrize("method", ["prefix", "prefix_mlp"])


@pytest.mark.parametrize("make", [make_gpt2, make_llama])
@PREFIXES
def test_prefixes_of_other_calls(make, method):
    model = prompted(make, method)
    ways = ways_of(make, method)
    for inputs in (
        {"attention_mask": MASK.flip(1)},
        {"position_ids": torch.arange(6).expand(4, 6) + 2},
        {"output_hidden_states": True},
    ):
        assert_as_peft(model, ways, **inputs)
    expected = run(model, use_cache=False)[0][0]
    report = peft_kernels.accelerate(model)
    torch.testing.assert_close(run(model, use_cache=False)[0][0], expected, rtol=1e-5, atol=1e-5)
    assert set(report.counts()) == ways
    peft_kernels.accelerate(model)
    peft_kernels.accelerate(model)  # twice is once
    assert_as_peft(model, ways)
    with model.disable_adapter(), torch.no_grad():
        plain = run(model)[0][0]
        peft_kernels.restore(model)
        torch.testing.assert_close(run(model)[0][0], plain)


@PREFIXES
def test_the_base_attends_as_it_is_told_to(method):
    """The kernel is for the forward that has a prefix, and copies and pickles know."""
    model = prompted(make_llama, method)
    base = model.get_base_model()
    seen = []
    base.model.layers[0].self_attn.register_forward_hook(
        lambda module, *_: seen.append(module.config._attn_implementation)
    )
    peft_kernels.accelerate(model)
    with torch.no_grad():
        model(IDS), base(IDS)
        base.set_attn_implementation("eager")
        base(IDS), model(IDS)
    assert seen == ["peft_kernels_prefix", "sdpa", "eager", "peft_kernels_prefix"]
    config = base.model.layers[0].self_attn.config
    for other in (copy.deepcopy(base.model.layers[0].self_attn).config, pickle.loads(
        pickle.dumps(config)
    )):  # fmt: skip
        assert other._attn_implementation == "eager" and type(other) is type(config)
    peft_kernels.restore(model)
    assert type(base.model.layers[0].self_attn.config) is transformers.LlamaConfig


@PREFIXES
def test_a_returned_cache_goes_on(method):
    """It has the prefix, once it is read."""
    model = prompted(make_llama, method)

    def continued(model):
        with torch.no_grad():
            cache = model(IDS, MASK).past_key_values
            assert cache.get_seq_length() == L + IDS.shape[1]
            copies = copy.deepcopy(cache)
            mask = torch.ones(4, L + IDS.shape[1] + 1)
            for given in (cache, copies):
                yield model.get_base_model()(IDS[:, :1], mask, past_key_values=given).logits

    expected = list(continued(model))
    peft_kernels.accelerate(model)
    found = list(continued(model))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@PREFIXES
def test_calls_that_no_prefix_kernel_serves(method):
    model = prompted(make_llama, method)
    encoder = ways_of(make_llama, method) - {ATTENTION}
    embeddings = model.word_embeddings(IDS).detach()
    for inputs in (
        {"input_ids": None, "inputs_embeds": embeddings},
        {"return_dict": False},
        {"output_attentions": True},
    ):
        model.get_base_model().set_attn_implementation("eager")
        if "return_dict" in inputs:
            report = peft_kernels.accelerate(model)
            model(IDS, **inputs)
            assert set(report.counts()) == {"other arguments", *encoder}
        else:
            assert_as_peft(model, {"other arguments", *encoder}, **inputs)


def test_an_attention_of_someone_elses_is_pefts():
    """What asks for no prefix would leave it out."""
    model = prompted(make_llama, "prefix")
    attention = model.get_base_model().model.layers[1].self_attn
    plain = type(attention).forward

    def forward(*args, **kwargs):
        kwargs["attention_mask"] = None
        attention.config = plain_config
        return plain(attention, *args, **kwargs)

    plain_config = copy.deepcopy(attention.config)
    attention.forward = forward
    expected = run(model)[0][0]
    report = peft_kernels.accelerate(model)
    torch.testing.assert_close(run(model)[0][0], expected)
    assert set(report.counts()) == {"an attention that asks for no prefix", "no projection"}


@pytest.mark.parametrize("kind", ["Mistral", "Gemma2"])
def test_prefixes_in_windows_are_pefts(kind):
    sizes = make_llama().config.to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
             "num_attention_heads", "num_key_value_heads")  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(
        **{name: sizes[name] for name in names}, head_dim=4, sliding_window=4
    )
    base = getattr(transformers, f"{kind}ForCausalLM")(config).double()
    options = {"num_attention_heads": 2, "token_dim": 8}
    settings = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=L, **options)
    model = peft.get_peft_model(base, settings).double().eval()
    reason = "attention in a window" if kind == "Mistral" else "no attention that is known"
    assert_as_peft(model, {reason, "no projection"}, attention_mask=None)


@pytest.mark.parametrize("make", [make_gpt2, make_llama])
@methods
def test_generates_as_peft(make, method):
    model = prompted(make, method)
    arguments = {"attention_mask": MASK.flip(1), "max_new_tokens": 5, "do_sample": False}
    arguments["pad_token_id"] = 0
    expected = model.generate(input_ids=IDS, **arguments)
    peft_kernels.accelerate(model)
    assert torch.equal(model.generate(input_ids=IDS, **arguments), expected)


def test_the_report_says_what_serves_what():
    report = peft_kernels.accelerate(prompted(make_llama, "lstm", torch.float32))
    kinds = {layer.name: (layer.kind, layer.backend) for layer in report.layers}
    assert kinds == {
        "": ("peft_model.PeftModelForCausalLM", "cpu"),
        "prompt_encoder.default": ("p_tuning.PromptEncoder", "torch"),
    }
    assert report.summary() == (
        "1 of 2 layers of PEFT's run on peft_kernels (cpu); "
        "1 on PyTorch's operations, and no kernel"
    )
    assert "(model)" in str(report)
    report = peft_kernels.accelerate(prompted(make_llama, "prefix"))
    assert "1 keep PEFT's: no projection (1)" in report.summary()


@pytest.mark.parametrize("method", ["mlp", "lstm", "prefix_mlp"])
def test_an_encoder_runs_again_once_something_changed(method, monkeypatch):
    model = prompted(make_llama, method)
    peft_kernels.accelerate(model)
    encoder = model.prompt_encoder["default"]
    runs = []
    theirs = type(encoder).__bases__[0]
    forward = theirs.forward

    def counted(self, rows):
        runs.append(rows.shape[0])
        return forward(self, rows)

    monkeypatch.setattr(theirs, "forward", counted)
    with torch.no_grad():
        first = run(model)[0][0]
        assert torch.equal(run(model)[0][0], first)
        assert runs == [1]
        encoder.embedding.weight.mul_(-1)
        changed = run(model)[0][0]
        assert not torch.allclose(changed, first) and runs == [1, 1]
    run(model.train())
    assert runs == [1, 1, 1]  # once, whatever the batch
    peft_kernels.restore(model)
    with torch.no_grad():
        torch.testing.assert_close(run(model.eval())[0][0], changed)


def test_hooks_of_an_encoder_run_in_pefts_code():
    model = prompted(make_llama, "prefix_mlp")
    seen = []
    encoder = model.prompt_encoder["default"]
    encoder.transform[0].register_forward_hook(lambda module, args, output: seen.append(output))
    assert_as_peft(model, {ATTENTION, "hooks"})
    assert {output.shape[0] for output in seen} == {4, 1}


def test_other_arguments_are_pefts():
    model = prompted(make_llama, "prompt")
    embeddings = model.word_embeddings(IDS).detach()
    assert_as_peft(model, {"other arguments"}, input_ids=None, inputs_embeds=embeddings)
    assert_as_peft(model, {"other arguments"}, attention_mask=MASK.double())


@pytest.mark.parametrize("method", ["mlp", "prefix_mlp"])
def test_training_gives_the_same_losses(method):
    def losses(accelerated):
        model = prompted(make_gpt2, method)
        if accelerated:
            peft_kernels.accelerate(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        found = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = model(IDS, MASK, labels=IDS).loss
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    expected, found = losses(False), losses(True)
    torch.testing.assert_close(found, expected)
    assert found[-1] < found[0]


@methods
def test_copies_and_files(method, tmp_path):
    model = prompted(make_llama, method, torch.float32)
    printed, keys = repr(model), list(model.state_dict())
    peft_kernels.accelerate(model)
    assert repr(model) == printed and list(model.state_dict()) == keys
    with torch.no_grad():
        expected = run(model)[0][0]
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(other) is type(model)
            assert torch.equal(run(other)[0][0], expected)
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(prompted(make_llama, "prompt").base_model.float(),
                                               tmp_path)  # fmt: skip
        peft_kernels.accelerate(again)
        torch.testing.assert_close(run(again.eval())[0][0], expected, rtol=1e-4, atol=1e-5)


# ---- strict=False ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_gpt2, make_llama])
@pytest.mark.parametrize("method", ["prompt", "mlp"])
def test_left_padding_is_no_part_of_the_text(make, method):
    """A padded row is what it is alone; PEFT's isn't."""
    model = prompted(make, method)
    ids = IDS[:2].clone()
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    alone = model(ids[1:, 2:]).logits[0]
    theirs = model(ids, attention_mask=mask).logits[1, -4:]
    peft_kernels.accelerate(model, strict=False)
    ours = model(ids, attention_mask=mask)
    torch.testing.assert_close(ours.logits[1, -4:], alone[-4:])
    torch.testing.assert_close(ours.logits[0], model(ids[:1]).logits[0])
    if make is make_gpt2:  # whose positions are learned
        assert not torch.allclose(theirs, alone[-4:], atol=1e-3)
    peft_kernels.accelerate(model)
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[1, -4:], theirs)


@pytest.mark.parametrize("make", [make_gpt2, make_llama])
def test_left_padded_rows_are_generated_as_alone(make):
    model = prompted(make, "prompt")
    ids = IDS[:2].clone()
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(input_ids=ids[1:, 2:], **arguments)[0, 4:]
    whole = model.generate(input_ids=ids[:1], **arguments)[0]
    peft_kernels.accelerate(model, strict=False)
    found = model.generate(input_ids=ids, attention_mask=mask, **arguments)
    assert torch.equal(found[1, 6:], alone) and torch.equal(found[0], whole)


def test_labels_follow_the_prompt():
    model = prompted(make_llama, "prompt")
    mask = torch.ones_like(IDS)
    mask[1, :2] = 0
    labels = IDS.masked_fill(mask == 0, -100)
    peft_kernels.accelerate(model, strict=False)
    found = model(IDS, attention_mask=mask, labels=labels).loss
    rows = [model(IDS[i : i + 1, 2 * (i == 1) :], labels=labels[i : i + 1, 2 * (i == 1) :]).loss
            for i in range(4)]  # fmt: skip
    counts = [6, 4, 6, 6]  # a text's first token is predicted from the prompt's last
    expected = sum(loss * count for loss, count in zip(rows, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(found, expected)
