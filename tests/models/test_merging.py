"""merge, unmerge and unload: what is done to all LoRALinear layers of a model at once."""

import warnings

import pytest
import torch
from lora_models import MODELS, base, logits, make_llama, models, swapped, trained
from torch import nn

import peft_kernels
from peft_kernels import disabled, merge, swap_linear, unload, unmerge
from peft_kernels.nn import LoRALinear

transformers = pytest.importorskip("transformers")


def layers_of(model: nn.Module) -> list[LoRALinear]:
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


def states(model: nn.Module) -> list:
    return [(id(layer), id(layer.weight), layer.merged) for layer in layers_of(model)]


# ---- merge and unmerge -------------------------------------------------------------------------


@models
def test_merge_and_unmerge(kind):
    model = swapped(kind)
    adapted, before = logits(model), states(model)
    assert not torch.allclose(adapted, logits(base(kind)), atol=0.05)
    merge(model)
    assert all(layer.merged for layer in layers_of(model))
    tolerance = 1e-5 if model.dtype is torch.float32 else 5e-2
    torch.testing.assert_close(logits(model), adapted, rtol=tolerance, atol=tolerance)
    merge(model)
    unmerge(model)
    unmerge(model)
    assert states(model) == before and torch.equal(logits(model), adapted)


def test_merging_is_all_or_nothing_and_names_the_layer():
    model = swapped("llama")
    model.model.layers[0].self_attn.q_proj.merge()
    model.lm_head.lora_b.data.fill_(torch.inf)
    before = states(model)
    for call in (merge, lambda m: unload(m, merge=True)):
        with pytest.raises(ValueError, match="lm_head: the merged weight has values"):
            call(model)
        assert states(model) == before
    merge(model, safe=False)


@pytest.mark.parametrize("call", [merge, unmerge, lambda m: unload(m, merge=False)])
def test_a_model_without_layers(call):
    with pytest.raises(ValueError, match=r"LoRALinear layers; it has none \(swap_linear"):
        call(base("llama"))
    model = base("llama")
    peft_kernels.AdapterPool.attach(model, ["q_proj"], capacity=8)
    with pytest.raises(ValueError, match="detach"):
        call(model)


def test_a_model_of_peft_is_told_where_to_go():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"])
    with pytest.raises(ValueError, match="merge_and_unload"):
        merge(peft.get_peft_model(base("llama"), config))


# ---- unload ------------------------------------------------------------------------------------


@models
@pytest.mark.parametrize("merged_before", [False, True])
def test_unloading_gives_the_base_model_back(kind, merged_before):
    model = base(kind)
    modules, expected = list(model.modules()), logits(model)
    trained(swap_linear(model, MODELS[kind][1], 2, alpha=4))
    if merged_before:
        merge(model)
    assert unload(model, merge=False) is model
    assert list(model.modules()) == modules and torch.equal(logits(model), expected)
    assert set(model.state_dict()) == set(base(kind).state_dict())


@models
@pytest.mark.parametrize("merged_before", [False, True])
def test_unloading_merged_then_saved_and_loaded_is_the_merged_model(kind, merged_before, tmp_path):
    model = swapped(kind)
    merge(model)
    expected = logits(model)
    if not merged_before:
        unmerge(model)
    unload(model, merge=True)
    assert not layers_of(model) and torch.equal(logits(model), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path).to(model.dtype).eval()
    assert torch.equal(logits(loaded), expected)
    assert {type(m) for m in loaded.modules()} == {type(m) for m in model.modules()}


def test_layers_that_nobody_holds_are_made_again():
    kinds = {name: type(module) for name, module in base("gpt2").named_modules()}
    model = swapped("gpt2")
    unload(model, merge=False)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert str(model) == str(base("gpt2")) and torch.equal(logits(model), logits(base("gpt2")))


def test_what_a_swap_replaced_is_not_kept_alive():
    """A model that is sharded or moved afterwards must not keep its weights in another place."""
    model = base("llama").requires_grad_(False)
    swap_linear(model, ["q_proj"], 2, alpha=4)
    layer = model.model.layers[0].self_attn.q_proj
    weight = torch.utils.weak.WeakTensorKeyDictionary({layer.weight: 1})
    layer.load_state_dict({n: t.clone() for n, t in layer.state_dict().items()}, assign=True)
    assert not len(weight)


def test_a_lone_layer():
    layer = trained(LoRALinear(6, 4, 2, alpha=4))
    x = torch.randn(3, 6)
    expected = layer(x)
    plain = unload(layer, merge=True)
    assert type(plain) is nn.Linear and str(plain) == str(nn.Linear(6, 4))
    torch.testing.assert_close(plain(x), expected)


