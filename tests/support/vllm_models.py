"""A small model and its adapters, in folders for vLLM, and the tokens that PEFT gives with them."""

from __future__ import annotations

from pathlib import Path

import peft
import tokenizers
import torch
import transformers
from torch import nn

TOKENS = 8
WORDS = ["<unk>", "one", "two", *(f"w{i}" for i in range(3, 320))]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "french": (8, LINEAR),
    "legal": (64, LINEAR),
    "r16": (16, LINEAR),
    "r24-some": (24, ["q_proj", "v_proj", "up_proj"]),
    "r32-head": (32, [*LINEAR, "lm_head"]),
    "r8-all": (8, [*LINEAR, "lm_head", "embed_tokens"]),
}
OPTIONS = {
    "rank 1": {"r": 1, "target_modules": LINEAR},
    "rank-stabilised": {"r": 16, "target_modules": LINEAR, "use_rslora": True},
    "patterns": {
        "r": 8,
        "target_modules": LINEAR,
        "rank_pattern": {"q_proj": 32, "layers.1.mlp.up_proj": 3},
        "alpha_pattern": {"v_proj": 40},
    },
    "last layer": {"r": 8, "target_modules": LINEAR, "layers_to_transform": [1]},
    "one slice": {"r": 5, "target_modules": ["k_proj"]},
    "head alone": {"r": 8, "target_modules": ["lm_head"]},
    "embedding alone": {"r": 8, "target_modules": ["embed_tokens"]},
}
IDS = {name: i + 1 for i, name in enumerate([*ADAPTERS, *OPTIONS])}
PROMPTS = [[1, 2], *([1, 5, 9, 20 + i, *range(30, 30 + 3 * i)] for i in range(7))]
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

Tokens = list[list[int]]


def base() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=None,
        initializer_range=0.1,
    )
    return transformers.LlamaForCausalLM(config).eval()


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


def write_folders(folder: Path) -> dict[str | None, Tokens]:
    """Writes models/small and adapters/<name>; returns each one's tokens, and those of none."""
    base().save_pretrained(folder / "models/small")
    tokenizer().save_pretrained(folder / "models/small")
    found: dict[str | None, Tokens] = {None: tokens_of(base())}
    for name, (rank, targets) in ADAPTERS.items():
        found[name] = write_adapter(folder, name, r=rank, target_modules=targets)
    return found


def write_adapter(folder: Path, name: str, std: float = 0.05, **options) -> Tokens:
    """Writes adapters/<name> with PEFT's options; returns its tokens."""
    config = peft.LoraConfig(lora_alpha=2 * options["r"], **options)
    model = peft.get_peft_model(base(), config)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=std)
    model.save_pretrained(folder / "adapters" / name)
    return tokens_of(model.eval())


def tokens_of(model: nn.Module) -> Tokens:
    run = {"max_new_tokens": TOKENS, "do_sample": False}
    outs = [model.generate(input_ids=torch.tensor([p]), **run) for p in PROMPTS]
    return [out[0, -TOKENS:].tolist() for out in outs]


def text_of(tokens: list[int]) -> str:
    return tokenizer().decode(tokens)


def rotations() -> list[list[str | None]]:
    """A name for every prompt, or none, so that each prompt has each of them once."""
    order = [None, *ADAPTERS]
    return [
        [order[(i + shift) % len(order)] for i in range(len(PROMPTS))]
        for shift in range(len(order))
    ]


def outputs(
    llm, folder: Path, names: list[str | None], prompts: Tokens = PROMPTS, whole=False, **sampling
):
    """What a vLLM engine gives: of each prompt with its adapter, or ``whole`` with the prompt's."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    requests = [LoRARequest(n, IDS[n], str(folder / "adapters" / n)) if n else None for n in names]
    greedy = SamplingParams(
        temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, **sampling
    )
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    outs = llm.generate(given, greedy, lora_request=requests, use_tqdm=False)
    return outs if whole else [out.outputs[0] for out in outs]


def serve(llm, folder: Path, names: list[str | None], prompts: Tokens = PROMPTS) -> Tokens:
    """The tokens of it."""
    return [list(out.token_ids) for out in outputs(llm, folder, names, prompts)]


def options(slots: int) -> dict[str, object]:
    """Of vLLM's LLM, with fewer slots than there are adapters."""
    return {
        "skip_tokenizer_init": True,
        "enable_lora": True,
        "max_loras": slots,
        "max_cpu_loras": len(ADAPTERS),
        "max_lora_rank": 64,
        "dtype": "float32",
        "max_model_len": 128,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 256,
        "disable_log_stats": True,
    }
