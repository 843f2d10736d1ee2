"""Prefixes and prompts given to what wraps a model: found inside, or the error says why not."""

import copy

import pytest
import torch
from prefix_models import L, assert_close, hidden, inputs_of, make, tokens, transformers
from prompt_models import make_prompt
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from peft_kernels.calls.carried import carried
from peft_kernels.integrations.transformers import prefix as prefixes
from peft_kernels.integrations.transformers import soft_prompts as prompts
from peft_kernels.nn import PrefixTuning, PromptTuning


class Around(nn.Module):
    """A model of the user's own."""

    def __init__(self, model):
        super().__init__()
        self.backbone = model
        self.head = nn.Linear(32, 2).double()

    def forward(self, **inputs):
        return self.backbone(**inputs)


def compiled(model):
    return torch.compile(model, backend="eager")


FOUND_INSIDE = {
    "compile": compiled,
    "DataParallel": nn.DataParallel,
    "Module": Around,
    "Sequential": nn.Sequential,
    "average": torch.optim.swa_utils.AveragedModel,
    "several": lambda model: nn.DataParallel(compiled(model)),
}


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def sharded(model):
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    return fully_shard(model, mesh=mesh)


BUILT_ON_PARAMETERS = {
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "FullyShardedDataParallel": lambda model: FullyShardedDataParallel(
        model, device_id=torch.device("cpu"), use_orig_params=True
    ),
    "FSDPModule": sharded,
}


def add_prefix(model):
    bare = next(m for m in model.modules() if hasattr(m, "lm_head"))
    prefix = PrefixTuning(L, prefixes.prefix_shapes(bare), std=1.0, tasks=2).double()
    prefixes.add_prefix(model, prefix)
    return prefix


def add_prompt(model):
    bare = next(m for m in model.modules() if hasattr(m, "lm_head"))
    prompt = make_prompt(bare, tasks=2)
    prompts.add_prompt(model, prompt)
    return prompt


