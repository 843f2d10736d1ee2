"""multi_lora_linear on the grids that serving systems test, thinned, against float64.

Hidden sizes, ranks, batch sizes and popularities are those of Punica's, S-LoRA's, vLLM's, SGLang's
and LoRAX's kernel tests. Every pair of a hidden size and a rank is run, as reduction and as output
width alternately; the other factors are dealt out so that each value meets many others.
"""

import itertools
from typing import NamedTuple

import pytest
import torch
from errors import assert_as_good_as

import peft_kernels
from peft_kernels.ops import multi_lora_linear
from peft_kernels.ops.multi_lora_linear import example_ids, example_inputs

HIDDEN = [1024, 2048, 2049, 4096, 11008]
RANKS = [1, 3, 4, 8, 16, 32, 33, 64, 96, 128, 256, 320, 512]
BATCHES = [0, 1, 2, 3, 4, 7, 10, 16, 32, 64, 133]
ADAPTERS = [1, 4, 8, 32, 128]
POPULARITIES = ["distinct", "uniform", "zipf", "identical", "skewed", "none"]
SLICES = [[96], [64, 64], [128, 32, 32]]  # one layer; gate and up; query, key and value with GQA
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# The loosest that a peer allows itself: vLLM 6e-2 for 16 bits, Punica 1e-2 and less for floats.
PEERS_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}
ELEMENTS = 16_000_000  # of all A together; beyond it the middle adapters have rank 8


class Case(NamedTuple):
    hidden: int
    rank: int
    batch: int
    adapters: int
    popularity: str
    slices: list[int]
    dtype: torch.dtype
    reduces: bool  # hidden is what is summed over, else the output's width

    def inputs(self):
        small = self.adapters * self.rank * self.hidden > ELEMENTS
        ranks = [8 if small else self.rank] * self.adapters
        ranks[0] = ranks[-1] = self.rank
        ids = example_ids(self.batch, self.adapters, self.popularity)
        widths, k = self.slices, self.hidden
        if not self.reduces:
            rest = self.hidden - sum(self.slices[1:])
            widths, k = [rest, *self.slices[1:]], 80
        return example_inputs(self.batch, widths, k, ranks, ids=ids, dtype=self.dtype)


def cases():
    for i, (hidden, rank) in enumerate(itertools.product(HIDDEN, RANKS)):
        yield Case(
            hidden,
            rank,
            BATCHES[i * 3 % len(BATCHES)],
            ADAPTERS[i // 2 % len(ADAPTERS)],
            POPULARITIES[i // 3 % len(POPULARITIES)],
            SLICES[i // 5 % len(SLICES)],
            DTYPES[i // 7 % len(DTYPES)],
            reduces=i % 2 == 0,
        )


CASES = list(cases())


def test_every_value_is_there():
    for field, values in zip(
        Case._fields,
        [HIDDEN, RANKS, BATCHES, ADAPTERS, POPULARITIES, SLICES, DTYPES, [True, False]],
        strict=True,
    ):
        found = [getattr(case, field) for case in CASES]
        assert all(value in found for value in values), field


@pytest.mark.parametrize("case", CASES, ids=str)
def test_grid(case):
    inputs = case.inputs()
    wide = {
        name: [b._replace(a=b.a.double(), b=b.b.double()) for b in value]
        if name == "banks"
        else value
        if name == "ids"
        else value.double()
        for name, value in inputs.items()
    }
    exact = multi_lora_linear(**wide)
    with peft_kernels.backend("reference"):
        eager = multi_lora_linear(**inputs)
    out = multi_lora_linear(**inputs)
    assert_as_good_as(out, eager, exact, "y")
    tolerance = PEERS_TOLERANCE[case.dtype]
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
