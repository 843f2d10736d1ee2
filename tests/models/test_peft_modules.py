"""What is trained beside LoRA layers, both ways against PEFT: heads, embeddings, norms, tasks."""

import copy
import json
import warnings

import pytest
import safetensors.torch
import torch
from tiny_models import make_bert, make_llama, transformers
from torch import nn

from peft_kernels import AdapterPool, load_adapter, save_adapter, swap_linear
from peft_kernels.integrations.transformers.adapters import insert_adapters
from peft_kernels.nn import LoRALinear

peft = pytest.importorskip("peft")

IDS = torch.arange(1, 13).reshape(2, 6)


def make_sequence_classifier() -> nn.Module:
    return transformers.BertForSequenceClassification(make_bert().config)


def make_token_classifier() -> nn.Module:
    return transformers.BertForTokenClassification(make_bert().config)


def make_answers() -> nn.Module:
    return transformers.BertForQuestionAnswering(make_bert().config)


def make_roberta() -> nn.Module:
    config = transformers.RobertaConfig(**make_bert().config.to_diff_dict() | {"pad_token_id": 0})
    return transformers.RobertaForSequenceClassification(config)


def make_scorer() -> nn.Module:
    config = make_llama().config
    config.pad_token_id = 0
    return transformers.LlamaForSequenceClassification(config)


def make_tied() -> nn.Module:
    config = make_llama().config
    config.tie_word_embeddings = True
    return transformers.LlamaForCausalLM(config)


# The model, its task, the targets, what is trained beside them, and what the config names.
CASES = {
    "sequence": (make_sequence_classifier, "SEQ_CLS", ["query"], ["classifier"]),
    "sequence, frozen head": (make_sequence_classifier, "SEQ_CLS", ["query", "value"], []),
    "sequence, all": (make_sequence_classifier, "SEQ_CLS", "all-linear", ["classifier"]),
    "nested head": (make_roberta, "SEQ_CLS", ["query"], ["classifier"]),
    "score": (make_scorer, "SEQ_CLS", ["q_proj"], ["score"]),
    "token": (make_token_classifier, "TOKEN_CLS", ["query"], ["classifier"]),
    "answers": (make_answers, "QUESTION_ANS", ["query"], ["qa_outputs"]),
    "language head": (make_llama, "CAUSAL_LM", ["q_proj"], ["lm_head"]),
    "embeddings": (make_llama, "CAUSAL_LM", ["q_proj"], ["lm_head", "embed_tokens"]),
    "norms": (make_llama, "CAUSAL_LM", ["q_proj"], ["norm", "input_layernorm"]),
    "no task": (make_sequence_classifier, None, ["query"], ["classifier", "pooler"]),
}
cases = pytest.mark.parametrize("case", CASES)


@pytest.fixture(autouse=True)
def strict():
    """PEFT warns of keys that are missing from the file, and of config keys it doesn't know."""
    with warnings.catch_warnings():
        for message in ("Found missing adapter keys", "Unexpected keyword arguments"):
            warnings.filterwarnings("error", message=message)
        yield


def base(make) -> nn.Module:
    """A model whose weights are large enough for an adapter to matter."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def randomised(model: nn.Module) -> nn.Module:
    """What trains, as if trained; A's values stay."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_a" not in name.lower():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def ours(case: str) -> nn.Module:
    make, task, targets, beside = CASES[case]
    model = swap_linear(base(make), targets, 2, alpha=4, task_type=task)
    for name, module in model.named_modules():
        if name.endswith(tuple(beside)):
            module.requires_grad_(True)
    return randomised(model)


def theirs(case: str, **options) -> nn.Module:
    make, task, targets, beside = CASES[case]
    config = peft.LoraConfig(
        task_type=task, r=2, lora_alpha=4, target_modules=targets, modules_to_save=beside or None
    )
    return randomised(peft.get_peft_model(base(make), config))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS)[0]


def assert_same_logits(model: nn.Module, other: nn.Module, make) -> None:
    assert (logits(model) - logits(base(make))).abs().max() > 1e-3
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-4, atol=1e-5)


def config_of(folder) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def tensors_of(folder) -> dict:
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


# ---- both ways -------------------------------------------------------------------------------


@cases
def test_ours_loads_in_peft(tmp_path, case):
    make, task, _, _ = CASES[case]
    model = ours(case)
    save_adapter(model, tmp_path)
    assert config_of(tmp_path)["task_type"] == task
    loaded = peft.PeftModel.from_pretrained(base(make), tmp_path)
    assert_same_logits(loaded, model, make)


