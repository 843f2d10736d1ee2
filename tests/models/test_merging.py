"""merge, unmerge, unload and disabled: what is done to all LoRALinear layers of a model at once."""

import asyncio
import contextvars
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import peft_kernels
from peft_kernels import disabled, merge, swap_linear, unload, unmerge
from peft_kernels.integrations.transformers.adapters import adapters_of, insert_adapters
from peft_kernels.integrations.transformers.prefix import add_prefix, prefix_for
from peft_kernels.nn import LoRALinear

transformers = pytest.importorskip("transformers")

IDS = torch.arange(12).reshape(2, 6)


def make_llama(dtype=torch.float32, tied=False) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


def make_gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


MODELS = {
    "llama": (make_llama, ["q_proj", "down_proj", "lm_head"]),
    "llama-bf16": (lambda: make_llama(torch.bfloat16), ["q_proj", "down_proj"]),
    "gpt2": (make_gpt2, ["c_attn", "mlp.c_proj"]),
}
models = pytest.mark.parametrize("kind", MODELS)


def base(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[kind][0]().eval()


def swapped(kind: str) -> nn.Module:
    return trained(swap_linear(base(kind), MODELS[kind][1], 2, alpha=4))


def trained(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_b" in name:
            nn.init.normal_(parameter, std=2.0)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


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


# ---- disabled ----------------------------------------------------------------------------------


@models
@pytest.mark.parametrize("merged", [False, True])
def test_disabled_is_the_base_model(kind, merged):
    model, expected = swapped(kind), logits(base(kind))
    if merged:
        merge(model)
    adapted = logits(model)
    with disabled(model):
        assert torch.equal(logits(model), expected)
        with disabled(model):
            assert torch.equal(logits(model), expected)
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), adapted)
    with pytest.raises(KeyError), disabled(model):
        raise KeyError
    assert torch.equal(logits(model), adapted)


def gradients(model: nn.Module) -> list[torch.Tensor | None]:
    found = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    return found


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_forward_is_computed_again_with_what_was_off(reentrant):
    model = swapped("llama").double().train()
    model.get_input_embeddings().weight.requires_grad_()
    loss = model(IDS).logits.sum()
    loss.backward()
    adapted = gradients(model)
    with disabled(model):
        model(IDS).logits.sum().backward()
        off = gradients(model)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(IDS).logits.sum().backward()
        torch.testing.assert_close(gradients(model), off)
        loss = model(IDS).logits.sum()
    with pytest.raises(RuntimeError, match=r"call backward\(\) inside the with-block"):
        loss.backward()
    model.zero_grad()
    loss = model(IDS).logits.sum()
    with disabled(model):
        loss.backward()
    torch.testing.assert_close(gradients(model), adapted)
    unload(model, merge=False)
    assert not any(
        hasattr(module.__dict__.get("_gradient_checkpointing_func"), "checkpoint")
        for module in model.modules()
    )


def test_disabled_turns_off_one_model():
    model, other = swapped("llama"), swapped("llama")
    adapted = logits(other)
    with disabled(model), disabled(base_of_gpt2 := swapped("gpt2")):
        assert torch.equal(logits(other), adapted)
        assert torch.equal(logits(model), logits(base("llama")))
        assert torch.equal(logits(base_of_gpt2), logits(base("gpt2")))


def test_disabled_is_of_its_thread():
    model, expected = swapped("llama"), {}
    adapted, plain = logits(model), logits(base("llama"))
    inside, done = threading.Barrier(2), threading.Barrier(2)

    def other():
        inside.wait()
        expected["other"] = logits(model)
        done.wait()

    thread = threading.Thread(target=other)
    thread.start()
    with disabled(model):
        inside.wait()
        expected["here"] = logits(model)
        done.wait()
    thread.join()
    assert torch.equal(expected["here"], plain) and torch.equal(expected["other"], adapted)


def test_disabled_is_of_its_task():
    model = swapped("llama")
    adapted, plain = logits(model), logits(base("llama"))

    async def one(off: bool, first: float, second: float) -> torch.Tensor:
        await asyncio.sleep(first)
        if not off:
            return logits(model)
        with disabled(model):
            await asyncio.sleep(second)
            return logits(model)

    async def all_of_them():
        return await asyncio.gather(one(True, 0, 0.03), one(False, 0.01, 0), one(True, 0.02, 0.03))

    for result, expected in zip(asyncio.run(all_of_them()), (plain, adapted, plain), strict=True):
        assert torch.equal(result, expected)


def test_disabled_pool():
    model = base("llama")
    expected = logits(model)
    pool = peft_kernels.AdapterPool.attach(model, ["q_proj"], capacity=8)
    pool.create("a", 2, alpha=4)
    for name, parameter in pool.named_parameters("a"):
        if name.endswith("lora_B"):
            nn.init.normal_(parameter)
    with pool.route(["a", "a"]):
        adapted = logits(model)
        with disabled(model):
            torch.testing.assert_close(logits(model), expected)
        assert torch.equal(logits(model), adapted) and not torch.allclose(adapted, expected)


