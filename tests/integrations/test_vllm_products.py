"""What vLLM's layers ask of the wrapper of any device: each product against float64, and odd steps.

The GPU's runs on the CPU, its kernels interpreted.
"""

from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("vllm")

from vllm_layers import (
    DTYPES,
    RANKS,
    K,
    check,
    embedding,
    fill,
    filled,
    linear,
    logits,
    random_adapter,
    step,
    wrapper,
)

import peft_kernels
from peft_kernels.integrations.vllm import prompt_rows
from peft_kernels.integrations.vllm.punica import PunicaWrapperPEFTKernels
from peft_kernels.integrations.vllm.punica_gpu import PunicaWrapperPEFTKernelsGPU

IDS = [0, -1, 3, 1, 1, -1, 2, 0, 0, 3, 1, 0, -1, 0, 2, 1, 1, 0]
KINDS = [PunicaWrapperPEFTKernels, PunicaWrapperPEFTKernelsGPU]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request):
    on_gpu = request.param is PunicaWrapperPEFTKernelsGPU
    with peft_kernels.backend("triton") if on_gpu else nullcontext():
        yield request.param


# ---- linear layers and embeddings --------------------------------------------------------------


def test_a_scale_and_a_y_that_is_written_anew(kind):
    layer = linear(len(RANKS), 64, K, (24, 8), torch.float32)
    made, adapters = filled(layer, (24, 8), torch.float32, kind=kind)
    step(made, IDS, [0])
    x, y = torch.randn(len(IDS), K), torch.randn(len(IDS), 32)
    stacks = layer.lora_a_stacked, layer.lora_b_stacked
    made.add_lora_linear(y, x, *stacks, 0.25, (24, 8), add_inputs=False)
    check(4 * y, torch.zeros_like(y), x, adapters, IDS, "y")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embeddings(dtype, kind):
    layer = embedding(len(RANKS), 64, 30, 56, dtype)
    made, adapters = filled(layer, (56,), dtype, k=30, kind=kind)
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
def test_shrink_and_expand_by_themselves_make_the_whole(offset, dtype, kind):
    """As where adapters are shared out: A has fewer rank rows here than B."""
    widths, ranks = (24, 8), (8, 5, 3, 1)
    layer = linear(len(ranks), 16, K, widths, dtype)
    layer.lora_a_stacked = tuple(a[:, :, :8].contiguous() for a in layer.lora_a_stacked)
    made, adapters = filled(layer, widths, dtype, ranks, kind=kind)
    step(made, IDS, [0])
    x, y = torch.randn(len(IDS), K).to(dtype), torch.randn(len(IDS), 40).to(dtype)
    before = y.clone()
    s = torch.zeros(2, len(IDS), 8)
    made.add_shrink(s, x, layer.lora_a_stacked, 1.0)
    s = torch.cat([s, torch.zeros_like(s)], 2)
    made.add_expand(y, s, layer.lora_b_stacked, widths, offset_start=offset, add_inputs=True)
    own, end = slice(offset, offset + 32), offset + 32
    check(y[:, own], before[:, own], x, adapters, IDS, "y")
    assert torch.equal(y[:, :offset], before[:, :offset])
    assert torch.equal(y[:, end:], before[:, end:])


def test_an_expand_that_writes_anew_and_one_without_room(kind):
    layer = linear(1, 16, K, (24,), torch.float32)
    layer.lora_a_stacked = tuple(a[:, :, :8].contiguous() for a in layer.lora_a_stacked)
    made, _ = filled(layer, (24,), torch.float32, ranks=[8], kind=kind)
    step(made, [0, -1], [0])
    y, s = torch.ones(2, 30), torch.zeros(1, 2, 16)
    made.add_expand(y, s, layer.lora_b_stacked, (24,), offset_start=2, add_inputs=False)
    assert not y[:, 2:26].any() and y[:, :2].all() and y[:, 26:].all()
    with pytest.raises(ValueError, match=r"\[24\] columns from column 7 on; it has 30"):
        made.add_expand(y, s, layer.lora_b_stacked, (24,), offset_start=7)