@cases
def test_ours_loads_in_ours(tmp_path, case):
    make = CASES[case][0]
    model = ours(case)
    save_adapter(model, tmp_path)
    swapped = swap_linear(base(make), CASES[case][2], 2, alpha=1, task_type=CASES[case][1])
    for into in (base(make), swapped):
        loaded = load_adapter(into, tmp_path)
        assert_same_logits(loaded, model, make)
        # Frozen for serving, and saved once more, it is whole still.
        save_adapter(loaded.requires_grad_(False), tmp_path / "again")
        assert tensors_of(tmp_path / "again").keys() == tensors_of(tmp_path).keys()
        assert config_of(tmp_path / "again")["task_type"] == CASES[case][1]


@cases
def test_theirs_loads_in_ours(tmp_path, case):
    make = CASES[case][0]
    model = theirs(case)
    model.save_pretrained(tmp_path)
    loaded = load_adapter(base(make), tmp_path)
    assert_same_logits(loaded, model, make)
    beside = {n for n, p in loaded.named_parameters() if p.requires_grad and "lora_" not in n}
    expected = {key for key in tensors_of(tmp_path) if "lora_" not in key}
    assert beside == {key.removeprefix("base_model.model.") for key in expected}


@pytest.mark.parametrize("case", ["sequence", "language head", "embeddings"])
def test_embeddings_that_peft_saves_along(tmp_path, case):
    """With ``save_embedding_layers`` wrapped modules are there under several keys."""
    make = CASES[case][0]
    model = theirs(case)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any("embed" in key for key in tensors_of(tmp_path))
    assert_same_logits(load_adapter(base(make), tmp_path), model, make)


@pytest.mark.parametrize("wrapper", ["modules_to_save", "modules_to_save.default"])
def test_keys_of_wrapped_modules(tmp_path, wrapper):
    model = theirs("sequence")
    model.save_pretrained(tmp_path)
    tensors = tensors_of(tmp_path)
    for own in ("weight", "bias"):
        key = f"base_model.model.classifier.{own}"
        tensors[f"base_model.model.classifier.{wrapper}.{own}"] = tensors.pop(key)
        tensors[f"base_model.model.classifier.original_module.{own}"] = torch.ones(7)
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    loaded = load_adapter(base(make_sequence_classifier), tmp_path)
    assert_same_logits(loaded, model, make_sequence_classifier)


def test_resized_embeddings_that_peft_saves_along(tmp_path):
    def make():
        model = make_llama()
        model.resize_token_embeddings(40)
        return model

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = randomised(peft.get_peft_model(base(make), config))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(ValueError, match=r"must be \[32, 16\].*resize_token_embeddings"):
        load_adapter(base(make_llama), tmp_path)
    assert_same_logits(load_adapter(base(make), tmp_path), model, make)


# ---- tied weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("unfrozen", ["lm_head", "model.embed_tokens"])
def test_tied_weights_that_train_are_written_under_both_names(tmp_path, unfrozen):
    model = swap_linear(base(make_tied), ["q_proj"], 2, alpha=4)
    model.get_submodule(unfrozen).requires_grad_(True)
    save_adapter(randomised(model), tmp_path)
    assert config_of(tmp_path)["modules_to_save"] == ["lm_head", "model.embed_tokens"]
    loaded = peft.PeftModel.from_pretrained(base(make_tied), tmp_path)
    assert_same_logits(loaded, model, make_tied)
    assert_same_logits(load_adapter(base(make_tied), tmp_path), model, make_tied)


def test_a_head_that_was_trained_apart_is_not_put_into_a_tied_model(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    randomised(peft.get_peft_model(base(make_tied), config)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lm_head\.weight is tied to model\.embed_tokens\.weight"):
        load_adapter(base(make_tied), tmp_path)


@pytest.mark.parametrize("embeddings", [True, False], ids=["trained", "saved along"])
def test_two_values_are_not_put_into_one_tied_weight(tmp_path, embeddings):
    names = ["lm_head", "embed_tokens"] if embeddings else ["lm_head"]
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=names)
    trained = randomised(peft.get_peft_model(base(make_tied), config))
    trained.save_pretrained(tmp_path, save_embedding_layers=not embeddings)
    model = base(make_tied)
    before = logits(model)
    with pytest.raises(ValueError, match=r"tied to .* and the file has other values for each"):
        load_adapter(model, tmp_path)
    assert torch.equal(logits(model), before)


# ---- PEFT's Auto classes ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "auto"),
    [
        ("sequence", "AutoPeftModelForSequenceClassification"),
        ("token", "AutoPeftModelForTokenClassification"),
        ("answers", "AutoPeftModelForQuestionAnswering"),
        ("language head", "AutoPeftModelForCausalLM"),
        ("no task", "AutoPeftModel"),
    ],
)
def test_auto_classes_load_ours(tmp_path, case, auto):
    make, task, targets, beside = CASES[case]
    base(make).save_pretrained(tmp_path / "base")
    model = type(base(make)).from_pretrained(tmp_path / "base")
    swap_linear(model, targets, 2, alpha=4)
    for name in beside:
        for path, module in model.named_modules():
            if path.endswith(name):
                module.requires_grad_(True)
    save_adapter(randomised(model), tmp_path / "adapter", task_type=task)
    loaded = getattr(peft, auto).from_pretrained(tmp_path / "adapter").eval()
    assert_same_logits(loaded, model, make)


