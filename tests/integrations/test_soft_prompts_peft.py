"""Soft prompts against PEFT's: the same where PEFT's are right, and where they aren't."""

import copy

import pytest
import torch
from prefix_models import tokens
from prompt_models import TOLERANCE, L, S, make, padded, relative

from peft_kernels.integrations.transformers.soft_prompts import add_prompt
from peft_kernels.nn import PromptTuning, PTuning, Template
from peft_kernels.nn._template import Input, Slots
from peft_kernels.tools.bench.suites import prompt_lookup as suite

peft = pytest.importorskip("peft")

T = 3


def prompt_tuning(dtype):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=L)
    return config, PromptTuning(L, 16, dtype=dtype), {"prompt": "embedding.weight"}


def p_tuning_mlp(dtype):
    return p_tuning("MLP", dtype)


def p_tuning_lstm(dtype):
    return p_tuning("LSTM", dtype)


def p_tuning(kind, dtype):
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=L,
        encoder_reparameterization_type=kind,
        encoder_hidden_size=12,
    )
    template = Template([Slots(L), Input("x")], model="causal")
    prompt = PTuning(template, 16, encoder=kind.lower(), hidden_size=12, dtype=dtype)
    theirs = {"slots": "embedding.weight"}
    for name, _ in prompt.named_parameters():
        head, _, rest = name.partition(".")
        if rest:
            theirs[name] = f"{head}_head.{rest}"
    return config, prompt, theirs


def multitask(dtype):
    config = peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=L, num_tasks=T, num_ranks=2
    )
    prompt = PromptTuning(L, 16, tasks=T, rank=2, dtype=dtype)
    theirs = {
        "prompt": "embedding.weight",
        "task_cols": "prefix_task_cols",
        "task_rows": "prefix_task_rows",
    }
    return config, prompt, theirs


KINDS = [prompt_tuning, p_tuning_mlp, p_tuning_lstm, multitask]


def both(kind, name, dtype, as_prefix="auto"):
    """PEFT's model and ours with the same weights, and the names of PEFT's parameters by ours."""
    torch.manual_seed(0)
    base = make(name, dtype)
    config, prompt, names = kind(dtype)
    ours = copy.deepcopy(base)
    theirs = peft.get_peft_model(base, config).to(dtype).eval()
    encoder = theirs.prompt_encoder["default"]
    weights = dict(encoder.named_parameters())
    assert set(names.values()) == set(weights)
    with torch.no_grad():
        for mine, parameter in prompt.named_parameters():
            weight = weights[names[mine]]
            weight.normal_(std=0.5)
            parameter.copy_(weight.view_as(parameter))
    add_prompt(ours, prompt, as_prefix=as_prefix)
    return theirs, ours, {mine: weights[name] for mine, name in names.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("as_prefix", ["auto", False])
@pytest.mark.parametrize("padding", [False, True])
def test_the_same_where_padding_is_on_the_right(kind, dtype, name, as_prefix, padding):
    theirs, ours, weights = both(kind, name, dtype, as_prefix)
    inputs = padded("right")
    if not padding:
        inputs = {"input_ids": tokens(3, S)}
        inputs["labels"] = inputs["input_ids"]
    if kind is multitask:
        inputs["task_ids"] = torch.tensor([2, 0, 2])
    wanted, found = theirs(**inputs), ours(**inputs)
    real = inputs.get("attention_mask", torch.ones(3, S)).bool()
    bound = TOLERANCE[dtype]
    assert found.logits.shape == (3, S, 32)
    assert wanted.logits.shape == (3, L + S, 32)
    assert relative(found.logits[real], wanted.logits[:, L:][real]) <= bound
    assert relative(found.loss, wanted.loss) <= bound
    wanted.loss.backward()
    found.loss.backward()
    for mine, parameter in ours.soft_prompt.named_parameters():
        expected = weights[mine].grad.view_as(parameter)
        assert expected.any(), mine
        assert relative(parameter.grad, expected) <= bound, mine
    own = set(ours.soft_prompt.parameters())
    assert all(p.grad is None for p in ours.parameters() if p not in own)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@torch.no_grad()
def test_left_padding_moves_peft_and_not_us(name):
    """PEFT has [prompt][padding][text], with the padding's places counted."""
    theirs, ours, _ = both(prompt_tuning, name, torch.float64)
    ids, pads = tokens(1, S), 3
    left = torch.cat([torch.zeros(1, pads, dtype=torch.long), ids], 1)
    mask = (torch.arange(pads + S) >= pads).long()[None]
    alone = theirs(input_ids=ids).logits[:, L:]
    moved = theirs(input_ids=left, attention_mask=mask).logits[:, L + pads :]
    assert relative(ours(ids).logits, alone) < 1e-12
    assert relative(ours(left, attention_mask=mask).logits[:, pads:], alone) < 1e-12
    assert relative(moved, alone) > 1e-4


@torch.no_grad()
def test_peft_ignores_which_row_has_which_prompt():
    """PEFT's way to mix adapters in a batch, ``adapter_names``, leaves every row the active one."""
    base = make("llama", torch.float64)
    ours = copy.deepcopy(base)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=L)
    theirs = peft.get_peft_model(base, config, adapter_name="a")
    theirs.add_adapter("b", config)
    theirs.double().eval()
    prompt = PromptTuning(L, 16, tasks=2, dtype=torch.float64)
    for row, name in zip(prompt.prompt, "ab", strict=True):
        row.copy_(theirs.prompt_encoder[name].embedding.weight)
    add_prompt(ours, prompt)
    ids = tokens(2, S)
    alone = []
    for row, name in zip(ids, "ab", strict=True):
        theirs.set_adapter(name)
        alone.append(theirs(input_ids=row[None]).logits[0, L:])
    alone = torch.stack(alone)
    theirs.set_adapter("a")
    mixed = theirs(input_ids=ids, adapter_names=["a", "b"]).logits[:, L:]
    assert relative(ours(ids, task_ids=[0, 1]).logits, alone) < 1e-12
    assert relative(mixed[0], alone[0]) < 1e-12
    assert relative(mixed[1], alone[1]) > 1e-2


@torch.no_grad()
def test_t5_is_the_same():
    base = make("t5", torch.float64)
    ours = copy.deepcopy(base)
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=L)
    theirs = peft.get_peft_model(base, config).double().eval()
    prompt = PromptTuning(L, 16, dtype=torch.float64)
    # PEFT's has rows for the decoder too, which its prompt tuning leaves unused.
    prompt.prompt[0].copy_(theirs.prompt_encoder["default"].embedding.weight[:L])
    add_prompt(ours, prompt)
    inputs = padded("right") | {"labels": tokens(3, 4)}
    assert relative(ours(**inputs).logits, theirs(**inputs).logits) < 1e-12


def test_the_benchmarks_step_is_the_same_everywhere():
    case = suite.Case(2, 8, 64, L, backward=True, layers=2)
    made = {}
    for name, implementation in suite.implementations(case).items():
        x = implementation.x.detach().requires_grad_()
        loss = implementation.forward(x)
        made[name] = loss.detach(), *torch.autograd.grad(loss, x)
    assert made.keys() == {suite.BARE, suite.FUSED, "in the rows", "peft"}
    expected = made.pop(suite.BARE)
    for name, found in made.items():
        for a, b in zip(found, expected, strict=True):
            assert (a.view_as(b) - b).norm() <= 1e-5 * b.norm(), name
