"""Models with soft prompts, for their tests."""

import copy
from functools import partial

import prefix_models
import torch
import torch.nn.functional as F
from prefix_models import tokens

from peft_kernels.integrations.transformers.attention.prefixed import Recording, current_state
from peft_kernels.integrations.transformers.soft_prompts import add_prompt
from peft_kernels.nn import PromptTuning

L, S = 4, 6
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def causal_loss(logits, labels, **options):
    """The loss in the logits' dtype; transformers' own is in float32."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def rms_norm(module, x):
    return F.rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)


def make(name, *args, **options):
    model = prefix_models.make(name, *args, **options)
    model.loss_function = causal_loss
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):  # they are in float32 too
            module.forward = partial(rms_norm, module)
    return model


def make_prompt(model, **options):
    embedding = model.get_input_embeddings().weight
    options = {"init": "normal", "std": 1.0, "dtype": embedding.dtype} | options
    return PromptTuning(options.pop("length", L), embedding.shape[1], **options)


def padded(side, rows=3, length=S):
    """Ids, mask and labels of rows of several lengths."""
    ids, mask = tokens(rows, length), torch.ones(rows, length, dtype=torch.long)
    for row in range(rows):
        pads = slice(0, row) if side == "left" else slice(length - row, length)
        if row:
            ids[row, pads], mask[row, pads] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def both_ways(name, dtype=torch.float64, prompt_options=None, **options):
    """The model with the prompt as a prefix, and with it in the rows."""
    one = make(name, dtype, **options)
    other = copy.deepcopy(one)
    prompt = make_prompt(one, **(prompt_options or {}))
    add_prompt(one, prompt)
    add_prompt(other, copy.deepcopy(prompt), as_prefix=False)
    assert one.__dict__["_prompt_hook_of"].obstacle is None
    return one, other


def runs_of_prompt(model):
    """How many forwards of the prompt alone the model makes, and of how many rows: a live list."""
    seen = []
    decoder = model.__dict__["_prompt_hook_of"].decoder

    def note(module, args, kwargs):
        if isinstance(current_state(), Recording):
            seen.append(tuple(kwargs["inputs_embeds"].shape[:2]))

    decoder.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def relative(a, b):
    """The error of a by norm."""
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()