KINDS = {
    "prefix": (add_prefix, prefixes.prefix_ids, prefixes.remove_prefix),
    "prompt": (add_prompt, prompts.task_ids, prompts.remove_prompt),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@each_kind
@pytest.mark.parametrize("wrapper", FOUND_INSIDE)
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_the_model_is_found_inside(kind, wrapper):
    add, row_ids, remove = KINDS[kind]
    model, inputs = make("llama", layers=1), inputs_of("llama")
    wrapped = FOUND_INSIDE[wrapper](copy.deepcopy(model))
    call = wrapped if wrapper != "Sequential" else wrapped[0]
    bare = hidden(call(**inputs))
    torch.manual_seed(0)
    added = add(wrapped)
    torch.manual_seed(0)
    add(model)
    assert all(p.requires_grad for p in added.parameters())
    assert len(trained(wrapped)) == len(list(added.parameters()))
    for ids in ([0, 1], [1, -1]):
        with row_ids(model, ids), row_ids(wrapped, ids):
            assert torch.equal(hidden(call(**inputs)), hidden(model(**inputs)))
    assert remove(wrapped) is added
    assert torch.equal(hidden(call(**inputs)), bare)


class ByPosition(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, ids):
        return self.inner(ids)


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def but_compile_alone_is_long(wrappers):
    """Each compiles a model or several, for seconds."""
    long = pytest.mark.long
    return [w if w == "compile" else pytest.param(w, marks=long) for w in wrappers]


BY_POSITION = {
    "compile": lambda model: ByPosition(compiled(model)),
    "several": lambda model: ByPosition(nn.DataParallel(compiled(model))),
    "compile outside too": lambda model: compiled(ByPosition(compiled(model))),
    "compile in place": lambda model: ByPosition(compiled_in_place(model)),
}


@each_kind
@pytest.mark.parametrize("wrapper", but_compile_alone_is_long(BY_POSITION))
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_ids_by_position_in_a_module_around_a_wrapper(kind, wrapper):
    add, row_ids, remove = KINDS[kind]
    model, ids = make("llama", layers=1), tokens(2, 5)
    wrapped = BY_POSITION[wrapper](copy.deepcopy(model))
    bare = hidden(wrapped(ids))
    torch.manual_seed(0)
    added = add(wrapped)
    torch.manual_seed(0)
    add(model)
    for rows in ([0, 1], [1, -1]):
        with row_ids(model, rows), row_ids(wrapped, rows):
            assert torch.equal(hidden(wrapped(ids)), hidden(model(ids)))
    assert remove(wrapped) is added
    assert torch.equal(hidden(wrapped(ids)), bare)


@each_kind
@pytest.mark.parametrize("when", ["before", pytest.param("after", marks=pytest.mark.long)])
def test_a_forward_compiled_in_place_leaves_nothing(kind, when):
    """`module.compile()` has torch call another method of the module than it does without."""
    add, row_ids, remove = KINDS[kind]
    model, inputs = make("llama", layers=1), inputs_of("llama")
    bare = hidden(model(**inputs))
    if when == "before":
        compiled_in_place(model)
    add(model)
    if when == "after":
        compiled_in_place(model)
    with row_ids(model, [0, 1]):
        carries = dict(carried())
        expected = hidden(model(**inputs))
        assert dict(carried()) == carries
    copied = copy.deepcopy(model)
    with row_ids(copied, [0, 1]):
        assert torch.equal(hidden(copied(**inputs)), expected)
    remove(model)
    assert torch.equal(hidden(model(**inputs)), bare)


@each_kind
@pytest.mark.parametrize("wrapper", BUILT_ON_PARAMETERS)
def test_what_knows_its_parameters_is_told_first(kind, wrapper, group):
    add = KINDS[kind][0]
    wrapped = BUILT_ON_PARAMETERS[wrapper](make("llama"))
    before = trained(wrapped)
    with pytest.raises(ValueError, match=f"must get its {kind} before {wrapper} wraps it"):
        add(wrapped)
    assert trained(wrapped) == before


@each_kind
@pytest.mark.parametrize("wrapper", BUILT_ON_PARAMETERS)
def test_wrapped_when_it_is_in(kind, wrapper, group):
    add, row_ids, _ = KINDS[kind]
    model, inputs = make("llama"), inputs_of("llama")
    add(model)
    with row_ids(model, [0, 1]):
        expected = hidden(model(**inputs)).detach()
    wrapped = BUILT_ON_PARAMETERS[wrapper](model)
    with row_ids(wrapped, [0, 1]):
        out = hidden(wrapped(**inputs))
        assert torch.equal(out, expected)
        out.square().sum().backward()
    grads = [p.grad for p in wrapped.parameters() if p.requires_grad]
    assert grads and all(g is not None and g.abs().max() > 0 for g in grads)


@each_kind
def test_a_copy_made_for_a_forward_is_an_error(kind):
    """As nn.DataParallel's replicas on several GPUs are: same hooks, other modules."""
    model, inputs = make("llama"), inputs_of("llama")
    KINDS[kind][0](model)
    replica = model._replicate_for_data_parallel()
    replica.model = model.model._replicate_for_data_parallel()
    replica.model.layers = copy.deepcopy(model.model.layers)
    with pytest.raises(RuntimeError, match=r"copied for this forward, as nn\.DataParallel does"):
        replica(**inputs, **{"prefix_ids" if kind == "prefix" else "task_ids": [0, 1]})
    assert not any(carried().values())


SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def make_clip():
    config = transformers.CLIPConfig(
        text_config=SIZES | {"vocab_size": 32, "max_position_embeddings": 16, "eos_token_id": 2},
        vision_config=SIZES | {"image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    return transformers.CLIPModel(config).eval()


def text_features(model, ids):
    out = model.get_text_features(input_ids=ids)
    return out if isinstance(out, torch.Tensor) else out.pooler_output  # transformers 4 and 5


def test_a_model_of_two_stacks_says_which_to_pass():
    model = make_clip()
    before = trained(model)
    for call in (prefixes.attention_places, lambda m: prefixes.prefix_for(m, L)):
        with pytest.raises(ValueError, match="CLIPModel has more: pass one of its parts, text_mod"):
            call(model)
    assert trained(model) == before
    part, ids = model.text_model, tokens(2, 5)
    bare = text_features(model, ids)
    prefix = prefixes.prefix_for(part, L, std=1.0)
    prefixes.add_prefix(part, prefix)
    assert (text_features(model, ids) - bare).abs().amax(-1).min() > 1e-4
    with prefixes.prefix_ids(model, [-1, -1]):
        assert_close(text_features(model, ids), bare, 1e-5)
    assert prefixes.remove_prefix(model) is prefix
    assert torch.equal(text_features(model, ids), bare)


def make_llava():
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(vocab_size=32, **SIZES),
            vision_config=transformers.CLIPVisionConfig(image_size=8, patch_size=4, **SIZES),
            image_token_index=31,
        )
    ).eval()


HOLD_SEVERAL = {
    "list": lambda: nn.ModuleList([make("llama"), make("llama")]),
    "list of other kinds": lambda: nn.ModuleList([make("gpt2"), compiled(make("llama"))]),
    "lists": lambda: nn.ModuleDict({"a": nn.ModuleList([make("llama"), make("t5")])}),
    "CLIP": make_clip,
    "LLaVA": make_llava,
}


@pytest.mark.parametrize("several", HOLD_SEVERAL)
def test_the_parts_that_are_named_take_a_prefix(several):
    model = HOLD_SEVERAL[several]()
    before = trained(model)
    with pytest.raises(ValueError, match="has more: pass one of its parts, ") as error:
        prefixes.prefix_for(model, L)
    assert trained(model) == before
    named = str(error.value).partition("parts, ")[2].split(" or ")
    assert len(named) == 2
    for path in named:
        part = model.get_submodule(path)
        prefixes.add_prefix(part, prefixes.prefix_for(part, L))
        prefixes.remove_prefix(part)


def test_a_list_of_one_model_has_that_model_s_layers():
    model = make("llama")
    held = prefixes.attention_places(nn.ModuleList([model]))
    assert [place.layer for place in held] == [0, 1]
    assert [p.module for p in held] == [p.module for p in prefixes.attention_places(model)]


class TwoAttentions(nn.Module):
    """A layer of two self-attentions has no place in a prefix for the second."""

    def __init__(self):
        super().__init__()
        model = make("llama")
        pairs = [layer.self_attn for layer in model.model.layers]
        self.layers = nn.ModuleList([nn.ModuleDict({"time": pairs[0], "space": pairs[1]})])


@pytest.mark.parametrize(
    ("make_model", "expected"),
    [
        (
            TwoAttentions,
            r"layers\.0\.time and layers\.0\.space, and none of its parts can take one",
        ),
        (
            lambda: make("llama").model.layers[0],
            "whose LlamaAttention is in no list of layers: pas",
        ),
        (lambda: make("llama").model.layers[0].self_attn, "LlamaAttention is in no list of layer"),
        (lambda: nn.Linear(2, 2), "got Linear, which has no attention: pass a model of transform"),
    ],
)
def test_what_takes_no_prefix_says_so(make_model, expected):
    with pytest.raises(ValueError, match=expected):
        prefixes.prefix_for(make_model(), L)


@each_kind
def test_placeholders_are_named(kind):
    """DeepSpeed's ZeRO-3 takes the values away, and leaves a parameter of shape [0]."""
    model = make("llama")
    weights = [model.model.layers[0].self_attn.q_proj.weight, model.lm_head.weight]
    for weight in weights:
        weight.ds_id, weight.ds_shape, weight.data = 1, weight.shape, torch.empty(0)
    prompt = PromptTuning(L, 16)
    before = trained(model)
    for holder in (model, Around(model), compiled(model)):
        message = r"layers\.0\.self_attn\.q_proj\.weight is a placeholder of DeepSpeed's ZeRO-3: bu"
        with pytest.raises(TypeError, match=message):
            prompts.add_prompt(holder, prompt) if kind == "prompt" else add_prefix(holder)
    assert trained(model) == before


def test_no_prompt_where_there_are_no_text_embeddings():
    for model in (make_clip(), nn.Linear(2, 2)):
        before = trained(model)
        with pytest.raises(ValueError, match="model must be a text model of transformers'; "):
            prompts.add_prompt(model, make_prompt(make("llama")))
        assert trained(model) == before


def make_blip2():
    text = transformers.OPTConfig(
        vocab_size=32, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=32, **SIZES
    )
    config = transformers.Blip2Config(
        vision_config=SIZES | {"image_size": 8, "patch_size": 4},
        qformer_config=SIZES | {"encoder_hidden_size": 16, "vocab_size": 32},
        text_config=text.to_dict(),
        num_query_tokens=2,
        image_token_index=31,
    )
    return transformers.Blip2ForConditionalGeneration(config).eval()


def test_where_tokens_must_be_given_the_text_model_inside_has_the_prompt():
    """BLIP-2's forward can't go without input_ids, and hands embeddings to its language model."""
    model, ids = make_blip2(), torch.cat((torch.full((2, 2), 31), tokens(2, 4).clamp(max=30)), 1)
    prompt, image = PromptTuning(L, 16), torch.randn(2, 3, 8, 8)
    nn.init.normal_(prompt.prompt)
    bare = model(image, ids).logits
    prompts.add_prompt(model, prompt)
    out = model(image, ids).logits
    assert (out - bare).abs().amax((1, 2)).min() > 1e-4
    assert prompts.remove_prompt(model) is prompt
    prompts.add_prompt(model.language_model, prompt)
    assert torch.equal(model(image, ids).logits, out)


def test_an_image_s_features_are_computed_without_the_prompt_in_the_text_s_rows():
    """The vision tower is called by itself too, and has no prompt to be left out."""
    model, image = make_llava(), torch.randn(1, 3, 8, 8)
    want = model.model.vision_tower(image)[0]
    prompts.add_prompt(model, PromptTuning(L, 16), as_prefix=False)
    assert torch.equal(model.model.vision_tower(image)[0], want)
    with pytest.raises(RuntimeError, match="outside of a call of the model that has the prompt"):
        model.model.language_model(tokens(1, 4))


def test_two_models_in_one_say_which_to_pass():
    both = nn.ModuleDict({"one": make("llama"), "other": make("gpt2")})
    with pytest.raises(ValueError, match="ModuleDict holds several: one, other"):
        prompts.add_prompt(both, make_prompt(both["one"]))
    for model in both.values():
        add_prompt(model)
    with pytest.raises(ValueError, match="it has one at each of one, other"):
        prompts.remove_prompt(both)


@each_kind
def test_only_one_at_any_depth(kind):
    model = make("llama")
    KINDS[kind][0](model)
    for wrapped in (model, Around(model), compiled(model)):
        with pytest.raises(ValueError, match=f"model has a {kind} already"):
            add_prefix(wrapped) if kind == "prefix" else add_prompt(wrapped)
        with pytest.raises(ValueError, match=f"model has a {kind}, and can't have a pr"):
            add_prompt(wrapped) if kind == "prefix" else add_prefix(wrapped)


def test_nothing_there_is_an_error():
    model = Around(make("llama"))
    for call in (prefixes.remove_prefix, prompts.remove_prompt):
        with pytest.raises(ValueError, match="model has no pr"):
            call(model)
    with pytest.raises(ValueError, match="no prefix; add_prefix"), prefixes.prefix_ids(model, [0]):
        pass


def test_values_of_a_text_through_a_wrapper():
    model, ids = make("llama"), tokens(1, L)
    expected = prefixes.text_values(model, input_ids=ids)["self"]
    for wrapped in (Around(model), nn.DataParallel(model), compiled(model)):
        found = prefixes.text_values(wrapped, input_ids=ids)["self"]
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
