"""Layers whose weight is read and which are never called: what took their place would be idle."""

import contextvars
import copy
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from peft_kernels import (
    AdapterPool,
    disabled,
    load_adapter,
    merge,
    save_adapter,
    swap_linear,
    unload,
    unmerge,
)
from peft_kernels.integrations.transformers.adapters import (
    adapters_of,
    fuse_adapters,
    insert_adapter,
    insert_adapters,
)
from peft_kernels.integrations.transformers.prefix import add_prefix, prefix_for
from peft_kernels.modules.uncalled import uncalled_layers
from peft_kernels.nn import AdapterFusion, BottleneckAdapter, InvertibleAdapter, LoRALinear

transformers = pytest.importorskip("transformers")


def lora_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def linear_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def host(module: nn.Module) -> nn.Module:
    return nn.ModuleDict({"host": module, "other": nn.Linear(8, 8)})


def bottleneck() -> BottleneckAdapter:
    return BottleneckAdapter(8, 2, gating=True)


def videomae() -> nn.Module:
    config = transformers.VideoMAEConfig(
        hidden_size=8, num_attention_heads=2, attn_implementation="eager"
    )
    return transformers.models.videomae.modeling_videomae.VideoMAESelfAttention(config)


def wavlm() -> nn.Module:
    return transformers.models.wavlm.modeling_wavlm.WavLMAttention(8, 2)


class Fused(nn.Module):
    """A feed-forward block of another library's."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.called = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        nn.init.normal_(self.called.weight)

    def forward(self, x):
        if self.called.weight.dtype is not x.dtype:
            x = x.to(self.up.weight)
        return self._fused(self.called(x))

    def _fused(self, x):
        return F.linear(F.linear(x, self.up.weight, self.up.bias), self.down.weight)


# What has linear layers that it never calls, and which.
UNCALLED = {
    "bottleneck": (bottleneck, ["down", "up", "gate"]),
    "fusion": (lambda: AdapterFusion([bottleneck()]), ["query", "adapters.0.up", "value", "key"]),
    "invertible": (lambda: InvertibleAdapter(8), ["F.0", "F.2", "G.0", "G.2"]),
    "torch": (lambda: nn.MultiheadAttention(8, 2), ["out_proj"]),
    "source": (Fused, ["up", "down"]),
    "wavlm": (wavlm, ["q_proj", "k_proj", "v_proj", "out_proj"]),
}
layers = pytest.mark.parametrize(
    ("make", "path"), [(make, path) for make, paths in UNCALLED.values() for path in paths]
)


@layers
def test_a_target_that_is_never_called_is_refused(make, path):
    model = host(make())
    target = f"host.{path}"
    for call in (
        lambda: swap_linear(model, [target, "other"], 2, alpha=4),
        lambda: AdapterPool.attach(model, [target, "other"], capacity=8),
        lambda: insert_adapter(model, target, bottleneck()),
    ):
        with pytest.raises(TypeError, match=rf"{target} must be a layer that is called; \w+ reads"):
            call()
        assert not lora_names(model) and type(model.other) is nn.Linear
        assert all(p.requires_grad for p in model.other.parameters())


def test_a_folder_with_such_a_layer_is_refused(tmp_path):
    plain = nn.ModuleDict({"host": nn.ModuleDict({"up": nn.Linear(8, 8)})})
    save_adapter(swap_linear(plain, ["up"], 2, alpha=4), tmp_path)
    with pytest.raises(TypeError, match=r"host\.up must be a layer that is called; Fused"):
        load_adapter(nn.ModuleDict({"host": Fused()}), tmp_path)


@pytest.mark.parametrize("kind", ["torch", "source", "wavlm"])
def test_all_linear_leaves_them_out_and_says_so(kind):
    make, paths = UNCALLED[kind]
    model = host(make())
    expected = linear_names(model) - {f"host.{path}" for path in paths}
    with pytest.warns(RuntimeWarning, match=rf"e\.g\. host\.\w+ \(by \w+\); {len(paths)} in all"):
        swap_linear(model, "all-linear", 2, alpha=4)
    assert lora_names(model) == expected


@pytest.mark.parametrize("put", ["adapters", "fusion", "prefix"])
def test_all_linear_means_the_models_own_layers(put):
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model, other = transformers.BertModel(config), transformers.BertModel(config)
    own = linear_names(model)
    if put == "prefix":
        add_prefix(model, prefix_for(model, 3, reparametrization="mlp"))
    else:
        insert_adapters(model, "pfeiffer")
        insert_adapters(other, "pfeiffer")
    if put == "fusion":
        fuse_adapters(model, [adapters_of(other)])
    assert linear_names(model) > own
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".* frozen with the rest of the model")  # what was put
        swap_linear(model, "all-linear", 2, alpha=4)
    assert lora_names(model) == own


@pytest.mark.parametrize("make", [Fused, videomae, wavlm])
def test_they_are_in_fact_never_called(make):
    """And all others are. VideoMAE's attention reads or calls, by the version of transformers."""
    model, called = make(), set()
    for name, module in model.named_children():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    model(torch.randn(2, 5, 8))
    idle = {name for name, module in model.named_children() if module in uncalled_layers(model)}
    linear = linear_names(model)
    assert called & linear == linear - idle


class Declaring(Fused):
    uncalled_linears = ("called",)


class Correcting(Fused):
    uncalled_linears = ()


