"""Which rows a route serves, in transformers' models: each row its own adapter's, or an error."""

from contextlib import contextmanager

import pytest
import torch
from prefix_models import make_opt, make_t5
from tiny_models import make_bert, make_llama, transformers
from torch import nn

from peft_kernels import AdapterPool

NAMES = ("a", "b")
ATTENTION = ["q_proj", "v_proj"]


def in_pool(make, targets, **options):
    """A model in a pool with two adapters that make a difference."""
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.2)
    pool = AdapterPool.attach(model, targets, capacity=16, **options)
    for name in NAMES:
        pool.create(name, 4, alpha=8)
        for parameter in pool.parameters(name):
            nn.init.normal_(parameter, std=0.4)
            parameter.requires_grad_(False)
    return model, pool


@contextmanager
def refused(pool, ids, match):
    """A route in which a forward is an error."""
    with pytest.raises(ValueError, match=match), pool.route(ids):
        yield


def tokens(rows, length=4):
    return torch.randint(3, 32, (rows, length), generator=torch.Generator().manual_seed(5))


def make_mixtral():
    config = transformers.MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    return transformers.MixtralForCausalLM(config)


def make_chooser():
    config = make_bert().config
    return transformers.BertForMultipleChoice(config)


@torch.no_grad()
def rows_alone(model, pool, names, ids, **options):
    """What each row gets in a batch of its own, in a route of one entry."""
    found = []
    for name, row in zip(names, ids, strict=True):
        with pool.route([name]):
            found.append(model(row[None], **options)[0])
    return torch.cat(found)


@pytest.fixture
def mixtral():
    if not any(name.endswith("w1") for name, _ in make_mixtral().named_modules()):
        pytest.skip("the experts of this transformers aren't linear layers")
    return in_pool(make_mixtral, ["w1", "w2", "w3"])


# ---- by row --------------------------------------------------------------------------------------

MODELS = {
    "llama": (make_llama, ATTENTION),
    "bert and its pooler": (make_bert, ["query", "dense"]),
    "opt's flattened layers": (make_opt, ["fc1", "fc2"]),
    "a mixture's attention and gate": (make_mixtral, [*ATTENTION, "gate"]),
}


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_each_row_has_its_own_or_the_count_is_an_error(name):
    make, targets = MODELS[name]
    model = make()
    targets = [t for t in targets if any(n.endswith(t) and isinstance(m, nn.Linear)
               for n, m in model.named_modules())]  # fmt: skip
    model, pool = in_pool(make, targets)
    names, ids = ["b", None, "a", "b"], tokens(4)
    with pool.route(names):
        found = model(ids)[0]
    torch.testing.assert_close(found, rows_alone(model, pool, names, ids), rtol=1e-4, atol=1e-5)
    for rows in (1, 2, 3, 8):  # 2 rows of 2 tokens are as many rows of a flattened layer
        with (
            pytest.raises(ValueError, match=f"names for 4 rows, and the batch has {rows} rows"),
            pool.route(names),
        ):
            model(tokens(rows, 2))
        with refused(pool, names, "names for 4 rows"):
            model(input_ids=tokens(rows, 2))


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_a_route_by_token_has_each_token_s(name):
    make, targets = MODELS[name]
    model, pool = in_pool(make, [t for t in targets if t != "gate"])
    names, ids = ["b", None, "a", "b"], tokens(4)
    with pool.route([[name] * 4 for name in names]):
        found = model(ids)[0]
    torch.testing.assert_close(found, rows_alone(model, pool, names, ids), rtol=1e-4, atol=1e-5)
    with (
        pytest.raises(ValueError, match="names for 4 x 2 tokens"),
        pool.route([[name] * 2 for name in names]),
    ):
        model(ids)


@torch.no_grad()
def test_packed_rows_are_routed_by_token():
    """Two texts in one row, as continuous batching and padding-free training pack them."""
    model, pool = in_pool(make_llama, ATTENTION)
    ids = tokens(2)
    packed = {
        "input_ids": ids.view(1, 8),
        "position_ids": torch.arange(4).repeat(2)[None],
        "use_cache": False,
    }
    with pool.route([["a"] * 4 + ["b"] * 4]):
        found = model(**packed).logits
    expected = rows_alone(model, pool, NAMES, ids)
    torch.testing.assert_close(found.view(2, 4, -1), expected, rtol=1e-4, atol=1e-5)
    with (
        pytest.raises(ValueError, match="names for 2 rows, and the batch has 1"),
        pool.route(NAMES),
    ):
        model(**packed)


@torch.no_grad()
def test_choices_are_rows():
    model, pool = in_pool(make_chooser, ["query", "dense", "classifier"])
    ids, names = tokens(6).view(2, 3, 4), ["a", "b", None, "b", "a", "a"]
    with pool.route(names):
        found = model(ids).logits.flatten()
    expected = rows_alone(model, pool, names, ids.view(6, 1, 4)).flatten()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with (
        pytest.raises(ValueError, match="names for 2 rows, and the batch has 6"),
        pool.route(NAMES),
    ):
        model(ids)


# ---- experts -------------------------------------------------------------------------------------


@torch.no_grad()
def test_experts_serve_one_adapter_or_raise(mixtral):
    model, pool = mixtral
    for seed in range(12):  # in some of which an expert gets as many tokens as there are rows
        ids = torch.randint(3, 32, (2, 6), generator=torch.Generator().manual_seed(seed))
        for same in (["a", "a"], [["a"] * 6] * 2, ["a"]) if seed < 2 else ():
            with pool.route(same):
                found = model(ids)[0]
            expected = rows_alone(model, pool, ["a", "a"], ids)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        for mixed in (["a", "b"], ["a", None], [["a"] * 6, ["b"] * 6]):
            with (
                pytest.raises(ValueError, match=r"experts\.\d\.w\d is an expert of a mixture"),
                pool.route(mixed),
            ):
                model(ids)
        with refused(pool, ["a"] * 4, "names for 4 rows"):
            model(ids)


