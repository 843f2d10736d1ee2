"""Plans that a process measures by itself on the device of ``--device``: on a GPU alone."""

import importlib
import json

import pytest
import torch
from tune_caches import own_cache

import peft_kernels
from peft_kernels.triton.lora_linear import plan_cache, tuning

op = importlib.import_module("peft_kernels.ops.lora_linear")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The file of an empty tune cache of the test's own."""
    monkeypatch.setenv("PEFT_KERNELS_TUNE", "1")
    yield from own_cache(tmp_path / "cache")


def trained(device):
    torch.manual_seed(0)
    inputs = op.example_inputs(33, 64, 48, 5, device=device)
    for name in ("x", "lora_a", "lora_b"):
        inputs[name].requires_grad_()
    with peft_kernels.backend("triton"):
        y = op.lora_linear(**inputs)
        y.sum().backward()
    return [y, *(inputs[name].grad for name in ("x", "lora_a", "lora_b"))]


def test_the_first_call_measures_on_a_gpu_alone(cache, device):
    first, second = trained(device), trained(device)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    if device.type == "cpu":
        assert not cache.exists()
    else:
        found = json.loads(cache.read_text())[plan_cache.device_key(device)]
        sizes = "float32/float32 m64 n64 k64 r8"
        assert set(found) == {f"fwd {sizes}", f"bwd {sizes}"}


def test_a_captured_call_measures_nothing(cache, device):
    if device.type == "cpu":
        pytest.skip("graphs are captured on GPUs")
    inputs = op.example_inputs(33, 64, 48, 5, device=device)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PEFT_KERNELS_TUNE", "0")
        op.lora_linear(**op.example_inputs(34, 64, 48, 5, device=device))  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = op.lora_linear(**inputs)
    graph.replay()
    assert y.isfinite().all() and not cache.exists()
    op.lora_linear(**inputs)
    assert cache.exists()


def test_the_timer_tells_a_long_call_from_a_short_one(device):
    if device.type == "cpu":
        pytest.skip("it times GPUs")
    short, long = torch.ones(64, device=device), torch.ones(1 << 26, device=device)
    with torch.cuda.device(device):
        assert 0 < tuning.gpu_timer(short.zero_) < tuning.gpu_timer(long.zero_)
