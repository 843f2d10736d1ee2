"""The wrapper of CPUs: linear layers' slices, slots, logits' rows, steps and bits."""

import pytest
import torch

pytest.importorskip("vllm")

from vllm.lora.layers import LoRAMapping
from vllm_layers import (
    DTYPES,
    RANKS,
    K,
    check,
    fill,
    filled,
    linear,
    logits,
    random_adapter,
    step,
    wrapper,
)

from peft_kernels import backend_of
from peft_kernels.integrations.vllm import prompt_rows
from peft_kernels.integrations.vllm.pages import pages_of_b
from peft_kernels.integrations.vllm.punica import PunicaWrapperPEFTKernels

IDS = [0, -1, 3, 1, 1, -1, 2, 0, 0, 3]

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_kernels_are_the_native_ones():
    assert all(backend_of("multi_lora_linear", "cpu", dtype) == "cpu" for dtype in DTYPES)


def test_the_wrapper_has_all_that_vllm_calls_on_a_cpu():
    from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase as Base
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    public = {n for n in vars(PunicaWrapperCPU) if not n.startswith("_")}
    own = {n for n in public if hasattr(PunicaWrapperPEFTKernels, n)}
    base = {n for n in own if getattr(PunicaWrapperPEFTKernels, n) is getattr(Base, n, None)}
    assert public == own and not base


# ---- linear layers -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", [(56,), (24, 24), (24, 8, 13)], ids=str)
def test_linear_layers_and_packed_ones(widths, dtype):
    layer = linear(len(RANKS), 64, K, widths, dtype)
    made, adapters = filled(layer, widths, dtype)
    step(made, IDS, [0])
    x, y = torch.randn(len(IDS), K).to(dtype), torch.randn(len(IDS), sum(widths)).to(dtype)
    before = y.clone()
    made.add_lora_linear(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, layer.output_slices)
    check(y, before, x, adapters, IDS, "y")
    without = torch.tensor(IDS) < 0
    assert torch.equal(y[without], before[without])


def test_a_slice_without_its_adapter_stays():
    layer = linear(2, 16, K, (24, 24), torch.float32)
    made = wrapper(layer)
    (a, _), (b, _) = random_adapter(8, K, (24, 24), torch.float32)
    layer.set_lora(1, [a, None], [b, None])
    step(made, [1], [1])
    x, y = torch.randn(1, K), torch.randn(1, 48)
    before = y.clone()
    made.add_lora_linear(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, (24, 24))
    check(y[:, :24], before[:, :24], x, [None, ([a], [b])], [1], "y")
    assert torch.equal(y[:, 24:], before[:, 24:])


@pytest.mark.parametrize("most", [1, 12])
def test_largest_ranks_that_are_no_whole_pages(most):
    layer = linear(3, most, K, (56,), torch.float32)
    made, adapters = filled(layer, (56,), torch.float32, ranks=[most, 1, most])
    step(made, [0, 1, 2], [0])
    x, y = torch.randn(3, K), torch.zeros(3, 56)
    made.add_lora_linear(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, (56,))
    check(y, torch.zeros_like(y), x, adapters, [0, 1, 2], "y")


# ---- slots -------------------------------------------------------------------------------------


def ranks_of(made, layer):
    return [made._pages_of(b).ranks.tolist() for b in layer.lora_b_stacked]


def test_the_ranks_read_are_the_adapters_own():
    layer = linear(len(RANKS), 64, K, (24, 8), torch.float32)
    made, _ = filled(layer, (24, 8), torch.float32)
    assert ranks_of(made, layer) == [RANKS, RANKS]
    fill(layer, [random_adapter(5, K, (24, 8), torch.float32)])
    layer.reset_lora(1)
    assert ranks_of(made, layer) == [[5, 0, 16, 3]] * 2


def test_an_adapter_in_a_used_slot_has_nothing_of_the_former():
    layer = linear(1, 64, K, (56,), torch.float32)
    made, _ = filled(layer, (56,), torch.float32, ranks=[64])
    adapters = [random_adapter(8, K, (56,), torch.float32)]
    fill(layer, adapters)
    step(made, [0], [0])
    x, y = torch.randn(1, K), torch.zeros(1, 56)
    made.add_lora_linear(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, (56,))
    check(y, torch.zeros_like(y), x, adapters, [0], "y")


def test_a_layer_has_the_storage_that_vllm_gave_it_and_no_more():
    layer = linear(4, 64, K, (24, 8), torch.bfloat16)
    a = [stacked.data_ptr() for stacked in layer.lora_a_stacked]
    shapes = [stacked.shape for stacked in layer.lora_b_stacked]
    made = wrapper(layer)
    assert [stacked.data_ptr() for stacked in layer.lora_a_stacked] == a
    assert [stacked.shape for stacked in layer.lora_b_stacked] == shapes
    for stacked, n in zip(layer.lora_b_stacked, (24, 8), strict=True):
        assert stacked.untyped_storage().nbytes() == 4 * 64 * n * 2
    stacks = layer.lora_a_stacked, layer.lora_b_stacked
    layer.set_mapping(made)  # once more: they stay
    assert stacks[0] is layer.lora_a_stacked and stacks[1] is layer.lora_b_stacked


