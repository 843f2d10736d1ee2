"""PEFT's LoRA on embeddings under accelerate(), beside PEFT's own."""

import copy

import pytest
import torch
from tiny_models import make_llama
from torch import nn

import peft_kernels

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.tensor([[0, 3, 3, 7], [11, 2, 0, 3], [5, 5, 1, 9]])


class Scaled(nn.Embedding):
    """As Gemma's: what it looks up is multiplied by a factor, which PEFT asks for."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_buffer("embed_scale", torch.tensor(3.0), persistent=False)

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


def config(**options):
    settings = {"target_modules": ["0"], "r": 4, "lora_alpha": 6, "init_lora_weights": False}
    return peft.LoraConfig(**{**settings, **options})


def make(kind=nn.Embedding, dtype=torch.float64, **options) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(kind(12, 10, **options)).to(dtype)
    return peft.get_peft_model(base, config())


def both(model, ids=IDS, **call):
    """What PEFT gives and what the accelerated model does, with their gradients and counts."""
    results = []
    for accelerates in (False, True):
        own = copy.deepcopy(model)
        report = peft_kernels.accelerate(own) if accelerates else None
        y = own(ids, **call)
        y.sin().sum().backward()
        gradients = {name: p.grad for name, p in own.named_parameters() if p.grad is not None}
        results.append((y.detach(), gradients))
    return *results, report.counts()


def assert_as_peft(model, ways=("embedding",), ids=IDS, call=(), **tolerances):
    theirs, ours, counts = both(model, ids, **dict(call))
    torch.testing.assert_close(ours, theirs, **tolerances)
    assert set(counts) == set(ways)


@pytest.mark.parametrize("options", [
    {}, {"padding_idx": 3}, {"max_norm": 0.5}, {"max_norm": 2.0, "norm_type": 1.0},
    {"scale_grad_by_freq": True}, {"kind": Scaled}, {"kind": Scaled, "padding_idx": 0},
], ids=str)  # fmt: skip
def test_as_peft(options):
    model = make(**options)
    if "max_norm" in options:  # which lookups enforce in place, and autograd can't go through
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("embedding_B" in name)
    assert_as_peft(model)


@pytest.mark.parametrize("shape", [(), (5,), (0,), (2, 0), (2, 3, 2)], ids=str)
def test_ids_of_any_shape(shape):
    assert_as_peft(make(), ids=torch.randint(0, 12, shape))


def test_a_row_that_pads_gets_no_gradient():
    model = make(padding_idx=3)
    _, (_, gradients), _ = both(model)
    (a,) = (grad for name, grad in gradients.items() if "embedding_A" in name)
    assert not a[:, 3].any() and a[:, 0].all() and not a[:, 4].any()


def test_a_base_that_trains():
    model = make()
    model.base_model.model[0].base_layer.weight.requires_grad_()
    assert_as_peft(model)


def test_several_adapters():
    model = make()
    model.add_adapter("other", config(r=2, lora_alpha=5, use_rslora=True))
    model.add_adapter("elsewhere", config(target_modules=["0"], r=3))
    model.base_model.set_adapter(["default", "other"])
    assert_as_peft(model)
    model.base_model.model[0].scaling["other"] = torch.tensor(0.5)
    assert_as_peft(model)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_is_no_worse(base, adapter, autocast):
    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(nn.Embedding(64, 48)), config(r=8))
    layer = model.base_model.model[0]
    layer.base_layer.to(base)
    for parameters in (layer.lora_embedding_A, layer.lora_embedding_B):
        parameters.to(adapter)
    ids, exact = torch.randint(0, 64, (300,)), copy.deepcopy(model).double()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        (theirs, their_grads), (ours, our_grads), counts = both(model, ids)
    (truth, true_grads), _, _ = both(exact, ids)
    assert counts == {"embedding": 1} and ours.dtype is theirs.dtype is base
    pairs = [(ours, theirs, truth)]
    pairs += [(our_grads[name], their_grads[name], true_grads[name]) for name in true_grads]
    for own, other, true in pairs:
        own_error, other_error = (own - true).norm(), (other - true).norm()
        assert own_error <= 1.05 * other_error + 1e-5 * true.norm()


def test_names_are_pefts():
    model = make()
    model.add_adapter("other", config(r=2))
    model.base_model.set_adapter(["default", "other"])
    names = ["other", "__base__", "default"]
    assert_as_peft(model.eval(), ["adapter_names"], call={"adapter_names": names})
    peft_kernels.accelerate(model.train())
    model(IDS, adapter_names=["other", "__base__", "other"]).sum().backward()
    layer = model.base_model.model[0]
    assert layer.lora_embedding_A["default"].grad is None
    assert layer.lora_embedding_B["other"].grad.any()


def test_merged_disabled_and_none():
    model = make()
    peft_kernels.accelerate(model)
    expected = model(IDS)
    model.merge_adapter(safe_merge=True)
    report = peft_kernels.accelerate(model)
    torch.testing.assert_close(model(IDS), expected)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(
            model(IDS), nn.functional.embedding(IDS, model.get_base_model()[0].weight)
        )
    model.base_model.model[0]._active_adapter = []
    model(IDS)
    assert report.counts() == {"merged": 1, "disabled": 1, "no active adapter": 1}


def test_dora_is_pefts():
    model = peft.get_peft_model(nn.Sequential(nn.Embedding(12, 10)), config(use_dora=True))
    report = peft_kernels.accelerate(model)
    assert [layer.reason for layer in report.layers] == ["DoraEmbeddingVariant"]
    assert_as_peft(model, ["DoraEmbeddingVariant"])


@pytest.mark.parametrize(("reason", "change"), [
    ("several dtypes", lambda layer: layer.lora_embedding_B.float()),
    ("weights that aren't whole", lambda layer: setattr(
        layer.lora_embedding_A["default"], "data", layer.lora_embedding_A["default"].flatten())),
    ("isn't a constant", lambda layer: layer.scaling.update(default=torch.ones(1))),
    ("tensor parallelism", lambda layer: setattr(layer, "tp_layer", object())),
    ("another forward", lambda layer: setattr(layer, "forward", layer.forward)),
])  # fmt: skip
def test_what_stays_pefts_is_reported(reason, change):
    model = make()
    change(model.base_model.model[0])
    report = peft_kernels.accelerate(model)
    assert reason in report.layers[0].reason and "1 keep PEFT's" in report.summary()


def test_hooks_of_the_base_are_called():
    model = make()
    model.base_model.model[0].base_layer.register_forward_hook(lambda *call: call[-1] * 2)
    assert_as_peft(model)


def test_inputs_that_are_made_to_require_gradients():
    """As gradient checkpointing needs it of a frozen model, whichever module has the hook."""
    model = make()
    model.base_model.model[0].base_layer.register_forward_hook(
        lambda *call: call[-1].requires_grad_()
    )
    assert_as_peft(model)


def test_compiled():
    model = make(dtype=torch.float32)
    expected = model(IDS)
    peft_kernels.accelerate(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_with_the_head_of_a_model(tied):
    """The report tells what is no kernel from what is; a tied head is served as any other."""
    base = make_llama()
    if tied:
        base.lm_head.weight = base.model.embed_tokens.weight
        base.config.tie_word_embeddings = True
    settings = config(target_modules=["embed_tokens", "lm_head", "q_proj"])
    model = peft.get_peft_model(base.double(), settings)
    report = peft_kernels.accelerate(model)
    layers = {layer.name.split(".")[-1]: layer.backend for layer in report.layers}
    assert layers == {"embed_tokens": "torch", "lm_head": "reference", "q_proj": "reference"}
    assert report.summary().startswith("3 of 4 layers of PEFT's run on peft_kernels (reference); ")
    assert "1 on PyTorch's operations" in report.summary()
    ids = IDS.clamp_max(31)
    outputs = {}
    for accelerates in (True, False):
        model.zero_grad()
        (peft_kernels.accelerate if accelerates else peft_kernels.restore)(model)
        logits = model(ids).logits
        logits.sin().sum().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        outputs[accelerates] = logits.detach(), grads
    torch.testing.assert_close(outputs[True], outputs[False])
    weights = model.base_model.model
    assert (weights.lm_head.weight is weights.model.embed_tokens.weight) is tied
