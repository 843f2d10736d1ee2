"""Small models with LoRA, and how they are trained and sharded, for tests of several processes."""

from __future__ import annotations

import peft
import torch
import torch.distributed as dist
from tiny_models import make_llama
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor import parallel as torch_parallel
from torch.distributed.tensor.parallel import parallelize_module

import peft_kernels
from peft_kernels import swap_linear
from peft_kernels.integrations.parallel import ColwiseParallel, RowwiseParallel
from peft_kernels.integrations.transformers import (
    add_prefix,
    add_prompt,
    insert_adapters,
    prefix_shapes,
)
from peft_kernels.nn import PrefixTuning, PromptTuning

ROWS, LENGTH, STEPS = 4, 6, 10
PLAN = {f"model.layers.*.self_attn.{name}_proj": ColwiseParallel() for name in "qkv"} | {
    "model.layers.*.self_attn.o_proj": RowwiseParallel(),
    "model.layers.*.mlp.gate_proj": ColwiseParallel(),
    "model.layers.*.mlp.up_proj": ColwiseParallel(),
    "model.layers.*.mlp.down_proj": RowwiseParallel(),
}


def llama() -> nn.Module:
    torch.manual_seed(0)
    return make_llama().eval()


def lora(**options) -> nn.Module:
    model = swap_linear(llama(), "all-linear", 4, alpha=8, **options)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.1)
    return model


def dora() -> nn.Module:
    return lora(use_dora=True)


def dora_of_peft() -> nn.Module:
    return of_peft(use_dora=True)


def of_peft(**options) -> nn.Module:
    """PEFT's layers in a model of transformers', on kernels."""
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **options)
    model = peft.get_peft_model(llama(), config)
    peft_kernels.accelerate(model)
    return model


def bottleneck() -> nn.Module:
    model = llama()
    insert_adapters(model, "pfeiffer", reduction_factor=4)
    return model


def prefix() -> nn.Module:
    model = llama()
    add_prefix(model, PrefixTuning(3, prefix_shapes(model), std=1.0))
    return model


def prompt() -> nn.Module:
    model = llama()
    add_prompt(model, PromptTuning(3, 16))
    return model


def torch_parallel_llama() -> nn.Module:
    """As a model comes from elsewhere, without a style of this package."""
    styles = {name: getattr(torch_parallel, type(style).__name__)() for name, style in PLAN.items()}
    return parallelize_module(llama(), mesh(), styles)


def randomised(model: nn.Module) -> nn.Module:
    """B as if trained, the same in every process and however it lies."""
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            parameter.data.copy_(placed(torch.randn(parameter.shape) * 0.1, parameter))
    return model


def text(rows=slice(None)) -> torch.Tensor:
    return torch.arange(ROWS * LENGTH).reshape(ROWS, LENGTH)[rows] * 7 % 32


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(text()).logits


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if not isinstance(like, DTensor):
        return values
    return distribute_tensor(values, like.device_mesh, like.placements)


def close(found, expected, within: float = 1e-6) -> None:
    torch.testing.assert_close(found, expected, rtol=within, atol=within)


def mine(group=None) -> slice:
    """A process's rows of the batch."""
    return slice(dist.get_rank(group), None, dist.get_world_size(group))


def check_equal(model: nn.Module, expected, group=None, within: float = 1e-6) -> None:
    """That each process trains on its rows as one does on all of them."""
    losses, parameters = trained(model, mine(group))
    average_(losses, group=group)
    close((losses, parameters), expected, within)


def step(model: nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """The loss, and the gradients of what is trained."""
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    found = [loss.detach()]
    for parameter in model.parameters():
        if parameter.requires_grad:
            grad, parameter.grad = parameter.grad, None
            found.append(whole(grad))
    return found


def trained(model: nn.Module, rows=slice(None)) -> tuple[torch.Tensor, dict]:
    """The losses of some steps, and what was trained."""
    trains = {n.removeprefix("module."): p for n, p in model.named_parameters() if p.requires_grad}
    losses = steps(model, list(trains.values()), rows)
    return losses, {name: whole(p).detach() for name, p in trains.items()}


def steps(model: nn.Module, trains: list, rows=slice(None), after_backward=None) -> torch.Tensor:
    # eps is above the rounding of gradients, which Adam would make steps of otherwise.
    optimizer = torch.optim.AdamW(trains, lr=3e-3, eps=1e-5)
    ids = text(rows)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.detach())
        loss.backward()
        if after_backward is not None:
            after_backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    return torch.stack(losses)


def average_(*tensors: torch.Tensor, group=None) -> None:
    for tensor in tensors:
        dist.all_reduce(tensor, group=group)
        tensor /= dist.get_world_size(group)


def mesh() -> DeviceMesh:
    """Of all processes, in one dimension."""
    return init_device_mesh("cpu", (dist.get_world_size(),))


def in_shards(model: nn.Module, **options) -> nn.Module:
    return sharded(model, mesh(), **options)


def sharded(model: nn.Module, mesh, **options) -> nn.Module:
    """By fully_shard: each decoder layer, and the rest."""
    for layer in [m for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer"]:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def parallel(model: nn.Module, mesh) -> nn.Module:
    """By tensor parallelism: attention by heads, and the MLP."""
    prefix = "base_model.model." if isinstance(model, peft.PeftModel) else ""
    plan = {prefix + name: style for name, style in PLAN.items()}
    return parallelize_module(model, mesh, plan)
