"""Measures `lora_linear`'s plans for the layers of Llama-3-8B, Qwen2.5-7B and BERT on this GPU.

    python python/tools/tune_models.py > tune.json

The tables go to standard error; the plans go into the tune cache, as ``peft-kernels tune`` does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch
from rich.console import Console

from peft_kernels.tools import tune

MODELS = ("llama-3-8b", "qwen2.5-7b", "bert")
ROWS = (1, 16, 256, 4096)
MIXED = ((torch.bfloat16, torch.float32),)  # what a model in bfloat16 trains with by default


def shapes() -> Iterator[tuple[int, int, int, int]]:
    """(m, n, k, r), the few rows of decoding last: a wrong plan costs most where there are many."""
    for rows in reversed(ROWS):
        for model in MODELS:
            yield from ((rows, n, k, tune.RANK) for n, k in tune.MODELS[model])


def main() -> None:
    console = Console(stderr=True, width=200)
    measured = tune.tune(list(shapes()), tune.DTYPES, weights=("",), console=console)
    measured += tune.tune(list(shapes()), MIXED, weights=("nf4",), console=console)
    document = tune.to_document(measured)
    del document["cache"]  # a folder of who runs this
    print(json.dumps(document))


if __name__ == "__main__":
    main()
