"""LoRALinear under PyTorch's own machinery: compiled, checkpointed, under autocast and sharded."""

import pytest
import torch
from lora_layers import expected, make_layer
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_kernels.nn import LoRALinear


def test_compiles_whole():
    layer = make_layer()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 12, requires_grad=True)
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).square().sum().backward()
    gradient, layer.lora_a.grad = layer.lora_a.grad, None
    layer(x).square().sum().backward()
    torch.testing.assert_close(layer.lora_a.grad, gradient)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_draws_the_same_dropout(reentrant):
    def gradients(run):
        layer = make_layer(dropout=0.5)
        x = torch.randn(8, 12, requires_grad=True)
        torch.manual_seed(3)
        run(layer, x).square().sum().backward()
        return x.grad, layer.lora_a.grad, layer.lora_b.grad

    plain = gradients(lambda layer, x: layer(x))
    again = gradients(lambda layer, x: checkpoint(layer, x, use_reentrant=reentrant))
    assert all(map(torch.equal, plain, again))


def test_autocast():
    layer = make_layer()
    x = torch.randn(8, 12)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.double(), expected(layer, x), rtol=3e-2, atol=3e-2)
    y.float().square().sum().backward()
    assert layer.lora_a.grad.dtype is torch.float32 and layer.lora_a.grad.any()


@pytest.fixture
def process_group(tmp_path):
    dist = torch.distributed
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def step(model: nn.Module, layer: LoRALinear) -> torch.Tensor:
    """One step of SGD; the new B."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    torch.manual_seed(4)
    model(torch.randn(6, 12)).square().mean().backward()
    optimizer.step()
    b = layer.lora_b.detach()
    return b.full_tensor() if hasattr(b, "full_tensor") else b


def test_a_step_under_ddp(process_group):
    layer, other = make_layer(), make_layer()
    ddp = nn.parallel.DistributedDataParallel(other)
    before = layer.lora_b.detach().clone()
    plain = step(layer, layer)
    assert not torch.equal(plain, before)
    torch.testing.assert_close(step(ddp, other), plain)


def test_a_step_under_fsdp2(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    layer, other = make_layer(), make_layer()
    fully_shard(other, mesh=init_device_mesh("cpu", (1,)))
    torch.testing.assert_close(step(other, other), step(layer, layer))
    other.reshard()
    for one in (layer, other):
        one.merge()
    torch.testing.assert_close(other.weight.full_tensor(), layer.weight)


def test_a_sharded_layer_takes_over_whole_matrices(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    layer = make_layer()
    fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    a, b = torch.randn(3, 12), torch.randn(7, 3)
    layer.switch(a, b, scale=0.5)
    assert torch.equal(layer.lora_a.full_tensor(), a)
    assert torch.equal(layer.lora_b.full_tensor(), b) and layer.scale == 0.5
    with pytest.raises(RuntimeError, match=r"lora_a is sharded .* keeps its rank, 3; got 2"):
        layer.switch(a[:2], b[:, :2])
    assert layer.r == 3
