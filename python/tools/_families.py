"""Tiny models of transformers' families, and whether each method computes in them what it should.

A check compares with what the model itself computes, in eager attention and float64, without this
package: a prefix made of a text's keys and values with that text in the rows (of images, a prefix
with its keys and values beside the image's), a prompt with its embeddings in the rows, LoRA with
its product added to the weights, adapters with their formula after the sublayer's output.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as ALL_MASKS
from transformers.models.auto import modeling_auto

from peft_kernels.integrations.transformers.adapters import adapters_of, insert_adapters
from peft_kernels.integrations.transformers.prefix import (
    add_prefix,
    attention_places,
    prefix_for,
    remove_prefix,
    text_values,
)
from peft_kernels.integrations.transformers.soft_prompts import add_prompt
from peft_kernels.models.swap import swap_linear
from peft_kernels.nn import LoRALinear, PromptTuning

METHODS = ("LoRA", "adapters", "prefix", "prompt")
L, S = 3, 5
DECODED = torch.tensor([[2, 7, 19, 33]])
TOLERANCE = 1e-5  # of the largest output; some models round to float32 on their way
LARGEST = 250_000  # parameters of a model that counts as tiny
SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("attention_heads", "decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "hidden_dim", "n_inner", "d_ff"), 48),
    **dict.fromkeys(("ffn_hidden_size", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "vocab_size", "local_attention"), 64
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(
        ("q_lora_rank", "kv_lora_rank", "v_head_dim", "head_dim", "qk_rope_head_dim"), 8
    ),
    **dict.fromkeys(("qk_nope_head_dim", "rotary_dim", "patch_size"), 4),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "type_vocab_size"), 2),
    **dict.fromkeys(("attention_window", "image_size"), 8),
    "word_embed_proj_dim": 32,
    "reference_compile": False,
    "trigram_input": False,  # by which a text reads the embedding of what is behind it
    "num_hidden_groups": 2,
    "d_kv": 8,
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("src_vocab_size", "tgt_vocab_size"), 64),
    **dict.fromkeys(("max_encoder_position_embeddings", "max_decoder_position_embeddings"), 64),
    "langs": ["en", "de"],
    "layer_types": ["full_attention"] * 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS = {
    "decoders": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "encoders": "MODEL_FOR_MASKED_LM_MAPPING",
    "encoder-decoders": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "images": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
}


@contextmanager
def default_dtype() -> Iterator[None]:
    """Within it, what a model makes on its way is in float64 too."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


class Family:
    """A class of models, and one of it.

    Args:
        kind: of KINDS.
        model: in eager attention and float64, with weights large enough for attention to matter.
    """

    def __init__(self, kind: str, model: nn.Module) -> None:
        self.kind, self.model, self.name = kind, model, type(model).__name__

    def copy(self) -> Any:
        return copy.deepcopy(self.model)


def families(kind: str) -> Iterator[Family]:
    """A tiny model of each class that can be built so."""
    mapping = getattr(modeling_auto, KINDS[kind])
    seen = set()
    for config in mapping:
        classes = mapping[config]
        for model in classes if isinstance(classes, tuple | list) else (classes,):
            if model.__name__ not in seen and (made := _built(kind, config, model)) is not None:
                seen.add(model.__name__)
                yield Family(kind, made)


def _built(kind: str, config: Any, model: Any) -> nn.Module | None:
    names = set(inspect.signature(config.__init__).parameters)
    any_name = not names - {"self", "args", "kwargs"}
    options = {k: v for k, v in SIZES.items() if any_name or k in names}
    torch.manual_seed(0)
    try:
        configured = config(**options)
        with torch.device("meta"):
            if sum(p.numel() for p in model(configured).parameters()) > LARGEST:
                return None
        configured._attn_implementation = "eager"
        with default_dtype():
            made = model(configured).double().eval()
            if _is_of_two(made) is not (kind == "encoder-decoders"):
                return None
            if (made.main_input_name == "pixel_values") is not (kind == "images"):
                return None
            _out(made, **_inputs(made, 1))
        copy.deepcopy(made)
    except Exception:  # what it raises says nothing here: this configuration isn't one of its own
        return None
    with torch.no_grad():
        for module in made.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return made


