"""A soft prompt beside layers to which it matters whether the prompt stands in the rows."""

import copy

import pytest
import torch
from test_pool_rows import ATTENTION, NAMES, in_pool, tokens
from tiny_models import make_llama
from torch import nn

from peft_kernels.integrations.transformers.adapters import insert_adapters
from peft_kernels.integrations.transformers.soft_prompts import add_prompt
from peft_kernels.nn import PromptTuning


def prompt_of(model, **options):
    torch.manual_seed(1)
    width = model.get_input_embeddings().embedding_dim
    return PromptTuning(3, width, init="normal", std=1.0, **options)


def prompted_in_pool(as_prefix, **options):
    model, pool = in_pool(make_llama, ATTENTION)
    add_prompt(model, prompt_of(model, **options), as_prefix=as_prefix)
    return model, pool


def alone(model, pool, ids, task_ids):
    """What each row gets in a batch and a route of its own."""
    found = []
    for name, task, row in zip(NAMES, task_ids, ids, strict=True):
        with pool.route([name]):
            found.append(model(row[None], task_ids=[task]).logits[0])
    return torch.stack(found)


@pytest.mark.parametrize("task_ids", [[0, 1], [1, 0], [1, 1]])
@torch.no_grad()
def test_a_prompt_runs_under_its_own_row_s_adapter(task_ids):
    ids = tokens(2)
    model, pool = prompted_in_pool("auto", tasks=2)
    in_rows, pool_in_rows = prompted_in_pool(False, tasks=2)
    expected = alone(in_rows, pool_in_rows, ids, task_ids)
    with pool.route(NAMES):
        torch.testing.assert_close(model(ids, task_ids=task_ids).logits, expected)
    torch.testing.assert_close(alone(model, pool, ids, task_ids), expected)


@torch.no_grad()
def test_so_it_does_in_generate():
    ids, made = tokens(2), []
    for as_prefix in ("auto", False):
        model, pool = prompted_in_pool(as_prefix, tasks=2)
        with pool.route(NAMES):
            made.append(model.generate(ids, task_ids=[1, 0], max_new_tokens=4, do_sample=False))
    assert torch.equal(*made)


def test_a_prompt_that_must_be_a_prefix_refuses_a_route_by_row():
    model, pool = prompted_in_pool(True)
    with pytest.raises(ValueError, match="a pool's route tells rows apart"), pool.route(NAMES):
        model(tokens(2))


@torch.no_grad()
def test_a_gate_that_is_a_mean_over_tokens_keeps_the_prompt_in_the_rows():
    torch.manual_seed(0)
    model = make_llama().eval()
    insert_adapters(model, "pfeiffer", bottleneck_size=4, gating=True)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.2)
    other = copy.deepcopy(model)
    add_prompt(model, prompt_of(model))
    add_prompt(other, prompt_of(other), as_prefix=False)
    ids = tokens(2)
    torch.testing.assert_close(model(ids).logits, other(ids).logits)
