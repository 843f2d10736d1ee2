"""Banks of bottleneck adapters in transformers' models: a row's logits are its adapter's alone."""

import asyncio
import copy
import threading

import pytest
import torch
from tiny_models import make_bert, make_llama
from torch import nn

from peft_kernels.integrations.transformers import (
    adapters_of,
    bank_adapters,
    insert_adapters,
    remove_adapters,
    route_adapters,
)
from peft_kernels.nn import AdapterBank, BottleneckAdapter
from peft_kernels.nn._row_groups import RowGroups

NAMES = ["b", None, "a"]
KINDS = [
    (make_bert, "pfeiffer"),
    (make_bert, "houlsby"),
    (make_bert, "parallel"),
    (make_llama, "adapterplus"),
    (make_llama, "parallel"),
]


def tokens(rows=3, length=5):
    return torch.randint(3, 32, (rows, length), generator=torch.Generator().manual_seed(5))


def drawn(make):
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.2)
    return model


def with_adapter(base, preset, size):
    model = copy.deepcopy(base)
    insert_adapters(model, preset, bottleneck_size=size)
    for adapter in adapters_of(model).values():
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.4)
    return model


def in_bank(make, preset):
    """A model with two adapters in its banks, and models with each of them alone, or none."""
    base = drawn(make)
    models = {None: base, "a": with_adapter(base, preset, 4), "b": with_adapter(base, preset, 3)}
    banked = with_adapter(base, preset, 2)
    trained = {name: copy.deepcopy(adapters_of(models[name])) for name in ("a", "b")}
    paths = bank_adapters(banked, trained)
    assert paths == list(trained["a"])
    return banked, models


def output_of(model, ids):
    with torch.no_grad():
        return model(ids)[0]


@pytest.mark.parametrize(("make", "preset"), KINDS)
def test_a_row_is_what_the_model_with_its_adapter_alone_makes(make, preset):
    model, models = in_bank(make, preset)
    ids = tokens()
    with route_adapters(model, NAMES):
        found = output_of(model, ids)
    for row, name in enumerate(NAMES):
        expected = output_of(models[name], ids[[row]])
        torch.testing.assert_close(found[[row]], expected, rtol=1e-4, atol=1e-5)
    assert (found[0] - output_of(models[None], ids[[0]])[0]).abs().max() > 0.1
    remove_adapters(model)
    torch.testing.assert_close(output_of(model, ids), output_of(models[None], ids), rtol=0, atol=0)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}]
)
def test_generate_gives_each_row_its_adapter_s_tokens(options):
    model, models = in_bank(make_llama, "adapterplus")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    options = {**options, "eos_token_id": None}
    ids = tokens()
    with route_adapters(model, NAMES):
        found = model.generate(ids, **options)
    rows = found.view(3, -1, found.shape[1])
    for row, name in zip(rows, NAMES, strict=True):
        expected = models[name].generate(ids[[NAMES.index(name)]], **options)
        assert row.tolist() == expected.tolist()
    remove_adapters(model)
    assert "generate" not in model.__dict__


def test_threads_have_names_of_their_own():
    model, models = in_bank(make_llama, "pfeiffer")
    ids, found = tokens(1), {}
    expected = {name: output_of(one, ids) for name, one in models.items()}

    def run(name):
        with route_adapters(model, [name]):
            found[name] = [output_of(model, ids) for _ in range(10)]

    threads = [threading.Thread(target=run, args=(name,)) for name in models]
    for thread in threads:
        thread.start()
    with pytest.raises(ValueError, match="which of a, b each row has; none are given"):
        output_of(model, ids)
    for thread in threads:
        thread.join()
    for name, outputs in found.items():
        for output in outputs:
            torch.testing.assert_close(output, expected[name], rtol=1e-4, atol=1e-5)