# ---- the checks ----------------------------------------------------------------------------------


def check(family: Family, method: str) -> str:
    """ "right", "wrong: ..." or the text of the error, a ValueError, that says why not."""
    torch.manual_seed(1)
    with warnings.catch_warnings(), torch.no_grad(), default_dtype():
        warnings.simplefilter("ignore")
        try:
            return _CHECKS[method](family)
        except ValueError as error:
            return str(error)
        except TypeError as error:
            if "must use Linear's own forward" in str(error):  # of a layer that LoRA can't replace
                return str(error)
            raise
        except RuntimeError as error:
            if "read its weight in this forward" in str(error):  # on a path of its own
                return str(error)
            raise


def _tokens(rows: int, length: int) -> Tensor:
    return torch.randint(3, 60, (rows, length))


def _is_of_two(model: Any) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


def _inputs(model: Any, rows: int) -> dict[str, Tensor]:
    """A text of S tokens in each row, or an image."""
    if model.main_input_name == "pixel_values":
        config = model.config
        channels = getattr(config, "num_channels", 3)
        return {"pixel_values": torch.randn(rows, channels, config.image_size, config.image_size)}
    return {"input_ids": _tokens(rows, S)}


def _out(model: Any, ids: Tensor | None = None, **inputs: Any) -> Tensor:
    """Logits; an encoder-decoder's decoder has DECODED in each row unless it is given others."""
    if ids is not None:
        inputs["input_ids"] = ids
    names = ("input_ids", "inputs_embeds")
    text = next((inputs[name] for name in names if name in inputs), None)
    if text is not None:
        inputs.setdefault("attention_mask", torch.ones(text.shape[:2], dtype=torch.long))
        if _is_of_two(model):
            inputs.setdefault("decoder_input_ids", DECODED.expand(text.shape[0], -1))
    output = model(**inputs)
    return output.logits if hasattr(output, "logits") else output[0]


def _verdict(found: Tensor, expected: Tensor, bare: Tensor) -> str:
    """Whether two outputs are the same; they must differ from the bare model's to show anything."""
    scale = expected.abs().max()
    if not (expected - bare).abs().max() > 100 * TOLERANCE * scale:
        return "wrong: the check shows nothing"
    error = ((found - expected).abs().max() / scale).item()
    return "right" if error < TOLERANCE else f"wrong: by {error:.1e}"


def _prefix(family: Family) -> str:
    if family.kind == "images":
        return _prefix_beside(family)
    return _prefix_of_two(family) if _is_of_two(family.model) else _prefix_of_one(family)


def _prefix_of_one(family: Family) -> str:
    """The keys and values of a text, before a decoder's text or behind an encoder's.

    Without padding all rows have a prefix; with padding none has.
    """
    ids, text = _tokens(2, S), _tokens(1, L).expand(2, -1)
    first = family.kind == "decoders"
    rows, kept = torch.cat([text, ids], 1), slice(0, L)
    if not first:
        rows, kept = torch.cat([ids, text], 1), slice(S, None)
    model, expected = family.copy(), _without_biases(family.copy())
    prefix = prefix_for(model, L, sites=["self"], tasks=2)
    add_prefix(model, prefix, shift_positions=False)
    if fault := _fault_of_padding(family, model, ids):
        return fault
    remove_prefix(_without_biases(model))
    made = text_values(model, input_ids=rows, attention_mask=torch.ones_like(rows))["self"]
    if any(pair is None for pair in made) or len(made) != 2:
        return "not compared: not all of its layers have attention of their own"
    prefix.fit([(k[:, :, kept], v[:, :, kept]) for k, v in made])
    add_prefix(model, prefix, shift_positions=first)
    found, whole = _out(model, ids, prefix_ids=[0, 1]), _out(expected, rows)
    return _verdict(found, whole[:, L:] if first else whole[:, :S], _out(expected, ids))


