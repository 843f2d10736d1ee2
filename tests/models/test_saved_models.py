"""Whole models that 0.1 saved: ``saved_by_0.1.pt`` holds some, with an input and their outputs.

Such a file names classes, and functions that are hooks, by the module that had them.
"""

import importlib
import warnings
from pathlib import Path

import pytest
import torch

import peft_kernels

OLD = Path(__file__).with_name("saved_by_0.1.pt")
# What else the files of models with prefixes, prompts and adapters name.
NAMES = {
    "_calls": ("Carried", "_apart", "_replica", "_run"),
    "_in_place": ("InPlace", "Place"),
    "_input_grads": ("_AskOfInput", "_AskOfOutput"),
    "integrations._guard": ("_check_asked",),
    "integrations._hooks": ("RowIds",),
    "integrations._pinned": ("_view_of",),
    "integrations._prefix_run": (
        "Attached", "_begin", "_generate", "_shift_positions", "_take_ids",
    ),
    "integrations._prompt_run": ("PromptRun", "_after", "_before", "_generate", "_no_forward"),
    "integrations.transformers": (
        "_adapt", "_adapt_in_parallel", "_adapted_kind", "_keep_input", "_new_adapted",
        "_pass_on_input",
    ),
    "nn._kept": ("Kept",),
    "nn._prefix_parts": ("FlatPrefix",),
    "nn._template": ("Verbalizer",),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the old paths
        return torch.load(OLD, weights_only=False)


@pytest.mark.parametrize("name", ["swapped", "lora", "adapter", "invertible"])
def test_a_model_that_0_1_saved_computes_what_it_did(saved, name):
    model, expected = saved["models"][name]
    with peft_kernels.backend("reference"):
        torch.testing.assert_close(model(saved["x"]), expected)
    assert any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("path", NAMES)
@pytest.mark.filterwarnings("ignore:.*the old path goes:DeprecationWarning")
def test_what_its_files_name_is_there(path):
    pytest.importorskip("transformers")
    module = importlib.import_module(f"peft_kernels.{path}")
    assert [name for name in NAMES[path] if not hasattr(module, name)] == []
