"""Prefixes in models: what every family must hold."""

import copy

import pytest
import torch
from prefix_models import (
    ENCODER_DECODERS,
    FAMILIES,
    GREEDY,
    KINDS,
    L,
    assert_close,
    each_decoder,
    each_family,
    gradients,
    hidden,
    inputs_of,
    loss_of,
    make,
    tokens,
    with_prefix,
)

from peft_kernels.integrations.transformers.prefix import (
    add_prefix,
    init_from_text,
    prefix_for,
    prefix_ids,
    prefix_shapes,
    remove_prefix,
)
from peft_kernels.nn import PrefixTuning

# ---- the same numbers ----------------------------------------------------------------------------


@each_family
def test_remove_restores_the_model(name):
    # Frozen, as it stays: sdpa computes a bias that trains in another way.
    model, inputs = make(name).requires_grad_(False), inputs_of(name)
    attention, before = model.config._attn_implementation, hidden(model(**inputs))
    classes = [type(module) for module in model.modules()]
    state = set(model.state_dict())
    prefix = prefix_for(model, L, std=1.0)
    add_prefix(model, prefix)
    assert (hidden(model(**inputs)) - before).abs().max() > 1e-3
    assert remove_prefix(model) is prefix
    assert torch.equal(hidden(model(**inputs)), before)
    assert model.config._attn_implementation == attention
    assert [type(module) for module in model.modules()] == classes
    assert set(model.state_dict()) == state
    assert not any("prefix" in key for m in model.modules() for key in vars(m))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert "generate" not in vars(model)
    with pytest.raises(ValueError, match="model has no prefix"):
        remove_prefix(model)


@each_family
def test_row_without_a_prefix_is_the_bare_model(name):
    model, inputs = make(name), inputs_of(name)
    bare = hidden(model(**inputs))
    add_prefix(model, prefix_for(model, L, std=1.0))
    exact = 1e-5 if name == "t5" else 1e-12  # T5's own softmax is in float32
    assert_close(hidden(model(**inputs, prefix_ids=[-1, -1])), bare, exact)
    with_one = hidden(model(**inputs, prefix_ids=[-1, 0]))
    assert_close(with_one[0], bare[0], exact)
    assert_close(with_one[1], hidden(model(**inputs))[1])


@pytest.mark.parametrize("kind", KINDS)
@each_decoder
def test_prefix_of_a_text_is_the_text(name, kind):
    """Positions start at L, so a prefix of a text's keys and values is that text in front."""
    model, text, ids = make(name), tokens(1, L), tokens(2, 5)
    whole = model(torch.cat([text.expand(2, -1), ids], 1)).logits[:, L:]
    prefix = prefix_for(model, L, **KINDS[kind])
    assert init_from_text(model, prefix, text) < 1e-12
    add_prefix(model, prefix)
    assert_close(model(ids).logits, whole, 1e-10)
    other = tokens(1, L + 2)  # cut, and with the prefix in the model
    init_from_text(model, prefix, other)
    logits = model(ids).logits
    remove_prefix(model)
    assert_close(
        logits, model(torch.cat([other[:, :L].expand(2, -1), ids], 1)).logits[:, L:], 1e-10
    )


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_prefix_of_a_text_has_the_models_keys_at_every_site(name):
    model = make(name)
    prefix = prefix_for(model, L)
    assert init_from_text(model, prefix, tokens(1, 2), tokens(1, L)) == 0.0
    assert list(prefix.layers) == ["encoder", "self", "cross"]
    assert all(x.abs().max() > 0 for site in prefix().values() for pair in site for x in pair)
    assert model.config._attn_implementation != "peft_kernels_prefix"


# BERT and BART have absolute positions, which the bare model lets left padding move.
SIDES = [(name, side) for name in FAMILIES for side in ("left", "right")]
SIDES = [case for case in SIDES if case not in (("bert", "left"), ("bart", "left"))]


