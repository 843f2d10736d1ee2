"""Soft prompts in ``generate``, with a cache of the user's, and in encoder-decoders."""

import copy

import pytest
import torch
import torch.nn.functional as F
from prefix_models import assert_close, each_decoder, gradients, make, tokens, transformers

from peft_kernels.integrations.transformers.soft_prompts import add_prompt, remove_prompt, task_ids
from peft_kernels.nn import PromptTuning

L, S, NEW = 4, 5, 4
each_way = pytest.mark.parametrize("as_prefix", ["auto", False])


def make_prompt(model, position="front", tasks=3):
    return PromptTuning(
        L, 16, tasks=tasks, init="normal", std=1.0, position=position, dtype=torch.float64
    )


def left_padded():
    ids, mask = tokens(3, S), torch.ones(3, S, dtype=torch.long)
    ids[1, :2], mask[1, :2] = 0, 0
    return ids, mask


def greedy(model, prompt, task, ids, steps=NEW):
    """A row's continuation by the bare model, on its whole embeddings each time."""
    embed = model.get_input_embeddings()
    for _ in range(steps):
        words = embed(ids)[None]
        if task >= 0:
            words = torch.cat([prompt.prompts()[task][None], words], 1)
        ids = torch.cat([ids, model(inputs_embeds=words).logits[0, -1:].argmax(-1)])
    return ids