def test_disabled_without_anything_to_disable():
    with pytest.raises(ValueError, match="adapters that can be disabled; it has none"):  # noqa: SIM117  the raise is on entering
        with disabled(base("llama")):
            pass


def test_disabled_beside_a_prefix_is_refused():
    model = swapped("llama")
    add_prefix(model, prefix_for(model, 3))
    with pytest.raises(ValueError, match="prefix or prompt"), disabled(model):
        pass


def test_what_inherits_a_block_that_has_ended_is_refused():
    model = swapped("llama")
    with disabled(model):
        context = contextvars.copy_context()
        assert torch.equal(context.run(logits, model), logits(base("llama")))
    with pytest.raises(RuntimeError, match="has ended"):
        context.run(logits, model)


def test_disabled_data_parallel_is_refused():
    with (
        pytest.raises(ValueError, match="DataParallel"),
        disabled(nn.DataParallel(swapped("gpt2"))),
    ):
        pass


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


@pytest.mark.parametrize("preset", ["pfeiffer", "houlsby", "parallel"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_disabled_bottleneck_adapters(kind, preset):
    if kind == "llama":
        model = base("llama").model
    else:
        config = transformers.BertConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2
        )
        model = transformers.BertModel(config).eval()
    with torch.no_grad():
        expected = model(IDS).last_hidden_state
        insert_adapters(model, preset)
        for adapter in adapters_of(model).values():
            nn.init.normal_(adapter.up.weight)
        adapted = model(IDS).last_hidden_state
        with disabled(model):
            assert torch.equal(model(IDS).last_hidden_state, expected)
        assert torch.equal(model(IDS).last_hidden_state, adapted)
    assert not torch.allclose(adapted, expected, atol=1e-3)


# ---- tensors that are computed from others -------------------------------------------------------

COMPUTED = {
    "pruned": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), r"prune\.remove"),
    "pruned bias": (lambda layer: prune.l1_unstructured(layer, "bias", 0.5), r"prune\.remove"),
    "pruned adapter": (lambda layer: prune.l1_unstructured(layer, "lora_b", 0.5), r"prune\.remove"),
    "weight_norm of hooks": (nn.utils.weight_norm, "remove_weight_norm"),
    "spectral_norm of hooks": (nn.utils.spectral_norm, "remove_spectral_norm"),
    "weight_norm": (parametrizations.weight_norm, "remove_parametrizations"),
    "identity": (
        lambda layer: parametrize.register_parametrization(layer, "weight", nn.Identity()),
        "remove_parametrizations",
    ),
}
CALLS = {
    "merge": merge,
    "unload": lambda model: unload(model, merge=False),
    "unload merged": lambda model: unload(model, merge=True),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_weights_are_refused_before_anything_is_changed(kind, call):
    torch.manual_seed(0)
    compute, named = COMPUTED[kind]
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    trained(swap_linear(model, ["0", "1"], 2, alpha=4))
    compute(model[1])
    x = torch.randn(3, 4)
    if kind == "pruned bias" and call == "merge":
        y = model(x)
        merge(model)
        torch.testing.assert_close(model(x), y)
        return
    before, y = [dict(vars(layer)) for layer in model], model.eval()(x)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises((TypeError, RuntimeError), match=f"^1.*{named}"):
        CALLS[call](model)
    assert [layer.merged for layer in model] == [False, False]
    assert [set(vars(layer)) for layer in model] == [set(names) for names in before]
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(x), y)


def test_computed_weights_of_merged_layers_are_refused_before_anything_is_changed():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    merge(trained(swap_linear(model, ["0", "1"], 2, alpha=4)))
    parametrize.register_parametrization(model[1], "weight", nn.Identity())
    x = torch.randn(3, 4)
    y = model(x)
    layer = model[1]
    for call in (
        lambda: unmerge(model),
        lambda: unload(model, merge=True),
        lambda: unload(model, merge=False),
        layer.unmerge,
    ):
        with pytest.raises((TypeError, RuntimeError), match="remove_parametrizations"):
            call()
        assert [layer.merged for layer in model] == [True, True]
        assert torch.equal(model(x), y)


@pytest.mark.parametrize("kind", ["pruned", "identity"])
def test_computed_weights_in_a_pool_are_refused_before_anything_is_changed(kind):
    compute, named = COMPUTED[kind]
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    pool = peft_kernels.AdapterPool.attach(model, ["0", "1"], capacity=8)
    compute(model[1])
    with pytest.raises(TypeError, match=f"^1 .*{named}"):
        pool.detach()
    pool.create("a", 2, alpha=4)
    assert all("Multi" in type(layer).__name__ for layer in model)


class Doubled(LoRALinear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_layer_of_a_class_with_a_forward_of_its_own_is_not_taken_out():
    model = nn.Sequential(nn.Linear(4, 4), Doubled.from_linear(nn.Linear(4, 4), 2, alpha=4))
    y = model(torch.eye(4))
    for with_updates in (True, False):
        with pytest.raises(TypeError, match=r"^1 must leave the methods .*Doubled has a forward"):
            unload(model, merge=with_updates)
    assert torch.equal(model(torch.eye(4)), y)
