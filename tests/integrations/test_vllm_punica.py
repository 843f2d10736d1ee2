"""What vLLM's layers get from the wrapper: every product against float64, and who is served."""

import pytest
import torch
from errors import assert_as_good_as

pytest.importorskip("vllm")

from vllm.lora.layers import LoRAMapping
from vllm_layers import (
    embedding,
    expected,
    fill,
    linear,
    logits,
    random_adapter,
    step,
    wrapper,
)

from peft_kernels import backend_of
from peft_kernels.integrations.vllm import prompt_rows
from peft_kernels.integrations.vllm.punica import PunicaWrapperPEFTKernels
from peft_kernels.integrations.vllm.punica_gpu import PunicaWrapperPEFTKernelsGPU

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RANKS = [8, 64, 16, 3]
IDS = [0, -1, 3, 1, 1, -1, 2, 0, 0, 3]
K = 40

pytestmark = pytest.mark.filterwarnings("ignore")


def check(y, before, x, adapters, ids, name):
    rest = before, x, adapters, ids
    assert_as_good_as(y, expected(*rest, y.dtype), expected(*rest, torch.float64), name)


def filled(layer, widths, dtype, ranks=RANKS, k=K):
    adapters = [random_adapter(r, k, widths, dtype) for r in ranks]
    made = wrapper(layer)
    fill(layer, adapters)
    return made, adapters


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


def test_a_scale_and_a_y_that_is_written_anew():
    layer = linear(len(RANKS), 64, K, (56,), torch.float32)
    made, adapters = filled(layer, (56,), torch.float32)
    step(made, IDS, [0])
    x, y = torch.randn(len(IDS), K), torch.randn(len(IDS), 56)
    stacks = layer.lora_a_stacked, layer.lora_b_stacked
    made.add_lora_linear(y, x, *stacks, 0.25, (56,), add_inputs=False)
    check(4 * y, torch.zeros_like(y), x, adapters, IDS, "y")


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
    return [made._of(b).ranks.tolist() for b in layer.lora_b_stacked]


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


def test_adapters_of_no_layer_that_is_known_are_refused():
    made = wrapper()
    step(made, [0], [0])
    a, b = torch.zeros(1, 1, 8, K), torch.zeros(1, 1, 56, 8)
    with pytest.raises(RuntimeError, match="PEFT_KERNELS_VLLM=0"):
        made.add_lora_linear(torch.zeros(1, 56), torch.zeros(1, K), (a,), (b,), 1.0, (56,))


# ---- logits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("y_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("padding", [0, 7])
def test_logits_as_wide_as_a_padded_vocabulary(padding, y_dtype, dtype):
    layer = logits(len(RANKS), 64, K, 50, dtype)
    made, adapters = filled(layer, (50,), dtype)
    step(made, [2, -1, 0], IDS)
    x = torch.randn(len(IDS), K).to(dtype)
    y = torch.randn(len(IDS), 50 + padding).to(y_dtype or dtype)
    before = y.clone()
    made.add_lora_logits(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0)
    check(y, before, x, adapters, IDS, "logits")
    assert torch.equal(y[:, 50:], before[:, 50:])


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


def test_other_rows_than_the_steps_have_logits_if_no_adapter_of_it_changes_them():
    """As of the log-probabilities of a prompt."""
    layer = logits(2, 8, K, 50, torch.float32)
    made, _ = filled(layer, (50,), torch.float32, ranks=[8])
    stacks = layer.lora_a_stacked, layer.lora_b_stacked
    step(made, [1, 1, -1], [1, -1])
    y = torch.randn(5, 50)
    before = y.clone()
    made.add_lora_logits(y, torch.randn(5, K), *stacks, 1.0)
    assert torch.equal(y, before)
    step(made, [1, 1, 0], [1, 0])
    with pytest.raises(ValueError, match="2 rows of logits"):
        made.add_lora_logits(y[:1], torch.randn(1, K), *stacks, 1.0)


def test_logits_of_prompts_are_slices_of_a_steps_hidden_states():
    """As vLLM's runner asks for them."""
    layer = logits(len(RANKS), 64, K, 50, torch.float32)
    made, adapters = filled(layer, (50,), torch.float32)
    step(made, IDS, [0])
    states, y = torch.randn(len(IDS), K), torch.zeros(5, 50)
    stacks = layer.lora_a_stacked, layer.lora_b_stacked

    def ask(runner, hidden_states):
        made.add_lora_logits(y, hidden_states[3:8], *stacks, 1.0)
        with pytest.raises(ValueError, match="slice of the step's hidden states"):
            made.add_lora_logits(y, hidden_states[3:8].clone(), *stacks, 1.0)

    prompt_rows._watched(ask, 1)(None, states)
    check(y, torch.zeros_like(y), states[3:8], adapters, IDS[3:8], "logits")
    with pytest.raises(ValueError, match="1 rows of logits, and at most 64 rows; it has 0"):
        made.add_lora_logits(y[:0], states[:0], *stacks, 1.0)


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
def test_embeddings(dtype):
    layer = embedding(len(RANKS), 64, 30, 56, dtype)
    made, adapters = filled(layer, (56,), dtype, k=30)
    step(made, IDS, [0])
    tokens = torch.randint(30, (len(IDS),))
    rows = tokens + made._embeddings_indices[: len(IDS)] // 100 * 30
    y = torch.randn(len(IDS), 56).to(dtype)
    before = y.clone()
    made.add_lora_embedding(y, layer.lora_a_stacked_2d[rows], layer.lora_b_stacked)
    x = torch.nn.functional.one_hot(tokens, 30).to(dtype)
    check(y, before, x, adapters, IDS, "embeddings")
    without = torch.tensor(IDS) < 0
    assert torch.equal(y[without], before[without])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 5])
