"""TRL's trainers over accelerated models, beside the same with PEFT's LoRA as it is.

A trainer puts the adapter on a base itself, and its reference model is that base; or it is given a
PeftModel, and takes a copy of the adapter as reference.
"""

import pytest
import torch
from trainer_models import IN_BFLOAT16, TARGETS, base, losses_of, rows, tokenizer

import peft_kernels

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
trl = pytest.importorskip("trl", reason="trl is not installed")
datasets = pytest.importorskip("datasets")

STEPS = 20

pytestmark = pytest.mark.filterwarnings("ignore")


def config():
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")


def words(generator, count: int, low: int = 3, high: int = 32) -> str:
    tokens = torch.randint(low, high, (count,), generator=generator).tolist()
    return " ".join(f"t{token}" for token in tokens)


def pairs():
    draw = torch.Generator().manual_seed(1)
    return datasets.Dataset.from_list([
        {"prompt": words(draw, 3), "chosen": " " + words(draw, 4), "rejected": " " + words(draw, 4)}
        for _ in range(8)
    ])  # fmt: skip


def many_pairs():
    """What is chosen begins with a small token: of so many, pairs without a rule teach nothing."""
    draw = torch.Generator().manual_seed(1)
    return datasets.Dataset.from_list([
        {
            "prompt": words(draw, 3),
            "chosen": f" {words(draw, 1, 3, 17)} {words(draw, 1)}",
            "rejected": f" {words(draw, 1, 17, 32)} {words(draw, 1)}",
        }
        for _ in range(256)
    ])  # fmt: skip


def prompts(count: int):
    draw = torch.Generator().manual_seed(1)
    return datasets.Dataset.from_list([{"prompt": words(draw, 3)} for _ in range(count)])


def reward(completions, **_) -> list[float]:
    """The share of small tokens."""
    tokens = [[int(word[1:]) for word in completion.split()] for completion in completions]
    return [sum(token < 16 for token in each) / (len(each) or 1) for each in tokens]


def completions(prompts, trainer) -> dict:
    """Such as an engine gives that runs beside the trainer: drawn anew at each step."""
    draw = torch.Generator().manual_seed(trainer.state.global_step)
    counts = torch.randint(5, (len(prompts),), generator=draw).tolist()
    end = trainer.processing_class.eos_token_id
    return {
        "prompt_ids": [trainer.processing_class(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": [
            [*torch.randint(3, 32, (count,), generator=draw).tolist(), end] for count in counts
        ],
        "logprobs": None,
    }


def trainer_of(method: str, folder, wrapped: bool, **changed):
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
        **changed,
    }
    torch.manual_seed(3)
    model = peft.get_peft_model(base(), config()) if wrapped else base()
    options = {"model": model, "processing_class": tokenizer()}
    options |= {} if wrapped else {"peft_config": config()}
    many = arguments["bf16"]
    if method == "sft":
        arguments = trl.SFTConfig(**arguments)
        data = datasets.Dataset.from_list(rows(128, 32) if many else rows())
        return trl.SFTTrainer(args=arguments, train_dataset=data, **options)
    if method == "dpo":
        arguments["per_device_train_batch_size"] *= 1 + many
        data = many_pairs() if many else pairs()
        return trl.DPOTrainer(args=trl.DPOConfig(**arguments), train_dataset=data, **options)
    data = prompts(32 if many else 8)
    if many:  # a rounding would decide which token is drawn, and all that follows
        options["rollout_func"] = completions
    arguments = trl.GRPOConfig(
        **arguments, num_generations=4, max_completion_length=5, beta=0.1, temperature=1.0
    )
    return trl.GRPOTrainer(args=arguments, train_dataset=data, reward_funcs=reward, **options)


def seeded_losses_of(trainer) -> list[float]:
    """Completions are drawn, which the losses go by."""
    transformers.set_seed(5)
    return losses_of(trainer)


@pytest.fixture(autouse=True)
def precision(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # which a run in bf16 leaves changed
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("wrapped", [True, False], ids=["PeftModel", "peft_config"])
@pytest.mark.parametrize("changed", [
    {}, IN_BFLOAT16, {"gradient_checkpointing": True}
], ids=lambda changed: next(iter(changed), "plain"))  # fmt: skip
@pytest.mark.parametrize("method", ["sft", "dpo", "grpo"])
def test_losses_are_pefts(method, changed, wrapped, tmp_path):
    theirs, ours = (trainer_of(method, tmp_path, wrapped, **changed) for _ in range(2))
    report = peft_kernels.accelerate(ours.model)
    assert {layer.backend for layer in report.layers} == {"cpu"}
    expected, losses = (seeded_losses_of(trainer) for trainer in (theirs, ours))
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-4)
    assert len(losses) == STEPS and max(losses) - min(losses) > 1e-2
    has_base_as_reference = method != "sft" and not wrapped
    assert set(report.counts()) == {"lora_linear", *["disabled"] * has_base_as_reference}
    tolerance = 3e-2 if "bf16" in changed else 1e-3
    for (name, own), (_, other) in zip(
        ours.model.named_parameters(), theirs.model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(own, other, rtol=0, atol=tolerance, msg=name)