@pytest.mark.parametrize("name,side", SIDES)
def test_padding_changes_nothing(name, side):
    model, inputs, pad = with_prefix(name), inputs_of(name, rows=1), tokens(1, 2)
    alone, length = hidden(model(**inputs)), inputs["input_ids"].shape[1]
    both, real = [inputs["input_ids"], pad], [torch.ones(1, length), torch.zeros(1, 2)]
    order = slice(None) if side == "right" else slice(None, None, -1)
    padded = torch.cat(both[order], 1)
    mask = torch.cat([torch.cat(real[order], 1), torch.ones(1, length + 2)]).long()
    batch = {"input_ids": torch.cat([padded, tokens(1, length + 2)]), "attention_mask": mask}
    if name in ENCODER_DECODERS:
        batch["decoder_input_ids"] = inputs["decoder_input_ids"].expand(2, -1)
    out = hidden(model(**batch))[:1]
    if name not in ENCODER_DECODERS:
        out = out[:, :length] if side == "right" else out[:, 2:]
    assert_close(out, alone, 1e-10)


@each_family
def test_mixed_prefixes_are_each_alone(name):
    model, inputs = with_prefix(name, tasks=3), inputs_of(name, rows=4)
    ids = torch.tensor([2, -1, 0, 2])
    with prefix_ids(model, ids):
        together = hidden(model(**inputs))
    for row in range(4):
        alone = {key: value[row : row + 1] for key, value in inputs.items()}
        assert_close(together[row : row + 1], hidden(model(**alone, prefix_ids=ids[row : row + 1])))
    assert (together[0] - hidden(model(**inputs, prefix_ids=[0, 0, 0, 0]))[0]).abs().max() > 1e-4
    with pytest.raises(ValueError, match="prefix_ids must be given: there are 3 tasks"):
        model(**inputs)


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@each_family
def test_only_the_prefix_trains_and_all_of_it(name, kind):
    model = with_prefix(name, kind)
    loss_of(model.train(), inputs_of(name)).backward()
    for path, parameter in model.named_parameters():
        assert path.startswith("prefix_tuning.") == parameter.requires_grad
        if parameter.requires_grad:
            assert parameter.grad.abs().max() > 0, path
        else:
            assert parameter.grad is None, path


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@each_family
def test_checkpointing_changes_no_gradient(name, kind, reentrant):
    model, inputs = with_prefix(name, kind, tasks=2).train(), inputs_of(name)
    with prefix_ids(model, [1, 0]):
        loss_of(model, inputs).backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    with prefix_ids(model, [1, 0]):
        first = loss_of(model, inputs)
    with prefix_ids(model, [0, 0]):  # another forward before the backward
        loss_of(model, inputs)
    first.backward(retain_graph=not reentrant)
    made = gradients(model)
    assert made.keys() == expected.keys()
    for path, gradient in expected.items():
        assert_close(made[path], gradient)


def test_mlp_runs_once_a_step_under_reentrant_checkpointing():
    model, runs = with_prefix("llama", "mlp").train(), []
    model.prefix_tuning.sites["self"].inner[0].register_forward_hook(lambda *_: runs.append(1))
    model.gradient_checkpointing_enable()
    loss_of(model, inputs_of("llama")).backward()
    assert len(runs) == 1


def test_a_layer_run_again_by_itself():
    """As a user's own checkpoint around a layer: with one prefix it is known, with several not."""
    model, inputs = with_prefix("llama"), inputs_of("llama")
    kept = {}

    def keep(module, args, kwargs, output):
        kept["call"] = (args, kwargs, output)

    layer = model.model.layers[0]
    layer.register_forward_hook(keep, with_kwargs=True)
    model(**inputs, use_cache=False)
    args, kwargs, output = kept["call"]
    assert_close(layer(*args, **kwargs), output)
    model = with_prefix("llama", tasks=2)
    with pytest.raises(ValueError, match="prefix_ids must be given: there are 2 tasks"):
        model.model.layers[0](*args, **kwargs)


DROPOUTS = {"gpt2": "attn_dropout", "bert": "dropout", "bart": "dropout", "t5": "dropout"}


