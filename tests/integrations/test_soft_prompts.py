"""Soft prompts in transformers' models: as a prefix and in the rows they are the same."""

import pytest
import torch
from prefix_models import (
    DECODERS,
    SIZES,
    assert_close,
    each_decoder,
    gradients,
    tokens,
    transformers,
)
from prompt_models import (
    TOLERANCE,
    L,
    S,
    both_ways,
    make,
    make_prompt,
    padded,
    relative,
    runs_of_prompt,
)

from peft_kernels.integrations.transformers.prefix import add_prefix, prefix_for
from peft_kernels.integrations.transformers.soft_prompts import add_prompt, remove_prompt, task_ids
from peft_kernels.nn import PromptTuning

# -- as a prefix and in the rows are the same


@each_decoder
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("side", [None, "right", "left"])
def test_a_prefix_is_exact(name, dtype, side):
    one, other = both_ways(name, dtype)
    runs = runs_of_prompt(one)
    inputs = padded(side or "right")
    real = inputs["attention_mask"] if side else torch.ones_like(inputs["attention_mask"])
    if side is None:
        del inputs["attention_mask"]
    bare = {k: v for k, v in inputs.items() if k != "labels"}
    outs = [model(**bare).logits for model in (one, other)]
    assert runs == [(1, L)]
    assert outs[0].shape == (3, S, 32)
    seen = real.bool()
    assert relative(outs[0][seen], outs[1][seen]) <= TOLERANCE[dtype]

    losses = [model(**inputs).loss for model in (one, other)]
    assert relative(*losses) <= TOLERANCE[dtype]
    for loss in losses:
        loss.backward()
    grads = [gradients(model) for model in (one, other)]
    assert list(grads[0]) == list(grads[1]) == ["soft_prompt.prompt"]
    (a,), (b,) = (grad.values() for grad in grads)
    assert b.norm() > 0
    assert relative(a, b) <= TOLERANCE[dtype]


@each_decoder
def test_rows_of_tasks_run_once_a_task(name):
    one, other = both_ways(name, prompt_options={"tasks": 4})
    runs = runs_of_prompt(one)
    inputs = padded("left", rows=5)
    ids = torch.tensor([2, -1, 0, 2, 2])
    outs = [model(**inputs, task_ids=ids) for model in (one, other)]
    assert runs == [(2, L - 1)]
    for out in outs:
        out.loss.backward()
    assert_close(outs[0].loss, outs[1].loss)
    a, b = (model.soft_prompt.prompt.grad for model in (one, other))
    assert_close(a, b)
    assert [bool(x.any()) for x in b] == [True, False, True, False]


@each_decoder
@pytest.mark.parametrize("as_prefix", ["auto", False])
def test_a_row_without_a_prompt_is_the_models_own(name, as_prefix):
    model = make(name)
    inputs = padded("left")
    del inputs["labels"]
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    own = model(**inputs, position_ids=positions).logits
    labels = inputs["input_ids"]
    loss = model(input_ids=labels, labels=labels).loss
    add_prompt(model, make_prompt(model), as_prefix=as_prefix)
    seen = inputs["attention_mask"].bool()
    with task_ids(model, [-1] * 3):
        assert_close(model(**inputs).logits[seen], own[seen])
        assert_close(model(input_ids=labels, labels=labels).loss, loss)
    assert not torch.allclose(model(**inputs).logits[seen], own[seen])


@each_decoder
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("as_prefix", [True, False])
def test_gradient_checkpointing(name, reentrant, as_prefix):
    model = make(name)
    add_prompt(model, make_prompt(model), as_prefix=as_prefix)
    for module in model.modules():
        for rate in ("dropout", "attention_dropout", "layerdrop"):
            if isinstance(module.__dict__.get(rate), float):
                setattr(module, rate, 0.0)
    inputs = padded("left")
    model.train()(**inputs).loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(**inputs).loss.backward()
    found = gradients(model)
    assert list(found) == list(wanted) == ["soft_prompt.prompt"]
    assert_close(found, wanted)


