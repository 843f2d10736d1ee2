"""A model served by vLLM with the plugin: its greedy tokens beside transformers and PEFT's."""

import pytest
import torch

pytest.importorskip("vllm")
pytest.importorskip("peft")

import peft
import transformers
from vllm.platforms.cpu import CpuPlatform

from peft_kernels.integrations.vllm.plugin import register
from peft_kernels.integrations.vllm.punica import PunicaWrapperPEFTKernels

TOKENS = 8
SLOTS = 4
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# More of them than slots, so that slots are used again.
ADAPTERS = {
    "r8": (8, LINEAR),
    "r16": (16, LINEAR),
    "r64": (64, LINEAR),
    "r24-some": (24, ["q_proj", "v_proj", "up_proj"]),
    "r32-head": (32, [*LINEAR, "lm_head"]),
    "r8-all": (8, [*LINEAR, "lm_head", "embed_tokens"]),
}
PROMPTS = [[1, 5, 9, 20 + i, *range(30, 30 + 3 * i)] for i in range(8)]

pytestmark = pytest.mark.filterwarnings("ignore")


def base():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=320,
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The base, and every adapter, in folders of their own."""
    made = tmp_path_factory.mktemp("served")
    base().save_pretrained(made / "base")
    for name, (rank, targets) in ADAPTERS.items():
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
        model = peft.get_peft_model(base(), config)
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.05)
        model.save_pretrained(made / name)
    return made


@pytest.fixture(scope="module")
def expected(folder):
    """The tokens of transformers with PEFT, of every prompt with every adapter and with none."""

    def tokens(model):
        run = dict(max_new_tokens=TOKENS, do_sample=False)
        outs = [model.generate(input_ids=torch.tensor([p]), **run) for p in PROMPTS]
        return [out[0, -TOKENS:].tolist() for out in outs]

    found = {None: tokens(base())}
    for name in ADAPTERS:
        found[name] = tokens(peft.PeftModel.from_pretrained(base(), folder / name).eval())
    return found


@pytest.fixture(scope="module")
def llm(folder):
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, where it can be looked at
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        patch.setattr(CpuPlatform, "get_punica_wrapper", CpuPlatform.get_punica_wrapper)
        register()
        made = vllm_of(folder)
        yield made
        made.llm_engine.engine_core.shutdown()


def vllm_of(folder):
    from vllm import LLM

    return LLM(
        str(folder / "base"),
        skip_tokenizer_init=True,
        enable_lora=True,
        max_loras=SLOTS,
        max_cpu_loras=len(ADAPTERS),
        max_lora_rank=64,
        dtype="float32",
        max_model_len=128,
        max_num_seqs=16,
        max_num_batched_tokens=256,
        disable_log_stats=True,
    )


def served(llm, folder, names, prompts=PROMPTS, **options):
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    ids = {name: i + 1 for i, name in enumerate(ADAPTERS)}
    requests = [LoRARequest(n, ids[n], str(folder / n)) if n else None for n in names]
    sampling = SamplingParams(
        temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, **options
    )
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    outs = llm.generate(given, sampling, lora_request=requests, use_tqdm=False)
    return [out.outputs[0] for out in outs]


def tokens_of(outs):
    return [list(out.token_ids) for out in outs]


def test_the_wrapper_is_in_place(llm):
    manager = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    wrapper = manager.model_runner.lora_manager._adapter_manager.punica_wrapper_mapping
    assert {type(one) for one in wrapper.values()} == {PunicaWrapperPEFTKernels}


def test_the_adapters_tell_prompts_apart(expected):
    """Else a wrong adapter would show in no token."""
    for row in zip(*expected.values(), strict=True):
        assert len({tuple(tokens) for tokens in row}) == len(expected)


@pytest.mark.parametrize("name", [None, *ADAPTERS], ids=str)
def test_every_adapter_alone(llm, folder, expected, name):
    assert tokens_of(served(llm, folder, [name] * len(PROMPTS))) == expected[name]


def test_mixed_with_each_other_and_with_the_base(llm, folder, expected):
    order = [None, *ADAPTERS]
    for shift in range(len(order)):
        names = [order[(i + shift) % len(order)] for i in range(len(PROMPTS))]
        found = tokens_of(served(llm, folder, names))
        assert found == [expected[name][i] for i, name in enumerate(names)], names


def test_base_rows_beside_full_slots(llm, folder, expected):
    """vLLM's own class gives such rows the update of the last slot."""
    full = list(ADAPTERS)[:SLOTS]
    served(llm, folder, full, PROMPTS[:SLOTS])
    names = [*full, *[None] * (len(PROMPTS) - SLOTS)]
    found = tokens_of(served(llm, folder, names))
    assert found == [expected[name][i] for i, name in enumerate(names)]
