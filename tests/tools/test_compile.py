"""Every Triton kernel in every shipped configuration, compiled for chips that aren't here."""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from peft_kernels import triton
from peft_kernels.tools.report import run

KERNELS = {
    "shrink", "tile", "persistent", "in_loop", "from_dy", "grad_a", "add_low_rank", "terms",
    "sum_partials", "gain_bwd", "gain_end", "dora_changed", "dora_norm", "dora_keep",
    "codes_tile", "dequantize",
    "multi_shrink", "multi_tile", "multi_delta", "multi_grad", "sum_parts",
    "decode_shrink", "decode_tile",
    "adapter_fold", "adapter_fwd", "adapter_norm_bwd", "adapter_bwd", "adapter_up", "adapter_down",
    "adapter_fusion_products", "adapter_fusion_mix", "adapter_fusion_grad",
    "adapter_fusion_weights", "adapter_fusion_weights_bwd",
    "prefix_attention_fwd", "prefix_attention_combine", "prefix_attention_delta",
    "prefix_attention_query_grad", "prefix_attention_text_grad", "prefix_attention_prefix_grad",
    "prompt_lookup_fwd", "prompt_lookup_bwd",
}  # fmt: skip


def test_the_names_are_those_of_the_package():
    """And so every kernel is compiled below."""
    sources = [path.read_text() for path in Path(triton.__file__).parent.rglob("*.py")]
    assert set(re.findall(r"^def (\w+)_kernel\(", "".join(sources), re.MULTILINE)) == KERNELS


@pytest.fixture(scope="module")
def compiled():
    """The rows of a target, compiled when it is first asked for."""
    return cache(lambda target: run.compile_table((target,)))


@pytest.fixture(scope="module")
def each_kernel():
    return run.compile_table(("sm_90",), once=True)


def test_each_kernel_is_within_budget(each_kernel):
    assert {row.kernel for row in each_kernel} == KERNELS and len(each_kernel) == len(KERNELS)
    assert [row for row in each_kernel if not row.within_budget()] == []


# Compiled in every case. `peft-kernels report` does so for all of them.
IN_EVERY_CASE = ("sm_80", "sm_90", "sm_100", "gfx942", "other (sm_80)")


def shipped_for(target):
    """Chips whose own GEMM wouldn't compete take the base product from the library.

    Those that copy by descriptors have programs that stay. Without tensor cores the library's is
    the one plan over a dense weight, and nothing is written in terms.
    """
    library = {"multi_tile"} if target in ("sm_75", "other (sm_80)") else set()
    stays = set() if target in ("sm_90", "sm_100") else {"persistent"}
    others = {"tile", "in_loop", "terms"} if target == "sm_75" else set()
    return KERNELS - library - stays - others


@pytest.mark.long
@pytest.mark.parametrize("target", sorted(set(run.TARGETS) - set(IN_EVERY_CASE)))
def test_budget_of_each_kernel(target):
    """In its first case, mostly the heaviest: their tiles are the others', or smaller.

    Of a T4's tensor cores Triton has no instructions: once it has, x is widened for nothing.
    """
    rows = run.compile_table((target,), once=True)
    assert {row.kernel for row in rows} == shipped_for(target)
    assert [row for row in rows if not row.within_budget()] == []
    assert any(row.tensor_core for row in rows) == (target != "sm_75")


@pytest.mark.long
@pytest.mark.parametrize("target", IN_EVERY_CASE)
def test_budget(compiled, target):
    """No spills, shared memory within the chip, 16-bit products on the tensor cores."""
    rows = compiled(target)
    shipped = shipped_for(target)
    assert {row.kernel for row in rows} == shipped
    assert all(row.registers > 0 for row in rows)
    assert [row for row in rows if not row.within_budget()] == []


@pytest.mark.long
@pytest.mark.parametrize(
    ("target", "instruction"),
    [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA"), ("gfx942", "v_mfma_f32")],
)
def test_tensor_core_instructions(compiled, target, instruction):
    rows = [row for row in compiled(target) if row.dtype == "bfloat16" and row.kernel == "tile"]
    assert rows
    for row in rows:
        assert any(name.startswith(instruction) for name in row.tensor_core), row


@pytest.mark.long
@pytest.mark.parametrize(("target", "instruction"), [("sm_90", "HGMMA"), ("sm_100", "UTCHMMA")])
@pytest.mark.parametrize("kernel", ["shrink", "grad_a"])
def test_terms_in_one_operand_are_one_product(compiled, target, instruction, kernel):
    """And three, one after the other, of a rank that leaves no registers for that."""

    def products(r):
        case = f"m=8192 r={r} bf16/f32 dropout"
        rows = [row for row in compiled(target) if row.kernel == kernel and row.case == case]
        (found,) = {row.tensor_core[instruction] for row in rows}
        return found

    assert products(64) == 3 * products(32)


def test_budget_sees_each_excess(each_kernel):
    """A row over any one limit is outside."""
    row = next(row for row in each_kernel if row.kernel == "tile")
    assert row.within_budget()
    assert not replace(row, spills=4).within_budget()
    assert not replace(row, shared=row.shared_limit + 1).within_budget()
    assert not replace(row, tensor_core={}).within_budget()


def test_unknown_target():
    with pytest.raises(ValueError, match="targets must be among sm_75"):
        run.compile_table(("sm_42",))
