"""Training by the Trainer of transformers and the SFTTrainer of TRL, beside PEFT's LoRA."""

import copy

import pytest
import torch
from torch import nn
from trainer_models import IN_BFLOAT16, TARGETS, base, losses_of, rows, tokenizer

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
    options = {}
    if request.param == "trl":
        datasets = pytest.importorskip("datasets")
        trainer, config = library.SFTTrainer, library.SFTConfig
        data_of = datasets.Dataset.from_list
        options["processing_class"] = tokenizer()
    else:
        trainer, config, data_of = library.Trainer, library.TrainingArguments, list

    def run(model: nn.Module, folder: str, resume: bool = False, **changed) -> list[float]:
        config_of_run = config(output_dir=str(tmp_path / folder), **{**arguments, **changed})
        train = rows(128, 32) if "bf16" in changed else rows()
        data = {"train_dataset": data_of(train), "eval_dataset": data_of(rows()[:3])}
        trains = trainer(model=model, args=config_of_run, **data, **options)
        checkpoint = tmp_path / folder / f"checkpoint-{config_of_run.save_steps}"
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


def lora_of(model: nn.Module) -> dict:
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_" in name}


def accelerated(model: nn.Module) -> nn.Module:
    """A copy on kernels."""
    ours = copy.deepcopy(model)
    peft_kernels.accelerate(ours)
    return ours


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
    IN_BFLOAT16,
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
], ids=["plain", "bf16", "reentrant", "checkpointing"])  # fmt: skip
def test_an_accelerated_model_trains_as_it_did(train, theirs, changed):
    theirs.enable_input_require_grads()
    ours = accelerated(theirs)
    report = peft_kernels.accelerate(ours)
    losses = train(ours, "ours", max_steps=20, **changed)
    expected = train(theirs, "theirs", max_steps=20, **changed)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-4)
    assert len(losses) == 20 and max(losses) - min(losses) > 1e-2
    assert set(report.counts()) == {"lora_linear"}


def test_goes_on_from_a_checkpoint(train, theirs, tmp_path):
    whole, again = swapped(tmp_path / "start"), swapped()
    train(whole, "run")
    train(again, "run", resume=True)
    expected = whole.state_dict()
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("folder", ["ours", "theirs"])
def test_an_accelerated_model_goes_on_from_a_checkpoint(train, theirs, folder):
    """Its own, or PEFT's."""
    whole, again = accelerated(theirs), accelerated(theirs)
    steps = {"max_steps": 20, "save_steps": 10}
    expected = train(theirs, "theirs", **steps)
    train(whole, "ours", **steps)
    report = peft_kernels.accelerate(again)
    losses = train(again, folder, resume=True, **steps)
    torch.testing.assert_close(losses, expected[10:], rtol=0, atol=1e-4)
    torch.testing.assert_close(lora_of(again), lora_of(theirs), rtol=0, atol=1e-4)
    if folder == "ours":
        torch.testing.assert_close(lora_of(again), lora_of(whole), rtol=0, atol=0)
    assert set(report.counts()) == {"lora_linear"}


def test_peft_goes_on_from_a_checkpoint_of_an_accelerated_model(train, theirs):
    again, steps = copy.deepcopy(theirs), {"max_steps": 20, "save_steps": 10}
    expected = train(accelerated(theirs), "ours", **steps)
    losses = train(again, "ours", resume=True, **steps)
    torch.testing.assert_close(losses, expected[10:], rtol=0, atol=1e-4)


def test_the_best_of_an_accelerated_model_is_loaded(train, theirs):
    """Here that is the first: the one with the greatest loss."""
    ours, first = accelerated(theirs), accelerated(theirs)
    report = peft_kernels.accelerate(ours)
    changed = {
        "max_steps": 20,
        "save_steps": 5,
        "eval_steps": 5,
        "eval_strategy": "steps",
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,
        "lr_scheduler_type": "constant",
    }
    expected, losses = train(theirs, "theirs", **changed), train(ours, "ours", **changed)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(lora_of(ours), lora_of(theirs), rtol=0, atol=1e-4)
    train(first, "first", max_steps=5, lr_scheduler_type="constant")
    torch.testing.assert_close(lora_of(ours), lora_of(first), rtol=0, atol=0)
    assert set(report.counts()) == {"lora_linear"}


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_loop_under_accelerate(theirs, precision, monkeypatch):
    """`accelerate`'s own loop: prepare(), backward(), autocast where it is asked for."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    batches = [{name: torch.tensor([value]) for name, value in row.items()} for row in rows()]

    def train(model: nn.Module) -> list[float]:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        runner = accelerate.Accelerator(cpu=True, mixed_precision=precision)
        parameters = [p for p in model.parameters() if p.requires_grad]
        model, optimizer = runner.prepare(model, torch.optim.AdamW(parameters, 1e-2))
        losses = []
        for step in range(20):
            loss = model(**batches[step % len(batches)]).loss
            runner.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    ours = accelerated(theirs)
    report = peft_kernels.accelerate(ours)
    expected, losses = train(theirs), train(ours)
    tolerance = 3e-3 if precision == "bf16" else 1e-4  # bf16 has 3 digits
    torch.testing.assert_close(losses, expected, rtol=0, atol=tolerance)
    assert set(report.counts()) == {"lora_linear"}