# ---- what has no place -----------------------------------------------------------------------


def test_a_part_of_a_head(tmp_path):
    model = swap_linear(base(make_roberta), ["query"], 2, alpha=4)
    model.classifier.out_proj.requires_grad_(True)
    save_adapter(randomised(model), tmp_path)
    assert config_of(tmp_path)["modules_to_save"] == ["classifier.out_proj"]
    loaded = peft.PeftModel.from_pretrained(base(make_roberta), tmp_path)
    assert_same_logits(loaded, model, make_roberta)


def test_what_is_frozen_again_before_it_is_saved_is_left_out(tmp_path):
    model = swap_linear(base(make_llama), ["q_proj"], 2, alpha=4)
    key = "base_model.model.model.norm.weight"
    for trains in (True, False):
        model.model.norm.requires_grad_(trains)
        save_adapter(model, tmp_path)
        assert (key in tensors_of(tmp_path)) is trains


def test_what_is_asked_for_is_written_though_it_is_frozen(tmp_path):
    model = swap_linear(base(make_llama), ["q_proj"], 2, alpha=4)
    save_adapter(model, tmp_path, modules_to_save=["norm"])
    beside = {key for key in tensors_of(tmp_path) if "lora_" not in key}
    # PEFT takes every module whose name ends so.
    assert {key.rpartition(".")[0].removeprefix("base_model.model.") for key in beside} == {
        "model.norm",
        *(f"model.layers.{i}.{n}_layernorm" for i in (0, 1) for n in ("input", "post_attention")),
    }
    with pytest.raises(ValueError, match="no 'nrm'"):
        save_adapter(model, tmp_path, modules_to_save=["nrm"])


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_the_base_of_a_layer_has_no_place(tmp_path, part):
    model = swap_linear(base(make_bert), ["query"], 2, alpha=4)
    layer = model.encoder.layer[1].attention.self.query
    getattr(layer, part).requires_grad_(True)
    with pytest.raises(ValueError, match=rf"layer\.1\.attention\.self\.query\.{part} trains"):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_parameter_around_adapters_has_no_place(tmp_path):
    model = swap_linear(base(make_bert), ["query"], 2, alpha=4)
    model.register_parameter("cls", nn.Parameter(torch.ones(3)))
    with pytest.raises(ValueError, match="cls trains, and PEFT's format holds whole modules"):
        save_adapter(model, tmp_path)


def test_adapters_of_another_method_are_said_to_be_left_out(tmp_path):
    model = swap_linear(base(make_bert), ["query"], 2, alpha=4)
    insert_adapters(model, "pfeiffer")
    with pytest.warns(UserWarning, match=r"isn't in the folder: .*\.0\.output\.adapter\.") as said:
        save_adapter(model, tmp_path)
    assert len(said) == 1


def test_a_head_with_adapters_has_no_task(tmp_path):
    model = swap_linear(base(make_token_classifier), ["classifier"], 2, alpha=4)
    with pytest.warns(UserWarning, match="classifier whole, and here it has adapters"):
        save_adapter(randomised(model), tmp_path, task_type="TOKEN_CLS")
    loaded = peft.PeftModel.from_pretrained(base(make_token_classifier), tmp_path)
    assert_same_logits(loaded, model, make_token_classifier)


@pytest.mark.parametrize("call", [save_adapter, swap_linear])
def test_unknown_tasks(tmp_path, call):
    model = swap_linear(base(make_bert), ["query"], 2, alpha=4)
    arguments = (tmp_path,) if call is save_adapter else (["key"], 2)
    options = {} if call is save_adapter else {"alpha": 4}
    with pytest.raises(ValueError, match=r"task_type must be of CAUSAL_LM.*got 'SEQ'"):
        call(model, *arguments, task_type="SEQ", **options)


# ---- folders that don't fit ------------------------------------------------------------------


