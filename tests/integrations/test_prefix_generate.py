"""Prefixes in generate, with caches, and where the text's positions are."""

import pytest
import torch
from prefix_models import (
    DECODERS,
    ENCODER_DECODERS,
    GREEDY,
    L,
    assert_close,
    each_decoder,
    make,
    tokens,
    transformers,
    with_prefix,
)

from peft_kernels.integrations.transformers.prefix import add_prefix, prefix_for, remove_prefix

# ---- generating ----------------------------------------------------------------------------------


GENERATORS = [*DECODERS, *ENCODER_DECODERS]


@pytest.mark.parametrize("name", GENERATORS)
def test_generate_with_and_without_cache(name):
    model, ids = with_prefix(name), tokens(2, 4)
    mask = torch.tensor([[1] * 4, [0, 0, 1, 1]] if name in DECODERS else [[1] * 4, [1, 1, 0, 0]])
    options = GREEDY | {
        "attention_mask": mask,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    cached = model.generate(ids, **options)
    plain = model.generate(ids, **options, use_cache=False)
    assert torch.equal(cached.sequences, plain.sequences)
    assert_close(torch.stack(cached.logits), torch.stack(plain.logits), 1e-10)
    # The steps are the teacher-forced forward of what was generated.
    if name in DECODERS:
        full = torch.cat([mask, torch.ones(2, 4, dtype=torch.long)], 1)
        logits = model(cached.sequences, attention_mask=full).logits[:, 3:-1]
    else:
        decoded = cached.sequences[:, :-1]
        logits = model(ids, attention_mask=mask, decoder_input_ids=decoded).logits
    assert_close(torch.stack(cached.logits, 1), logits.float(), 1e-6)


@pytest.mark.parametrize("name", GENERATORS)
def test_generate_with_a_prefix_for_each_row(name):
    model, ids = with_prefix(name, tasks=2), tokens(2, 4)
    together = model.generate(
        ids, prefix_ids=[1, -1], num_beams=2, num_return_sequences=2, **GREEDY
    )
    for row, prefix in enumerate([1, -1]):
        alone = model.generate(
            ids[row : row + 1],
            prefix_ids=[prefix],
            num_beams=2,
            num_return_sequences=2,
            **GREEDY,
        )
        assert torch.equal(together[2 * row : 2 * row + 2], alone)


@each_decoder
def test_a_users_own_cache_is_kept(name):
    model, ids = with_prefix(name), tokens(2, 7)
    cache = transformers.DynamicCache()
    model(ids[:, :3], past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 3
    rest = model(ids[:, 3:], past_key_values=cache, use_cache=True).logits
    assert_close(rest, model(ids).logits[:, 3:], 1e-10)
    assert cache.get_seq_length() == 7


def test_static_cache():
    model, ids = with_prefix("llama"), tokens(2, 4)
    assert torch.equal(
        model.generate(ids, **GREEDY, cache_implementation="static", disable_compile=True),
        model.generate(ids, **GREEDY),
    )


# ---- positions -----------------------------------------------------------------------------------


def test_positions_may_stay():
    model = make("gpt2")
    bare = prefix_for(model, L, std=1.0)
    ids = tokens(1, 4)
    add_prefix(model, bare, shift_positions=False)
    stay = model(ids).logits
    shifted = model(ids, position_ids=torch.arange(L, L + 4)[None]).logits
    remove_prefix(model)
    add_prefix(model, bare)
    assert_close(model(ids).logits, shifted)
    assert_close(model(ids, position_ids=torch.arange(4)[None]).logits, shifted)
    assert (stay - shifted).abs().max() > 1e-3


def test_text_beyond_the_models_positions():
    model = with_prefix("gpt2")
    model(tokens(1, 13))
    with pytest.raises(ValueError, match="positions reach 16 after the prefix; the model has 16"):
        model(tokens(1, 14))
    model = with_prefix("bart", shift_positions=True)
    model(tokens(1, 13), decoder_input_ids=tokens(1, 21))
    with pytest.raises(ValueError, match="positions reach 24 after the prefix; the model has 24"):
        model(tokens(1, 13), decoder_input_ids=tokens(1, 22))


def test_a_model_without_position_ids_shifts_none():
    config = transformers.ViTConfig(
        hidden_size=16, num_attention_heads=2, num_hidden_layers=1, image_size=8, patch_size=4
    )
    model = transformers.ViTModel(config)
    with pytest.raises(ValueError, match="shift_positions must be False or None for ViTModel"):
        add_prefix(model, prefix_for(model, L), shift_positions=True)


def test_bart_has_the_same_positions_in_all_rows():
    model, ids = with_prefix("bart", shift_positions=True), tokens(2, 4)
    model(ids, decoder_input_ids=ids, prefix_ids=[0, 0])
    with pytest.raises(ValueError, match="prefix_ids must not be -1 where this model's positions"):
        model(ids, decoder_input_ids=ids, prefix_ids=[0, -1])


def test_packed_rows_stay_apart():
    model, ids = with_prefix("llama"), tokens(1, 5)
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    packed = model(ids, position_ids=positions, use_cache=False).logits
    assert_close(packed[:, 3:], model(ids[:, 3:]).logits)


def test_sliding_window():
    config = transformers.MistralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=2,
    )
    model = transformers.MistralForCausalLM(config).double().eval()
    add_prefix(model, prefix_for(model, L, std=1.0))
    ids = tokens(1, 6)
    logits = model(ids).logits
    changed = ids.clone()
    changed[:, 1] = (ids[:, 1] + 1) % 32
    after = model(changed).logits
    assert_close(after[:, 3:], logits[:, 3:])  # out of the window
    assert (after[:, 2] - logits[:, 2]).abs().max() > 1e-5
    with torch.no_grad():
        for parameter in model.prefix_tuning.parameters():
            parameter.add_(1)
    assert ((model(ids).logits - logits).abs().amax(-1) > 1e-5).all()  # every query sees the prefix
