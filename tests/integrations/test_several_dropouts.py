"""Several active adapters of PEFT's, each with its own dropout, against PEFT's with its masks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from accelerated_models import KERNEL, config, error
from tiny_models import make_llama
from torch import nn

import peft_kernels
from peft_kernels.ops import _lora_sum
from peft_kernels.ops._dropout import dropout_factor

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*Already found a `peft_config`")

K, N = 24, 17
RANKS = {"default": 5, "second": 3, "third": 8}


class Drops(nn.Module):
    """The dropout that kernels draw with this seed."""

    def __init__(self, p: float, seed: torch.Tensor):
        super().__init__()
        self.p, self.seed = p, seed

    def forward(self, x):
        m, k = x.flatten(0, -2).shape
        return x * dropout_factor(self.seed, self.p, m, k, x.dtype).view(x.shape)


def make_model(shares, dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N).to(dtype))
    names = list(zip(RANKS.items(), shares, strict=False))
    for (name, r), p in names:
        one = config(["0"], r=r, lora_alpha=r + 2, lora_dropout=p, **options)
        if isinstance(model, peft.PeftModel):
            model.add_adapter(name, one)
        else:
            model = peft.get_peft_model(model, one, adapter_name=name)
    model.base_model.set_adapter([name for (name, _), _ in names])
    return model


def layer_of(model):
    return model.base_model.model[0]


def step(layer, x, dy):
    """y and the gradients of x and of all adapters."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy.to(y.dtype))
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]


@pytest.fixture
def drawn(monkeypatch):
    """The seeds that kernels draw, of each call."""
    seeds = []

    def draw(count, device):
        seeds.append(torch.randint(0, 2**63 - 1, (count,), device=device))
        return seeds[-1]

    monkeypatch.setattr(_lora_sum, "draw_seeds", draw)
    return seeds


@pytest.fixture
def no_dropout_of_pytorchs(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("PyTorch's dropout")

    monkeypatch.setattr(F, "dropout", refuse)


@pytest.mark.parametrize("shares", [(0.1, 0.1), (0.5, 0.2, 0.9), (0.0, 0.4), (0.3, 0.0, 0.0)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.usefixtures("no_dropout_of_pytorchs")
def test_with_the_same_masks_it_is_pefts(shares, bias, drawn):
    """In float64, forward and backward."""
    model = make_model(shares, lora_bias=bias)
    theirs = layer_of(copy.deepcopy(model))
    report = peft_kernels.accelerate(model)
    x, dy = torch.randn(3, 4, K).double(), torch.randn(3, 4, N).double()
    found = step(layer_of(model), x, dy)
    assert report.counts() == {KERNEL: 1}
    drops = [(name, p) for name, p in zip(RANKS, shares, strict=False) if p]
    for (name, p), seed in zip(drops, drawn[0][-len(drops) :], strict=True):
        theirs.lora_dropout[name] = Drops(p, seed)
    torch.testing.assert_close(found, step(theirs, x, dy))


@pytest.mark.parametrize("dtype", [torch.bfloat16, "autocast"])
def test_half_precision_is_no_worse(dtype, drawn):
    """Against float64 with the same masks, beside PEFT's."""
    model = make_model((0.3, 0.5), torch.float32)
    half = torch.bfloat16
    if dtype is half:
        layer_of(model).base_layer.to(half)
    theirs = layer_of(copy.deepcopy(model))
    x, dy = torch.randn(100, K).to(half), torch.randn(100, N).to(half)
    given = x.float() if dtype == "autocast" else x
    peft_kernels.accelerate(model)
    with torch.autocast("cpu", half, enabled=dtype == "autocast"):
        ours = step(layer_of(model), given, dy)
        for name, seed in zip(theirs.active_adapters, drawn[0], strict=True):
            theirs.lora_dropout[name] = Drops(theirs.lora_dropout[name].p, seed)
        others = step(theirs, given, dy)
    truth = step(theirs.double(), x.double(), dy.double())
    for own, other, true in zip(ours, others, truth, strict=True):
        assert error(own, true) <= 1.5 * error(other, true)


def test_adapters_that_are_the_same_drop_other_elements():
    model = make_model((0.5, 0.5), torch.float32)
    layer = layer_of(model)
    layer.update_layer("second", 5, 7, config=config(["0"], r=5, lora_alpha=7, lora_dropout=0.5))
    for part in (layer.lora_A, layer.lora_B):
        part["second"].load_state_dict(part["default"].state_dict())
    layer.set_adapter(["default", "second"])
    nn.init.zeros_(layer.base_layer.weight), nn.init.zeros_(layer.base_layer.bias)
    peft_kernels.accelerate(model)
    x = torch.zeros(2000, K)
    x[:, 0] = 1.0  # each adapter adds its column of A, or nothing
    sizes = layer(x).norm(dim=1)
    largest = sizes.max()
    shares = [(sizes - c * largest).abs().lt(1e-3 * largest).float().mean() for c in (0, 0.5, 1)]
    for share, expected in zip(shares, (0.25, 0.5, 0.25), strict=True):
        assert abs(share - expected) < 5 * (expected * (1 - expected) / 2000) ** 0.5


def test_without_training_nothing_is_dropped(drawn):
    model = make_model((0.5, 0.2)).eval()
    x = torch.randn(5, K).double()
    expected = layer_of(model)(x)
    report = peft_kernels.accelerate(model)
    torch.testing.assert_close(layer_of(model)(x), expected)
    assert report.counts() == {KERNEL: 1} and not drawn


def test_what_kernels_do_not_serve_is_pefts():
    model = make_model((0.5, 1.0))
    report = peft_kernels.accelerate(model)
    layer_of(model)(torch.randn(5, K).double())
    assert report.counts() == {"dropout of everything": 1}
    model = make_model((0.5, 0.2), use_dora=True)
    report = peft_kernels.accelerate(model)
    layer_of(model)(torch.randn(5, K).double())
    assert report.counts() == {"DoRA beside other adapters": 1}


IDS = torch.randint(0, 32, (4, 6), generator=torch.Generator().manual_seed(0))


def make_models():
    """A Llama of two adapters with dropout, on kernels."""
    torch.manual_seed(0)
    options = {"lora_dropout": 0.3, "init_lora_weights": True}
    model = peft.get_peft_model(make_llama(), config(["q_proj", "down_proj"], **options))
    model.add_adapter("other", config(["q_proj", "v_proj"], **options | {"r": 3}))
    model.base_model.set_adapter(["default", "other"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.train(), peft_kernels.accelerate(model)


def gradients(model):
    model.zero_grad()
    torch.manual_seed(5)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_it_drops_the_same(reentrant):
    model, report = make_models()
    loss, expected = gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again, found = gradients(model)
    assert torch.equal(loss, again)
    torch.testing.assert_close(found, expected)
    assert set(report.counts()) == {KERNEL}


def test_compiled_it_drops_the_same():
    model, _ = make_models()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(4, 6, layer.in_features, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = []
    for one in (layer, compiled):
        torch.manual_seed(5)
        found.append(torch.autograd.grad(one(x).sin().sum(), (x, *layer.lora_A.parameters())))
    torch.testing.assert_close(*found)
    with torch.no_grad():
        assert not torch.equal(compiled(x), compiled(x))