class Patched(Fused):
    def __init__(self) -> None:
        super().__init__()
        self.forward = lambda x: self.up(self.down(x))


class Reading(nn.Module):
    """Reads weights, and calls the layers too, or may."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.how = nn.Linear(8, 8), how

    def forward(self, x):
        penalty = self.a.weight.square().sum()
        return getattr(self, self.how)(x) + penalty


class Passing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x):
        return self._apply_to(self.a, x) * self.a.weight.mean()

    @staticmethod
    def _apply_to(layer, x):
        return layer(x)


class Untold(nn.Module):
    """Reads a weight elsewhere than in forward, and has others call its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def penalty(self):
        return self.a.weight.square().sum()


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Declaring(), {"called"}),
        (Correcting(), set()),
        (Patched(), set()),
        (Reading("a"), set()),
        (Passing(), set()),
        (Untold(), set()),
        (eval("type('Sourceless', (nn.Module,), {'forward': lambda self, x: x})()"), set()),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_a_class_says_counts_and_doubt_refuses_nothing(model, expected):
    uncalled = uncalled_layers(model)
    assert {name for name, module in model.named_modules() if module in uncalled} == expected


@pytest.mark.parametrize("path", ["layers", "blocks.a"])
def test_an_adapter_after_what_is_never_called_is_refused(path):
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(8, 8)])
    model.blocks = nn.ModuleDict({"a": nn.ModuleDict()})
    with pytest.raises(
        TypeError, match=rf"{path} must be a module that is called; Module\w+ isn't"
    ):
        insert_adapter(model, path, bottleneck())


# ---- called on one path, read on another --------------------------------------------------------


class Either(nn.Module):
    """As Mamba's mixers: which path is taken isn't known before."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fused = nn.Linear(8, 8), nn.Linear(8, 8), True

    def forward(self, x):
        x = self.b(x)
        return x @ self.a.weight.T + self.a.bias if self.fused else self.a(x)


class InAnotherThread(nn.Module):
    def __init__(self, module: nn.Module, threads: ThreadPoolExecutor) -> None:
        super().__init__()
        self.module, self.threads = module, threads

    def forward(self, x):
        return self.threads.submit(contextvars.copy_context().run, self.module, x).result()


def adapted() -> tuple[nn.Module, Either]:
    """A model with an adapter that has an effect, and the module in it."""
    either = Either()
    model = host(either)
    swap_linear(model, ["a"], 2, alpha=4)
    nn.init.normal_(either.a.lora_b)
    return model, either


def check_that_reading_raises(either: Either) -> None:
    x = torch.randn(2, 8)
    either.fused = False
    either(x)
    either.fused = True
    with pytest.raises(RuntimeError, match=r"host\.a must be called; Either read its weight"):
        either(x)
    either.fused = False
    either(x)


def test_a_forward_that_reads_what_it_could_have_called_raises():
    _, either = adapted()
    check_that_reading_raises(either)


def test_so_does_a_routed_one_of_a_pool():
    either = Either()
    pool = AdapterPool.attach(host(either), ["a"], capacity=8)
    pool.create("one", 2, alpha=4)
    x = torch.randn(2, 8)
    expected = either(x)  # of the base, which is all that a forward without a route reads
    with pool.route(["one", None]):
        check_that_reading_raises(either)
    assert torch.allclose(either(x), expected, atol=1e-5)


def test_a_call_in_a_thread_of_the_forward_is_one():
    _, either = adapted()
    either.fused = False
    x = torch.randn(2, 8)
    expected, plain = either(x), either.a
    with ThreadPoolExecutor(1) as threads:
        either.a = InAnotherThread(plain, threads)
        assert torch.equal(either(x), expected)


def test_so_does_a_copy():
    model, _ = adapted()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(RuntimeError, match=r"host\.a must be called; Either read its weight"):
            copied["host"](torch.randn(2, 8))


def test_what_is_read_of_a_merged_layer_is_right():
    model, either = adapted()
    x = torch.randn(2, 8)
    either.fused = False
    expected = either(x)
    either.fused = True
    merge(model)
    assert torch.allclose(either(x), expected, atol=1e-5)
    unmerge(model)
    with disabled(model):
        either(x)
    with pytest.raises(RuntimeError, match="must be called"):
        either(x)
    unload(model, merge=False)
    either(x)
    assert not either._forward_hooks and not either._forward_pre_hooks
    assert not either.a._forward_pre_hooks


def test_a_forward_that_failed_leaves_nothing_behind():
    _, either = adapted()
    either.fused = False
    with pytest.raises(RuntimeError):
        either(torch.randn(2, 7))
    either(torch.randn(2, 8))


def test_bloom_with_its_slow_and_exact_path():
    config = transformers.BloomConfig(
        hidden_size=32, n_layer=1, n_head=4, vocab_size=64, pretraining_tp=2, slow_but_exact=True
    )
    model = transformers.BloomForCausalLM(config)
    swap_linear(model, ["dense"], 2, alpha=4)
    with pytest.raises(RuntimeError, match=r"self_attention\.dense must be called"):
        model(torch.ones(1, 3, dtype=torch.long))


def test_it_compiles_as_one_graph():
    _, either = adapted()
    x, either.fused = torch.randn(2, 8), False
    assert torch.allclose(torch.compile(either, fullgraph=True, backend="eager")(x), either(x))