def test_shrink_and_expand_by_themselves_make_the_whole(offset, dtype):
    widths = 24, 8
    layer = linear(len(RANKS), 64, K, widths, dtype)
    made, adapters = filled(layer, widths, dtype)
    step(made, IDS, [0])
    x, y = torch.randn(len(IDS), K).to(dtype), torch.randn(len(IDS), 40).to(dtype)
    before = y.clone()
    s = torch.zeros(2, len(IDS), 64)
    made.add_shrink(s, x, layer.lora_a_stacked, 1.0)
    made.add_expand(y, s, layer.lora_b_stacked, widths, offset_start=offset, add_inputs=True)
    own = slice(offset, offset + 32)
    check(y[:, own], before[:, own], x, adapters, IDS, "y")
    assert torch.equal(y[:, :offset], before[:, :offset])
    assert torch.equal(y[:, offset + 32 :], before[:, offset + 32 :])
    whole = before[:, own].contiguous()
    made.add_lora_linear(whole, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, widths)
    assert torch.equal(y[:, own], whole)


def test_an_expand_that_writes_anew_and_one_without_room():
    layer = linear(1, 8, K, (24,), torch.float32)
    made, _ = filled(layer, (24,), torch.float32, ranks=[8])
    step(made, [0, -1], [0])
    y, s = torch.ones(2, 30), torch.zeros(1, 2, 8)
    made.add_expand(y, s, layer.lora_b_stacked, (24,), offset_start=2, add_inputs=False)
    assert not y[:, 2:26].any() and y[:, :2].all() and y[:, 26:].all()
    with pytest.raises(ValueError, match=r"\[24\] columns from column 7 on; it has 30"):
        made.add_expand(y, s, layer.lora_b_stacked, (24,), offset_start=7)


def test_heads_of_a_classifier():
    made = wrapper()
    step(made, [1, 0, -1, 2], [1, 0, -1, 2])
    weights, biases = torch.randn(3, 1, 5, K), torch.randn(3, 5)
    enabled = torch.tensor([True, True, False])
    x, y = torch.randn(4, K), torch.randn(4, 5)
    before = y.clone()
    made.apply_lora_full_linear(y, x, weights, biases, enabled)
    for row, slot in enumerate([1, 0]):
        torch.testing.assert_close(y[row], weights[slot, 0] @ x[row] + biases[slot])
    assert torch.equal(y[2:], before[2:])


# ---- odd steps ---------------------------------------------------------------------------------

KINDS = [PunicaWrapperPEFTKernels, PunicaWrapperPEFTKernelsGPU]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("ids", [[], [-1], [-1] * 20], ids=len)
@pytest.mark.parametrize("padding", [0, 3])
def test_a_step_without_an_adapter_or_without_rows_changes_nothing(padding, ids, kind):
    rows, k, widths = len(ids) + padding, 30, (24, 8)
    both = linear(2, 16, k, widths, torch.float32)
    sharded, words, head = (
        linear(2, 16, k, widths, torch.float32),
        embedding(2, 16, k, 32, torch.float32),
        logits(2, 16, k, 32, torch.float32),
    )
    sharded.lora_a_stacked = tuple(a[:, :, :8].contiguous() for a in sharded.lora_a_stacked)
    made = wrapper(both, sharded, words, head, kind=kind)
    for layer, own in ((both, widths), (sharded, widths), (words, (32,)), (head, (32,))):
        fill(layer, [random_adapter(8, k, own, torch.float32)] * 2)
    step(made, [1, 0, 1], [1])
    step(made, ids, ids)
    x, y = torch.randn(rows, k), torch.randn(rows, 32)
    before = y.clone()
    made.add_lora_linear(y, x, both.lora_a_stacked, both.lora_b_stacked, 1.0, widths)
    s = torch.zeros(2, rows, 8)
    made.add_shrink(s, x, sharded.lora_a_stacked, 1.0)
    made.add_expand(y, torch.randn(2, rows, 16), sharded.lora_b_stacked, widths)
    made.add_lora_embedding(y, torch.randn(rows, 16), words.lora_b_stacked)
    made.add_lora_logits(y, x, head.lora_a_stacked, head.lora_b_stacked, 1.0)
    whole = torch.randn(2, 1, 32, k), torch.randn(2, 32), torch.tensor([True, True])
    made.apply_lora_full_linear(y[: len(ids)], x[: len(ids)], *whole)
    assert torch.equal(y, before) and not s.any()
