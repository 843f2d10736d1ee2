"""A model served by vLLM with the plugin: its greedy tokens beside transformers and PEFT's."""

import gc
import json
import logging
import shutil

import pytest
import torch

pytest.importorskip("vllm")
pytest.importorskip("peft")

from safetensors.torch import load_file, save_file
from vllm.config import CompilationMode
from vllm.lora.request import LoRARequest
from vllm.platforms.cpu import CpuPlatform
from vllm_models import (
    ADAPTERS,
    IDS,
    OPTIONS,
    PROMPTS,
    SETTINGS,
    options,
    outputs,
    rotations,
    serve,
    write_adapter,
    write_folders,
)

from peft_kernels.integrations.vllm.plugin import register
from peft_kernels.integrations.vllm.punica import PunicaWrapperPEFTKernels

SLOTS = 4

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def expected(folder):
    return write_folders(folder)


@pytest.fixture(scope="module")
def llm(folder, expected):
    with pytest.MonkeyPatch.context() as patch:
        # In this process, where it can be looked at.
        for name, value in {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **SETTINGS}.items():
            patch.setenv(name, value)
        patch.setattr(CpuPlatform, "get_punica_wrapper", CpuPlatform.get_punica_wrapper)
        register()
        from vllm import LLM

        made = LLM(str(folder / "models/small"), **options(SLOTS))
        yield made
        made.llm_engine.engine_core.shutdown()


def manager_of(llm):
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    return worker.model_runner.lora_manager._adapter_manager


def test_the_wrapper_is_in_place(llm):
    wrappers = manager_of(llm).punica_wrapper_mapping
    assert {type(one) for one in wrappers.values()} == {PunicaWrapperPEFTKernels}


def test_vllm_compiles_no_model_with_lora_on_a_cpu(llm):
    assert not llm.llm_engine.vllm_config.model_config.enforce_eager
    assert llm.llm_engine.vllm_config.compilation_config.mode is CompilationMode.NONE


def test_the_adapters_tell_prompts_apart(expected):
    """Else a wrong adapter would show in no token."""
    for row in zip(*expected.values(), strict=True):
        assert len({tuple(tokens) for tokens in row}) == len(expected)


@pytest.mark.parametrize("name", [None, *ADAPTERS], ids=str)
def test_every_adapter_alone(llm, folder, expected, name):
    assert serve(llm, folder, [name] * len(PROMPTS)) == expected[name]


@pytest.mark.parametrize("name", OPTIONS)
def test_an_adapter_of_another_kind_beside_others(llm, folder, expected, name):
    own = write_adapter(folder, name, std=0.3, **OPTIONS[name])
    assert own != expected[None]
    names = [name, "r16", None, name, "r8-all", name, None, name]
    found = serve(llm, folder, names)
    assert found == [(expected | {name: own})[each][i] for i, each in enumerate(names)]


@pytest.mark.parametrize("names", rotations(), ids=str)
def test_mixed_with_each_other_and_with_the_base(llm, folder, expected, names):
    """There are more of them than slots, so that slots are used again."""
    found = serve(llm, folder, names)
    assert found == [expected[name][i] for i, name in enumerate(names)]


def test_base_rows_beside_full_slots(llm, folder, expected):
    """vLLM's own class gives such rows the update of the last slot."""
    full = list(ADAPTERS)[:SLOTS]
    serve(llm, folder, full, PROMPTS[:SLOTS])
    names = [*full, *[None] * (len(PROMPTS) - SLOTS)]
    found = serve(llm, folder, names)
    assert found == [expected[name][i] for i, name in enumerate(names)]


def test_base_rows_have_the_bits_that_they_have_without_lora(llm, folder):
    def bits(names):
        outs = outputs(llm, folder, names, logprobs=5)
        return [
            [{token: p.logprob for token, p in step.items()} for step in out.logprobs]
            for out in outs
        ]

    without = bits([None] * len(PROMPTS))
    for name in ADAPTERS:
        names = [name, *[None] * (len(PROMPTS) - 1)]
        beside = bits(names)
        assert beside[0] != without[0]
        assert beside[1:] == without[1:], name


def test_log_probabilities_of_prompts_have_the_adapters_of_their_own_prompts(llm, folder):
    """The last one of a prompt is that of the first token after the prompt without its end."""
    names = ["r8-all", "r32-head", None, "r32-head"]
    prompts = [prompt[-n:] for prompt, n in zip(PROMPTS, (5, 4, 6, 5), strict=False)]
    whole = outputs(llm, folder, names, prompts, whole=True, prompt_logprobs=3)
    ends = outputs(llm, folder, names, [prompt[:-1] for prompt in prompts], logprobs=3)
    for out, end, prompt in zip(whole, ends, prompts, strict=True):
        found = {token: p.logprob for token, p in out.prompt_logprobs[-1].items()}
        found.pop(prompt[-1], None)
        wanted = {token: p.logprob for token, p in end.logprobs[0].items()}
        for token, value in found.items():
            assert value == pytest.approx(wanted[token], abs=1e-4)
        assert len(found) >= 2


