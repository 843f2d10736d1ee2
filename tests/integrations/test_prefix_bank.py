"""PrefixBank: prefixes of several lengths in one batch, each row as with its prefix alone."""

import copy

import pytest
import torch
from prefix_models import (
    DECODERS,
    GREEDY,
    KINDS,
    assert_close,
    each_family,
    gradients,
    hidden,
    inputs_of,
    make,
    tokens,
)
from torch import nn

from peft_kernels.formats.peft_prompts import load_prompt, save_prompt
from peft_kernels.integrations.transformers import add_prefix, prefix_for, remove_prefix
from peft_kernels.integrations.transformers.attention import by_length
from peft_kernels.nn import PrefixBank, PrefixTuning

LENGTHS = {"a": 2, "b": 5, "c": 2}
ROWS = [["c", None, "b", "a"], ["b"] * 4, ["a", None, "c", "c"], [None] * 4]


def prefixes_for(base):
    kinds = {"a": "flat", "b": "mlp", "c": "flat"}
    return {
        name: prefix_for(base, length, **KINDS[kinds[name]]).eval()
        for name, length in LENGTHS.items()
    }


def with_bank(name, shift_positions=None):
    """A model with a bank, and what a row gives alone in a model with its prefix."""
    base = make(name)
    prefixes = prefixes_for(base)
    model, bank = copy.deepcopy(base), PrefixBank(prefixes)
    add_prefix(model, bank, shift_positions=shift_positions)
    models = {None: base}
    for key, prefix in prefixes.items():
        models[key] = copy.deepcopy(base)
        add_prefix(models[key], prefix, shift_positions=shift_positions)
    return model, bank, models


def row_of(inputs, row):
    return {key: value[[row]] for key, value in inputs.items()}


@each_family
@pytest.mark.parametrize("names", ROWS, ids=str)
@torch.no_grad()
def test_a_row_is_what_its_prefix_alone_makes(name, names):
    model, bank, models = with_bank(name)
    inputs = inputs_of(name, rows=4)
    found = hidden(model(**inputs, prefix_ids=bank.ids(names)))
    for row, key in enumerate(names):
        expected = hidden(models[key](**row_of(inputs, row)))
        # T5's own softmax, without a prefix, is of float32.
        assert_close(found[[row]], expected, 1e-3 if name == "t5" and key is None else 1e-12)
    assert remove_prefix(model) is bank


@pytest.mark.parametrize("name", ["llama", "bert"])
@torch.no_grad()
def test_padding_on_either_side_and_attentions(name):
    model, bank, models = with_bank(name)
    inputs, names = inputs_of(name, rows=4), ROWS[0]
    inputs["attention_mask"] = torch.ones(4, 6, dtype=torch.long)
    inputs["attention_mask"][0, :2] = 0
    inputs["attention_mask"][2, 4:] = 0
    real = inputs["attention_mask"].bool()
    found = hidden(model(**inputs, prefix_ids=bank.ids(names)))
    options = {"prefix_ids": bank.ids(names), "output_attentions": True}
    seen = hidden(model(**inputs, **options))
    for row, key in enumerate(names):
        expected = hidden(models[key](**row_of(inputs, row)))[0]
        for ours in (found, seen):
            assert_close(ours[row][real[row]], expected[real[row]])


@pytest.mark.parametrize("name", [*DECODERS, "t5", "bart"])
@pytest.mark.parametrize("beams", [1, 2])
def test_generate_gives_each_row_its_prefix_s_tokens(name, beams):
    model, bank, models = with_bank(name)
    ids, options = tokens(4, 5), GREEDY | {"num_beams": beams, "num_return_sequences": beams}
    found = model.generate(ids, prefix_ids=bank.ids(ROWS[0]), **options)
    rows = found.view(4, beams, -1).tolist()
    expected = [
        models[key].generate(ids[[row]], **options).tolist() for row, key in enumerate(ROWS[0])
    ]
    assert rows == expected


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_a_bank_trains_as_its_prefixes_do(checkpointing):
    model, bank, models = with_bank("llama")
    if checkpointing is not None:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    inputs, names = inputs_of("llama", rows=4), ROWS[0]
    hidden(model(**inputs, prefix_ids=bank.ids(names))).square().sum().backward()
    found = next(iter(gradients(bank).values()))
    for row, key in enumerate(names):
        if key in ("a", "c"):
            hidden(models[key](**row_of(inputs, row))).square().sum().backward()
            prefix = models[key].prefix_tuning
            expected, number = next(iter(gradients(prefix).values())), bank.names.index(key)
            assert expected.any()
            assert_close(found[number][..., : LENGTHS[key], :], expected[0], 1e-9)
            assert not found[number][..., LENGTHS[key] :, :].any()


