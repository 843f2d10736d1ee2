"""Tiny models for the prefixes' tests, and what the tests have in common."""

import pytest
import torch
from tiny_models import make_bert, make_gpt2, make_llama, transformers
from torch import Tensor, nn

from peft_kernels.integrations.transformers.prefix import add_prefix, prefix_for

L = 3
SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
}


def make_opt():
    config = transformers.OPTConfig(
        ffn_dim=24, word_embed_proj_dim=16, pad_token_id=0, dropout=0.0, **SIZES
    )
    return transformers.OPTForCausalLM(config)


def make_qwen2():
    config = transformers.Qwen2Config(intermediate_size=24, num_key_value_heads=1, **SIZES)
    return transformers.Qwen2ForCausalLM(config)


def make_qwen3():
    config = transformers.Qwen3Config(
        intermediate_size=24, num_key_value_heads=2, head_dim=8, **SIZES
    )
    return transformers.Qwen3ForCausalLM(config)


def make_t5(d_kv=8, layers=2):
    config = transformers.T5Config(
        vocab_size=32,
        d_model=16,
        d_kv=d_kv,
        d_ff=24,
        num_layers=layers,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def make_bart(heads=2, layers=2):
    config = transformers.BartConfig(
        vocab_size=32,
        d_model=16,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=4,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=24,
        dropout=0.0,
    )
    return transformers.BartForConditionalGeneration(config)


DECODERS = {
    "llama": make_llama,
    "gpt2": make_gpt2,
    "opt": make_opt,
    "qwen2": make_qwen2,
    "qwen3": make_qwen3,
}
ENCODER_DECODERS = {"t5": make_t5, "bart": make_bart}
FAMILIES = DECODERS | ENCODER_DECODERS | {"bert": make_bert}


def make(name: str, dtype: torch.dtype = torch.float64, **options) -> nn.Module:
    """A model in eval mode whose weights are large enough for attention to matter; no dropout."""
    model = FAMILIES[name](**options).to(dtype).eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(3, 32, (rows, length))


def inputs_of(name: str, rows: int = 2, length: int = 6) -> dict[str, Tensor]:
    inputs = {"input_ids": tokens(rows, length)}
    if name in ENCODER_DECODERS:
        inputs["decoder_input_ids"] = tokens(rows, length - 1)
    return inputs


def hidden(output) -> Tensor:
    """Logits, or a bare encoder's last hidden states."""
    return output.logits if "logits" in output else output.last_hidden_state


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def assert_close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
KINDS = {"flat": {"std": 1.0}, "mlp": {"reparametrization": "mlp", "mid": 8}}


def with_prefix(name, kind="flat", shift_positions=None, dtype=torch.float64, **options):
    model = make(name, dtype)
    add_prefix(
        model, prefix_for(model, L, **KINDS[kind], **options), shift_positions=shift_positions
    )
    return model


def loss_of(model, inputs):
    return hidden(model(**inputs)).square().mean()


each_family = pytest.mark.parametrize("name", FAMILIES)
each_decoder = pytest.mark.parametrize("name", DECODERS)
