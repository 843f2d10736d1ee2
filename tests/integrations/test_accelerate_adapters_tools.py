"""accelerate(): models of `adapters` under checkpointing, torch.compile and their trainer."""

import pytest

pytest.importorskip("adapters")

import adapters
import torch
import transformers
from adapters_models import IDS, KERNEL, LORA, bottleneck, lora, make_bert, run, with_adapters
from torch import nn

import peft_kernels


@pytest.mark.parametrize("config", [bottleneck(dropout=0.3), lora(dropout=0.3)])
def test_gradient_checkpointing(config):
    """The forward that the backward computes again drops what the first one did."""
    model = with_adapters(make_bert, torch.float32, a=config).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p != 0.3:
            module.p = 0.0
    report = peft_kernels.accelerate(model)
    _, expected = run(model)
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    _, found = run(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert set(report.counts()) <= {KERNEL, LORA} and report.counts()


@pytest.mark.parametrize("config", [bottleneck(), lora()])
def test_compiled(config):
    model = with_adapters(make_bert, torch.float32, a=config)
    expected = run(model)
    peft_kernels.accelerate(model)
    torch._dynamo.reset()
    found = run(torch.compile(model, backend="aot_eager"))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)


def test_their_trainer(tmp_path):
    def losses(accelerated):
        model = adapters.AutoAdapterModel.from_config(with_adapters(make_bert).config)
        model.add_adapter("a", config=bottleneck())
        model.add_classification_head("a", num_labels=2)
        model.train_adapter("a")
        report = peft_kernels.accelerate(model) if accelerated else None
        rows = [{"input_ids": row, "labels": row[0] % 2} for row in IDS]
        settings = transformers.TrainingArguments(
            tmp_path, max_steps=5, learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=True,
            per_device_train_batch_size=2, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = adapters.AdapterTrainer(model=model, args=settings, train_dataset=rows)
        trainer.train()
        assert report is None or set(report.counts()) == {KERNEL}
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    torch.manual_seed(0)
    expected = losses(False)
    torch.manual_seed(0)
    found = losses(True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
