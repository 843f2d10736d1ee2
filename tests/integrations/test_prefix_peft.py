"""Prefix tuning against PEFT's: equal where PEFT is right, and what differs where it isn't."""

import copy

import pytest
import torch
from prefix_models import L, assert_close, gradients, hidden, inputs_of, make, tokens, transformers

from peft_kernels.formats.peft_prompts.folder import load_prompt
from peft_kernels.integrations.transformers.prefix import add_prefix, prefix_for

peft = pytest.importorskip("peft")
NAMES = ["llama", "gpt2", "opt", "qwen2", "qwen3"]
KINDS = {"flat": {}, "mlp": {"prefix_projection": True, "encoder_hidden_size": 6}}


def peft_model(base, kind="flat", task="CAUSAL_LM", **options):
    config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=L, **KINDS[kind], **options)
    model = peft.get_peft_model(base, config)
    model.prompt_encoder.to(base.dtype)  # made in float32 whatever the model is
    return model


def encoder_of(theirs):
    return theirs.prompt_encoder["default"]


def copied(theirs, model, kind):
    """Our prefix with the weights of theirs."""
    encoder = encoder_of(theirs)
    if kind == "flat":
        prefix = prefix_for(model, L)
        prefix.fit(prefix.from_table(encoder.embedding.weight.detach()))
        return prefix
    prefix = prefix_for(model, L, reparametrization="mlp", mid=6)
    site, last = prefix.sites["self"], encoder.transform[2]
    rows = last.out_features // len(site.outer)
    with torch.no_grad():
        site.embedding.copy_(encoder.embedding.weight[None])
        site.inner[0].load_state_dict(encoder.transform[0].state_dict())
        for index, linear in enumerate(site.outer.values()):
            chosen = slice(index * rows, (index + 1) * rows)
            linear.weight.copy_(last.weight[chosen])
            linear.bias.copy_(last.bias[chosen])
    return prefix


def both(name, kind="flat", dtype=torch.float64):
    model = make(name, dtype)
    theirs = peft_model(copy.deepcopy(model), kind)
    add_prefix(model, copied(theirs, model, kind))
    return model, theirs


def their_gradients(theirs, prefix, kind):
    """PEFT's gradients under our parameters' names."""
    encoder = encoder_of(theirs)
    if kind == "flat":
        pairs = prefix.from_table(encoder.embedding.weight.grad)
        return {f"sites.self.values.{i}": torch.stack(pair, 1) for i, pair in enumerate(pairs)}
    first, last = encoder.transform[0], encoder.transform[2]
    made = {
        "sites.self.embedding": encoder.embedding.weight.grad[None],
        "sites.self.inner.0.weight": first.weight.grad,
        "sites.self.inner.0.bias": first.bias.grad,
    }
    for part in ("weight", "bias"):
        for i, grad in enumerate(getattr(last, part).grad.chunk(2)):
            made[f"sites.self.outer.{i}.{part}"] = grad
    return made


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_same_logits_and_gradients(name, kind, dtype, tolerance, padded):
    model, theirs = both(name, kind, dtype)
    ids, mask = tokens(3, 6), torch.ones(3, 6, dtype=torch.long)
    if padded:
        mask[1, 4:] = mask[2, 2:] = 0
    made = []
    for m in (model, theirs):
        logits = m(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        logits.square().mean().backward()
        made.append(logits)
    scale = made[1].abs().max()
    assert_close(made[0] / scale, made[1] / scale, tolerance)
    ours = gradients(model.prefix_tuning)
    expected = their_gradients(theirs, model.prefix_tuning, kind)
    assert ours.keys() == expected.keys()
    for path, gradient in expected.items():
        scale = gradient.abs().max()
        assert scale > 0
        assert_close(ours[path] / scale, gradient / scale, tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_same_parameter_count(kind):
    model, theirs = both("llama", kind)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == theirs.get_nb_trainable_parameters()[0]


def test_same_for_bert_with_shifted_positions():
    model = make("bert")
    theirs = peft_model(copy.deepcopy(model), task="FEATURE_EXTRACTION")
    add_prefix(model, copied(theirs, model, "flat"), shift_positions=True)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    inputs = {"input_ids": tokens(2, 6), "attention_mask": mask}
    expected = hidden(theirs(**inputs))
    assert_close(hidden(model(**inputs))[mask.bool()], expected[mask.bool()], 1e-12)


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("name,options", [("t5", {"d_kv": 4}), ("bart", {"heads": 4})])
def test_same_for_an_encoder_decoder_with_shifted_positions(
    name, options, layers, tmp_path, monkeypatch
):
    # T5 rounds its scores to float32, whatever the model is in.
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    model, inputs = make(name, layers=layers, **options), inputs_of(name)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, 4:] = 0
    bare = copy.deepcopy(model)
    theirs = peft_model(copy.deepcopy(model), task="SEQ_2_SEQ_LM")
    theirs.save_pretrained(tmp_path)
    prefix = load_prompt(tmp_path, model=model)
    add_prefix(model, prefix, shift_positions=True)
    made = []
    for m in (model, theirs):
        logits = m(**inputs).logits
        logits.square().mean().backward()
        made.append(logits)
    assert_close(made[0], made[1], 1e-12)
    assert (made[0] - bare(**inputs).logits).abs().max() > 1e-3
    slots = encoder_of(theirs).embedding.weight.grad.unflatten(1, (2 * layers, -1))
    expected = torch.zeros_like(slots)
    for index, values in enumerate(prefix.sites["self"].values.values()):
        for which in range(2):
            expected[:, (4 * index + which) % (2 * layers)] += (
                values.grad[0, which].transpose(0, 1).flatten(1)
            )
    assert_close(slots, expected, 1e-12)


# ---- where PEFT differs --------------------------------------------------------------------------


def rows_seen(linear):
    seen = []
    linear.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[0]))
    return seen


