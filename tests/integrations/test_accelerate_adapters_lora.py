"""accelerate(): LoRA in models of `adapters`."""

import pytest

pytest.importorskip("adapters")

import torch
from adapters_models import (
    COMPOSITIONS,
    LORA,
    ROWS,
    assert_as_theirs,
    lora,
    make_bert,
    make_llama,
    models,
    run,
    with_adapters,
)

import peft_kernels


@models
class TestLoRA:
    @pytest.mark.parametrize("options", [
        {},
        {"attn_matrices": ["q", "k", "v"], "r": 2, "alpha": 3, "intermediate_lora": True},
        {"attn_matrices": ["k"], "output_lora": False},
    ], ids=lambda options: "-".join(options) or "plain")  # fmt: skip
    def test_one_adapter(self, make, options):
        model = with_adapters(make, a=lora(**options))
        report = assert_as_theirs(model, {LORA})
        assert all(layer.reason is None for layer in report.layers)

    def test_float32_on_kernels(self, make):
        model = with_adapters(make, torch.float32, a=lora())
        assert all(layer.backend == "cpu" for layer in peft_kernels.accelerate(model).layers)
        assert_as_theirs(model, {LORA}, rtol=1e-3, atol=1e-3)

    def test_merged(self, make):
        model = with_adapters(make, a=lora())
        expected = run(model)[0]
        report = peft_kernels.accelerate(model)
        model.merge_adapter("a")
        with torch.no_grad():
            torch.testing.assert_close(run(model)[0], expected)
        assert set(report.counts()) == {"merged"}
        model.reset_adapter()
        assert_as_theirs(model, {LORA})


@pytest.mark.parametrize("make", [make_bert, make_llama])
@pytest.mark.parametrize(("composition", "ways"), [
    ("batch_split", {ROWS}),
    ("parallel", {ROWS, "Parallel"}),
    ("average", {LORA}),
])  # fmt: skip
def test_compositions_of_lora(make, composition, ways):
    model = with_adapters(make, a=lora(), b=lora(r=2, alpha=5))
    model.set_active_adapters(COMPOSITIONS[composition]())
    assert_as_theirs(model, ways)
