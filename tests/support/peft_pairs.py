"""Pairs of a model as PEFT runs it and the same model accelerated, for each kind of model."""

import copy

import pytest
import torch
from tiny_models import make_bert, make_gpt2, make_llama
from torch import nn

import peft_kernels

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D

KERNELS = ("lora_linear", "multi_lora_linear", "dora_linear")
BATCH = 4


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(10, 20), nn.Linear(20, 6)
        self.norm = nn.LayerNorm(20)

    def forward(self, X):
        return self.lin1(self.norm(self.lin0(X).relu()))


class Embedded(nn.Module):
    """An embedding, a Conv1D of transformers' and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.conv1d, self.lin0 = nn.Embedding(32, 5), Conv1D(8, 5), nn.Linear(8, 6)

    def forward(self, X):
        return self.lin0(self.conv1d(self.emb(X)).relu())


def make_t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=32,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return transformers.T5ForConditionalGeneration(config)


# By kind: how to make one, what an adapter is put on, and what another one is put on.
MODELS = {
    "mlp": (MLP, ["lin0", "lin1"], ["lin0"]),
    "conv1d": (Embedded, ["conv1d"], ["conv1d", "lin0"]),
    "embedding": (Embedded, ["emb", "lin0"], ["emb", "conv1d"]),
    "llama": (make_llama, ["q_proj", "v_proj", "down_proj"], ["q_proj", "up_proj"]),
    "gpt2": (make_gpt2, ["c_attn", "mlp.c_proj"], ["c_attn", "c_fc"]),
    "bert": (make_bert, ["query", "value", "intermediate.dense"], ["query", "key"]),
    "t5": (make_t5, ["q", "v", "wi"], ["q", "wo"]),
}
TRANSFORMERS = ("llama", "gpt2", "bert", "t5")
GENERATES = ("llama", "gpt2", "t5")


def config(targets, **options):
    settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}
    return peft.LoraConfig(target_modules=targets, **{**settings, **options})


def make_base(kind: str) -> nn.Module:
    """With weights large enough that adapters make a difference."""
    torch.manual_seed(0)
    model = MODELS[kind][0]()
    for module in model.modules():
        for rate in ("p", "dropout_prob", "attention_dropout"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def inputs_of(kind: str) -> dict:
    generator = torch.Generator().manual_seed(3)
    if kind == "mlp":
        return {"X": torch.randn(BATCH, 10, generator=generator)}
    ids = torch.randint(2, 32, (BATCH, 6), generator=generator)
    if kind in TRANSFORMERS:
        decoder = {"decoder_input_ids": ids[:, :4]} if kind == "t5" else {}
        return {"input_ids": ids, **decoder}
    return {"X": ids}


def output_of(found) -> torch.Tensor:
    return found if isinstance(found, torch.Tensor) else found[0]


def run(model, kind: str, **call):
    """The output, and the gradients of all that is trained."""
    model.zero_grad()
    output = output_of(model(**inputs_of(kind), **call))
    if output.requires_grad:
        weights = torch.linspace(-1, 1, output.shape[-1])
        (output.sin() * weights).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output.detach(), gradients


class Pair:
    """``theirs`` is PEFT's, ``ours`` its copy on kernels; whatever is done is done to both."""

    def __init__(self, kind: str, **options) -> None:
        self.kind = kind
        base = make_base(kind)
        self.theirs = peft.get_peft_model(base, config(MODELS[kind][1], **options))
        self.theirs.eval()
        self.ours = copy.deepcopy(self.theirs)
        self.report = peft_kernels.accelerate(self.ours)

    def __iter__(self):
        return iter((self.theirs, self.ours))

    def each(self, act) -> list:
        """What ``act`` gives of either; layers that it adds are accelerated."""
        results = []
        for model in self:
            torch.manual_seed(2)
            results.append(act(model))
        if self.report.missing():
            peft_kernels.accelerate(self.ours)
        return results

    def add(self, name: str = "other", **options) -> None:
        settings = config(MODELS[self.kind][2], **{"r": 3, "lora_alpha": 6, **options})
        self.each(lambda model: model.add_adapter(name, copy.deepcopy(settings)))

    def hits(self) -> int:
        """The calls of kernels since they were last asked for."""
        counts = self.report.counts()
        total = sum(counts.get(name, 0) for name in KERNELS)
        self.report = peft_kernels.accelerate(self.ours)
        return total

    def agree(self, *, hits: bool = True, **call) -> torch.Tensor:
        """Both give the same outputs and gradients, ours by kernels or without any."""
        self.hits()
        (expected, gradients), (output, found) = (run(model, self.kind, **call) for model in self)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found, gradients, rtol=1e-4, atol=1e-4)
        assert (self.hits() > 0) is hits
        return output