def test_their_mlp_runs_for_every_row():
    model, theirs = both("llama", "mlp")
    ids = tokens(4, 5)
    ours = rows_seen(model.prefix_tuning.sites["self"].inner[0])
    peers = rows_seen(encoder_of(theirs).transform[0])
    model(ids)
    theirs(ids)
    assert (ours, peers) == ([1], [4])


def test_half_of_their_t5_prefix_never_trains():
    model, inputs = make("t5", d_kv=4), inputs_of("t5")
    theirs = peft_model(copy.deepcopy(model), task="SEQ_2_SEQ_LM")
    theirs(**inputs).logits.square().mean().backward()
    slots = encoder_of(theirs).embedding.weight.grad.view(L, 4, -1).abs().amax((0, 2))
    assert (slots > 0).tolist() == [True, True, False, False]
    prefix = prefix_for(model, L, sites=["self"])
    assert sum(p.numel() for p in prefix.parameters()) == L * 4 * 16
    add_prefix(model, prefix)
    model(**inputs).logits.square().mean().backward()
    for values in prefix.parameters():
        assert (values.grad.abs().amax((0, 2, 3, 4)) > 0).all()


def test_their_prefix_is_lost_under_checkpointing():
    model, theirs = both("llama")
    ids = tokens(2, 5)
    prefixed = model(ids).logits
    assert_close(theirs(input_ids=ids).logits, prefixed, 1e-10)
    for m, base in ((model, model), (theirs, theirs.get_base_model())):
        m.train()
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_close(model(ids).logits, prefixed)
    if transformers.__version__ >= "5":  # the mask still counts the prefix
        with pytest.raises(RuntimeError, match="must match the size"):
            theirs(input_ids=ids)
    else:
        dropped = theirs(input_ids=ids).logits
        assert (dropped - prefixed).abs().max() > 1e-2
        with torch.no_grad():
            encoder_of(theirs).embedding.weight.add_(1)
        assert torch.equal(theirs(input_ids=ids).logits, dropped)
    checkpointed = make("llama")
    checkpointed.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="does not work with gradient checkpointing"):
        peft_model(checkpointed)


def test_they_overwrite_a_users_cache():
    model, theirs = both("gpt2")
    ids = tokens(2, 6)
    whole = theirs(input_ids=ids).logits[:, 3:]
    assert_close(model(ids).logits[:, 3:], whole, 1e-10)
    made = []
    for m in (model, theirs):
        cache = transformers.DynamicCache()
        first = m(input_ids=ids[:, :3], past_key_values=cache, use_cache=True)
        rest = m(input_ids=ids[:, 3:], past_key_values=first.past_key_values, use_cache=True)
        made.append(rest.logits)
    assert_close(made[0], whole, 1e-10)
    assert_close(made[1], theirs(input_ids=ids[:, 3:]).logits, 1e-10)
    assert (made[1] - whole).abs().max() > 1e-2


def test_left_padding_moves_their_text():
    model, theirs = both("gpt2")
    ids = tokens(1, 5)
    padded = torch.cat([tokens(1, 2), ids], 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    alone = theirs(input_ids=ids).logits
    assert_close(model(padded, attention_mask=mask).logits[:, 2:], alone, 1e-10)
    moved = theirs(input_ids=padded, attention_mask=mask).logits[:, 2:]
    assert (moved - alone).abs().max() > 1e-2


def test_their_t5_prefix_needs_heads_of_the_hidden_size():
    """T5's heads times their size need not be the hidden size: in T5-3B they are 4096 and 1024."""
    model, inputs = make("t5", d_kv=8), inputs_of("t5")
    theirs = peft_model(copy.deepcopy(model), task="SEQ_2_SEQ_LM")
    with pytest.raises(RuntimeError):
        theirs(**inputs)
    add_prefix(model, prefix_for(model, L))
    model(**inputs)
