"""The lines of transformers that soft prompts run on."""

import pytest
from prefix_models import L, inputs_of, make
from prompt_models import make_prompt

from peft_kernels.integrations.transformers import supported
from peft_kernels.integrations.transformers.prefix import add_prefix, prefix_for, text_values
from peft_kernels.integrations.transformers.soft_prompts import add_prompt

CALLS = {
    "add_prefix": lambda model, given: add_prefix(model, given[0]),
    "add_prompt": lambda model, given: add_prompt(model, given[1]),
    "text_values": lambda model, given: text_values(model, **inputs_of("llama")),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("version", ["4.56.2", "4.5.0", "6.0.0", "50.1"])
def test_other_lines_are_refused(call, version, monkeypatch):
    model = make("llama")
    given, before = (prefix_for(model, L), make_prompt(model)), set(vars(model))
    monkeypatch.setattr(supported.transformers, "__version__", version)
    with pytest.raises(RuntimeError, match=f"needs transformers 4.57 or 5; got {version}: install"):
        CALLS[call](model, given)
    assert set(vars(model)) == before
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("version", ["4.57.0", "4.57.6", "5.0.0", "5.24.0.dev0"])
def test_both_lines_are_taken(version, monkeypatch):
    model = make("llama")
    monkeypatch.setattr(supported.transformers, "__version__", version)
    add_prefix(model, prefix_for(model, L))
