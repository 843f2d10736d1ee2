"""The error that `peft-kernels bench` shows beside each ratio: of every suite, against float64."""

import json

import pytest
import torch

from peft_kernels._library import OPS
from peft_kernels.cli import main
from peft_kernels.tools.bench.errors import Error, errors_of
from peft_kernels.tools.bench.implementation import Implementation
from peft_kernels.tools.bench.run import find_suite

SHAPES = {
    "lora_linear": (5, 7, 9),
    "dora_linear": (5, 7, 9),
    "multi_lora_linear": (3, 4, 5),
    "adapter": (4, 64, 8),
    "adapter_fusion": (4, 64, 8),
    "prefix_attention": (5, 2, 3),
    "prompt_lookup": (4, 8, 3),
}
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.1}


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_every_suite_knows_the_exact_values(op, backward, dtype):
    suite = find_suite(op)
    (case,) = suite.cases([SHAPES[op]], dtype, backward)
    found = suite.implementations(case)
    found.pop(suite.BARE)
    for name, error in errors_of(found, suite.exact(case), backward).items():
        assert error.rms < ROUNDING[dtype], name
        assert error.largest < 10 * ROUNDING[dtype], name


def test_a_step_of_prompt_tuning_has_exact_values_too():
    suite = find_suite("prompt_lookup")
    case = suite.Case(2, 4, 64, 3, backward=True, layers=1)
    found = suite.implementations(case)
    found.pop(suite.BARE)
    errors = errors_of(found, suite.exact(case), True)
    assert max(error.rms for error in errors.values()) < 1e-4


def test_an_error_is_that_of_the_worst_result():
    x = torch.ones(4)
    exact = Implementation(lambda x: 2 * x, x.double(), ())
    doubled_late = Implementation(lambda x: x + x.detach(), x, ())  # its gradient is half
    off_once = Implementation(lambda x: 2 * x + torch.tensor([0, 0, 0, 1.0]), x, ())
    found = {"late": doubled_late, "off": off_once}
    assert errors_of(found, exact, False)["late"] == Error(0.0, 0.0)
    assert errors_of(found, exact, False)["off"] == Error(0.25, 0.5)
    assert errors_of(found, exact, True)["late"].rms == 0.5


@pytest.mark.parametrize("flags", [[], ["--backward"]])
def test_bench_shows_errors_in_table_markdown_and_json(capsys, tmp_path, flags):
    markdown, sizes = tmp_path / "tables.md", ["--rounds", "1", "--seconds", "0.01"]
    command = ["bench", "lora_linear", "--shapes", "5x7x9", *sizes, *flags]
    assert main([*command, "--out", str(tmp_path), "--markdown", str(markdown)]) == 0
    (row,) = json.loads((tmp_path / "bench.json").read_text())
    assert row["errors"].keys() == row["timings"].keys() - {"bare layer"}
    rms = f"({row['errors']['peft_kernels']['rms']:.1e})"
    assert all(0 < error["rms"] < error["largest"] for error in row["errors"].values())
    for text in (capsys.readouterr().out, markdown.read_text()):
        assert rms in text
