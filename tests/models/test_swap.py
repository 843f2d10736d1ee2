"""swap_linear: which layers it chooses, what it replaces, and what it leaves alone."""

import warnings

import pytest
import torch
from torch import nn

from peft_kernels import swap_linear
from peft_kernels.nn import LoRALinear


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(8, 8)
        self.key = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(x + self.query(x) * self.key(x))


class Model(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([Block() for _ in range(blocks)])
        self.head = nn.Linear(8, 11)

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def swapped(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def snapshot(model: nn.Module) -> tuple:
    modules = [(name, id(module)) for name, module in model.named_modules()]
    return modules, [(id(p), p.requires_grad, p.clone()) for p in model.parameters()]


def assert_unchanged(model: nn.Module, before: tuple) -> None:
    modules, parameters = snapshot(model)
    assert modules == before[0]
    assert [p[:2] for p in parameters] == [p[:2] for p in before[1]]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(parameters, before[1], strict=True))


QUERIES = {f"layers.{i}.query" for i in range(3)}
KEYS = {f"layers.{i}.key" for i in range(3)}


@pytest.mark.parametrize(
    ("target_modules", "options", "expected"),
    [
        (["query"], {}, QUERIES),
        (["query", "key"], {}, QUERIES | KEYS),
        (("layers.1.query", "head"), {}, {"layers.1.query", "head"}),
        (["1.key"], {}, {"layers.1.key"}),
        (r"layers\.[02]\..*y", {},
         {"layers.0.query", "layers.0.key", "layers.2.query", "layers.2.key"}),
        ("all-linear", {}, QUERIES | KEYS),
        ("All-Linear", {}, QUERIES | KEYS),
        ("all-linear", {"exclude_modules": ["key"]}, QUERIES),
        ("all-linear", {"exclude_modules": r".*\.query"}, KEYS),
        (["query"], {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
         {"layers.0.query", "layers.2.query"}),
        (["key"], {"layers_to_transform": 0, "layers_pattern": ["h", "layers"]}, {"layers.0.key"}),
    ],
)  # fmt: skip
def test_targets(target_modules, options, expected):
    model = Model()
    assert swap_linear(model, target_modules, 2, alpha=4, **options) is model
    assert swapped(model) == expected


def test_only_adapters_are_trained():
    model = swap_linear(Model(), ["query"], 2, alpha=4)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.lora_{m}" for name in QUERIES for m in "ab"}
    model(torch.arange(5)).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained


def test_the_model_computes_the_same_until_trained():
    model = Model()
    before = model(torch.arange(11))
    swap_linear(model, "all-linear", 2, alpha=4)
    torch.testing.assert_close(model(torch.arange(11)), before)


def test_settings_reach_the_layers():
    model = swap_linear(
        Model().bfloat16(),
        ["query"],
        4,
        alpha=6,
        dropout=0.1,
        use_rslora=True,
        init="gaussian",
        adapter_dtype=torch.bfloat16,
    )
    layer = model.layers[0].query
    assert (layer.r, layer.alpha, layer.scale, layer.dropout) == (4, 6, 3.0, 0.1)
    assert layer.use_rslora and layer.init == "gaussian" and layer.lora_a.dtype is torch.bfloat16


def test_rank_and_alpha_patterns():
    patterns = {
        "rank_pattern": {"^layers.0.query": 3, "query": 5},
        "alpha_pattern": {r"layers\.[12]\.key": 9},
    }
    model = swap_linear(Model(), ["query", "key"], 2, alpha=4, **patterns)
    assert [layer.query.r for layer in model.layers] == [3, 5, 5]
    assert [layer.key.r for layer in model.layers] == [2, 2, 2]
    assert [layer.key.alpha for layer in model.layers] == [4, 9, 9]
    assert [layer.query.alpha for layer in model.layers] == [4, 4, 4]


def test_a_pattern_key_without_a_match_warns():
    with pytest.warns(RuntimeWarning, match="alpha_pattern has 'value': 3"):
        swap_linear(Model(), ["query"], 2, alpha=4, alpha_pattern={"value": 3, "0.query": 5})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        swap_linear(Model(), ["query"], 2, alpha=4, rank_pattern={"0.query": 5})


def test_a_shared_module_is_replaced_under_all_its_names():
    model = Model()
    model.layers[2].key = model.layers[1].key
    model.again = model.layers[1].key
    swap_linear(model, ["key"], 2, alpha=4)
    assert isinstance(model.again, LoRALinear)
    assert model.again is model.layers[1].key is model.layers[2].key


def test_a_second_swap_keeps_the_adapters_of_the_first():
    model = swap_linear(Model(), ["query"], 2, alpha=4)
    swap_linear(model, ["key"], 3, alpha=4)
    assert swapped(model) == QUERIES | KEYS
    assert model.layers[0].query.lora_a.requires_grad and model.layers[0].query.r == 2
    assert not model.head.weight.requires_grad


def test_the_training_mode_is_kept():
    assert not swap_linear(Model().eval(), ["query"], 2, alpha=4).layers[0].query.training
    assert swap_linear(Model(), ["query"], 2, alpha=4).layers[0].query.training


@pytest.mark.parametrize("r", [0, 2.5])
@pytest.mark.parametrize("where", ["r", "rank_pattern"])
def test_bad_ranks_change_nothing(where, r):
    model = Model()
    before = snapshot(model)
    ranks = {"r": r} if where == "r" else {"r": 2, "rank_pattern": {"2.query": r}}
    with pytest.raises((ValueError, TypeError), match="r must be"):
        swap_linear(model, ["query"], alpha=4, **ranks)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("target_modules", "options", "error", "named"),
    [
        (["value"], {}, ValueError, "value"),
        (["query", "uery"], {}, ValueError, r"\['uery'\]"),
        ("query", {}, ValueError, "query"),
        ("layers", {"exclude_modules": ["layers"]}, ValueError, r"\['layers'\]"),
        (".*quer", {}, ValueError, "quer"),
        ([], {}, ValueError, "target_modules must select"),
        (
            ["query"],
            {"exclude_modules": "layers.*"},
            ValueError,
            r"that exclude_modules leaves; it leaves none of what \['query'\] matches, of 3 layers",
        ),
        (
            ["query", "key"],
            {"exclude_modules": ["key"]},
            ValueError,
            r"that exclude_modules leaves; it leaves none of what \['key'\] matches",
        ),
        (".*query", {"exclude_modules": ["query"]}, ValueError, "that exclude_modules leaves"),
        ("all-linear", {"exclude_modules": ".*"}, ValueError, "that exclude_modules leaves"),
        (
            ["query"],
            {"layers_to_transform": 9, "exclude_modules": ["key"]},
            ValueError,
            "that exclude_modules and layers_to_transform leaves",
        ),
        (["valu"], {"exclude_modules": ["key"]}, ValueError, r"nothing matches \['valu'\]"),
        (5, {}, TypeError, "target_modules must be a str, or a list of names; got 5"),
        ([b"query"], {}, TypeError, r"a list of names; got \[b'query'\]"),
        (["query"], {"exclude_modules": 5}, TypeError, "exclude_modules must be a str, or a list"),
        (["query"], {"rank_pattern": 5}, TypeError, "rank_pattern must be a dict.* got 5"),
        (["query"], {"alpha_pattern": ["query"]}, TypeError, "alpha_pattern must be a dict"),
        ("(query", {}, ValueError, r"target_modules must be a regular .* got '\(query'"),
        (["query"], {"exclude_modules": "*y"}, ValueError, "exclude_modules must be a regular"),
        (["query"], {"rank_pattern": {"[": 2}}, ValueError, "rank_pattern must be a regular"),
        (["query"], {"alpha_pattern": {"[": 2}}, ValueError, "key of alpha_pattern or"),
        (
            ["query"],
            {"layers_to_transform": 1, "layers_pattern": "("},
            ValueError,
            "layers_pattern must be a regular",
        ),
        (
            ["query", "norm"],
            {},
            TypeError,
            r"layers\.0\.norm must be .*; got torch.nn.modules.normalization.LayerNorm",
        ),
        (["layers"], {}, TypeError, "layers must be .*; got torch.nn.modules.container.ModuleList"),
        (["embed"], {}, TypeError, "embed must be .*; got torch.nn.modules.sparse.Embedding"),
        (["query"], {"layers_pattern": "layers"}, ValueError, "layers_to_transform"),
        (".*query", {"layers_to_transform": 1}, ValueError, "layers_to_transform"),
        (["query"], {"dropout": 2.0}, ValueError, "dropout"),
        (["query"], {"adapter_dtype": torch.bfloat16}, TypeError, "adapter_dtype"),
    ],
)
def test_bad_input_changes_nothing(target_modules, options, error, named):
    model = Model()
    model.embed.weight.requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(error, match=named):
        swap_linear(model, target_modules, 2, alpha=4, **options)
    assert_unchanged(model, before)


def test_swapping_the_same_layer_twice_changes_nothing():
    model = swap_linear(Model(), ["query"], 2, alpha=4)
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"layers\.0\.query .* LoRALinear already"):
        swap_linear(model, "all-linear", 2, alpha=4)
    assert_unchanged(model, before)


@pytest.mark.parametrize("padded", [False, True])
def test_torch_encoders_call_the_swapped_layers(padded):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    swap_linear(model, ["linear1", "linear2"], 2, alpha=4)
    for name, parameter in model.named_parameters():
        if "lora_b" in name:
            nn.init.normal_(parameter)
    x = torch.randn(3, 5, 8)
    mask = torch.arange(5) >= torch.tensor([[5], [3], [4]]) if padded else None
    training = model(x, src_key_padding_mask=mask)
    torch.testing.assert_close(model.eval()(x, src_key_padding_mask=mask), training)
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=mask), training)
