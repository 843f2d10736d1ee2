"""AdapterPool against Hugging Face PEFT itself: its folders, logits, generation and gradients."""

import pytest
import torch
from tiny_models import make_bert, make_gpt2, make_llama
from torch import nn

from peft_kernels import AdapterPool

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TARGETS = {
    make_bert: ["query", "value", "intermediate.dense"],
    make_gpt2: ["c_attn", "mlp.c_proj"],
    make_llama: ["q_proj", "v_proj", "down_proj"],
}
# By the names of PEFT's LoraConfig; "fewer" lacks modules that the others have.
ADAPTERS = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 6, "lora_alpha": 4, "use_rslora": True},
    "patterns": {
        "r": 2,
        "lora_alpha": 16,
        "rank_pattern": {"query|q_proj|c_attn": 11},
        "alpha_pattern": {r".*\.1\..*(value|v_proj|c_proj)": 3.5},
    },
    "fewer": {"r": 3, "lora_alpha": 6, "target_modules": ["query", "q_proj", "c_proj"]},
}
models = pytest.mark.parametrize("make", TARGETS, ids=lambda make: make.__name__)
decoders = pytest.mark.parametrize("make", [make_gpt2, make_llama], ids=lambda make: make.__name__)

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")


def base(make) -> nn.Module:
    """With weights large enough that adapters and prompts make a difference."""
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.2)
    return model


def theirs(make, name: str) -> nn.Module:
    """PEFT's model with one adapter, as if trained."""
    options = {"target_modules": TARGETS[make]} | ADAPTERS[name]
    if name == "fewer":
        options["target_modules"] = [
            target for target in TARGETS[make] if target in options["target_modules"]
        ] or ["mlp.c_proj"]
    model = peft.get_peft_model(base(make), peft.LoraConfig(**options)).eval()
    torch.manual_seed(1 + list(ADAPTERS).index(name))
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=0.3)
    return model


def make_pool(make, folder, **options) -> tuple[nn.Module, AdapterPool]:
    """A pool with all of PEFT's adapters, read from their folders."""
    model = base(make)
    pool = AdapterPool.attach(model, TARGETS[make], capacity=64)
    for name in ADAPTERS:
        if not (folder / name).exists():
            theirs(make, name).save_pretrained(folder / name)
        pool.load(name, folder / name, **options)
    return model, pool


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(ids)[0]


def tokens(rows: int, length: int = 6) -> torch.Tensor:
    return torch.randint(3, 32, (rows, length), generator=torch.Generator().manual_seed(3))


@models
def test_each_row_has_the_logits_of_its_adapter_alone(tmp_path, make):
    model, pool = make_pool(make, tmp_path)
    names = ["plain", None, "patterns", "rslora", "fewer", "plain"]
    ids = tokens(len(names))
    with pool.route(names):
        ours = logits(model, ids)
    for row, name in enumerate(names):
        alone = theirs(make, name) if name else base(make)
        expected = logits(alone, ids[row : row + 1])[0]
        torch.testing.assert_close(ours[row], expected, rtol=1e-3, atol=1e-4, msg=str(name))
        assert name is None or (expected - logits(base(make), ids)[row]).abs().max() > 1e-2
    with pool.route([[name] * ids.shape[1] for name in names]):
        torch.testing.assert_close(logits(model, ids), ours)


@models
def test_folders_go_back_to_peft(tmp_path, make):
    _, pool = make_pool(make, tmp_path)
    ids = tokens(2)
    for name in ADAPTERS:
        pool.save(name, tmp_path / "saved" / name)
        loaded = peft.PeftModel.from_pretrained(base(make), tmp_path / "saved" / name).eval()
        torch.testing.assert_close(
            logits(loaded, ids), logits(theirs(make, name), ids), rtol=1e-4, atol=1e-5
        )


@models
def test_state_dicts_of_peft(make):
    wrapped = theirs(make, "patterns")
    state = peft.get_peft_model_state_dict(wrapped)
    model = base(make)
    pool = AdapterPool.attach(model, TARGETS[make], capacity=32)
    pool.load("a", state, config=wrapped.peft_config["default"].to_dict())
    ids = tokens(2)
    with pool.route(["a"]):
        torch.testing.assert_close(logits(model, ids), logits(wrapped, ids), rtol=1e-3, atol=1e-4)


def generate(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, **options) -> torch.Tensor:
    return model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=1,
        **options,
    )