def test_torch_s_layers_without_batch_first_serve_one_adapter_or_raise():
    """They are given [tokens, rows, features], here as many of one as of the other."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, 0.0), 1).eval()
    pool = AdapterPool.attach(model, ["linear1"], capacity=16)
    pool.create("a", 4, alpha=8)
    with torch.no_grad():
        for parameter in pool.parameters("a"):
            nn.init.normal_(parameter, std=0.4)
        x = torch.randn(2, 2, 16)
        with pool.route(["a"]):
            routed = model(x)
        assert not torch.allclose(routed, model(x), atol=1e-3)
        with (
            pytest.raises(ValueError, match=r"linear1 is given \[tokens, rows, features\]"),
            pool.route(["a", None]),
        ):
            model(x)


# ---- generate ------------------------------------------------------------------------------------

SAMPLED = {"do_sample": True, "num_return_sequences": 3}
COPIES = [
    {"num_beams": 3, "do_sample": False},
    {"num_beams": 3, "num_return_sequences": 2},
    SAMPLED,
]


def logits_of(model, ids, **options):
    torch.manual_seed(1)
    found = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, pad_token_id=0,
        eos_token_id=None, output_logits=True, return_dict_in_generate=True, **options,
    )  # fmt: skip
    return found.logits[0]


@torch.no_grad()
@pytest.mark.parametrize("options", COPIES, ids=["beams", "beams returned", "sampled"])
@pytest.mark.parametrize("make", [make_llama, make_opt, make_t5], ids=lambda make: make.__name__)
def test_copies_of_a_row_have_its_adapter(make, options):
    targets = {make_t5: ["q", "wi"], make_opt: ["fc1", "v_proj"]}.get(make, ATTENTION)
    model, pool = in_pool(make, targets)
    names, ids = ["b", None, "a"], tokens(3)
    with pool.route(names):
        found = logits_of(model, ids, **options)
        torch.manual_seed(1)
        model.generate(ids, max_new_tokens=3, **options)
    for row, name in enumerate(names):
        with pool.route([name]):
            expected = logits_of(model, ids[[row]], **options)
        copies = len(found) // 3
        ours = found[row * copies : (row + 1) * copies]
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_generate_says_which_rows_it_wants():
    model, pool = in_pool(make_llama, ATTENTION)
    with (
        pytest.raises(ValueError, match="names for 2 rows, and the batch has 4 rows"),
        pool.route(NAMES),
    ):  # as many as two beams
        model.generate(tokens(4), max_new_tokens=2)
    with (
        pytest.raises(ValueError, match="each step of generate has other tokens"),
        pool.route([["a"] * 4]),
    ):
        model.generate(tokens(1), max_new_tokens=2)
    with refused(pool, NAMES, "names for 2 rows"):
        model(tokens(6))  # outside of generate there are no copies


def test_continuous_batching_takes_no_route():
    model, pool = in_pool(make_llama, ATTENTION)
    with refused(pool, ["a"], "a thread that has no route"):
        model.generate_batch([[3, 4, 5]])
    pool.detach()
    assert "generate_batch" not in model.__dict__ and "generate" not in model.__dict__


# ---- checkpointing -------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_flattened_layers_are_computed_again_with_their_rows(reentrant):
    found = []
    for checkpointing in (False, True):
        model, pool = in_pool(make_opt, ["fc1", "fc2"])
        for parameter in pool.parameters("a"):
            parameter.requires_grad_(True)
        if checkpointing:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        ids = tokens(3)
        with pool.route(["a", None, "b"]):
            model(ids, labels=ids).loss.backward()
        found.append([p.grad for p in pool.parameters("a")])
    for plain, again in zip(*found, strict=True):
        assert plain.any()
        torch.testing.assert_close(plain, again, rtol=1e-4, atol=1e-6)


# ---- rows and tokens that change places ----------------------------------------------------------


def make_xlnet():
    config = transformers.XLNetConfig(vocab_size=32, d_model=16, n_layer=2, n_head=4, d_inner=24)
    return transformers.XLNetModel(config)


def make_longformer():
    config = transformers.LongformerConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        attention_window=4,
        max_position_embeddings=64,
    )
    return transformers.LongformerModel(config)


@pytest.mark.parametrize(
    ("make", "targets", "length"),
    [(make_xlnet, ["layer_1", "layer_2"], 2), (make_longformer, ["query", "value"], 4)],
)
def test_rows_that_may_be_tokens_are_refused(make, targets, length):
    model, pool = in_pool(make, targets)
    ids, names = tokens(length, length), NAMES * (length // 2)
    with refused(pool, names, r"whose rows may be its tokens, for the forward of \w+ swaps"):
        model(ids)
    with torch.no_grad(), pool.route(["a"] * length):
        both = model(ids).last_hidden_state
    with torch.no_grad(), pool.route(["a"]):
        assert torch.equal(model(ids).last_hidden_state, both)


class Turned(nn.Module):
    """Has its layer run over the tokens of all rows, the first token of each first."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(16, 16)

    def forward(self, inputs_embeds):
        rows, length, _ = inputs_embeds.shape
        flat = self.up(inputs_embeds.transpose(0, 1).flatten(0, 1))
        return flat.unflatten(0, (length, rows)).transpose(0, 1)


def test_tokens_on_end_that_may_be_in_another_order_are_refused():
    model, pool = in_pool(Turned, ["up"])
    with refused(pool, NAMES, "the forward of Turned swaps two dimensions"):
        model(inputs_embeds=torch.randn(2, 3, 16))
