"""A training step of prompt tuning in GPT-2's blocks, for the suite of prompt_lookup.

Random weights: time doesn't depend on them. The host is `transformers`' GPT2LMHeadModel with a
small vocabulary, so that its blocks are what takes time. The loss is the forward's result, and the
prompt its x.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from peft_kernels.integrations.transformers.soft_prompts import CHILD, add_prompt
from peft_kernels.nn import PromptTuning
from peft_kernels.tools.bench.implementation import Implementation

VOCABULARY = 1000
Batch = Mapping[str, Tensor]


def gpt2(hidden: int, layers: int, places: int) -> Any:
    """A frozen GPT-2 without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=hidden,
        n_layer=layers,
        n_head=max(1, hidden // 64),
        n_positions=places,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    model: nn.Module = GPT2LMHeadModel(config)
    return model.train().requires_grad_(False)


def a_batch(batch: int, seq: int, device: torch.device | str) -> dict[str, Tensor]:
    ids = torch.randint(0, VOCABULARY, (batch, seq), device=device)
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def by_hand(base: Any, batch: Batch, prompt: Tensor) -> Implementation:
    """The prompt expanded to the batch and put before the text's embeddings."""
    ids, labels, mask = (batch[name] for name in ("input_ids", "labels", "attention_mask"))

    def forward(x: Tensor) -> Tensor:
        soft = x.expand(ids.shape[0], -1, -1)
        shape = soft.shape[:2]
        return base(
            inputs_embeds=torch.cat((soft, base.get_input_embeddings()(ids)), 1),
            attention_mask=torch.cat((mask.new_ones(shape), mask), 1),
            labels=torch.cat((labels.new_full(shape, -100), labels), 1),
        ).loss

    return Implementation(forward, prompt, (), tuple(base.parameters()))


def ours(base: Any, batch: Batch, prompt: Tensor, as_prefix: bool) -> Implementation:
    """The prompt run once and shared by the rows, or in each of them."""
    model = copy.deepcopy(base)
    module = PromptTuning(*prompt.shape, device=prompt.device)
    add_prompt(model, module, as_prefix=as_prefix)
    name = f"{CHILD}.prompt"
    return _step(model, batch, name, prompt.view(module.prompt.shape))


def theirs(base: Any, batch: Batch, prompt: Tensor) -> Implementation:
    """PEFT's prompt tuning."""
    import peft

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=prompt.shape[0])
    model = peft.get_peft_model(copy.deepcopy(base), config).train()
    return _step(model, batch, "prompt_encoder.default.embedding.weight", prompt)


def _step(model: nn.Module, batch: Batch, name: str, prompt: Tensor) -> Implementation:
    """Of the model with the prompt for its parameter of that name."""
    frozen = (*model.parameters(), *model.buffers())
    return Implementation(
        lambda x: functional_call(model, {name: x}, (), dict(batch)).loss, prompt, (), frozen
    )
