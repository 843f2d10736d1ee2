"""What models with a soft prompt take and answer: places, positions, labels and logits."""

import copy

import pytest
import torch
import torch.nn.functional as F
from prefix_models import (
    SIZES,
    assert_close,
    each_decoder,
    tokens,
    transformers,
)
from prompt_models import (
    S,
    both_ways,
    make,
    make_prompt,
    padded,
)

from peft_kernels.integrations.transformers.soft_prompts import add_prompt, task_ids


@pytest.mark.parametrize("position", ["front", "after_padding"])
@pytest.mark.parametrize("as_prefix", ["auto", False])
@each_decoder
def test_padding_changes_nothing(name, as_prefix, position):
    model = make(name)
    add_prompt(model, make_prompt(model, position=position), as_prefix=as_prefix)
    left = padded("left")
    logits = model(**{k: v for k, v in left.items() if k != "labels"}).logits
    loss = model(**left).loss
    losses, counts = [], []
    for row in range(3):
        ids = left["input_ids"][row : row + 1, row:]
        alone = model(ids, labels=ids)
        assert_close(logits[row : row + 1, row:], model(ids).logits)
        assert_close(alone.logits, model(ids).logits)
        losses.append(alone.loss * ids.shape[1])
        counts.append(ids.shape[1])
    assert_close(loss, sum(losses) / sum(counts))


def test_after_bos_keeps_the_classifiers_token():
    config = transformers.BertConfig(
        **SIZES, intermediate_size=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    model = transformers.BertForSequenceClassification(config).double().eval()
    prompt = make_prompt(model, position="after_bos", tasks=2)
    ids, mask = tokens(3, S), torch.ones(3, S, dtype=torch.long)
    words = model.get_input_embeddings()(ids)
    whole = torch.cat([words[:, :1], prompt.prompt[[1, 0, 1]], words[:, 1:]], 1)
    wanted = model(inputs_embeds=whole).logits
    own = model(ids).logits
    add_prompt(model, prompt)
    types = torch.zeros_like(ids)
    found = model(ids, mask, types, task_ids=[1, 0, -1]).logits
    assert_close(found[:2], wanted[:2])
    assert_close(found[2], own[2])


@pytest.mark.parametrize("keep", [1, 2, S, torch.tensor([0, 3, 5])])
@pytest.mark.parametrize("position", ["front", "after_padding", "after_bos"])
@pytest.mark.parametrize("as_prefix", ["auto", False])
def test_logits_to_keep_are_the_texts(keep, position, as_prefix):
    model = make("llama")
    add_prompt(model, make_prompt(model, position=position), as_prefix=as_prefix)
    inputs = padded("left")
    del inputs["labels"]
    every = model(**inputs).logits
    kept = model(**inputs, logits_to_keep=keep).logits
    assert_close(kept, every[:, -keep:] if isinstance(keep, int) else every[:, keep])
    values = model(**inputs, return_dict=False)
    assert_close(values[0], every)


def test_span_of_an_answer():
    config = transformers.BertConfig(**SIZES, intermediate_size=24)
    model = transformers.BertForQuestionAnswering(config).double().eval()
    add_prompt(model, make_prompt(model, position="after_bos"))
    start, end = torch.tensor([0, 2]), torch.tensor([3, S + 9])
    out = model(tokens(2, S), start_positions=start, end_positions=end, output_hidden_states=True)
    assert out.start_logits.shape == out.end_logits.shape == (2, S)
    # The softmax counts the prompt's places too: the loss is at least that of the text's alone.
    least = F.cross_entropy(out.start_logits, start) + F.cross_entropy(out.end_logits[:1], end[:1])
    assert least / 2 < out.loss < least / 2 + 1


@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
def test_classifiers_that_read_the_last_token(kind):
    config = getattr(transformers, f"{kind}Config")(**SIZES, intermediate_size=24, pad_token_id=0)
    one = getattr(transformers, f"{kind}ForSequenceClassification")(config).double().eval()
    other = copy.deepcopy(one)
    prompt = make_prompt(one, tasks=2)
    add_prompt(one, prompt)
    add_prompt(other, copy.deepcopy(prompt), as_prefix=False)
    classes, tasks = torch.tensor([0, 1, 0]), torch.tensor([1, 0, -1])
    results = {}
    for side in ("left", "right"):
        torch.manual_seed(0)
        inputs = padded(side)
        text = inputs["input_ids"][1][inputs["attention_mask"][1].bool()]
        inputs["labels"] = classes
        results[side] = one(**inputs, task_ids=tasks)
        alone = other(text[None], task_ids=[0]).logits
        assert_close(results[side].logits[1:2], alone)
        assert results[side].logits.shape == (3, 2)
    with pytest.raises(ValueError, match="attention_mask must end with a real token"):
        other(**inputs, task_ids=tasks)
    inputs = padded("left") | {"labels": classes}
    a, b = one(**inputs, task_ids=tasks), other(**inputs, task_ids=tasks)
    assert_close(a.logits, b.logits)
    assert_close(a.loss, b.loss)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_prompt_in_float32_and_a_model_in_bfloat16(autocast):
    exact = make("llama", torch.float32)
    one = copy.deepcopy(exact) if autocast else copy.deepcopy(exact).bfloat16()
    other = copy.deepcopy(one)
    prompt = make_prompt(exact, dtype=torch.float32)
    for model in (exact, one):
        add_prompt(model, copy.deepcopy(prompt))
    add_prompt(other, copy.deepcopy(prompt), as_prefix=False)
    inputs = padded("left")
    exact(**inputs).loss.backward()
    wanted = exact.soft_prompt.prompt.grad
    errors = []
    for model in (one, other):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**inputs).loss
        loss.backward()
        grad = model.soft_prompt.prompt.grad
        assert grad.dtype == torch.float32
        errors.append(((grad - wanted).norm() / wanted.norm()).item())
    assert errors[0] <= 1.5 * errors[1], errors


def test_a_copied_model_has_its_own_prompt():
    model = make("llama")
    add_prompt(model, make_prompt(model, tasks=2))
    ids = tokens(2, S)
    with task_ids(model, [0, 1]):
        wanted = model(ids).logits
    other = copy.deepcopy(model)
    with torch.no_grad():
        model.soft_prompt.prompt.zero_()
    with pytest.raises(ValueError, match="task_ids"), task_ids(model, [0, 1]):
        other(ids)
    assert_close(other(ids, task_ids=[0, 1]).logits, wanted)
    assert not torch.allclose(model(ids, task_ids=[0, 1]).logits, wanted)


def test_own_positions_are_moved():
    for model in both_ways("gpt2"):
        ids = tokens(2, S)
        assert_close(model(ids, position_ids=torch.arange(S)[None]).logits, model(ids).logits)
        with pytest.raises(ValueError, match="position_ids must not decrease"):
            model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
