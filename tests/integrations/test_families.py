"""Every class of transformers' that can be built tiny: each method is right, or one clear error."""

import sys
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")
TOOLS = Path(__file__).parents[2] / "python" / "tools"
sys.path.insert(0, str(TOOLS))

import _families  # noqa: E402  it lies beside the tools, which are scripts and no package
import families  # noqa: E402

FOUR = transformers.__version__.startswith("4.57")


@pytest.fixture(scope="module")
def tables():
    return {kind: list(families.rows(kind)) for kind in _families.KINDS}


def test_enough_classes_are_built(tables):
    assert len(tables["decoders"]) > 60 and len(tables["encoders"]) > 20


@pytest.mark.parametrize("method", _families.METHODS)
def test_right_or_one_clear_error(tables, method):
    column = _families.METHODS.index(method)
    found = {name: cells[column] for table in tables.values() for name, cells in table}
    assert not {name: text for name, text in found.items() if text.startswith("wrong")}
    assert sum(text == "right" for text in found.values()) > (20 if method == "adapters" else 60)


@pytest.mark.skipif(not FOUR, reason="the page is of transformers 4.57")
def test_the_page_is_what_the_tool_writes(tables):
    assert families.PAGE.read_text() == families.page(tables)


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