def test_one_prefix_and_equal_lengths_are_banks_too():
    base, ids = make("llama"), tokens(2, 4)
    prefixes = prefixes_for(base)
    for chosen, numbers in ((["b"], None), (["a", "c"], [1, -1])):
        model, bank = copy.deepcopy(base), PrefixBank({name: prefixes[name] for name in chosen})
        add_prefix(model, bank)
        found = hidden(model(ids, prefix_ids=numbers))
        for row in range(2):
            alone = copy.deepcopy(base)
            if numbers is None or numbers[row] >= 0:
                add_prefix(alone, copy.deepcopy(prefixes[chosen[-1]]))
            assert_close(found[[row]], hidden(alone(ids[[row]])))


def test_a_task_of_a_bank_is_saved_at_its_length(tmp_path):
    base = make("llama")
    bank = PrefixBank(prefixes_for(base))
    save_prompt(tmp_path, bank, model=base, task=2, task_type="CAUSAL_LM")
    loaded = load_prompt(tmp_path, model=base)
    assert loaded.length == LENGTHS["c"]
    for ours, theirs in zip(bank()["self"], loaded()["self"], strict=True):
        assert_close(ours[0][2, :, :2], theirs[0].double(), 1e-6)


def test_a_state_dict_goes_into_a_bank_of_the_same_lengths():
    prefixes = prefixes_for(make("llama"))
    bank, same, other = (PrefixBank({n: prefixes[n] for n in x}) for x in ("abc", "abc", "bac"))
    same.load_state_dict(bank.state_dict())
    with pytest.raises(RuntimeError, match=r"'lengths': \[5, 2, 2\]\}; it has .* \[2, 5, 2\]\}"):
        other.load_state_dict(bank.state_dict())
    with pytest.raises(RuntimeError, match="_extra_state"):  # one of equal lengths
        PrefixTuning(**bank.config()).load_state_dict(bank.state_dict())


def test_a_bank_of_a_folder_s_prefix_is_of_a_folder_too():
    prefixes = prefixes_for(make("llama"))
    assert not PrefixBank(prefixes).read_from_folder
    prefixes["b"].read_from_folder = True
    assert PrefixBank(prefixes).read_from_folder


def test_what_is_wrong_is_named():
    base = make("llama")
    prefixes = prefixes_for(base)
    bank = PrefixBank(prefixes)
    assert bank.ids(["c", None]).tolist() == [2, -1]
    with pytest.raises(ValueError, match="names must be of a, b, c, or None; got 'd'"):
        bank.ids(["d"])
    with pytest.raises(TypeError, match="a name for each row; got 'ab'"):
        bank.ids("ab")
    with pytest.raises(ValueError, match="at least one prefix; got none"):
        PrefixBank({})
    with pytest.raises(TypeError, match=r"prefixes\['x'\] must be a PrefixTuning; got Linear"):
        PrefixBank({"x": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"prefixes\['x'\] must be of one task; got a bank of 2"):
        PrefixBank({"x": prefix_for(base, 2, tasks=2)})
    with pytest.raises(ValueError, match=r"prefixes\['x'\] must have the sites and layers"):
        PrefixBank({"a": prefixes["a"], "x": prefix_for(make("gpt2"), 2)})
    with pytest.raises(ValueError, match="prefix_ids must be given: there are 3 tasks"):
        add_prefix(base, bank)
        base(tokens(2, 3))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_positions_that_all_rows_share_take_one_length(name):
    base = make(name)
    prefixes = prefixes_for(base)
    with pytest.raises(ValueError, match=r"one length where the positions of .* are shifted"):
        add_prefix(base, PrefixBank(prefixes), shift_positions=True)
    add_prefix(base, PrefixBank({x: prefixes[x] for x in "ac"}), shift_positions=True)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
@pytest.mark.parametrize("names", ROWS, ids=str)
def test_without_gradients_a_layer_is_one_call_with_the_same_bits(name, names, monkeypatch):
    counts = {"prefix_attention": 0, "prefix_attention_lengths": 0}

    def counted(op):
        kernel = getattr(by_length, op)

        def call(*args, **kwargs):
            counts[op] += 1
            return kernel(*args, **kwargs)

        monkeypatch.setattr(by_length, op, call)

    for op in counts:
        counted(op)
    model, bank, _ = with_bank(name)
    model.float()
    inputs = inputs_of(name, rows=4)
    inputs["attention_mask"] = torch.ones(inputs["input_ids"].shape, dtype=torch.long)
    inputs["attention_mask"][0, :2] = 0
    lengths = {LENGTHS[key] for key in names if key is not None}
    with torch.no_grad():
        found = hidden(model(**inputs, prefix_ids=bank.ids(names)))
    together = dict(counts)
    assert together["prefix_attention" if len(lengths) > 1 else "prefix_attention_lengths"] == 0
    expected = hidden(model(**inputs, prefix_ids=bank.ids(names)))
    each = counts["prefix_attention"] - together["prefix_attention"]
    assert each == sum(together.values()) * max(len(lengths), 1) > 0
    assert counts["prefix_attention_lengths"] == together["prefix_attention_lengths"]
    assert torch.equal(found, expected.detach())