@each_family
def test_the_models_attention_dropout_is_kept(name):
    """In training alone, with and without checkpointing; the recomputed draw is the first one."""
    model, inputs = with_prefix(name), inputs_of(name)
    plain = hidden(model(**inputs))
    option = DROPOUTS.get(name, "dropout" if name == "opt" else "attention_dropout")
    for module in model.modules():
        if hasattr(module, "layer_idx") and hasattr(module, option):
            rate = getattr(module, option)
            if isinstance(rate, torch.nn.Dropout):
                rate.p = 0.2
            else:
                setattr(module, option, 0.2)
    assert torch.equal(hidden(model(**inputs)), plain)
    made = []
    for checkpoint in (False, True):
        model.train().zero_grad()
        if checkpoint:
            model.gradient_checkpointing_enable()
        torch.manual_seed(1)
        loss_of(model, inputs).backward()
        made.append(gradients(model))
    torch.manual_seed(1)
    assert (hidden(model(**inputs)) - plain).abs().max() > 1e-3
    for path, gradient in made[0].items():
        assert_close(made[1][path], gradient)


@pytest.mark.filterwarnings("ignore:`output_attentions=True` is not supported")
@each_family
def test_attentions_hold_the_prefix(name):
    model, inputs = with_prefix(name, tasks=2), inputs_of(name)
    config = {"prefix_ids": [1, -1]}
    out = model(**inputs, **config, output_attentions=True)
    assert_close(hidden(out), hidden(model(**inputs, **config)))
    given = out.decoder_attentions if name in ENCODER_DECODERS else out.attentions
    for weights in given:
        assert weights.shape[-1] == weights.shape[-2] + L
        assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
        assert (weights[0, ..., :L] > 0).all() and (weights[1, ..., :L] == 0).all()


@each_decoder
def test_attentions_that_the_config_asks_for(name):
    """As the eager models that it was asked of have them."""
    model, inputs = make(name), inputs_of(name)
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    assert all(weights.shape[-1] == 6 for weights in model(**inputs).attentions)
    add_prefix(model, prefix_for(model, L, std=1.0))
    given = model(**inputs).attentions
    assert len(given) == 2 and all(weights.shape[-1] == 6 + L for weights in given)


# ---- the rest ------------------------------------------------------------------------------------


@each_family
def test_eject_keeps_the_outputs(name):
    model, inputs = with_prefix(name, "mlp"), inputs_of(name)
    before = hidden(model(**inputs))
    model.prefix_tuning.eject()
    assert_close(hidden(model(**inputs)), before)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_copied_model_has_its_own_prefix(name):
    model, inputs = with_prefix(name), inputs_of(name)
    before = hidden(model(**inputs))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.prefix_tuning.parameters():
            parameter.zero_()
    assert torch.equal(hidden(model(**inputs)), before)
    assert (hidden(other(**inputs)) - before).abs().max() > 1e-4
    assert other.generate(inputs["input_ids"], **GREEDY).shape[0] == 2


def test_layers_may_be_skipped_and_sites_chosen():
    model, inputs = make("bart"), inputs_of("bart")
    bare = hidden(model(**inputs))
    shapes = prefix_shapes(model, ["cross"])
    assert shapes == {"cross": [(4, 4)] * 2}
    with pytest.raises(ValueError, match="sites must be of encoder, self, cross in this model"):
        prefix_shapes(model, ["decoder"])
    layers = {"self": [None, (4, 4)], "encoder": [(2, 8), None]}
    add_prefix(model, PrefixTuning(L, layers, std=1.0, dtype=torch.float64))
    out = model(**inputs, output_attentions=True)
    lengths = [w.shape[-1] - w.shape[-2] for w in out.encoder_attentions + out.decoder_attentions]
    assert lengths == [L, 0, 0, L]
    assert [w.shape[-1] for w in out.cross_attentions] == [6, 6]
    assert (hidden(out) - bare).abs().max() > 1e-3


