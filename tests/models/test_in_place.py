"""Adapters whose layers something else replaced: an error, never a model without them."""

import copy
import pickle

import pytest
import torch
from torch import nn

from peft_kernels import AdapterPool, load_adapter, merge, save_adapter, swap_linear, unload
from peft_kernels.integrations.transformers.adapters import insert_adapter, remove_adapters
from peft_kernels.models.in_place import InPlace
from peft_kernels.models.swap import give_up_replaced
from peft_kernels.nn import BottleneckAdapter

transformers = pytest.importorskip("transformers")

IDS = torch.arange(12).reshape(2, 6)
REPLACED = r"lm_head was a \w+ with its adapter, and is now Linear without"


def make_llama(tied: bool = False) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config).eval()


def swap(model):
    swap_linear(model, ["q_proj", "lm_head"], 2, alpha=4)
    return lambda: unload(model, merge=False)


def attach(model):
    return AdapterPool.attach(model, ["q_proj", "lm_head"], capacity=8).detach


ways = pytest.mark.parametrize("put", [swap, attach])


def swap_and_merge(model):
    swap(model)
    merge(model)


def adapt(path):
    return lambda model: insert_adapter(model, path, BottleneckAdapter(WIDTHS[path], 4))


WIDTHS = {"lm_head": 32, "model.embed_tokens": 16}
PUTS = {
    "swap": swap,
    "merged": swap_and_merge,
    "pool": attach,
    "after the head": adapt("lm_head"),
    "after the embedding": adapt("model.embed_tokens"),
}


@pytest.mark.parametrize("put", PUTS.values(), ids=list(PUTS))
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("asked", [(40,), (None, 12)], ids=["number", "multiple"])
def test_resizing_embeddings_with_an_adapter_changes_nothing(put, tied, asked):
    model = make_llama(tied)
    put(model)
    before, sizes = model(IDS).logits, [p.shape for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"in place of (lm_head|model.embed_tokens), without"):
        model.resize_token_embeddings(*asked, mean_resizing=False)
    assert [p.shape for p in model.parameters()] == sizes and model.config.vocab_size == 32
    assert torch.equal(model(IDS).logits, before)
    model.resize_token_embeddings(32)
    model.resize_token_embeddings(None, 8)
    assert torch.equal(model(IDS).logits, before)


@ways
def test_resizing_before_or_after(put):
    model = make_llama()
    model.resize_token_embeddings(40, mean_resizing=False)
    take_out = put(model)
    assert model(IDS).logits.shape[-1] == 40
    take_out()
    model.resize_token_embeddings(48, mean_resizing=False)
    assert model(IDS).logits.shape[-1] == 48
    assert not model._forward_pre_hooks
    assert "resize_token_embeddings" not in vars(model)


def test_resizing_where_no_embedding_has_an_adapter():
    model = make_llama()
    swap_linear(model, ["q_proj"], 2, alpha=4)
    assert "resize_token_embeddings" not in vars(model)
    model.resize_token_embeddings(40, mean_resizing=False)
    assert model(IDS).logits.shape[-1] == 40


def test_resizing_after_the_adapter_was_taken_out():
    model = make_llama()
    adapt("lm_head")(model)
    remove_adapters(model)
    model.resize_token_embeddings(40, mean_resizing=False)
    assert model(IDS).logits.shape[-1] == 40


@ways
def test_the_error_comes_at_every_forward_until_the_adapter_is_given_up(put):
    model = make_llama()
    put(model)
    model.lm_head = nn.Linear(16, 40)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=REPLACED):
            model(IDS)
    give_up_replaced(model)
    assert model(IDS).logits.shape[-1] == 40


def test_saving_from_a_pool(tmp_path):
    model = make_llama()
    pool = AdapterPool.attach(model, ["q_proj", "lm_head"], capacity=8)
    pool.create("a", 2, alpha=4)
    model.lm_head = nn.Linear(16, 40)
    with pytest.raises(RuntimeError, match=REPLACED):
        pool.save("a", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_saving_and_unloading(tmp_path):
    model = make_llama()
    swap(model)
    model.lm_head = nn.Linear(16, 40).requires_grad_(False)
    for call in (lambda: save_adapter(model, tmp_path), lambda: unload(model, merge=False)):
        with pytest.raises(RuntimeError, match=REPLACED):
            call()
    assert not list(tmp_path.iterdir())
    give_up_replaced(model)
    save_adapter(model, tmp_path)
    assert load_adapter(make_llama(), tmp_path)(IDS).logits.shape[-1] == 32


def test_pruning_heads():
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.BertModel(config)
    if not hasattr(model, "prune_heads"):
        pytest.skip("this version of transformers can't prune heads")
    swap_linear(model, ["query"], 2, alpha=4)
    model.prune_heads({0: [1]})
    with pytest.raises(
        RuntimeError, match=r"encoder.layer.0.attention.self.query was a LoRALinear"
    ):
        model(IDS)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copies_look_after_their_own_layers(duplicate):
    model = make_llama()
    swap(model)
    other = duplicate(model)
    model.lm_head = nn.Linear(16, 40)
    other(IDS)
    other.lm_head = nn.Linear(16, 40)
    with pytest.raises(RuntimeError, match=REPLACED):
        other(IDS)


def test_wrappers_and_other_layers_around_a_layer_are_no_replacement():
    model = make_llama()
    swap(model)
    expected = model(IDS).logits
    model.lm_head = torch.compile(model.lm_head, backend="eager")
    model.model.layers[0] = nn.Sequential(model.model.layers[0])[0]
    assert torch.equal(model(IDS).logits, expected)


def test_two_swaps_and_one_of_a_part():
    model = make_llama()
    swap_linear(model.model, ["q_proj"], 2, alpha=4)
    swap_linear(model, ["lm_head"], 2, alpha=4)
    swap_linear(model, ["v_proj"], 2, alpha=4)
    for root in (model, model.model):
        hooks = root._forward_pre_hooks.values()
        assert sum(isinstance(hook, InPlace) for hook in hooks) == 1
    model(IDS)
    unload(model, merge=True)
    assert not model._forward_pre_hooks and not model.model._forward_pre_hooks


def test_an_adapter_that_never_trained_is_told_when_it_is_saved(tmp_path):
    class Reads(nn.Module):
        """Reads its weight by a way that no source tells."""

        def __init__(self) -> None:
            super().__init__()
            self.called, self.read = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.called(x) @ dict(self.named_parameters())["read.weight"]

    model = swap_linear(Reads(), ["called", "read"], 2, alpha=4)
    save_adapter(model, tmp_path)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    with pytest.warns(RuntimeWarning, match=r"lora_b is zero as at first in 1 of 2 layers.* read,"):
        save_adapter(model, tmp_path)
