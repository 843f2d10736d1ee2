"""What a model's attention layers call: the direct form against the op, masks, recording."""

import inspect

import pytest
import torch
from prefix_models import L, assert_close, make, tokens
from torch import nn
from transformers.masking_utils import sdpa_mask

from peft_kernels.integrations.transformers.attention.prefixed import (
    Prefixes,
    attend,
    attention,
    attention_mask,
    recording,
    using,
)
from peft_kernels.integrations.transformers.prefix import add_prefix, attention_places, prefix_for

B, HQ, HKV, S, T, D = 3, 4, 2, 3, 5, 8


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def example():
    text = [drawn(B, HQ, S, D), drawn(B, HKV, T, D), drawn(B, HKV, T, D)]
    return text, (drawn(2, HKV, L, D), drawn(2, HKV, L, D))


MASKS = {
    "none": lambda: None,
    "padding": lambda: torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1]]).bool(),
    "bool": lambda: torch.rand(B, 1, S, T) < 0.7,
    "additive": lambda: torch.randn(1, HQ, S, T, dtype=torch.float64),
}


@pytest.mark.parametrize("ids", [None, [1, 0, 1], [-1, 1, -1]])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_direct_form_is_the_op(mask, is_causal, ids):
    module, (text, bank) = nn.Identity(), example()
    given = MASKS[mask]()
    if ids is None:
        pair, rows = tuple(x[0] for x in bank), None
    else:
        pair, rows = bank, torch.tensor(ids, dtype=torch.int32)
    made = []
    for options in ({}, {"need_weights": True}, {"head_mask": torch.ones(HQ, dtype=torch.float64)}):
        with using(Prefixes({module: pair}, rows)):
            out, _ = attend(module, *text, given, is_causal=is_causal, scale=0.3, **options)
        grads = torch.autograd.grad(out.nan_to_num().square().sum(), [*text, *bank])
        made.append((out.nan_to_num(), grads))  # softmax over nothing
    for out, grads in made[1:]:
        assert_close(out, made[0][0])
        for a, b in zip(grads, made[0][1], strict=True):
            assert_close(a.nan_to_num(), b)


def test_dropout_drops_prefix_and_text_alike():
    module, rows = nn.Identity(), 4000
    q, k, v = (torch.randn(1, 2, n, D).expand(rows, -1, -1, -1) for n in (1, T, T))
    pair = (torch.randn(2, L, D), torch.randn(2, L, D))
    with using(Prefixes({module: pair})):
        whole, _ = attend(module, q[:1], k[:1], v[:1])
        dropped, _ = attend(module, q, k, v, dropout=0.3)
        weights = attend(module, q, k, v, dropout=0.3, need_weights=True)[1]
    error = (dropped.mean(0) - whole[0]).abs() / (dropped.std(0) / rows**0.5)
    assert error.max() < 5
    share = (weights == 0).float().mean((0, 1, 2))
    assert share.shape == (L + T,) and (share - 0.3).abs().max() < 0.03


def test_head_mask_silences_a_head():
    module, (text, bank) = nn.Identity(), example()
    heads = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    with using(Prefixes({module: (bank[0][0], bank[1][0])})):
        out, _ = attend(module, *text, head_mask=heads)
        plain, _ = attend(module, *text)
    assert out[:, :, 1].abs().max() == 0
    assert_close(out[:, :, 2], plain[:, :, 2])


def sizes(queries, keys, past=0):
    """What a model of the transformers that is installed hands to a mask function."""
    if "cache_position" in inspect.signature(sdpa_mask).parameters:
        where = {"cache_position": torch.arange(past, past + queries)}
    else:
        where = {"q_length": queries, "q_offset": past}
    return {"batch_size": 2, "kv_length": keys} | where


def test_no_square_mask_is_made_for_padding():
    where = sizes(4, 4)
    assert attention_mask(**where) is None
    assert attention_mask(**where, attention_mask=torch.ones(2, 4, dtype=torch.bool)) is None
    padding = torch.tensor([[True] * 4, [True, True, False, False]])
    assert torch.equal(attention_mask(**where, attention_mask=padding), padding)
    assert attention_mask(**where, allow_is_causal_skip=False).shape == (2, 1, 4, 4)


def test_queries_before_the_end_of_the_keys_have_a_square_mask():
    """As over a cache of a fixed size, whose last places nothing has filled."""
    where = sizes(2, 6, past=1) | {"allow_is_causal_skip": "q_length" in sizes(1, 1)}
    assert (
        attention_mask(**where).int().tolist() == [[[[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]]]] * 2
    )
    assert attention_mask(**sizes(2, 6, past=4)) is None


def test_scores_with_more_than_a_product_are_refused():
    (q, k, v), _ = example()
    with pytest.raises(ValueError, match="Identity attends with softcap"):
        attention(nn.Identity(), q, k, v, None, softcap=30.0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_recording_is_differentiable_and_gives_the_prefix(name):
    """The keys and values of prompt embeddings, as a prefix of all rows."""
    model = make(name)
    add_prefix(model, prefix_for(model, L))
    prompt = drawn(1, L, 16)
    inputs = {"inputs_embeds": prompt}
    if name == "t5":
        inputs["decoder_input_ids"] = tokens(1, 2)
    model.train().gradient_checkpointing_enable()
    with recording(model) as kept:
        model(**inputs)
    assert all(
        m.gradient_checkpointing for m in model.modules() if hasattr(m, "gradient_checkpointing")
    )
    for place in attention_places(model):
        k, v = kept.pairs[place.module]
        assert k.shape[:2] == (1, place.kv_heads) and k.shape[3] == place.head_dim
        if place.site != "self" or name != "t5":
            (gradient,) = torch.autograd.grad(v.square().sum(), prompt, retain_graph=True)
            assert gradient.abs().max() > 0
