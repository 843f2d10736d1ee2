"""fully_shard over 4-bit bases: trained, evaluated and saved as in one process."""

from __future__ import annotations

import pytest
import torch
from parallel_models import in_shards, step
from processes import Cases
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

import peft_kernels
from peft_kernels.integrations.transformers import add_prefix, insert_adapters, prefix_for
from peft_kernels.nn import QuantizedLoRALinear

quantised = pytest.importorskip("quantised")
peft = pytest.importorskip("peft")

CASES = Cases(2)
run = CASES.fixture()

IDS = torch.arange(12).view(2, 6) % 32
TARGETS = ["q_proj", "down_proj"]


def llama(kind="nf4", storage=torch.uint8):
    return quantised.in_codes(quantised.make_plain_llama(), kind, storage=storage)


def swapped(model, **options):
    return drawn(peft_kernels.swap_linear(model, TARGETS, 4, alpha=8, **options))


def accelerated(model):
    model.is_loaded_in_4bit = True
    config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    peft_kernels.accelerate(model)
    return drawn(model)


def adapted(model):
    insert_adapters(model, "pfeiffer")
    return drawn(model)


def prefixed(model):
    add_prefix(model, prefix_for(model, 3))
    return drawn(model)


def drawn(model):
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            parameter.data.normal_(std=0.1)
    return model


def check(make, **options):
    """Before an evaluation and after."""
    expected = step(make(llama(**options)), IDS)
    model = in_shards(make(llama(**options)))
    for _ in range(2):
        found = step(model, IDS)
        assert len(found) == len(expected) > 1
        for one, other in zip(found, expected, strict=True):
            assert other.any()
            torch.testing.assert_close(one, other)
        with torch.no_grad():
            model.eval()(IDS)
        model.train()


@CASES.add
def codes_in_bytes():
    check(swapped)


@CASES.add
def codes_in_float32():
    check(swapped, storage=torch.float32)


@CASES.add
def codes_in_bfloat16():
    check(swapped, storage=torch.bfloat16)


@CASES.add
def dora():
    check(lambda model: swapped(model, use_dora=True))


@CASES.add
def pefts_layers():
    check(accelerated)


@CASES.add
def bottleneck_adapters():
    check(adapted)


@CASES.add
def prefixes():
    check(prefixed)


@CASES.add
def the_state_dict_has_the_scales():
    model = in_shards(swapped(llama()))
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    whole = swapped(llama())
    expected = whole.state_dict()
    for name, layer in whole.named_modules():
        if isinstance(layer, QuantizedLoRALinear):
            keys = [key for key in expected if key.startswith(f"{name}.")]
            assert len(keys) == 9
            assert all(torch.equal(state[key], expected[key]) for key in keys)


@CASES.add
def an_adapter_is_saved_and_read_in_one_process():
    model = in_shards(swapped(llama()))
    expected = swapped(llama())(IDS).logits
    peft_kernels.save_adapter(model, CASES.folder / "adapter")
    torch.distributed.barrier()
    other = peft_kernels.load_adapter(llama(), CASES.folder / "adapter")
    torch.testing.assert_close(other(IDS).logits, expected)


@CASES.add
def codes_are_merged_before_they_are_sharded():
    model = in_shards(swapped(llama()))
    with pytest.raises(RuntimeError, match=r"q_proj: weight is in codes, which fully_shard holds"):
        peft_kernels.merge(model)


@CASES.add
def layers_over_codes_leave_before_they_are_sharded():
    message = r"q_proj has a weight in codes, which fully_shard holds.*before sharding"
    model = llama()
    pool = peft_kernels.AdapterPool.attach(model, TARGETS, capacity=8)
    in_a_pool, with_lora = in_shards(model), in_shards(swapped(llama()))
    expected = [model(IDS).logits for model in (in_a_pool, with_lora)]
    with pytest.raises(RuntimeError, match=message):
        pool.detach()
    with pytest.raises(RuntimeError, match=message):
        peft_kernels.unload(with_lora, merge=False)
    for model, logits in zip((in_a_pool, with_lora), expected, strict=True):
        torch.testing.assert_close(model(IDS).logits, logits)


@CASES.add
def eight_bits_are_refused_by_name():
    layers = nn.Sequential(*(quantised.layer_in_codes(nn.Linear(64, 64), "int8") for _ in "ab"))
    model = fully_shard(peft_kernels.swap_linear(layers, ["0", "1"], 4, alpha=8))
    with pytest.raises(TypeError, match=r"the layer of 64 outputs has, .*fully_shard has lost"):
        model(torch.randn(2, 64))


@CASES.add
def layers_that_are_sharded_already_are_refused():
    model = in_shards(llama())
    with pytest.raises(TypeError, match=r"layers\.0\.self_attn\.q_proj has a weight that is shard"):
        swapped(model)


@CASES.tests
def test_fully_shard_over_codes(run, case):
    run(case)