def test_an_error_in_a_forward_leaves_nothing_behind():
    model, inputs = with_prefix("bart", tasks=2), inputs_of("bart")
    expected = hidden(model(**inputs, prefix_ids=[0, 1]))
    with pytest.raises(ValueError, match="prefix_ids must have one id for each of 2 rows; got 3"):
        model(**inputs, prefix_ids=[0, 1, 1])
    with pytest.raises(ValueError, match=r"prefix_ids must be in \[-1, 2\); got 0 to 2"):
        model(**inputs, prefix_ids=[0, 2])
    with pytest.raises(ValueError, match=r"prefix_ids must be integers \[rows\]"):
        model(**inputs, prefix_ids=[0.5, 1.0])
    with pytest.raises(ValueError, match="prefix_ids must be given: there are 2 tasks"):
        model(**inputs)
    assert torch.equal(hidden(model(**inputs, prefix_ids=[0, 1])), expected)


def test_prefixes_that_do_not_fit():
    model = make("llama")
    other = prefix_for(make("gpt2"), L)
    implementation = model.config._attn_implementation
    with pytest.raises(
        ValueError,
        match="prefix has 2 key/value heads of size 8 at self, layer 0; the model's has 2 of size",
    ):
        add_prefix(model, other)
    with pytest.raises(ValueError, match="prefix has 2 layers at encoder, and the model has 0"):
        add_prefix(model, prefix_for(make("bart"), L))
    with pytest.raises(ValueError, match="no attention module that can take a prefix; got Linear"):
        add_prefix(torch.nn.Linear(2, 2), other)
    assert model.config._attn_implementation == implementation
    assert all(parameter.requires_grad for parameter in model.parameters())
    add_prefix(model, prefix_for(model, L))
    with pytest.raises(ValueError, match="model has a prefix already"):
        add_prefix(model, prefix_for(model, L))


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_saved_prefix_goes_on_in_another_model(name, tmp_path):
    model, inputs = with_prefix(name, "mlp"), inputs_of(name)
    state = copy.deepcopy(make(name).state_dict())

    def train(model, optimizer):
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model, inputs).backward()
            optimizer.step()

    optimizer = torch.optim.AdamW(model.prefix_tuning.parameters(), 1e-2)
    train(model, optimizer)
    saved = [model.prefix_tuning.state_dict(), optimizer.state_dict()]
    torch.save(saved, tmp_path / "prefix.pt")
    train(model, optimizer)

    resumed = with_prefix(name, "mlp")
    bare = {key: value for key, value in model.state_dict().items() if key in state}
    resumed.load_state_dict(bare, strict=False)
    again = torch.optim.AdamW(resumed.prefix_tuning.parameters(), 1e-2)
    for part, given in zip(
        (resumed.prefix_tuning, again), torch.load(tmp_path / "prefix.pt"), strict=True
    ):
        part.load_state_dict(given)
    train(resumed, again)
    assert torch.equal(hidden(resumed(**inputs)), hidden(model(**inputs)))


def test_bfloat16_model_with_a_float32_prefix():
    model = make("llama", torch.bfloat16)
    prefix = prefix_for(model, L, dtype=torch.float32)
    add_prefix(model, prefix)
    loss_of(model, inputs_of("llama")).backward()
    assert all(p.grad.dtype == torch.float32 for p in prefix.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_prefix", [torch.float64, torch.float16, torch.bfloat16])
def test_a_prefix_of_another_dtype_is_read_as_it_is(of_prefix, dtype):
    """As a folder may have it, or a model that was cast afterwards."""
    model = make("llama", dtype)
    prefix = prefix_for(model, L, dtype=of_prefix, std=1.0)
    add_prefix(model, prefix)
    inputs = inputs_of("llama")
    loss_of(model, inputs).backward()
    assert all(p.grad.dtype == of_prefix and p.grad.any() for p in prefix.parameters())
    found = hidden(model(**inputs))
    prefix.float()
    assert torch.equal(hidden(model(**inputs)), found)


def test_a_forward_of_nothing_says_what_is_missing():
    model = make("llama")
    add_prefix(model, prefix_for(model, L))
    with pytest.raises(ValueError, match="input_ids or inputs_embeds must be given"):
        model()
