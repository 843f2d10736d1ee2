"""nn.PrefixTuning: shapes, parameter counts, reparametrisation, initial values, saving."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from peft_kernels.nn import PrefixTuning, prefix_multihead_attention
from peft_kernels.ops.prefix_attention import prefix_attention

LAYERS = [(2, 4), None, (1, 8)]  # grouped, skipped, multi-query


def mlp_prefix(layers=LAYERS, length=3, **options):
    return PrefixTuning(length, layers, **({"reparametrization": "mlp", "mid": 5} | options))


def values_of(prefix, seed=1):
    """Keys and values of the prefix' shapes."""
    drawn = torch.Generator().manual_seed(seed)
    return {
        site: [
            None if p is None else tuple(torch.randn(x.shape, generator=drawn) for x in p)
            for p in ps
        ]
        for site, ps in prefix().items()
    }


def assert_same(made, expected, tolerance=0.0):
    assert made.keys() == expected.keys()
    for site in made:
        for a, b in zip(made[site], expected[site], strict=True):
            assert (a is None) == (b is None)
            for x, y in zip(a or (), b or (), strict=True):
                torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


# ---- shapes and counts ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flat", "mlp"])
@pytest.mark.parametrize("tasks", [1, 3])
def test_layers_may_differ_and_be_skipped(kind, tasks):
    made = PrefixTuning(6, LAYERS, tasks=tasks, reparametrization=kind, mid=4)()["self"]
    bank = (tasks,) if tasks > 1 else ()
    assert made[1] is None
    assert [x.shape for x in made[0]] == [(*bank, 2, 6, 4)] * 2
    assert [x.shape for x in made[2]] == [(*bank, 1, 6, 8)] * 2


def count(prefix):
    return sum(p.numel() for p in prefix.parameters())


def test_counts_are_the_papers():
    """GPT-2 medium, L = 5: 0.25M (Li & Liang 2021, table 1: 0.1%); and the MLP, mid 512."""
    gpt2 = [(16, 64)] * 24
    assert count(PrefixTuning(5, gpt2, device="meta")) == 5 * 24 * 2 * 1024 == 245_760
    mlp = PrefixTuning(5, gpt2, reparametrization="mlp", mid=512, device="meta")
    outputs = 24 * 2 * 1024
    assert count(mlp) == 5 * 1024 + 1024 * 512 + 512 + 512 * outputs + outputs


def test_counts_of_bart_with_three_sites():
    """BART large: the paper's self, encoder and cross prefixes, 12 layers of 16 heads each."""
    layers = {site: [(16, 64)] * 12 for site in ("self", "encoder", "cross")}
    assert count(PrefixTuning(200, layers, device="meta")) == 3 * 200 * 12 * 2 * 1024


def test_depth_of_the_mlp():
    linear = mlp_prefix(depth=1, dim=6)
    assert count(linear) == 3 * 6 + 7 * (16 + 16)
    deep = mlp_prefix(depth=4, dim=6)
    assert count(deep) == 3 * 6 + 7 * 5 + 2 * 6 * 5 + 6 * (16 + 16)


def test_mlp_is_tanh_between_linear_layers():
    prefix = mlp_prefix(depth=3)
    site = prefix.sites["self"]
    h = site.embedding[0]
    for linear in site.inner:
        h = torch.tanh(F.linear(h, linear.weight, linear.bias))
    y = F.linear(h, site.outer["2"].weight, site.outer["2"].bias)  # [L, 2 * 1 * 8]
    k, v = prefix()["self"][2]
    torch.testing.assert_close(k[0], y[:, :8])
    torch.testing.assert_close(v[0], y[:, 8:])


def test_sites_are_independent():
    prefix = mlp_prefix({"self": LAYERS, "encoder": [(2, 4)], "cross": [None, (2, 4)]})
    prefix()["encoder"][0][0].sum().backward()
    with_gradient = {n.split(".")[1] for n, p in prefix.named_parameters() if p.grad is not None}
    assert with_gradient == {"encoder"}
    assert list(prefix(["cross", "encoder"])) == ["encoder", "cross"]


@pytest.mark.parametrize("kind", ["flat", "mlp"])
def test_every_parameter_trains(kind):
    prefix = PrefixTuning(3, LAYERS, tasks=2, reparametrization=kind, mid=5)
    sum((k * v).sum() for k, v in filter(None, prefix()["self"])).backward()
    for name, parameter in prefix.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_one_layer_by_itself():
    prefix = mlp_prefix(tasks=2)
    for index, pair in enumerate(prefix()["self"]):
        alone = prefix.layer("self", index)
        assert_same({"self": [alone]}, {"self": [pair]})