@decoders
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_every_row_generates_what_it_would_alone(tmp_path, make, options):
    model, pool = make_pool(make, tmp_path)
    names = ["plain", None, "patterns", "rslora", "fewer"]
    ids = tokens(len(names), 5)
    mask = torch.ones_like(ids)
    mask[1, :2] = mask[3, :1] = 0
    with pool.route(names):
        ours = generate(model, ids, mask, **options)
    assert len({tuple(row[5:].tolist()) for row in ours}) > 2
    for row, name in enumerate(names):
        alone = theirs(make, name) if name else base(make)
        expected = generate(alone, ids[[row]], mask[[row]], **options)[0]
        assert torch.equal(ours[row, : len(expected)], expected), name
        assert {0, 1}.issuperset(ours[row, len(expected) :].tolist())


@models
def test_a_step_over_all_adapters_has_the_gradients_of_each(tmp_path, make):
    model, pool = make_pool(make, tmp_path, trainable=True)
    names = [*ADAPTERS, None, "plain"]
    ids = tokens(len(names))
    with pool.route(names):
        model(ids)[0].sigmoid().square().sum().backward()
    for name in ADAPTERS:
        own = [row for row, other in enumerate(names) if other == name]
        wrapped = theirs(make, name)
        wrapped(ids[own])[0].sigmoid().square().sum().backward()
        layers = wrapped.base_model.model
        for key, parameter in pool.named_parameters(name):
            layer, _, matrix = key.rpartition(".")
            gradient = getattr(layers.get_submodule(layer), matrix)["default"].weight.grad
            gradient = gradient.T if matrix == "lora_B" else gradient
            error = (parameter.grad - gradient).norm() / gradient.norm()
            assert gradient.any() and error < 1e-3, key


def test_the_training_of_transformers_with_checkpointing(tmp_path):
    """As a Trainer would: checkpointing on, the loss and the backward inside the route."""
    model, pool = make_pool(make_llama, tmp_path, trainable=True)
    ids = tokens(3)
    found = []
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        with pool.route(["plain", "rslora", None]):
            model(input_ids=ids, labels=ids).loss.backward()
        found.append([p.grad for name in ("plain", "rslora") for p in pool.parameters(name)])
        for name in ADAPTERS:
            for parameter in pool.parameters(name):
                parameter.grad = None
    for plain, again in zip(*found, strict=True):
        assert plain.any()
        torch.testing.assert_close(plain, again, rtol=1e-4, atol=1e-6)


def classifier() -> nn.Module:
    config = base(make_llama).config
    config.pad_token_id = 0
    torch.manual_seed(0)
    return transformers.LlamaForSequenceClassification(config).eval()


def filled(pool: AdapterPool) -> AdapterPool:
    pool.create("a", 2, alpha=4)
    for parameter in pool.parameters("a"):
        nn.init.normal_(parameter)
    return pool


def test_a_task_type_is_written(tmp_path):
    pool = AdapterPool.attach(base(make_llama), ["q_proj"], capacity=8, task_type="CAUSAL_LM")
    filled(pool).save("a", tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path).task_type == "CAUSAL_LM"
    assert type(peft.PeftModel.from_pretrained(base(make_llama), tmp_path)) is (
        peft.PeftModelForCausalLM
    )


def test_a_task_type_whose_head_peft_would_look_for_is_not_written(tmp_path):
    model = classifier()
    pool = filled(AdapterPool.attach(model, ["q_proj"], capacity=8, task_type="SEQ_CLS"))
    with pytest.warns(UserWarning, match="written as None: for SEQ_CLS PEFT saves score whole"):
        pool.save("a", tmp_path)
    ids = tokens(2)
    with pool.route(["a"]):
        expected = logits(model, ids)
    found = logits(peft.PeftModel.from_pretrained(classifier(), tmp_path).eval(), ids)
    torch.testing.assert_close(found, expected)
    again = AdapterPool.attach(classifier(), ["q_proj"], capacity=8)
    again.load("a", tmp_path)


def test_an_unknown_task_type_is_refused_before_anything_is_changed():
    model = base(make_llama)
    with pytest.raises(ValueError, match=r"task_type must be of .* got 'CAUSAL'"):
        AdapterPool.attach(model, ["q_proj"], capacity=8, task_type="CAUSAL")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_head_that_trains_beside_is_said_not_to_be_in_the_folder(tmp_path):
    model = classifier()
    pool = filled(AdapterPool.attach(model, ["q_proj"], capacity=8))
    model.score.requires_grad_(True)
    with pytest.warns(UserWarning, match="isn't in the folder: score.weight"):
        pool.save("a", tmp_path)
