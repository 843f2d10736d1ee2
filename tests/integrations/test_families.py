"""Every class of transformers' that can be built tiny: each method is right, or one clear error."""

import sys
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")
TOOLS = Path(__file__).parents[2] / "python" / "tools"
sys.path.insert(0, str(TOOLS))

import _families  # noqa: E402  it lies beside the tools, which are scripts and no package
import families  # noqa: E402

from peft_kernels import AdapterPool, swap_linear, unload  # noqa: E402  transformers first
from peft_kernels.integrations.transformers.prefix import prefix_for  # noqa: E402

FOUR = transformers.__version__.startswith("4.57")


@pytest.fixture(scope="module")
def tables():
    return {kind: list(families.rows(kind)) for kind in _families.KINDS}


@pytest.mark.long
def test_enough_classes_are_built(tables):
    assert len(tables["decoders"]) > 70 and len(tables["encoders"]) > 20
    assert len(tables["encoder-decoders"]) > 18 and len(tables["images"]) > 6
    assert {"T5ForConditionalGeneration", "BartForConditionalGeneration"} <= {
        name for name, _ in tables["encoder-decoders"]
    }


@pytest.mark.long
@pytest.mark.parametrize("name", ["T5", "Bart", "ViT", "Falcon"])
def test_what_is_promised_is_right(tables, name):
    found = {family: cells for table in tables.values() for family, cells in table}
    kind = {"ViT": "ForImageClassification", "Falcon": "ForCausalLM"}
    lora, _, prefix, prompt = found[name + kind.get(name, "ForConditionalGeneration")]
    assert lora == "right"
    assert name == "Falcon" or prefix == "right"
    assert name == "ViT" or prompt == "right"


@pytest.mark.long
@pytest.mark.parametrize("method", _families.METHODS)
def test_right_or_one_clear_error(tables, method):
    column = _families.METHODS.index(method)
    found = {name: cells[column] for table in tables.values() for name, cells in table}
    assert not {name: text for name, text in found.items() if text.startswith("wrong")}
    assert sum(text == "right" for text in found.values()) > (20 if method == "adapters" else 60)


@pytest.mark.long
def test_what_takes_no_prefix_says_why_and_what_to_do(tables):
    found = {family: cells for table in tables.values() for family, cells in table}
    texts = {n: (c[2], c[3]) for n, c in found.items() if c[2].startswith("model has no attention")}
    assert len(texts) > 15
    for name, (prefix, prompt) in texts.items():
        reason, _, advice = prefix.partition(": ")
        assert f"got {name}, wh" in reason, name
        assert advice.startswith("add_prompt") == (prompt == "right"), name
        assert advice.startswith(("add_prompt gives", "it takes no soft prompt either; swap_lin"))
    for name in ("MambaForCausalLM", "RwkvForCausalLM"):
        assert name not in texts or "which has no attention: add_prompt" in texts[name][0]


@pytest.mark.long
@pytest.mark.skipif(not FOUR, reason="the page is of transformers 4.57")
def test_the_page_is_what_the_tool_writes(tables):
    assert families.PAGE.read_text() == families.page(tables)


def test_falcons_linear_layers_are_served_and_routers_are_not():
    built = {family.name: family for family in _families.families("decoders")}
    falcon, llama4 = built["FalconForCausalLM"], built["Llama4ForCausalLM"]
    assert _families.check(falcon, "LoRA") == "right"
    model = falcon.copy()
    kinds = {name: type(module) for name, module in model.named_modules()}
    pool = AdapterPool.attach(model, "all-linear", capacity=8)
    pool.detach()
    swap_linear(model, "all-linear", 2, alpha=4)
    unload(model, merge=True)
    assert kinds == {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(TypeError, match="Llama4Router has another, which would be left out"):
        swap_linear(llama4.copy(), ["router"], 2, alpha=4)


def test_a_prefix_that_would_leave_out_the_encoder_is_asked_for_by_its_sites():
    family = next(
        f for f in _families.families("encoder-decoders") if f.name.startswith("BigBirdPegasus")
    )
    with pytest.raises(ValueError, match=r"sites must be given .* at encoder can't take a prefix"):
        prefix_for(family.model, 3)
    assert set(prefix_for(family.model, 3, sites=["self", "cross"]).layers) == {"self", "cross"}


def test_the_check_can_fail(monkeypatch):
    """With a prefix that isn't attended to, or one of another length, none is right."""
    family = next(f for f in _families.families("decoders") if f.name == "LlamaForCausalLM")
    assert _families.check(family, "prefix") == "right"
    monkeypatch.setattr(_families, "add_prefix", lambda model, prefix, **_: None)
    model_out = _families._out
    monkeypatch.setattr(
        _families, "_out", lambda m, ids=None, prefix_ids=None, **x: model_out(m, ids, **x)
    )
    monkeypatch.setattr(_families, "remove_prefix", lambda model: None)
    assert _families.check(family, "prefix").startswith("wrong: by")
