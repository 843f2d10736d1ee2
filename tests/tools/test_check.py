"""Which ops ``make check`` tests for a change."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "python" / "tools"))

import check

EVERY, TWO = check.OPS, ["adapter", "prompt_lookup"]


@pytest.mark.parametrize(
    ("files", "ops"),
    [
        (["csrc/cpu/adapter_fusion_kernels.cpp"], ["adapter_fusion"]),
        (["peft_kernels/triton/adapter/kernels.py"], ["adapter"]),
        (["peft_kernels/ops/multi_lora_linear.py", "README.md"], ["multi_lora_linear"]),
        (
            ["tests/ops/test_adapter.py", "csrc/cuda/prompt_lookup.cuh"],
            ["adapter", "prompt_lookup"],
        ),
        (["csrc/cpu/matrix/tile.h"], EVERY),
        (["peft_kernels/ops/_rows.py", "docs/index.md"], EVERY),
        (["peft_kernels/nn/lora.py"], []),
    ],
)
def test_the_ops_of_a_change(files, ops):
    assert check.ops_of(files) == ops


def test_an_unknown_op(capsys):
    assert check.main(["lora"]) == 2
    assert "OP must be among adapter, adapter_fusion" in capsys.readouterr().out