def test_fast_paths_of_torchs_encoders_come_back():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    before = [vars(module).copy() for module in (model, *model.layers)]
    swap_linear(model, ["linear1"], 2, alpha=4)
    assert not model.use_nested_tensor
    unload(model, merge=False)
    assert [vars(module) for module in (model, *model.layers)] == before


@pytest.mark.parametrize("merged_before", [False, True])
def test_a_tied_weight_is_not_merged_for_good(merged_before, tmp_path):
    model = make_llama(tied=True).eval()
    trained(swap_linear(model, ["q_proj", "lm_head"], 2, alpha=4))
    if merged_before:
        merge(model)
    before = states(model)
    with pytest.raises(ValueError, match=r"lm_head.weight is tied to that of model.embed_tokens"):
        unload(model, merge=True)
    assert states(model) == before
    # As the message says:
    unmerge(model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone(), False)
    model.config.tie_word_embeddings = False
    expected = logits(model)
    unload(model, merge=True).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded), expected)


def test_a_tied_weight_may_be_unloaded_unmerged():
    model = make_llama(tied=True).eval()
    expected = logits(model)
    trained(swap_linear(model, ["lm_head"], 2, alpha=4))
    merge(model)
    unload(model, merge=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), expected)


# ---- the state dict of a merged model ----------------------------------------------------------


def test_a_state_dict_of_base_weights_says_so(tmp_path):
    model = swapped("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.state_dict()
    merge(model)
    for take in (model.state_dict, lambda: model.save_pretrained(tmp_path)):
        with pytest.warns(UserWarning, match=r"base weights.*unload\(model, merge=True\)") as told:
            take()
        assert len([one for one in told if "base weights" in str(one.message)]) == 1
    unmerge(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.state_dict()


# ---- another weight ----------------------------------------------------------------------------


def test_tying_again_leaves_a_merged_head_merged():
    model = make_llama(tied=True).eval()
    trained(swap_linear(model, ["lm_head"], 2, alpha=4))
    merge(model)
    expected = logits(model)
    model.tie_weights()
    assert model.lm_head.merged and torch.equal(logits(model), expected)
    unmerge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_another_weight_for_a_merged_layer_is_refused():
    model = make_llama(tied=True).eval()
    trained(swap_linear(model, ["lm_head"], 2, alpha=4))
    merge(model)
    expected = logits(model)
    with pytest.raises(RuntimeError, match="merged; unmerge"):
        model.lm_head.weight = nn.Parameter(torch.zeros(32, 16))
    assert torch.equal(logits(model), expected)
    unmerge(model)
    model.lm_head.weight = nn.Parameter(torch.zeros(32, 16))


@pytest.mark.parametrize("pool", [False, True])
def test_a_weight_of_another_size_is_refused(pool):
    model = make_llama(tied=True).eval()
    if pool:
        peft_kernels.AdapterPool.attach(model, ["lm_head"], capacity=8)
    else:
        swap_linear(model, ["lm_head"], 2, alpha=4)
    with pytest.raises(ValueError, match=r"weight must stay \[32, 16\].*got \[40, 16\]"):
        model.lm_head.weight = nn.Parameter(torch.zeros(40, 16))


# ---- wrapped models ----------------------------------------------------------------------------


def test_a_compiled_model():
    model = swapped("llama")
    adapted, expected = logits(model), logits(base("llama"))
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(logits(compiled), adapted)
        with disabled(compiled):
            torch.testing.assert_close(logits(compiled), expected)
    merge(compiled)
    torch.testing.assert_close(logits(compiled), adapted)
    unmerge(compiled)
    torch.testing.assert_close(logits(compiled), adapted)
    assert unload(compiled, merge=False) is compiled
    torch.testing.assert_close(logits(compiled), expected)


def test_a_model_in_ddp(tmp_path):
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(swapped("llama"))
        adapted = logits(model)
        with disabled(model):
            assert torch.equal(logits(model), logits(base("llama")))
        merge(model)
        merged = logits(model)
        torch.testing.assert_close(merged, adapted)
        unload(model, merge=True)
        assert torch.equal(logits(model.module), merged)
    finally:
        torch.distributed.destroy_process_group()


# ---- counting ----------------------------------------------------------------------------------


def test_print_trainable_parameters_prints_what_peft_prints(capsys):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    peft.get_peft_model(make_llama(), config).print_trainable_parameters()
    theirs = capsys.readouterr().out
    model = swap_linear(make_llama(), ["q_proj", "down_proj"], 2, alpha=4)
    for change in (lambda m: None, merge):
        change(model)
        peft_kernels.print_trainable_parameters(model)
        assert capsys.readouterr().out == theirs