@each_decoder
@each_way
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("position", ["front", "after_padding"])
@torch.no_grad()
def test_generate(name, as_prefix, use_cache, position):
    model = make(name)
    prompt = make_prompt(model, position)
    ids, mask = left_padded()
    tasks = torch.tensor([2, 0, -1])
    wanted = [
        greedy(model, prompt, task, row[m.bool()])
        for task, row, m in zip(tasks.tolist(), ids, mask, strict=True)
    ]
    add_prompt(model, prompt, as_prefix=as_prefix)
    options = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0, "eos_token_id": None}
    found = model.generate(ids, attention_mask=mask, task_ids=tasks, use_cache=use_cache, **options)
    for row, m, expected in zip(found, mask, wanted, strict=True):
        real = torch.cat([m, m.new_ones(NEW)]).bool()
        assert row[real].tolist() == expected.tolist()
    with task_ids(model, tasks):
        again = model.generate(ids, attention_mask=mask, use_cache=use_cache, **options)
    assert torch.equal(again, found)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_beams_and_several_sequences(name):
    """The two ways agree, and each row's beams have its prompt."""
    one = make(name)
    other = copy.deepcopy(one)
    prompt = make_prompt(one)
    add_prompt(one, prompt)
    add_prompt(other, copy.deepcopy(prompt), as_prefix=False)
    ids, mask = left_padded()
    tasks = torch.tensor([2, 0, -1])
    options = {"max_new_tokens": NEW, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    options |= {"num_beams": 3, "num_return_sequences": 2}
    a = one.generate(ids, attention_mask=mask, task_ids=tasks, **options)
    assert torch.equal(a, other.generate(ids, attention_mask=mask, task_ids=tasks, **options))
    row = one.generate(ids[:1], task_ids=[2], **options)
    assert torch.equal(a[:2], row)


@torch.no_grad()
def test_generate_runs_the_prompt_once():
    model = make("llama")
    add_prompt(model, make_prompt(model, tasks=1))
    calls = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs.get("inputs_embeds") is not None),
        with_kwargs=True,
    )
    model.generate(tokens(2, S), max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    assert calls.count(True) == 1
    model.soft_prompt.prompt.mul_(2)
    model.generate(tokens(2, S), max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    assert calls.count(True) == 2


@each_decoder
@each_way
@pytest.mark.parametrize("position", ["front", "after_bos"])
@torch.no_grad()
def test_a_cache_of_the_users(name, as_prefix, position):
    model = make(name)
    add_prompt(model, make_prompt(model, position), as_prefix=as_prefix)
    ids, mask = left_padded()
    cache = transformers.DynamicCache()
    with task_ids(model, [2, 0, -1]):
        whole = model(ids, attention_mask=mask).logits
        model(ids[:, :3], attention_mask=mask[:, :3], past_key_values=cache, use_cache=True)
        rest = model(ids[:, 3:], attention_mask=mask, past_key_values=cache)
        assert_close(rest.logits, whole[:, 3:])
        out = model(ids[:, :3], attention_mask=mask[:, :3], use_cache=True)
        rest = model(ids[:, 3:], attention_mask=mask, past_key_values=out.past_key_values)
        assert_close(rest.logits, whole[:, 3:])
    with task_ids(model, [2, 0, 1]):
        whole = model(ids).logits
        out = model(ids[:, :3], use_cache=True)
        rest = model(ids[:, 3:], past_key_values=out.past_key_values)
        assert_close(rest.logits, whole[:, 3:])


def test_a_cache_that_was_cut_into_the_prompt_is_refused():
    model, ids = make("llama"), tokens(2, S)
    add_prompt(model, make_prompt(model, tasks=1), as_prefix=False)
    right, cache = model(ids)[0], transformers.DynamicCache()
    model(ids, past_key_values=cache)
    cache.crop(-(S + 1))
    with pytest.raises(ValueError, match=f"all of the prompt's {L} places, or nothing; it was cut"):
        model(ids, past_key_values=cache)
    cache = transformers.DynamicCache()
    assert_close(model(ids, past_key_values=cache)[0], right)


def test_a_cache_of_fixed_size_is_refused_with_the_prompt_in_the_rows():
    model = make("llama", torch.float32)
    prompt = PromptTuning(L, 16)
    add_prompt(model, prompt, as_prefix=False)
    with pytest.raises(ValueError, match="cache_implementation must be that of a cache"):
        model.generate(tokens(2, S), max_new_tokens=2, cache_implementation="static")


@torch.no_grad()
def test_generate_goes_on_from_a_cache():
    """As a prefix; a cache whose rows have the prompt is refused, as generate counts its places."""
    model, ids = make("llama"), tokens(2, S)
    prompt = make_prompt(model, tasks=1)
    options = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
    add_prompt(model, prompt)
    wanted = model.generate(ids, **options)
    cache = model(ids[:, :3], use_cache=True).past_key_values
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), wanted)
    remove_prompt(model)
    add_prompt(model, prompt, as_prefix=False)
    cache = model(ids[:, :3], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values must be empty in generate"):
        model.generate(ids, past_key_values=cache, **options)
    empty = transformers.DynamicCache()
    assert torch.equal(model.generate(ids, past_key_values=empty, **options), wanted)


@each_way
def test_an_empty_cache_with_labels_is_filled(as_prefix):
    model = make("llama")
    add_prompt(model, make_prompt(model, tasks=1), as_prefix=as_prefix)
    ids = tokens(2, S)
    cache = transformers.DynamicCache()
    out = model(ids[:, :3], labels=ids[:, :3], past_key_values=cache)
    torch.testing.assert_close(out.loss, model(ids[:, :3], labels=ids[:, :3]).loss)
    rest = model(ids[:, 3:], past_key_values=cache)
    assert_close(rest.logits, model(ids).logits[:, 3:])
    cache = model(ids[:, :3], labels=ids[:, :3], use_cache=True).past_key_values
    rest = model(ids[:, 3:], past_key_values=cache)
    assert_close(rest.logits, model(ids).logits[:, 3:])
    if as_prefix == "auto":  # its rows have a soft token, which no cache may have
        assert model(ids, labels=ids).past_key_values is None


# -- encoder-decoders


def whole_encoding(model, prompt, tasks, ids, mask):
    """Embeddings and mask with each row's prompt in front."""
    words = model.get_input_embeddings()(ids)
    rows = prompt.prompts()[tasks.clamp_min(0)]
    real = (tasks >= 0).long()[:, None].expand(-1, L)
    return {
        "inputs_embeds": torch.cat([rows, words], 1),
        "attention_mask": torch.cat([real, mask], 1),
    }


def right_padded():
    ids, mask = tokens(3, S), torch.ones(3, S, dtype=torch.long)
    ids[1, 3:], mask[1, 3:] = 0, 0
    return ids, mask


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("masked", [True, False])
def test_encoder_decoder(name, masked):
    model = make(name)
    prompt = make_prompt(model)
    tasks = torch.tensor([2, 0, 2])
    ids, mask = right_padded()
    if not masked:
        mask = torch.ones_like(mask)
    labels = tokens(3, 4)
    wanted = model(**whole_encoding(model, prompt, tasks, ids, mask), labels=labels)
    loss = F.cross_entropy(wanted.logits.flatten(0, 1), labels.flatten())
    (expected,) = torch.autograd.grad(loss, prompt.prompt)

    add_prompt(model, prompt)
    given = {"attention_mask": mask} if masked else {}
    found = model(ids, **given, labels=labels, task_ids=tasks)
    assert_close(found.logits, wanted.logits)
    assert_close(found.loss, wanted.loss)
    F.cross_entropy(found.logits.flatten(0, 1), labels.flatten()).backward()
    assert list(gradients(model)) == ["soft_prompt.prompt"]
    assert_close(prompt.prompt.grad, expected)
    assert not prompt.prompt.grad[1].any()


@pytest.mark.parametrize("name", ["t5", "bart"])
@torch.no_grad()
def test_encoder_decoder_generates(name):
    model = make(name)
    prompt = make_prompt(model)
    ids, mask = right_padded()
    tasks = torch.tensor([2, 0, 1])
    options = {"max_new_tokens": NEW, "do_sample": False, "num_beams": 2}
    wanted = model.generate(**whole_encoding(model, prompt, tasks, ids, mask), **options)
    bare = model.generate(ids, attention_mask=mask, **options)
    add_prompt(model, prompt)
    for use_cache in (True, False):
        options["use_cache"] = use_cache
        found = model.generate(ids, attention_mask=mask, task_ids=tasks, **options)
        assert torch.equal(found, wanted)
    none = model.generate(ids, attention_mask=mask, task_ids=[-1] * 3, **options)
    if name == "t5":  # BART's positions are the places
        assert torch.equal(none, bare)
    with pytest.raises(ValueError, match="task_ids must be given"):
        model.generate(ids, **options)
    remove_prompt(model)
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), bare)


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_encoder_decoder_checkpointing(name, reentrant):
    model = make(name)
    add_prompt(model, make_prompt(model, tasks=1))
    for module in model.modules():
        for rate in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(module.__dict__.get(rate), float):
                setattr(module, rate, 0.0)
    ids, labels = tokens(2, S), tokens(2, 3)
    model.train()(ids, labels=labels).loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(ids, labels=labels).loss.backward()
    torch.testing.assert_close(gradients(model), wanted, rtol=1e-6, atol=1e-9)


def test_roberta_counts_positions_from_its_own_first():
    config = transformers.RobertaConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=14,
        pad_token_id=1,
    )
    model = transformers.RobertaForMaskedLM(config).double().eval()
    prompt = make_prompt(model, tasks=1)
    ids, mask = left_padded()
    words = model.get_input_embeddings()(ids)
    wanted = []
    for row in range(3):  # each without its padding
        real = words[row : row + 1, mask[row].bool()]
        whole = torch.cat([prompt.prompts(), real], 1)
        wanted.append(model(inputs_embeds=whole).logits[0, L:])
    add_prompt(model, prompt)
    assert_close(model(ids, attention_mask=mask).logits[mask.bool()], torch.cat(wanted))
    with pytest.raises(ValueError, match="input_ids must be shorter"):
        model(tokens(1, 9))