@each_decoder
def test_text_embeddings_in_place_of_ids(name):
    for model in both_ways(name):
        inputs = padded("left")
        wanted = model(**inputs)
        embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
        found = model(inputs_embeds=embeddings, **inputs)
        assert_close(found.loss, wanted.loss)
        assert_close(found.logits, wanted.logits)


# -- where a prefix is used, and where it isn't


def is_prefix(model):
    return model.__dict__["_prompt_hook_of"].obstacle is None


@pytest.mark.parametrize(
    ("name", "position"),
    [("bert", "front"), ("t5", "front"), ("bart", "front"), ("llama", "after_bos")],
)
def test_no_prefix_where_it_is_not_exact(name, position):
    model = make(name)
    add_prompt(model, make_prompt(model, position=position))
    assert not is_prefix(model)
    prompt = remove_prompt(model)
    with pytest.raises(ValueError, match="as_prefix can't be True"):
        add_prompt(model, prompt, as_prefix=True)
    assert not hasattr(model, "soft_prompt")


def make_of(kind, **options):
    config = getattr(transformers, f"{kind}Config")
    return getattr(transformers, f"{kind}ForCausalLM")(config(**SIZES, **options)).double().eval()


UNFIT = {
    "window": (
        "Mistral",
        {"intermediate_size": 24, "num_key_value_heads": 2, "sliding_window": 4},
    ),
    "window of some": (
        "Qwen2",
        {
            "intermediate_size": 24,
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
        },
    ),
    "rope by length": (
        "Llama",
        {"intermediate_size": 24, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    ),
    "own attention": ("Bloom", {"n_head": 4, "n_layer": 2}),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_no_prefix_in_models_where_it_is_not_exact(kind):
    """And the rows' way is that of the whole text's embeddings."""
    name, options = UNFIT[kind]
    model = make_of(name, **options)
    prompt = make_prompt(model)
    ids = tokens(2, S)
    whole = torch.cat([prompt.prompt.expand(2, -1, -1), model.get_input_embeddings()(ids)], 1)
    wanted = model(inputs_embeds=whole).logits[:, L:]
    add_prompt(model, prompt)
    assert not is_prefix(model)
    assert_close(model(ids).logits, wanted)


def test_active_dropout_runs_each_rows_own_prompt():
    for where in ("attn_pdrop", "embd_pdrop"):
        model = make("gpt2").train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        drop = model.transformer.drop if where == "embd_pdrop" else model.transformer.h[0].attn
        drop = getattr(drop, "attn_dropout", drop)
        drop.p = 0.5
        add_prompt(model, make_prompt(model))
        runs = runs_of_prompt(model)
        model(tokens(2, S))
        assert runs == []
        model.eval()(tokens(2, S))
        assert runs == [(1, L)]
        prompt = remove_prompt(model.train())
        add_prompt(model, prompt, as_prefix=True)
        model(tokens(2, S))
        assert len(runs) == 2


def test_attentions_are_of_the_whole_row():
    model = make("llama")
    model.set_attn_implementation("eager")
    prompt = make_prompt(model)
    add_prompt(model, prompt)
    runs = runs_of_prompt(model)
    out = model(tokens(2, S), output_attentions=True, output_hidden_states=True)
    assert runs == []
    assert out.attentions[0].shape == (2, 4, L + S, L + S)
    assert {h.shape for h in out.hidden_states} == {(2, S, 16)}
    remove_prompt(model)
    add_prompt(model, prompt, as_prefix=True)
    with pytest.raises(ValueError, match="output_attentions"):
        model(tokens(2, S), output_attentions=True)


def test_a_prefix_besides_it():
    model = make("gpt2")
    add_prefix(model, prefix_for(model, 3))
    with pytest.raises(ValueError, match="model has a prefix"):
        add_prompt(model, make_prompt(model))


# -- bad input


def test_task_ids_are_never_ignored():
    for model in both_ways("llama", prompt_options={"tasks": 2}):
        ids = tokens(2, S)
        with pytest.raises(ValueError, match="task_ids must be given"):
            model(ids)
        with pytest.raises(ValueError, match=r"task_ids must be in \[-1, 2\)"):
            model(ids, task_ids=[0, 2])
        with pytest.raises(ValueError, match="one id for each of 2 rows; got 3"):
            model(ids, task_ids=[0, 1, 0])
        with pytest.raises(ValueError, match="integers"):
            model(ids, task_ids=torch.ones(2))
        with pytest.raises(ValueError, match="task_ids must be given"):
            model.generate(ids)
        with task_ids(model, [0, 1]):
            a = model(ids).logits
        assert_close(a, model(ids, task_ids=[0, 1]).logits)
        assert not torch.allclose(a, model(ids, task_ids=[1, 1]).logits)
        with pytest.raises(ValueError, match="task_ids must be given"):
            model(ids)


def test_bad_arguments():
    model = make("gpt2")
    with pytest.raises(ValueError, match="model has no prompt"):
        remove_prompt(model)
    with pytest.raises(ValueError, match="model has no prompt"), task_ids(model, [0]):
        pass
    with pytest.raises(ValueError, match="prompt has 8 features, and the model's embeddings 16"):
        add_prompt(model, PromptTuning(2, 8))
    with pytest.raises(ValueError, match="as_prefix must be"):
        add_prompt(model, make_prompt(model), as_prefix="always")
    assert all(p.requires_grad for p in model.parameters())
    add_prompt(model, make_prompt(model), as_prefix=False)
    with pytest.raises(ValueError, match="has a prompt already"):
        add_prompt(model, make_prompt(model))
    with pytest.raises(ValueError, match="input_ids must be shorter"):
        model(tokens(1, 14))  # 16 positions
    with pytest.raises(ValueError, match="attention_mask must be"):
        model(tokens(1, S), attention_mask=torch.ones(1, S + L, dtype=torch.long))
    cache = transformers.DynamicCache()
    remove = remove_prompt(model)
    model(tokens(1, S), past_key_values=cache)
    add_prompt(model, remove, as_prefix=False)
    with pytest.raises(ValueError, match="past_key_values must be"):
        model(tokens(1, 1), past_key_values=cache)


@pytest.mark.parametrize("name", [*DECODERS, "bert", "t5"])
def test_removing_leaves_nothing(name):
    model = make(name).requires_grad_(False)  # as it stays
    ids = {"input_ids": tokens(2, S)}
    if name == "t5":
        ids["decoder_input_ids"] = tokens(2, 3)
    wanted = model(**ids)[0]
    before = {n: set(m.__dict__) for n, m in model.named_modules()}
    prompt = make_prompt(model)
    add_prompt(model, prompt)
    model.train().eval()
    assert not torch.allclose(model(**ids)[0], wanted)
    assert remove_prompt(model) is prompt
    assert torch.equal(model(**ids)[0], wanted)
    assert {n: set(m.__dict__) for n, m in model.named_modules()} == before
    assert not model._forward_pre_hooks and not model._forward_hooks


def test_layers_outside_of_the_forward_say_so():
    model = make("llama")
    add_prompt(model, make_prompt(model))
    with pytest.raises(RuntimeError, match="outside of its model's forward"):
        model.model(tokens(1, S))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_layers_outside_of_a_call_say_so_with_the_prompt_in_the_rows(name):
    model, ids = make(name), tokens(1, S)
    add_prompt(model, make_prompt(model), as_prefix=False)
    right = model(ids)[0]
    for outside in (model.forward, model.base_model.forward):
        with pytest.raises(RuntimeError, match="outside of a call of the model that has the promp"):
            outside(ids)
    assert torch.equal(model(ids)[0], right)
    prompt = remove_prompt(model)
    base = model.forward(ids)[0]
    assert not torch.equal(base, right)
    add_prompt(model.train(), prompt, as_prefix=False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(ids)[0].square().sum().backward()
    assert prompt.prompt.grad.abs().max() > 0


def test_a_prefix_besides_a_prompt_is_refused():
    model = make("gpt2", torch.float32)
    prefix = prefix_for(model, 2)
    add_prompt(model, make_prompt(model))
    with pytest.raises(ValueError, match="model has a prompt"):
        add_prefix(model, prefix)
    assert "prefix_tuning" not in dict(model.named_children())
