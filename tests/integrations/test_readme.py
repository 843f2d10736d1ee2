"""The README's Python runs as it stands there, once the names are defined that a reader has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import peft_kernels

transformers = pytest.importorskip("transformers")

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32, "vocab_size": 64}
IDS = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6], [5, 3, 5, 8]])
MASK = torch.ones_like(IDS)


def bert(kind: str = "ForSequenceClassification", **sizes) -> nn.Module:
    config = transformers.BertConfig(**SIZES | {"intermediate_size": 64} | sizes)
    return getattr(transformers, f"Bert{kind}")(config)


def with_lora() -> nn.Module:
    return peft_kernels.swap_linear(bert(), ["query", "value"], r=16, alpha=32)


def with_adapters() -> nn.Module:
    from peft_kernels.integrations.transformers import insert_adapters

    model = bert()
    insert_adapters(model, "pfeiffer")
    return model


def gpt2(**sizes) -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=1, n_head=2, vocab_size=64, n_positions=256, **sizes)
    )


def swap() -> dict[str, object]:
    return {"model": bert()}


def one_layer() -> dict[str, object]:
    return {"linear": nn.Linear(8, 6), "other_a": torch.ones(4, 8), "other_b": torch.ones(6, 4)}


def whole_model() -> dict[str, object]:
    return {"model": with_lora(), "batch": {"input_ids": IDS}}


def op() -> dict[str, object]:
    shapes = {"x": (2, 8), "weight": (6, 8), "lora_a": (4, 8), "lora_b": (6, 4), "bias": (6,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def many_adapters() -> dict[str, object]:
    for name in ("french", "legal", "legal-2"):
        peft_kernels.save_adapter(with_lora(), f"adapters/{name}")
    return {"model": bert(), "batch": {"input_ids": IDS}}


def bottleneck() -> dict[str, object]:
    return {"model": bert(), "fresh": bert()} | {name: with_adapters() for name in "abc"}


class Words:
    """A tokenizer of words, with what Template and Verbalizer ask of one."""

    vocab = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "?", "good", "great", "bad", "film")

    def __new__(cls):
        Path("vocab.txt").write_text("\n".join(cls.vocab))
        return transformers.BertTokenizer("vocab.txt")


def soft_prompts() -> dict[str, object]:
    return {
        "model": gpt2(n_embd=32),
        "other": gpt2(n_embd=768),
        "masked": bert("ForMaskedLM", hidden_size=768),
        "input_ids": IDS,
        "mask": MASK,
        "labels": IDS,
        "tasks": torch.tensor([0, 2, 1]),
        "tokenizer": Words(),
        "texts": ["good film", "bad bad film"],
    }


# What each block, in the README's order, finds defined.
SETUPS = (swap, one_layer, whole_model, op, many_adapters, bottleneck, soft_prompts)


def test_every_block_has_its_names():
    assert len(BLOCKS) == len(SETUPS)


@pytest.mark.parametrize("index", range(len(SETUPS)), ids=[setup.__name__ for setup in SETUPS])
@pytest.mark.filterwarnings("ignore:the head classifier is frozen:RuntimeWarning")
def test_a_block_runs(index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"torch": torch, "peft_kernels": peft_kernels, **SETUPS[index]()}
    exec(compile(BLOCKS[index], "README.md", "exec"), names)