def test_a_copy_routes_by_itself():
    model, models = in_bank(make_llama, "pfeiffer")
    other, ids = copy.deepcopy(model), tokens()
    with route_adapters(model, NAMES), route_adapters(other, ["a", "a", None]):
        ours, theirs = output_of(model, ids), output_of(other, ids)
    torch.testing.assert_close(ours[[0]], output_of(models["b"], ids[:1]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(theirs[[0]], output_of(models["a"], ids[:1]), rtol=1e-4, atol=1e-5)


def test_names_may_come_one_by_one_and_be_none_for_no_rows():
    model, _ = in_bank(make_llama, "pfeiffer")
    ids = tokens()
    with route_adapters(model, (name for name in NAMES)):
        found = output_of(model, ids)
    with route_adapters(model, NAMES):
        torch.testing.assert_close(found, output_of(model, ids), rtol=0, atol=0)
    bank = next(module for module in model.modules() if isinstance(module, AdapterBank))
    with route_adapters(model, []):
        assert bank(torch.ones(0, bank.hidden_size)).shape == (0, bank.hidden_size)
    with pytest.raises(TypeError, match="a name for each row; got None"):
        route_adapters(model, None).__enter__()


def test_adapters_of_another_hidden_size_change_nothing():
    model = with_adapter(drawn(make_llama), "pfeiffer", 2)
    before = adapters_of(model)
    size = next(iter(before.values())).hidden_size
    others = {path: BottleneckAdapter(2 * size, 2) for path in before}
    with pytest.raises(ValueError, match=rf"of hidden size {size} at model.*; got {2 * size}"):
        bank_adapters(model, {"a": others})
    assert adapters_of(model) == before


def test_what_is_wrong_is_named():
    model, models = in_bank(make_llama, "pfeiffer")
    with pytest.raises(ValueError, match="names must be of a, b, or None; got 'c'"):
        route_adapters(model, ["c"]).__enter__()
    with pytest.raises(TypeError, match="a name for each row; got 'ab'"):
        route_adapters(model, "ab").__enter__()
    one = pytest.raises(ValueError, match="one id for each of 3 rows; got 1")
    with one, route_adapters(model, ["a"]):
        output_of(model, tokens())
    two = pytest.raises(ValueError, match="one id for each of 3 rows; got 2")
    with two, route_adapters(model, ["a", "b"]):
        model.generate(tokens(), max_new_tokens=2)
    with pytest.raises(ValueError, match="model must have banks of adapters"):
        route_adapters(models["a"], ["a"]).__enter__()
    with pytest.raises(ValueError, match="at least one adapter; got none"):
        bank_adapters(models["a"], {})
    with pytest.raises(ValueError, match="model has no adapters; insert_adapters says"):
        bank_adapters(models[None], {"a": {}})
    with pytest.raises(ValueError, match=r"trained\['x'\] must have .* differs at layers"):
        bank_adapters(models["a"], {"x": {"layers": nn.Identity()}})
    assert list(adapters_of(models["a"])) == list(adapters_of(models["b"]))


def test_a_route_s_rows_are_grouped_once_for_all_layers_and_calls(monkeypatch):
    made = []
    init = RowGroups.__init__

    def counted(self, numbers):
        made.append(list(numbers))
        init(self, numbers)

    monkeypatch.setattr(RowGroups, "__init__", counted)
    model, _ = in_bank(make_bert, "houlsby")
    with route_adapters(model, NAMES):
        for _ in range(2):
            output_of(model, tokens())
        with route_adapters(model, ["a", "b", None]):
            output_of(model, tokens())
        output_of(model, tokens())
    assert made == [[1, -1, 0], [0, 1, -1]]
    model, _ = in_bank(make_llama, "pfeiffer")
    made.clear()
    with route_adapters(model, NAMES):
        model.generate(tokens(), max_new_tokens=3, num_beams=2, pad_token_id=0)
    assert made == [[1, 1, -1, -1, 0, 0]]


def test_rows_that_were_grouped_in_inference_mode_train():
    model, models = in_bank(make_llama, "pfeiffer")
    ids = tokens()
    with route_adapters(model, NAMES):
        with torch.inference_mode():
            model(ids)
        model(ids)[0][0].sum().backward()
    models["b"](ids[:1])[0][0].sum().backward()
    ours, alone = (
        [p.grad for p in adapter.parameters()]
        for adapter in (
            next(m for m in model.modules() if isinstance(m, AdapterBank)).adapters[1],
            next(iter(adapters_of(models["b"]).values())),
        )
    )
    for found, expected in zip(ours, alone, strict=True):
        assert expected.any()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_asyncio_tasks_have_names_of_their_own():
    model, models = in_bank(make_llama, "pfeiffer")
    ids = tokens()

    async def run(names):
        found = []
        with route_adapters(model, names):
            for _ in range(3):
                found.append(output_of(model, ids))
                await asyncio.sleep(0)
        return found

    async def both():
        return await asyncio.gather(run(NAMES), run(NAMES[::-1]))

    for names, outputs in zip((NAMES, NAMES[::-1]), asyncio.run(both()), strict=True):
        for output in outputs:
            for row, name in enumerate(names):
                expected = output_of(models[name], ids[[row]])
                torch.testing.assert_close(output[[row]], expected, rtol=1e-4, atol=1e-5)


def test_compiled_code_serves_each_route():
    model, _ = in_bank(make_llama, "pfeiffer")
    ids, compiled = tokens(), torch.compile(model, backend="aot_eager")
    for names in (NAMES, ["a", "a", "b"], NAMES):
        with route_adapters(model, names):
            for _ in range(2):
                with torch.no_grad():
                    found = compiled(ids)[0]
                torch.testing.assert_close(found, output_of(model, ids), rtol=1e-5, atol=1e-6)