# ---- initial values ------------------------------------------------------------------------------


def test_normal_and_zero():
    flat = PrefixTuning(50, [(4, 16)] * 4)()["self"][0][0]
    assert 0.018 < flat.std() < 0.022
    wide = PrefixTuning(50, [(4, 16)] * 4, std=1.0)()["self"][0][0]
    assert 0.9 < wide.std() < 1.1
    for kind in ("flat", "mlp"):
        made = PrefixTuning(3, LAYERS, reparametrization=kind, mid=4, init="zero")()["self"]
        assert all(x.abs().max() == 0 for pair in filter(None, made) for x in pair)


@pytest.mark.parametrize("kind,tolerance", [("flat", 0.0), ("mlp", 2e-6)])
def test_starts_from_given_values(kind, tolerance):
    options = {"reparametrization": kind, "mid": 8}
    values = values_of(PrefixTuning(3, LAYERS, tasks=2, **options))
    prefix = PrefixTuning(3, LAYERS, tasks=2, init=values, **options)
    assert_same(prefix(), values, tolerance)
    assert prefix.fit(values["self"]) <= 2e-6


def test_a_fit_that_cannot_be_exact_says_so():
    prefix = mlp_prefix(length=9, mid=4)
    error = prefix.fit(values_of(prefix))
    assert 0.1 < error < 1.0


def test_values_that_do_not_fit():
    prefix = mlp_prefix()
    before = copy.deepcopy(prefix.state_dict())
    values = values_of(prefix)["self"]
    with pytest.raises(ValueError, match="values of self must have 3 layers, as the prefix; got 2"):
        prefix.fit(values[:2])
    with pytest.raises(ValueError, match=r"layer 2, must be \[1, 1, 3, 8\]; got \[2, 3, 4\]"):
        prefix.fit([values[0], None, values[0]])
    with pytest.raises(ValueError, match="values of self must have keys and values for layer 2"):
        prefix.fit([values[0], None, None])
    with pytest.raises(ValueError, match="values must be of self; got cross"):
        prefix.fit({"cross": values})
    for name, tensor in prefix.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_table_is_layer_then_key_and_value_then_head():
    prefix = mlp_prefix(tasks=2)
    table = prefix.table()
    assert table.shape == (2, 3, 32)
    k, v = prefix()["self"][0]
    assert torch.equal(table[1, 2, :8], k[1, :, 2].flatten())
    assert torch.equal(table[1, 2, 8:16], v[1, :, 2].flatten())
    assert_same({"self": prefix.from_table(table)}, prefix())
    with pytest.raises(ValueError, match=r"table must be \[2, 3, 32\]; got \[2, 3, 31\]"):
        prefix.from_table(table[..., 1:])


# ---- training, saving, ejecting ------------------------------------------------------------------


def test_dropout_in_training_only():
    prefix = PrefixTuning(50, [(2, 16)], dropout=0.5, std=1.0)
    k, v = prefix()["self"][0]
    for x in (k, v):
        assert 0.4 < (x == 0).float().mean() < 0.6
    kept = k != 0
    whole = prefix.eval()()["self"][0][0]
    torch.testing.assert_close(k[kept], 2 * whole[kept])
    assert not (whole == 0).any()


@pytest.mark.parametrize("tasks", [1, 2])
def test_eject_keeps_the_prefix(tasks):
    prefix = mlp_prefix({"self": LAYERS, "cross": [(2, 4)]}, tasks=tasks)
    made = prefix()
    assert prefix.eject() is prefix
    assert_same(prefix(), made)
    assert count(prefix) == tasks * 3 * (32 + 16)
    assert all(p.requires_grad for p in prefix.parameters())
    assert PrefixTuning(**prefix.config()).load_state_dict(prefix.state_dict())


