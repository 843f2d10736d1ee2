"""Files of wrapped models: what was saved through wrappers is what PEFT and `adapters` read."""

import warnings

import pytest
import safetensors.torch
import torch
from tiny_models import make_bert, make_llama, transformers
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from peft_kernels import AdapterPool, load_adapter, save_adapter, swap_linear
from peft_kernels.formats import adapter_hub as adapter_files
from peft_kernels.formats.peft_prompts.folder import load_prompt, save_prompt
from peft_kernels.integrations.transformers.adapters import (
    adapters_of,
    fuse_adapters,
    insert_adapters,
    remove_adapters,
)
from peft_kernels.modules.names import plain_modules
from peft_kernels.nn import LoRALinear, PromptTuning

peft = pytest.importorskip("peft")

IDS = torch.arange(12).reshape(2, 6)
PATTERNS = {"rank_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 2}}


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory):
    store = f"file://{tmp_path_factory.mktemp('gloo') / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def strict():
    """PEFT warns of keys that are missing from the file, and goes on with zeros."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        yield


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "compile(ddp)": lambda m: compiled(nn.parallel.DistributedDataParallel(m)),
    "ddp(compile)": lambda m: nn.parallel.DistributedDataParallel(compiled(m)),
    "data_parallel(checkpoint)": lambda m: nn.DataParallel(checkpoint_wrapper(m)),
    "average(compile)": lambda m: AveragedModel(compiled(m)),
}
wrappers = pytest.mark.parametrize("wrapper", WRAPPERS)


def base(make=make_llama) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def make_classifier() -> nn.Module:
    return transformers.BertForSequenceClassification(make_bert().config)


def wrap_layers(layers: nn.ModuleList) -> None:
    """As activation checkpointing and compiling block by block leave a model."""
    layers[0] = checkpoint_wrapper(layers[0])
    layers[1] = compiled(layers[1])


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS)[0]


def trained(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for module in plain_modules(model).values():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.lora_b, std=0.3)
    return model


@wrappers
def test_peft_reads_what_a_wrapped_model_wrote(tmp_path, wrapper):
    model = trained(swap_linear(base(), ["q_proj", "v_proj"], 4, alpha=8, **PATTERNS))
    expected = logits(model)
    wrap_layers(model.model.layers)
    save_adapter(WRAPPERS[wrapper](model), tmp_path)
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path)
    assert (logits(loaded) - logits(base())).abs().max() > 1e-3
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)
    assert loaded.base_model.model.model.layers[0].self_attn.q_proj.r == {"default": 2}


@wrappers
def test_a_wrapped_model_reads_what_peft_wrote(tmp_path, wrapper):
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **PATTERNS)
    theirs = peft.get_peft_model(base(), config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path)
    model = base()
    wrap_layers(model.model.layers)
    wrapped = WRAPPERS[wrapper](model)
    load_adapter(wrapped, tmp_path)
    torch.testing.assert_close(logits(wrapped), logits(theirs), rtol=1e-4, atol=1e-5)


def test_peft_reads_what_a_pool_of_a_wrapped_model_wrote(tmp_path):
    model = base()
    wrap_layers(model.model.layers)
    pool = AdapterPool.attach(compiled(model), ["q_proj", "v_proj"], capacity=16)
    pool.create("a", 4, alpha=8, **PATTERNS)
    for parameter in pool.parameters("a"):
        nn.init.normal_(parameter, std=0.3)
    pool.save("a", tmp_path)
    with pool.route(["a", "a"]):
        expected = logits(model)
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)


@wrappers
def test_a_prompt_of_a_wrapped_model(tmp_path, wrapper):
    model = base(make_classifier)
    wrap_layers(model.bert.encoder.layer)
    prompt = PromptTuning(3, 16, init="normal", std=1.0)
    wrapped = WRAPPERS[wrapper](model)
    save_prompt(tmp_path, prompt, model=wrapped)
    keys = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors").keys()
    head = {"base_model.classifier.weight", "base_model.classifier.bias"}
    assert keys == {"prompt_embeddings"} | head
    nn.init.zeros_(model.classifier.weight)
    inner = plain_modules(wrapped)["classifier"]
    nn.init.zeros_(inner.weight)
    load_prompt(tmp_path, model=wrapped)
    assert torch.equal(inner.weight, base(make_classifier).classifier.weight)


# ---- bottleneck adapters ---------------------------------------------------------------------


def randomised(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for adapter in adapters_of(model).values():
            for parameter in adapter.parameters():
                nn.init.normal_(parameter, std=0.2)
    return model


def layers_of(model: nn.Module) -> nn.ModuleList:
    return model.encoder.layer if hasattr(model, "encoder") else model.model.layers


@pytest.mark.parametrize("preset", ["pfeiffer", "houlsby", "parallel"])
@pytest.mark.parametrize(
    "make", [make_bert, pytest.param(make_llama, marks=pytest.mark.long)], ids=["bert", "llama"]
)
def test_adapters_of_wrapped_blocks_have_plain_paths_and_files(tmp_path, make, preset):
    plain = base(make)
    paths = insert_adapters(plain, preset)
    expected = logits(randomised(plain))
    model = base(make)
    wrap_layers(layers_of(model))
    wrapped = compiled(model)
    assert insert_adapters(wrapped, preset) == paths == list(adapters_of(wrapped))
    torch.testing.assert_close(logits(randomised(wrapped)), expected)
    adapter_files.save_adapter(wrapped, tmp_path, "task")
    again = base(make)
    adapter_files.load_adapter(again, tmp_path)
    torch.testing.assert_close(logits(again), expected)
    remove_adapters(wrapped)
    torch.testing.assert_close(logits(wrapped), logits(base(make)))


def test_adapters_of_wrapped_ends_of_sublayers():
    plain, model = base(make_bert), base(make_bert)
    for layer, wrap in zip(model.encoder.layer, (checkpoint_wrapper, compiled), strict=True):
        layer.output = wrap(layer.output)
        layer.attention.output = wrap(layer.attention.output)
    assert insert_adapters(model, "pfeiffer") == insert_adapters(plain, "pfeiffer")
    torch.testing.assert_close(logits(randomised(model)), logits(randomised(plain)))
    assert (logits(model) - logits(base(make_bert))).abs().max() > 1e-3


def test_adapters_of_a_plain_model_are_fused_in_a_wrapped_one():
    plain, model = base(make_bert), base(make_bert)
    insert_adapters(plain, "pfeiffer")
    wrap_layers(model.encoder.layer)
    insert_adapters(model, "pfeiffer")
    trained = [adapters_of(randomised(plain)), adapters_of(model)]
    assert fuse_adapters(compiled(model), trained) == list(trained[0])
