"""A prefix or a prompt stays in force, or the forward raises, whatever is done to the model."""

import copy
import pickle

import pytest
import torch
from prefix_models import L, assert_close, each_decoder, hidden, inputs_of, make, transformers
from prompt_models import make_prompt

from peft_kernels.integrations.transformers.prefix import add_prefix, prefix_for, remove_prefix
from peft_kernels.integrations.transformers.soft_prompts import add_prompt, remove_prompt


def as_prefix(model):
    add_prefix(model, prefix_for(model, L, std=1.0))


def as_prompt(model):
    add_prompt(model, make_prompt(model))


ADDED = {"prefix": (as_prefix, remove_prefix), "prompt": (as_prompt, remove_prompt)}
each_kind = pytest.mark.parametrize("kind", ADDED)


def on_config(model, name):
    model.config._attn_implementation = name


def on_inner_config(model, name):
    model.base_model.config._attn_implementation_internal = name


SWITCHES = {
    "set_attn_implementation": lambda model, name: model.set_attn_implementation(name),
    "of the inner model": lambda model, name: model.base_model.set_attn_implementation(name),
    "by part": lambda model, name: model.set_attn_implementation({"": name}),
    "config": on_config,
    "inner config": on_inner_config,
}


@each_kind
@each_decoder
@pytest.mark.parametrize("how", SWITCHES)
@pytest.mark.parametrize("to", ["sdpa", "eager"])
def test_a_later_switch_of_attention(name, kind, how, to):
    model, inputs = make(name), inputs_of(name)
    add, remove = ADDED[kind]
    bare = hidden(model(**inputs))
    add(model)
    expected = hidden(model(**inputs))
    assert (expected - bare).abs().max() > 1e-3
    SWITCHES[how](model, to)
    assert torch.equal(hidden(model(**inputs)), expected)
    remove(model)
    assert model.config._attn_implementation == to
    assert_close(hidden(model(**inputs)), bare, 1e-6)


@each_kind
def test_models_of_one_config_leave_each_other_alone(kind):
    one, inputs = make("llama"), inputs_of("llama")
    other = transformers.LlamaForCausalLM(one.config).double().eval()
    add, remove = ADDED[kind]
    bare = hidden(other(**inputs))
    add(one)
    assert other.config._attn_implementation == "sdpa"
    assert torch.equal(hidden(other(**inputs)), bare)
    add(other)
    expected = hidden(other(**inputs))
    remove(one)
    assert torch.equal(hidden(other(**inputs)), expected)
    remove(other)
    assert torch.equal(hidden(other(**inputs)), bare)


def test_a_config_says_the_same_to_both_sides():
    model = make("llama")
    config = model.config
    as_prefix(model)
    config.use_cache = False
    assert model.model.config.use_cache is False
    model.model.config.pad_token_id = 7
    assert config.pad_token_id == 7
    assert model.config.to_dict() == config.to_dict()
    assert isinstance(copy.copy(model.config), type(config))
    built = transformers.AutoModelForCausalLM.from_config(model.config)
    assert type(built) is type(model)
    remove_prefix(model)
    assert model.config is config and model.model.config is config
    assert config._attn_implementation == "sdpa"


@each_kind
@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_its_own(kind, way):
    model, inputs = make("llama"), inputs_of("llama")
    bare = hidden(model(**inputs))
    ADDED[kind][0](model)
    expected = hidden(model(**inputs))
    twin = way(model)
    ADDED[kind][1](model)
    twin.set_attn_implementation("eager")
    assert torch.equal(hidden(twin(**inputs)), expected)
    ADDED[kind][1](twin)
    assert_close(hidden(twin(**inputs)), bare, 1e-6)
    assert model.config._attn_implementation == "sdpa"


def own_forward(module):
    module.forward = lambda hidden_states, *args, **kwargs: (hidden_states, None)


def another_class(module):
    module.__class__ = type(module).__bases__[0] if "Prefix" in type(module).__name__ else Other


class Other(torch.nn.Module):
    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states, None


def another_config(module):
    module.config = copy.deepcopy(module.config)
    module.config = type(module.config).__bases__[1](attn_implementation="eager")


CHANGES = {"forward": own_forward, "class": another_class, "config": another_config}


@each_kind
@pytest.mark.parametrize("change", CHANGES)
def test_attention_that_does_not_ask_is_an_error(kind, change):
    model, inputs = make("llama"), inputs_of("llama")
    ADDED[kind][0](model)
    model(**inputs)
    CHANGES[change](model.model.layers[1].self_attn)
    with pytest.raises(RuntimeError, match=r"layers\.1\.self_attn ran without the prefix"):
        model(**inputs)
    ADDED[kind][1](model)
    model(**inputs)


def test_replaced_layers_are_an_error():
    model, inputs = make("llama"), inputs_of("llama")
    as_prefix(model)
    model.model.layers[0] = copy.deepcopy(model.model.layers[0])
    with pytest.raises(RuntimeError, match=r"attention at layers\.0\.self_attn isn't the module"):
        model(**inputs)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_a_new_input_embedding_is_read(name):
    model, inputs = make(name), inputs_of(name)
    expected = copy.deepcopy(model)
    new = torch.nn.Embedding(32, 16).double()
    for m in (model, expected):
        m.set_input_embeddings(new)
    prompt = make_prompt(model)
    add_prompt(expected, copy.deepcopy(prompt), as_prefix=False)
    model.set_input_embeddings(torch.nn.Embedding(32, 16).double())
    add_prompt(model, prompt, as_prefix=False)
    model.set_input_embeddings(new)
    assert torch.equal(hidden(model(**inputs)), hidden(expected(**inputs)))
    model.set_input_embeddings(torch.nn.Embedding(32, 8).double())
    with pytest.raises(ValueError, match="prompt has 16 features, and the model's embeddings 8"):
        model(**inputs)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("option", ["scale_attn_by_inverse_layer_idx", "scale_attn_weights"])
def test_gpt2s_scales_are_those_of_the_implementation_in_force(attention, option):
    """transformers 4's eager attention has them and its sdpa doesn't; in 5 both do."""
    config = make("gpt2").config
    setattr(config, option, not getattr(config, option))
    model, inputs = transformers.GPT2LMHeadModel(config).double().eval(), inputs_of("gpt2")
    model.set_attn_implementation(attention)
    bare = hidden(model(**inputs))
    add_prefix(model, prefix_for(model, L, tasks=2, std=1.0))
    assert_close(hidden(model(**inputs, prefix_ids=[-1, -1])), bare, 1e-6)