# ---- logits ------------------------------------------------------------------------------------


def test_logits_whose_rows_lie_apart():
    layer = logits(len(RANKS), 64, K, 50, torch.float32)
    made, adapters = filled(layer, (50,), torch.float32)
    step(made, [2, -1, 0], IDS)
    whole = torch.randn(len(IDS), 80)
    x, y, before = torch.randn(len(IDS), K), whole[:, 10:60], whole.clone()
    made.add_lora_logits(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0)
    check(y, before[:, 10:60], x, adapters, IDS, "logits")
    assert torch.equal(whole[:, :10], before[:, :10])
    assert torch.equal(whole[:, 60:], before[:, 60:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_logits_has_the_same_bits_whatever_its_neighbours(dtype):
    layer = logits(len(RANKS), 64, K, 50, dtype)
    made, _ = filled(layer, (50,), dtype)
    x, y = torch.randn(len(IDS), K).to(dtype), torch.randn(len(IDS), 50).to(dtype)

    def run(rows):
        step(made, [2], [IDS[i] for i in rows])
        out = y[rows].clone()
        made.add_lora_logits(out, x[rows], layer.lora_a_stacked, layer.lora_b_stacked, 1.0)
        return out

    every = list(range(len(IDS)))
    together = run(every)
    assert torch.equal(run(every[::-1]), together.flip(0))
    for i in every:
        assert torch.equal(run([i])[0], together[i])


def test_without_lora_in_a_step_nothing_is_looked_at():
    layer = logits(2, 8, K, 50, torch.float32)
    made = wrapper(layer)
    step(made, [-1, -1], [-1])
    y = torch.randn(3, 50)
    before = y.clone()
    made.add_lora_logits(y, None, None, None, 1.0)
    made.add_lora_linear(y, None, None, None, 1.0, (50,))
    assert torch.equal(y, before)


def test_both_of_vllms_runners_ask_for_prompts_as_is_known_here():
    """What names the methods is looked up by name alone."""
    import inspect
    from importlib import import_module

    for module, methods in prompt_rows._ASKING.items():
        for owner, name, position in methods:
            method = getattr(getattr(import_module(module), owner), name)
            assert list(inspect.signature(method).parameters)[position] == "hidden_states"


# ---- steps -------------------------------------------------------------------------------------


def test_rows_beyond_the_step_have_no_adapter():
    layer = linear(len(RANKS), 64, K, (56,), torch.float32)
    made, adapters = filled(layer, (56,), torch.float32)
    step(made, [1] * 9, [1])
    step(made, IDS[:4], [1])
    x, y = torch.randn(9, K), torch.randn(9, 56)
    before = y.clone()
    made.add_lora_linear(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, (56,))
    check(y, before, x, adapters, [*IDS[:4], *[-1] * 5], "y")
    assert torch.equal(y[4:], before[4:])


@pytest.mark.parametrize("rows", [2, 65])
def test_rows_that_can_not_be_told_apart_are_refused(rows):
    layer = logits(1, 8, K, 50, torch.float32)
    made, _ = filled(layer, (50,), torch.float32, ranks=[8])
    step(made, [0, 0, -1], [0, 0, -1])
    y = torch.zeros(rows, 50)
    with pytest.raises(ValueError, match=f"3 rows of logits, and at most 64 rows; it has {rows}"):
        made.add_lora_logits(
            y, torch.zeros(rows, K), layer.lora_a_stacked, layer.lora_b_stacked, 1.0
        )
    assert not y.any()


def test_the_slots_are_those_of_the_adapters_names():
    made = wrapper()
    mapping = LoRAMapping((30, 30, 0, 10), (30, 0, 10))
    made.update_metadata(mapping, [10, None, 30], 4, 100)
    assert made._tokens.ids[:5].tolist() == [2, 2, -1, 0, -1]
    assert made._prompts.ids[:4].tolist() == [2, -1, 0, -1]


# ---- one product alone -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shrink_and_expand_by_themselves_have_the_bits_of_the_whole(dtype):
    widths = 24, 8
    layer = linear(len(RANKS), 64, K, widths, dtype)
    made, _ = filled(layer, widths, dtype)
    step(made, IDS, [0])
    x, y = torch.randn(len(IDS), K).to(dtype), torch.randn(len(IDS), 32).to(dtype)
    whole, s = y.clone(), torch.zeros(2, len(IDS), 64)
    made.add_shrink(s, x, layer.lora_a_stacked, 1.0)
    made.add_expand(y, s, layer.lora_b_stacked, widths)
    made.add_lora_linear(whole, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, widths)
    assert torch.equal(y, whole)


@pytest.mark.parametrize("rank", [8, 5])
def test_b_is_kept_in_the_memory_that_it_had(rank):
    values = torch.randn(3, 1, 6, rank)
    stacked = values.clone()
    pages = pages_of_b(stacked)
    assert torch.equal(pages.stacked, values)
    assert torch.equal(pages.rows.view(3, -1, 6)[:, :rank], values[:, 0].mT)
    lies_there = pages.rows.data_ptr() == stacked.data_ptr()
    assert lies_there == (rank == 8)  # a whole page of rank rows
