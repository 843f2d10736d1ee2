"""Training by the Trainer of transformers and the SFTTrainer of TRL, beside PEFT's LoRA."""

import copy

import pytest
import torch
from torch import nn
from trainer_models import TARGETS, base, losses_of, rows, tokenizer

import peft_kernels

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

STEPS = 4

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=["transformers", "trl"])
def train(request, tmp_path, monkeypatch):
    """A function that trains a model and returns its losses."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # which a run in bf16 leaves changed
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    library = pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    arguments = {
        "max_steps": STEPS,
        "save_steps": STEPS // 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    options = {"train_dataset": rows()}
    if request.param == "trl":
        datasets = pytest.importorskip("datasets")
        trainer, config = library.SFTTrainer, library.SFTConfig
        options = {"train_dataset": datasets.Dataset.from_list(rows())}
        options["processing_class"] = tokenizer()
    else:
        trainer, config = library.Trainer, library.TrainingArguments

    def run(model: nn.Module, folder: str, resume: bool = False, **changed) -> list[float]:
        config_of_run = config(output_dir=str(tmp_path / folder), **{**arguments, **changed})
        trains = trainer(model=model, args=config_of_run, **options)
        checkpoint = tmp_path / folder / f"checkpoint-{STEPS // 2}"
        return losses_of(trains, resume_from_checkpoint=str(checkpoint) if resume else None)

    return run


def swapped(folder=None) -> nn.Module:
    model = base()
    peft_kernels.swap_linear(model, TARGETS, r=4, alpha=8)
    if folder is not None:
        peft_kernels.load_adapter(model, folder)
    return model


@pytest.fixture
def theirs(tmp_path) -> nn.Module:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base(), config)
    model.save_pretrained(tmp_path / "start")
    return model


def test_trains_as_peft_does(train, theirs, tmp_path):
    ours = swapped(tmp_path / "start")
    losses, expected = train(ours, "ours"), train(theirs, "theirs")
    torch.testing.assert_close(losses, expected)
    assert losses[0] != losses[-1]
    for name, layer in ours.named_modules():
        if isinstance(layer, peft_kernels.nn.LoRALinear):
            other = theirs.get_submodule(f"base_model.model.{name}")
            torch.testing.assert_close(layer.lora_a, other.lora_A["default"].weight)
            torch.testing.assert_close(layer.lora_b, other.lora_B["default"].weight)
            assert layer.lora_b.abs().max() > 1e-3
            assert torch.equal(layer.weight, other.base_layer.weight)


@pytest.mark.parametrize("changed", [
    {},
    {"bf16": True},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
], ids=["plain", "bf16", "reentrant", "checkpointing"])  # fmt: skip
def test_an_accelerated_model_trains_as_it_did(train, theirs, changed):
    theirs.enable_input_require_grads()
    ours = copy.deepcopy(theirs)
    report = peft_kernels.accelerate(ours)
    losses = train(ours, "ours", max_steps=20, **changed)
    expected = train(theirs, "theirs", max_steps=20, **changed)
    tolerance = 3e-3 if "bf16" in changed else 1e-4  # bf16 has 3 digits
    torch.testing.assert_close(losses, expected, rtol=0, atol=tolerance)
    assert set(report.counts()) == {"lora_linear"}


def test_goes_on_from_a_checkpoint(train, theirs, tmp_path):
    whole, again = swapped(tmp_path / "start"), swapped()
    train(whole, "run")
    train(again, "run", resume=True)
    expected = whole.state_dict()
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