def test_adapters_of_no_layer_that_is_known_are_refused(kind):
    made = wrapper(kind=kind)
    step(made, [0], [0])
    a, b = torch.zeros(1, 1, 8, K), torch.zeros(1, 1, 56, 8)
    with pytest.raises(RuntimeError, match="PEFT_KERNELS_VLLM=0"):
        made.add_lora_linear(torch.zeros(1, 56), torch.zeros(1, K), (a,), (b,), 1.0, (56,))


# ---- logits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("y_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize(("rows", "padding"), [(18, 0), (18, 7), (7, 7)])
def test_logits_as_wide_as_a_padded_vocabulary(rows, padding, y_dtype, dtype, kind):
    layer = logits(len(RANKS), 64, K, 50, dtype)
    made, adapters = filled(layer, (50,), dtype, kind=kind)
    ids = IDS[:rows]
    step(made, [2, -1, 0], ids)
    x = torch.randn(rows, K).to(dtype)
    y = torch.randn(rows, 50 + padding).to(y_dtype or dtype)
    before = y.clone()
    made.add_lora_logits(y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0)
    check(y, before, x, adapters, ids, "logits")
    assert torch.equal(y[:, 50:], before[:, 50:])


def test_other_rows_than_the_steps_have_logits_if_no_adapter_of_it_changes_them(kind):
    """As of the log-probabilities of a prompt."""
    layer = logits(2, 8, K, 50, torch.float32)
    made, _ = filled(layer, (50,), torch.float32, ranks=[8], kind=kind)
    stacks = layer.lora_a_stacked, layer.lora_b_stacked
    step(made, [1, 1, -1], [1, -1])
    y = torch.randn(5, 50)
    before = y.clone()
    made.add_lora_logits(y, torch.randn(5, K), *stacks, 1.0)
    assert torch.equal(y, before)
    step(made, [1, 1, 0], [1, 0])
    with pytest.raises(ValueError, match=r"2 rows of logits.*it has 1"):
        made.add_lora_logits(y[:1], torch.randn(1, K), *stacks, 1.0)


def test_logits_of_prompts_are_slices_of_a_steps_hidden_states(kind):
    """As vLLM's runner asks for them."""
    layer = logits(len(RANKS), 64, K, 50, torch.float32)
    made, adapters = filled(layer, (50,), torch.float32, kind=kind)
    step(made, IDS, [0])
    states, y = torch.randn(len(IDS), K), torch.zeros(5, 50)
    stacks = layer.lora_a_stacked, layer.lora_b_stacked

    def ask(runner, hidden_states):
        made.add_lora_logits(y, hidden_states[3:8], *stacks, 1.0)
        with pytest.raises(ValueError, match="slice of the step's hidden states"):
            made.add_lora_logits(y, hidden_states[3:8].clone(), *stacks, 1.0)

    prompt_rows._watched(ask, 1)(None, states)
    check(y, torch.zeros_like(y), states[3:8], adapters, IDS[3:8], "logits")
    with pytest.raises(ValueError, match=r"1 rows of logits.*it has 0"):
        made.add_lora_logits(y[:0], states[:0], *stacks, 1.0)


# ---- odd steps ---------------------------------------------------------------------------------


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


def test_heads_of_a_classifier(kind):
    made = wrapper(kind=kind)
    step(made, [1, 0, -1, 2], [1, 0, -1, 2])
    weights, biases = torch.randn(3, 1, 5, K), torch.randn(3, 5)
    enabled = torch.tensor([True, True, False])
    x, y = torch.randn(4, K), torch.randn(4, 5)
    before = y.clone()
    made.apply_lora_full_linear(y, x, weights, biases, enabled)
    for row, slot in enumerate([1, 0]):
        torch.testing.assert_close(y[row], weights[slot, 0] @ x[row] + biases[slot])
    assert torch.equal(y[2:], before[2:])