def test_adapters_that_come_and_go_leave_nothing_behind(llm, folder, expected):
    """Neither in what the wrapper keeps nor in the layers, however often they are replaced."""
    manager, names = manager_of(llm), list(ADAPTERS)

    def kept():
        holders = [*manager.punica_wrapper_mapping.values(), *manager.modules.values()]
        return [
            {name: len(own) for name, own in vars(holder).items() if isinstance(own, dict | list)}
            for holder in {id(holder): holder for holder in holders}.values()
        ]

    def rounds(count):
        for i in range(count):
            llm.llm_engine.remove_lora(IDS[names[i % len(names)]])
            for name in (names[(i + 1) % len(names)], names[(i + 3) % len(names)]):
                path = str(folder / "adapters" / name)
                llm.llm_engine.add_lora(LoRARequest(name, IDS[name], path, load_inplace=True))
                assert serve(llm, folder, [name, None], PROMPTS[:2]) == [
                    expected[name][0],
                    expected[None][1],
                ]

    rounds(len(names))
    before, blocks = kept(), len(tensors())
    rounds(3 * len(names))
    assert any(any(sizes.values()) for sizes in before)
    assert kept() == before
    assert len(tensors()) <= blocks


def tensors():
    gc.collect()
    return [one for one in gc.get_objects() if isinstance(one, torch.Tensor)]


# ---- what is refused ---------------------------------------------------------------------------


def narrower(weights):
    """A model of half the width."""
    return {
        key: w[:, : w.shape[1] // 2] if "lora_A" in key else w[: len(w) // 2]
        for key, w in weights.items()
    }


def with_one(changed):
    """The same in one layer alone."""

    def change(weights):
        key = "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"
        return weights | {key: changed(weights[key].clone())}

    return change


def without_one(weights):
    return {key: w for key, w in weights.items() if "layers.1.mlp.up_proj.lora_B" not in key}


REFUSED = {
    "narrower": (narrower, {}, r"lora_A and lora_B of .* must be \[16, .*; they are \[16, "),
    "longer": (with_one(lambda b: torch.cat([b, b])), {}, r"k_proj must .* are .* \[128, 16\]"),
    "rank": (dict, {"r": 8}, r"must be \[8, .* rank 8 of adapter_config.json; they are \[16, "),
    "pattern": (dict, {"rank_pattern": {"v_proj": 4}}, r"v_proj must be \[4, 128\] and \[64, 4\]"),
    "nan": (with_one(lambda b: b.index_fill(0, torch.tensor(63), torch.nan)), {}, "no finite"),
    "inf": (with_one(lambda b: b.index_fill(0, torch.tensor(0), -torch.inf)), {}, "no finite"),
    "half": (without_one, {}, r"layers.1.mlp.up_proj has no lora_B"),
    "empty": (lambda weights: {}, {}, "no LoRA weights"),
}


def changed_folder(folder, name, change, settings):
    """That of "r16", with other weights or settings."""
    made = shutil.copytree(folder / "adapters/r16", folder / "changed" / name)
    weights, config = made / "adapter_model.safetensors", made / "adapter_config.json"
    own = {key: w.contiguous() for key, w in change(load_file(weights)).items()}
    save_file(own, weights)
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    return str(made)


@pytest.mark.parametrize("name", REFUSED)
def test_what_vllm_would_serve_as_another_adapter_is_refused(llm, folder, expected, name):
    """In place of one that is served, which goes on."""
    *change, says = REFUSED[name]
    serve(llm, folder, ["french"], PROMPTS[:1])
    path = changed_folder(folder, name, *change)
    with pytest.raises(ValueError, match=f"LoRA 'bad' can't be served: .*{says}"):
        llm.llm_engine.add_lora(LoRARequest("bad", IDS["french"], path, load_inplace=True))
    assert IDS["french"] in llm.llm_engine.list_loras()
    found = serve(llm, folder, ["french", None], PROMPTS[:2])
    assert found == [expected["french"][0], expected[None][1]]


def test_layers_that_the_model_has_not_are_named_in_a_warning(llm, folder, expected, caplog):
    def deeper(weights):
        return weights | {k.replace("layers.1", "layers.2"): w.clone() for k, w in weights.items()}

    path = changed_folder(folder, "deeper", deeper, {})
    logger = logging.getLogger("vllm")
    logger.addHandler(caplog.handler)
    try:
        llm.llm_engine.add_lora(LoRARequest("deeper", 100, path))
    finally:
        logger.removeHandler(caplog.handler)
    (line,) = (record.getMessage() for record in caplog.records if "deeper" in record.getMessage())
    assert "without its weights of layers that the model hasn't: model.layers.2." in line
    assert llm.llm_engine.remove_lora(100)