def assert_refused(named: str, folder, model: nn.Module, error=ValueError) -> None:
    before = copy.deepcopy(model.state_dict())
    trains = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=named):
        load_adapter(model, folder)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    assert trains == [p.requires_grad for p in model.parameters()]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"classifier.weight": torch.ones(3, 16)}, r"classifier\.weight must be \[2, 16\]"),
        ({"classifier.weight": None}, r"the file must have classifier\.weight"),
        ({"nowhere.weight": torch.ones(3)}, r"the file has nowhere\.weight"),
        ({"classifier.bias": torch.ones(2, dtype=torch.int64)}, r"classifier\.bias must be of the"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_modules_that_do_not_fit(tmp_path, changes, named):
    save_adapter(ours("sequence"), tmp_path)
    tensors = tensors_of(tmp_path)
    for key, value in changes.items():
        tensors.pop(f"base_model.model.{key}", None)
        if value is not None:
            tensors[f"base_model.model.{key}"] = value
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert_refused(named, tmp_path, base(make_sequence_classifier), (ValueError, TypeError))


def test_a_pool_has_no_place_for_a_head(tmp_path):
    save_adapter(ours("sequence"), tmp_path)
    pool = AdapterPool.attach(base(make_sequence_classifier), ["query"], capacity=8)
    with pytest.raises(ValueError, match=r"trained whole, classifier\.bias"):
        pool.load("a", tmp_path)
    assert pool.names() == []


# ---- running statistics ----------------------------------------------------------------------


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.up(x)), None


def test_running_statistics_that_changed_are_written(tmp_path):
    x = torch.randn(8, 4)
    pretrained = base(Norm)
    pretrained.train()(x)
    model = swap_linear(copy.deepcopy(pretrained), ["up"], 2, alpha=4)
    save_adapter(model, tmp_path)
    assert "modules_to_save" not in config_of(tmp_path)
    for _ in range(3):
        model.train()(x + 1)
    save_adapter(randomised(model), tmp_path)
    loaded = load_adapter(copy.deepcopy(pretrained), tmp_path).eval()
    torch.testing.assert_close(loaded(x)[0], model(x)[0])
    assert (pretrained.eval()(x)[0] - model(x)[0]).abs().max() > 1e-3
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(pretrained), tmp_path).eval()
    torch.testing.assert_close(theirs(x)[0], model(x)[0])


# ---- PEFT's own adapters in the same model -------------------------------------------------------


def _around(model: nn.Module) -> nn.Module:
    config = peft.LoraConfig(target_modules=["v_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


def _beside(model: nn.Module) -> nn.Module:
    model.add_adapter(peft.LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    return model


def _on_the_same_layer(model: nn.Module) -> nn.Module:
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


def _prompt(model: nn.Module) -> nn.Module:
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


THEIRS = {
    "around": (_around, r"layers\.0\.self_attn\.v_proj is PEFT's"),
    "beside": (_beside, r"layers\.0\.self_attn\.v_proj is PEFT's"),
    "same layer": (_on_the_same_layer, r"layers\.0\.self_attn\.q_proj is PEFT's"),
    "prompt": (_prompt, "is PEFT's .*peft"),
}


@pytest.mark.parametrize("kind", THEIRS)
def test_what_peft_has_beside_is_not_left_out(kind, tmp_path):
    put, named = THEIRS[kind]
    inner = swap_linear(make_llama(), ["q_proj"], 2, alpha=4)
    model = put(inner)
    for one in {model, inner} if kind != "prompt" else {model}:
        with pytest.raises(ValueError, match=f"{named}.*merge_and_unload"):
            save_adapter(one, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_what_peft_has_beside_a_pool_is_not_left_out(tmp_path):
    model = make_llama()
    pool = AdapterPool.attach(model, ["q_proj"], capacity=8)
    pool.create("a", 2, alpha=4)
    pool.save("a", tmp_path / "alone")
    _beside(model)
    with pytest.raises(ValueError, match="v_proj is PEFT's"):
        pool.save("a", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("end", ["merge_and_unload", "unload", "delete_adapter"])
def test_once_peft_s_are_gone_a_model_is_saved(end, tmp_path):
    model = swap_linear(make_llama(), ["q_proj"], 2, alpha=4)
    if end == "delete_adapter":
        _beside(model).delete_adapter("default")
    else:
        model = getattr(_around(model), end)()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, LoRALinear):
                layer.lora_b.normal_()
    save_adapter(model, tmp_path)
    base = make_llama()
    values = {name: tensor for name, tensor in model.state_dict().items() if "lora" not in name}
    base.load_state_dict({name.replace(".base_layer", ""): t for name, t in values.items()}, False)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(loaded(IDS).logits, model.eval()(IDS).logits)
