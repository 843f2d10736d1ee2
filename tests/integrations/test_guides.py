"""The Python of README and of the guides runs as it stands there: a page's blocks one after the
other, as a reader would run them, once the names are defined that a reader has."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import peft_kernels

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32, "vocab_size": 64}
IDS = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6], [5, 3, 5, 8]])
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
LABELS = torch.tensor([0, 1, 1])

Names = dict[str, object]


def bert(kind: str = "ForSequenceClassification") -> nn.Module:
    config = transformers.BertConfig(**SIZES, intermediate_size=64)
    return getattr(transformers, f"Bert{kind}")(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=64, n_positions=64)
    return transformers.GPT2LMHeadModel(config)


def with_lora() -> nn.Module:
    return peft_kernels.swap_linear(bert(), ["query", "value"], r=16, alpha=32)


def with_adapters() -> nn.Module:
    from peft_kernels.integrations.transformers import insert_adapters

    model = bert()
    insert_adapters(model, "pfeiffer")
    return model


def a_model() -> Names:
    models = {name: bert() for name in ("model", "other", "base")}
    return {**models, "batch": BATCH, "labels": LABELS}


def for_adapters() -> Names:
    pytest.importorskip("adapters")
    return a_model()


def folders_of_adapters() -> Names:
    for name in ("french", "legal", "legal-2"):
        peft_kernels.save_adapter(with_lora(), f"adapters/{name}")
    return {"model": bert(), "batch": BATCH}


def continuous_batching() -> Names:
    if not hasattr(transformers, "ContinuousBatchingConfig"):
        pytest.skip("continuous batching of transformers 5")
    config = transformers.LlamaConfig(**SIZES, intermediate_size=64)
    models = [transformers.LlamaForCausalLM(config).eval() for _ in range(2)]
    adapted = peft_kernels.swap_linear(models[0], ["q_proj", "v_proj"], r=4, alpha=8)
    peft_kernels.save_adapter(adapted, "adapters/legal")
    options = {"do_sample": False, "eos_token_id": -1, "max_new_tokens": 8}
    return {"model": models[1], "generation_config": transformers.GenerationConfig(**options)}


def bottleneck() -> Names:
    any_model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    fused = {name: with_adapters() for name in "abc"}
    plain = {name: bert() for name in ("model", "fresh", "other", "served")}
    return {"any_model": any_model, "batch": BATCH} | fused | plain


class Words:
    """A tokenizer of words, with what Template and Verbalizer ask of one."""

    vocab = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "?", "good", "great", "bad", "film")

    def __new__(cls):
        Path("vocab.txt").write_text("\n".join(cls.vocab))
        return transformers.BertTokenizer("vocab.txt")


def soft_prompts() -> Names:
    return {
        "model": gpt2(),
        "other": gpt2(),
        "masked": bert("ForMaskedLM"),
        "input_ids": IDS,
        "mask": BATCH["attention_mask"],
        "labels": IDS,
        "tasks": torch.tensor([0, 2, 1]),
        "tokenizer": Words(),
        "texts": ["good film", "bad bad film"],
    }


def gguf_file() -> Names:
    pytest.importorskip("peft")
    from gguf_files import make_model, write_gguf

    Path("models").mkdir()
    write_gguf("models/small.Q4_0.gguf", make_model(), "Q4_0")
    return {"batch": BATCH}


def merging() -> Names:
    return {"model": with_lora(), "copy": with_lora(), "base": bert(), "batch": BATCH}


def in_codes() -> Names:
    quantised = pytest.importorskip("quantised")
    config = transformers.LlamaConfig(**SIZES, intermediate_size=64)

    def make() -> nn.Module:
        return quantised.in_codes(transformers.LlamaForCausalLM(config))

    models = {name: make() for name in ("model", "fresh", "served")}
    return {**models, "batch": BATCH, "labels": IDS}


def tensors() -> Names:
    shapes = {"x": (2, 8), "weight": (6, 8), "lora_a": (4, 8), "lora_b": (6, 4)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


# What each page finds defined.
PAGES: dict[str, Callable[[], Names]] = {
    "README.md": a_model,
    "docs/index.md": a_model,
    "docs/guides/lora.md": a_model,
    "docs/guides/peft-models.md": a_model,
    "docs/guides/gguf-models.md": gguf_file,
    "docs/guides/adapters-models.md": for_adapters,
    "docs/guides/many-adapters.md": folders_of_adapters,
    "docs/guides/continuous-batching.md": continuous_batching,
    "docs/guides/bottleneck-adapters.md": bottleneck,
    "docs/guides/soft-prompts.md": soft_prompts,
    "docs/guides/merging-and-saving.md": merging,
    "docs/guides/quantised-models.md": in_codes,
    "docs/guides/gpu-tuning.md": tensors,
    "docs/reference/ops.md": dict,
}


def test_every_page_with_python_is_run():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    found = {str(page.relative_to(ROOT)) for page in pages if BLOCK.search(page.read_text())}
    # Those are in test_docs_op.py, distributed/test_guide.py and test_vllm_processes.py.
    names = "add-an-op", "guides/more-than-one-machine", "guides/vllm"
    assert found - {f"docs/{name}.md" for name in names} == set(PAGES)


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.filterwarnings("error:.*the old path goes:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:the head classifier is frozen:RuntimeWarning")
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"torch": torch, "peft_kernels": peft_kernels, **PAGES[page]()}
    text = (ROOT / page).read_text()
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start(1))
        exec(compile("\n" * line + found[1], page, "exec"), names)
