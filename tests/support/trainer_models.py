"""What trainers train in tests: a small Llama, PEFT's adapters, tokens and their tokenizer."""

import pytest
import torch
from tiny_models import make_llama
from torch import nn

transformers = pytest.importorskip("transformers")

TARGETS = ["q_proj", "v_proj", "down_proj"]


# bfloat16 has three digits. Losses are the same to 1e-4 where each is a mean over many tokens, the
# roundings of which cancel, and where Adam takes no whole step along a gradient that is rounding.
IN_BFLOAT16 = {"bf16": True, "per_device_train_batch_size": 128, "adam_epsilon": 1e-5}


def rows(count: int = 8, length: int = 7) -> list[dict]:
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 32, (count, length), generator=draw).tolist()
    return [{"input_ids": row, "labels": row} for row in tokens]


def tokenizer():
    """Of 32 tokens ``t0`` to ``t31``, split at spaces."""
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({f"t{i}": i for i in range(32)}, unk_token="t1")
    inner = tokenizers.Tokenizer(words)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="t0", eos_token="t2"
    )


def base() -> nn.Module:
    """With weights large enough that an adapter makes a difference."""
    torch.manual_seed(0)
    model = make_llama()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def losses_of(trainer, **options) -> list[float]:
    """Trains, and gives the losses of all steps, to all their digits, which the log hasn't."""
    losses, compute = [], trainer.compute_loss

    def recorded(*args, **kwargs):
        found = compute(*args, **kwargs)
        if trainer.model.training:
            losses.append((found[0] if isinstance(found, tuple) else found).item())
        return found

    trainer.compute_loss = recorded
    trainer.train(**options)
    return losses
