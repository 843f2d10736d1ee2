"""Models without memory, and models under inference_mode: no loader loses what was trained."""

import pytest
import torch
from tiny_models import make_bert
from torch import nn

from peft_kernels.formats.adapter_hub import load_adapter, remove_adapter, save_adapter
from peft_kernels.formats.peft_prompts.folder import load_prompt, save_prompt
from peft_kernels.integrations.transformers.adapters import (
    adapters_of,
    fuse_adapters,
    insert_adapters,
)
from peft_kernels.nn import PromptTuning

IDS = torch.tensor([[3, 1, 4, 1]])


@pytest.fixture
def folder(tmp_path):
    model = make_bert()
    insert_adapters(model, "houlsby")
    save_adapter(model, tmp_path / "adapter", "a")
    return tmp_path / "adapter"


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return make_bert()


def test_folders_of_adapters(folder):
    model = on_meta()
    with pytest.raises(RuntimeError, match=r"adapter_down.* is on the meta device, .*to_empty"):
        load_adapter(model, folder)
    assert not adapters_of(model)
    model.to_empty(device="cpu")
    assert load_adapter(model, folder)


def test_what_has_no_values_is_not_saved(tmp_path):
    model = on_meta()
    insert_adapters(model, "houlsby")
    with pytest.raises(RuntimeError, match=r"adapter_\S* is on the meta device"):
        save_adapter(model, tmp_path / "folder", "a")
    with pytest.raises(RuntimeError, match=r"embeddings is on the meta device"):
        prompt = PromptTuning(3, 16, device="meta")
        save_prompt(tmp_path / "folder", prompt, task_type="CAUSAL_LM")
    assert not (tmp_path / "folder").exists()


def test_adapters_inserted_on_meta_are_drawn_later():
    model = on_meta()
    insert_adapters(model, "pfeiffer")
    torch.use_deterministic_algorithms(True)  # memory that nobody has written holds NaNs
    try:
        model.to_empty(device="cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    for adapter in adapters_of(model).values():
        assert 0 < adapter.down.weight.std() < 0.1 and not adapter.down.bias.any()


def test_prompts(tmp_path):
    model = make_bert()
    save_prompt(tmp_path, PromptTuning(3, 16), model=model)
    expected = load_prompt(tmp_path).prompt
    prompt = load_prompt(tmp_path, model=on_meta())
    assert torch.equal(prompt.prompt, expected)
    with pytest.raises(ValueError, match="device must have memory"):
        load_prompt(tmp_path, device="meta")


def test_a_wrapper_that_would_not_know_the_adapters(tmp_path, folder):
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        for put in (
            lambda m: insert_adapters(m, "pfeiffer"),
            lambda m: load_adapter(m, folder),
        ):
            model = nn.parallel.DistributedDataParallel(make_bert())
            with pytest.warns(RuntimeWarning, match="gradients aren't averaged over processes"):
                put(model)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("loaded", [False, True])
def test_adapters_made_under_inference_mode_train(folder, loaded, fused):
    model = make_bert().eval()
    with torch.inference_mode():
        if loaded:
            load_adapter(model, folder)
        else:
            insert_adapters(model, "houlsby")
        if fused:
            fuse_adapters(model, [adapters_of(model)])
    model(IDS).last_hidden_state.square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)
    with torch.inference_mode():
        remove_adapter(model)
    assert not adapters_of(model)