def step(prefix, optimizer, seed):
    inputs = torch.Generator().manual_seed(seed)
    loss = sum(
        ((k - torch.randn(k.shape, generator=inputs)) * v).square().sum()
        for k, v in filter(None, prefix()["self"])
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("kind", ["flat", "mlp"])
def test_resumed_training_is_as_if_it_never_stopped(kind, tmp_path):
    options = {"tasks": 2, "reparametrization": kind, "mid": 4}
    prefix = PrefixTuning(3, LAYERS, **options)
    optimizer = torch.optim.Adam(prefix.parameters())
    for seed in range(3):
        step(prefix, optimizer, seed)
    torch.save([prefix.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    config = json.dumps(prefix.config())
    for seed in range(3, 6):
        step(prefix, optimizer, seed)

    resumed = PrefixTuning(**json.loads(config))
    again = torch.optim.Adam(resumed.parameters())
    for part, state in zip((resumed, again), torch.load(tmp_path / "state.pt"), strict=True):
        part.load_state_dict(state)
    for seed in range(3, 6):
        step(resumed, again, seed)
    assert_same(resumed(), prefix())


def test_mlp_runs_again_only_after_a_change():
    prefix, runs = mlp_prefix(), []
    prefix.sites["self"].outer["0"].register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        first = prefix()
        assert prefix()["self"][0][0] is first["self"][0][0] and len(runs) == 1
        prefix.sites["self"].embedding.mul_(2)
        assert not torch.equal(prefix()["self"][0][0], first["self"][0][0]) and len(runs) == 2
    with torch.inference_mode():
        prefix()
    prefix()["self"][0][0].sum().backward()  # what inference mode made isn't used here
    assert prefix.sites["self"].embedding.grad is not None


# ---- with torch's own modules --------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention(batch_first):
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first).double()
    prefix = PrefixTuning(3, [(2, 4)], dtype=torch.float64, std=1.0)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    given = x if batch_first else x.transpose(0, 1)
    pair = prefix()["self"][0]
    out = prefix_multihead_attention(
        attention, given, given, given, *pair, key_padding_mask=padding
    )
    q, k, v = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
    heads = [y.unflatten(-1, (2, 4)).transpose(1, 2) for y in (q, k, v)]
    k, v = (
        torch.cat([p.expand(2, -1, -1, -1), y], 2) for p, y in zip(pair, heads[1:], strict=True)
    )
    seen = torch.cat([torch.ones(2, 3, dtype=torch.bool), ~padding], 1)[:, None, None]
    expected = F.scaled_dot_product_attention(heads[0], k, v, seen).transpose(1, 2).flatten(2)
    expected = attention.out_proj(expected)
    out = out if batch_first else out.transpose(0, 1)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_multihead_attention_without_a_prefix_is_itself():
    attention = nn.MultiheadAttention(8, 2, batch_first=True, dropout=0.1).eval()
    x, masked = torch.randn(2, 5, 8), torch.ones(5, 5, dtype=torch.bool).triu(1)
    none = torch.empty(2, 0, 4)
    out = prefix_multihead_attention(attention, x, x, x, none, none, attn_mask=masked)
    expected, _ = attention(x, x, x, attn_mask=masked)
    torch.testing.assert_close(out, expected)
    with pytest.raises(ValueError, match=r"attention must not drop probabilities.*0\.1"):
        prefix_multihead_attention(attention.train(), x, x, x, none, none)


class OwnAttention(nn.Module):
    """A user's own layer, multi-query, that calls the op."""

    def __init__(self):
        super().__init__()
        self.q, self.kv = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, prefix):
        q = self.q(x).unflatten(-1, (2, 4)).transpose(1, 2)
        k, v = self.kv(x)[:, None].chunk(2, -1)
        return prefix_attention(q, k, v, *prefix, is_causal=True).transpose(1, 2).flatten(2)


def test_plain_module_trains_the_prefix_alone():
    layer, prefix = OwnAttention().requires_grad_(False), mlp_prefix([(1, 4)])
    out = layer(torch.randn(2, 5, 8), prefix()["self"][0])
    out.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in prefix.parameters())
    assert all(p.grad is None for p in layer.parameters())


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"length": 0}, "length must be at least 1; got 0"),
        ({"tasks": 0}, "tasks must be at least 1; got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\); got 1.0"),
        ({"layers": [None]}, "layers must have at least one layer with a prefix; got none"),
        ({"layers": {"decoder": [(1, 2)]}}, "layers must be .*decoder"),
        ({"layers": [(1, 0)]}, r"layer 0 is \(1, 0\)"),
        ({"reparametrization": "lstm"}, "reparametrization must be .*lstm"),
        ({"init": "text"}, "init must be .*text"),
        ({"dim": 0}, "dim must be at least 1; got 0"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        PrefixTuning(**({"length": 2, "layers": LAYERS} | arguments))