def _fault_of_padding(family: Family, model: nn.Module, ids: Tensor) -> str | None:
    """What is wrong in padded rows without a prefix, in a model that has one of two tasks."""
    mask = torch.tensor([[1] * S, [1] * (S - 2) + [0] * 2])
    without = _out(model, ids, attention_mask=mask, prefix_ids=[-1, -1])
    bare = _out(family.model, ids, attention_mask=mask)
    off = without - bare if _is_of_two(model) else (without - bare)[mask.bool()]
    error = off.abs().max() / bare.abs().max()
    return None if error < TOLERANCE else f"wrong: by {error:.1e} in padded rows without a prefix"


def _prefix_of_two(family: Family) -> str:
    """The same at each site of an encoder-decoder, one by one: all must be right."""
    sites = prefix_for(family.model, L).layers
    if set(sites) != {"self", "encoder", "cross"}:
        return f"wrong: has a prefix at {', '.join(sites)} alone"
    verdicts = [_prefix_at(family, site) for site in sites]
    return next((verdict for verdict in verdicts if verdict != "right"), "right")


def _prefix_at(family: Family, site: str) -> str:
    """A text before the decoder's, behind the encoder's, or that the encoder has read besides."""
    ids, text = _tokens(2, S), _tokens(1, L).expand(2, -1)
    decoded = DECODED.expand(2, -1)
    model, expected = family.copy(), _without_biases(family.copy())
    prefix = prefix_for(model, L, sites=[site], tasks=2)
    add_prefix(model, prefix, shift_positions=False)
    if fault := _fault_of_padding(family, model, ids):
        return fault
    remove_prefix(_without_biases(model))
    rows = {
        "self": (ids, torch.cat([text, decoded], 1)),
        "encoder": (torch.cat([ids, text], 1), decoded),
        "cross": (text, decoded),
    }[site]
    made = text_values(model, input_ids=rows[0], decoder_input_ids=rows[1])[site]
    kept = {"self": slice(0, L), "encoder": slice(S, None), "cross": slice(0, L)}[site]
    prefix.fit([(k[:, :, kept], v[:, :, kept]) for k, v in made])
    try:
        add_prefix(model, prefix, shift_positions=site == "self")
    except ValueError as error:
        if "shift_positions must be False" not in str(error):
            raise
        return _prefix_beside(family, [site])
    found, bare = _out(model, ids, prefix_ids=[0, 1]), _out(expected, ids)
    encode: Any = expected.get_encoder()
    encoded = encode(rows[0] if site == "encoder" else ids, return_dict=True)
    states = encoded.last_hidden_state[:, :S]
    if site == "cross":
        states = torch.cat([states, encode(text)[0]], 1)
    encoded.last_hidden_state = states
    mask = torch.ones(states.shape[:2], dtype=torch.long)
    given = {"encoder_outputs": encoded, "decoder_input_ids": rows[1]}
    whole = _out(expected, attention_mask=mask, **given)
    verdict = _verdict(found, whole[:, L:] if site == "self" else whole, bare)
    return verdict if verdict == "right" else f"{verdict} at {site}"


