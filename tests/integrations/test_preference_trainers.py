"""TRL's DPOTrainer and GRPOTrainer over accelerated models, beside PEFT's LoRA as it is."""

import pytest
import torch
from trainer_models import TARGETS, base, losses_of, tokenizer

import peft_kernels

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl", reason="trl is not installed")
datasets = pytest.importorskip("datasets")

STEPS = 20

pytestmark = pytest.mark.filterwarnings("ignore")


def config():
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")


def words(generator, count: int) -> str:
    tokens = torch.randint(3, 32, (count,), generator=generator).tolist()
    return " ".join(f"t{token}" for token in tokens)


def pairs():
    draw = torch.Generator().manual_seed(1)
    return datasets.Dataset.from_list([
        {"prompt": words(draw, 3), "chosen": " " + words(draw, 4), "rejected": " " + words(draw, 4)}
        for _ in range(8)
    ])  # fmt: skip


def prompts():
    draw = torch.Generator().manual_seed(1)
    return datasets.Dataset.from_list([{"prompt": words(draw, 3)} for _ in range(8)])


def reward(completions, **_) -> list[float]:
    """The share of small tokens."""
    tokens = [[int(word[1:]) for word in completion.split()] for completion in completions]
    return [sum(token < 16 for token in each) / (len(each) or 1) for each in tokens]


def trainer_of(method: str, folder, wrapped: bool):
    """A trainer of a base that it puts an adapter on, or of a PeftModel."""
    arguments = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
    }
    torch.manual_seed(3)
    model = peft.get_peft_model(base(), config()) if wrapped else base()
    options = {"model": model, "processing_class": tokenizer()}
    options |= {} if wrapped else {"peft_config": config()}
    if method == "dpo":
        arguments = trl.DPOConfig(**arguments)
        return trl.DPOTrainer(args=arguments, train_dataset=pairs(), **options)
    arguments = trl.GRPOConfig(
        **arguments, num_generations=4, max_completion_length=5, beta=0.1, temperature=1.0
    )
    return trl.GRPOTrainer(args=arguments, train_dataset=prompts(), reward_funcs=reward, **options)


def seeded_losses_of(trainer) -> list[float]:
    """Completions are drawn, which the losses go by."""
    transformers.set_seed(5)
    return losses_of(trainer)


@pytest.mark.parametrize("wrapped", [True, False], ids=["copied adapter", "disabled adapter"])
@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_losses_are_pefts(method, wrapped, tmp_path):
    """The reference model is the base, or where a PeftModel is given a copy of its adapter."""
    theirs, ours = (trainer_of(method, tmp_path, wrapped) for _ in range(2))
    report = peft_kernels.accelerate(ours.model)
    assert {layer.backend for layer in report.layers} == {"cpu"}
    expected, losses = (seeded_losses_of(trainer) for trainer in (theirs, ours))
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-4)
    assert len(losses) == STEPS and max(losses) - min(losses) > 1e-2
    ways = {"lora_linear"} if wrapped else {"lora_linear", "disabled"}
    assert set(report.counts()) == ways
    for (name, own), (_, other) in zip(
        ours.model.named_parameters(), theirs.model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-4, msg=name)
