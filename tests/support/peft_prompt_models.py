"""The same prompts in PEFT and here, in tiny models, and what they answer."""

import json

import pytest
import safetensors.torch
import torch
from prefix_models import make_bart, make_t5
from tiny_models import make_bert, make_gpt2, make_llama, transformers
from torch import nn

from peft_kernels.integrations.transformers.prefix import add_prefix, prefix_for, remove_prefix
from peft_kernels.integrations.transformers.soft_prompts import add_prompt, remove_prompt
from peft_kernels.nn import PrefixTuning, PromptTuning, PTuning, Template
from peft_kernels.nn._template import Input, Slots

peft = pytest.importorskip("peft")

L, D = 3, 16
IDS = torch.arange(12).reshape(2, 6)
# Padding at the end, which moves no position in PEFT.
MASK = torch.ones_like(IDS).index_put((torch.tensor([1]), torch.tensor([5])), torch.tensor(0))
TASKS = torch.tensor([1, 0])


def make_classifier() -> nn.Module:
    return transformers.BertForSequenceClassification(make_bert().config)


TYPES = {
    make_gpt2: "CAUSAL_LM",
    make_llama: "CAUSAL_LM",
    make_t5: "SEQ_2_SEQ_LM",
    make_bart: "SEQ_2_SEQ_LM",
    make_classifier: "SEQ_CLS",
    make_bert: "FEATURE_EXTRACTION",
}
METHODS = {
    "prompt": peft.PromptTuningConfig,
    "p_tuning": peft.PromptEncoderConfig,
    "lstm": peft.PromptEncoderConfig,
    "multitask": peft.MultitaskPromptTuningConfig,
    "prefix": peft.PrefixTuningConfig,
    "prefix_mlp": peft.PrefixTuningConfig,
}
OPTIONS = {
    "p_tuning": {"encoder_hidden_size": 7},
    "lstm": {
        "encoder_hidden_size": 7,
        "encoder_reparameterization_type": "LSTM",
        "encoder_num_layers": 3,
        "encoder_dropout": 0.25,
    },
    "multitask": {"num_tasks": 2, "num_ranks": 2, "num_transformer_submodules": 1},
    "prefix_mlp": {"prefix_projection": True, "encoder_hidden_size": 7},
}
CASES = [
    *((make, method) for make in (make_gpt2, make_llama) for method in METHODS),
    *((make, method) for make in (make_t5, make_bart) for method in ("prompt", "lstm")),
    *((make_classifier, method) for method in ("prompt", "p_tuning", "prefix")),
    (make_bert, "prompt"),
    (make_t5, "multitask"),
]
cases = pytest.mark.parametrize(
    ("make", "method"), CASES, ids=lambda x: x if isinstance(x, str) else x.__name__[5:]
)


def base(make) -> nn.Module:
    """A model whose weights are large enough for a prompt to matter."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def theirs(make, method: str) -> nn.Module:
    config = METHODS[method](task_type=TYPES[make], num_virtual_tokens=L, **OPTIONS.get(method, {}))
    model = peft.get_peft_model(base(make), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=1.0 if "prompt_encoder" in name else 0.3)
    return model


def ours(make, method: str) -> nn.Module:
    torch.manual_seed(1)
    if method.startswith("prefix"):
        options = {"reparametrization": "mlp", "mid": 7} if method == "prefix_mlp" else {}
        return prefix_for(base(make), L, std=1.0, **options)
    if method in ("lstm", "p_tuning"):
        template = Template([Slots(L), Input("x")], model="causal")
        options = {"encoder": "mlp", "hidden_size": 7}
        if method == "lstm":
            options = {"hidden_size": 7, "num_layers": 3, "dropout": 0.25}
        return PTuning(template, D, **options).eval()
    options = {"tasks": 2, "rank": 2, "factor_std": 1.0} if method == "multitask" else {}
    return PromptTuning(L, D, init="normal", std=1.0, **options)


def arguments(make, method: str) -> dict:
    """The model's, and PEFT's; an encoder-decoder's multitask prompt takes labels in PEFT alone."""
    given = {"attention_mask": MASK}
    if TYPES[make] == "SEQ_2_SEQ_LM":
        given["labels" if method == "multitask" else "decoder_input_ids"] = IDS[:, :4].contiguous()
    return given


def out_of(output) -> torch.Tensor:
    """Of the text's real tokens, not the prompt's; a decoder's or a classifier's is whole."""
    out = output.logits if "logits" in output else output.last_hidden_state
    if out.dim() < 3 or out.shape[1] < IDS.shape[1]:
        return out
    return out[:, -IDS.shape[1] :][MASK.bool()]


@torch.no_grad()
def their_logits(model: nn.Module, make, method: str) -> torch.Tensor:
    extra = {"task_ids": TASKS} if method == "multitask" else {}
    return out_of(model(IDS, **arguments(make, method), **extra))


@torch.no_grad()
def our_logits(model: nn.Module, module: nn.Module, make, method: str) -> torch.Tensor:
    given = arguments(make, method)
    if isinstance(module, PrefixTuning):
        # PEFT shifts BERT's positions as those of decoders.
        add_prefix(model, module, shift_positions=True if make is make_classifier else None)
        output = out_of(model(IDS, **given))
        assert remove_prefix(model) is module
        return output
    add_prompt(model, module)
    extra = {"task_ids": TASKS} if method == "multitask" else {}
    output = out_of(model(IDS, **given, **extra))
    assert remove_prompt(model) is module
    return output


def assert_close(a, b, without) -> None:
    """a is b, and not what the model computes without a prompt."""
    assert (a - without).abs().max() > 1e-3
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(b.abs().max()))


def bare(make, method: str) -> torch.Tensor:
    with torch.no_grad():
        return out_of(base(make)(IDS, **arguments(make, method)))


def config_of(folder) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def edit_config(folder, **changes) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(config_of(folder) | changes))


def tensors_of(folder) -> dict:
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


def write_tensors(folder, tensors) -> None:
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