def _prefix_beside(family: Family, sites: list[str] | None = None) -> str:
    """Any keys and values, put before the model's own by a function that attends to them too.

    So a prefix is checked that no text could be: of an image, or of a decoder whose positions
    can't be moved.
    """
    model, expected, inputs = family.copy(), family.copy(), _inputs(family.model, 2)
    prefix = prefix_for(model, L, sites=sites, std=1.0)
    add_prefix(model, prefix, shift_positions=False)
    made = prefix()
    pairs = {p.module: made[p.site][p.layer] for p in attention_places(expected) if p.site in made}

    def attend(
        module: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        *,
        scaling: float,
        position_bias: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        before = [x.detach().expand(q.shape[0], -1, -1, -1) for x in pairs.get(module, ())]
        k, v = (torch.cat([*before[i : i + 1], x], 2) for i, x in enumerate((k, v)))
        scores = scaling * q @ k.mT
        for added in (mask, position_bias):
            if added is not None:
                scores[..., -added.shape[-1] :] += added
        out = torch.softmax(scores, -1) @ v
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("peft_kernels_concatenated", attend)
    AttentionMaskInterface.register("peft_kernels_concatenated", ALL_MASKS["eager"])
    expected.set_attn_implementation("peft_kernels_concatenated")
    return _verdict(*(_out(one, **inputs) for one in (model, expected, family.model)))


def _without_biases(model: nn.Module) -> nn.Module:
    """What is added by relative position is of the text alone, and a text behind it has some."""
    for module in model.modules():
        if isinstance(bias := getattr(module, "relative_attention_bias", None), nn.Embedding):
            bias.weight.zero_()
    return model


def _prompt(family: Family) -> str:
    model, ids = family.copy(), _tokens(2, S)
    embedding = model.get_input_embeddings()
    width = getattr(embedding, "weight", torch.empty(1, 32)).shape[1]
    prompt = PromptTuning(L, width, init="normal", std=3.0, tasks=1).double()
    add_prompt(model, prompt)
    found = _out(model, ids)
    text, bare = family.model.get_input_embeddings()(ids), _out(family.model, ids)
    if not (_out(family.model, inputs_embeds=text) - bare).abs().max() < TOLERANCE * bare.max():
        return "wrong: its embeddings aren't what its tokens are"
    rows = torch.cat([prompt.prompts().expand(2, -1, -1), text], 1)
    expected = _out(family.model, inputs_embeds=rows)
    return _verdict(found, expected if _is_of_two(model) else expected[:, L:], bare)


def _lora(family: Family) -> str:
    model, expected, inputs = family.copy(), family.copy(), _inputs(family.model, 2)
    swap_linear(model, "all-linear", 2, alpha=4.0)
    for path, layer in model.named_modules():
        if not isinstance(layer, LoRALinear):
            continue
        weight: Any = expected.get_submodule(path).weight
        nn.init.normal_(layer.lora_b)
        product = 2.0 * layer.lora_b.double() @ layer.lora_a.double()
        is_linear = isinstance(expected.get_submodule(path), nn.Linear)
        weight += product if is_linear else product.T
    outputs = (_out(one, **inputs) for one in (model, expected, family.model))
    return _verdict(*outputs)


def _adapters(family: Family) -> str:
    model, expected, inputs = family.copy(), family.copy(), _inputs(family.model, 2)
    insert_adapters(model, "houlsby")
    for path, adapter in adapters_of(model).items():
        nn.init.normal_(adapter.up.weight)
        _adapt(expected.get_submodule(path.rpartition(".")[0]), adapter)
    outputs = (_out(one, **inputs) for one in (model, expected, family.model))
    return _verdict(*outputs)


def _adapt(module: Any, adapter: Any) -> None:
    """The formula of Houlsby's adapter, in a model that has none."""

    def update(x: Tensor) -> Tensor:
        return adapter.up(torch.nn.functional.silu(adapter.down(x)))

    def after_norm(hidden: Tensor, given: Tensor, **_: Any) -> Tensor:
        f = module.dense(hidden)
        return module.LayerNorm(f + given + update(f))

    def after(module: Any, args: tuple, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        first = first + update(first)
        return (first, *output[1:]) if isinstance(output, tuple) else first

    if hasattr(module, "LayerNorm"):
        module.forward = after_norm
    else:
        module.register_forward_hook(after)


_CHECKS = {"LoRA": _lora, "adapters": _adapters, "prefix": _prefix, "prompt": _prompt}
