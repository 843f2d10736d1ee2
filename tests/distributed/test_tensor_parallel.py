"""Layers whose weights are DTensors, as torch's tensor parallelism makes them."""

from __future__ import annotations

import itertools

import peft
import pytest
import torch
from parallel_models import close, mesh, whole
from processes import Cases, Wire, everywhere
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor import parallel as torch_parallel
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint

import peft_kernels
from peft_kernels import ops, swap_linear
from peft_kernels.integrations.parallel import ColwiseParallel, RowwiseParallel
from peft_kernels.ops._sharded import adapter_placements

CASES = Cases(2)
run = CASES.fixture()

M, K, N, R = 6, 16, 24, 4
PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}
TORCH_PLAN = {"up": torch_parallel.ColwiseParallel(), "down": torch_parallel.RowwiseParallel()}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(K, N), nn.Linear(N, K)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def swapped(dropout: float = 0.0) -> nn.Module:
    model = swap_linear(Block(), ["up", "down"], R, alpha=8, dropout=dropout)
    nn.init.normal_(model.up.lora_b), nn.init.normal_(model.down.lora_b)
    return model


def of_peft(second: bool = False, **options) -> nn.Module:
    options = {"init_lora_weights": False, **options}
    config = peft.LoraConfig(r=R, target_modules=["up", "down"], **options)
    model = peft.get_peft_model(Block(), config)
    if second:
        model.add_adapter("second", config)
        model.base_model.set_adapter(["default", "second"])
    return model.base_model.model


def trained(model: nn.Module) -> tuple[list[float], dict]:
    """The losses of ten steps, and the adapters after them."""
    trains = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trains, lr=1e-2)
    x = torch.linspace(-1, 1, M * K).reshape(2, M // 2, K)
    losses = []
    for _ in range(10):
        loss = (model(x) - x.flip(-1)).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    named = model.named_parameters()
    return losses, {name: whole(p).detach() for name, p in named if p.requires_grad}


# ---- models --------------------------------------------------------------------------------------


@CASES.add
def a_swapped_block_trains_as_in_one_process():
    expected = trained(swapped())
    for plan in (PLAN, TORCH_PLAN):
        model = parallelize_module(swapped(), mesh(), plan)
        assert model.up.weight.to_local().shape == (N // 2, K)
        close(trained(model), expected)


@CASES.add
def the_adapters_of_a_swapped_block_lie_beside_their_bases():
    model = parallelize_module(swapped(), mesh(), PLAN)
    assert model.up.lora_a.placements == (Replicate(),)
    assert model.up.lora_b.placements == (Shard(0),)
    assert model.down.lora_a.placements == (Shard(1),)
    assert model.down.lora_b.placements == (Replicate(),)
    assert not model.up.weight.requires_grad and model.up.lora_a.requires_grad
    merged = swapped()
    merged.up.merge()
    with pytest.raises(RuntimeError, match="is merged; unmerge"):
        parallelize_module(merged, mesh(), PLAN)


@CASES.add
def layers_of_peft_run_on_kernels():
    expected = trained(of_peft())
    model = parallelize_module(of_peft(), mesh(), PLAN)
    close(trained(model), expected)
    model = parallelize_module(of_peft(), mesh(), PLAN)
    report = peft_kernels.accelerate(model)
    assert [layer.backend for layer in report.layers] == ["cpu", "cpu"]
    close(trained(model), expected)
    assert report.counts() == {"lora_linear": 20}


@CASES.add
def several_adapters_of_peft():
    model = parallelize_module(of_peft(second=True), mesh(), PLAN)
    report = peft_kernels.accelerate(model)
    close(trained(model), trained(of_peft(second=True)))
    assert report.counts() == {"lora_linear": 20}


@CASES.add
def what_no_kernel_serves_of_peft_is_peft_s():
    model = parallelize_module(of_peft(second=True, lora_dropout=1.0), mesh(), PLAN)
    report = peft_kernels.accelerate(model)
    model(torch.randn(M, K))
    assert report.counts() == {"dropout of everything": 2}


@CASES.add
def several_adapters_of_peft_of_which_one_has_dropout():
    """Along columns processes drop what one process alone would, whose seed they have."""
    x, dy = torch.randn(2, M, K).unbind()
    found = []
    for split in (False, True):
        model = of_peft(second=True, lora_dropout=0.5)
        model.up.lora_dropout["second"].p = 0.0
        if split:
            parallelize_module(model, mesh(), {"up": ColwiseParallel(output_layouts=Replicate())})
        report = peft_kernels.accelerate(model)
        torch.manual_seed(torch.distributed.get_rank() if split else 0)
        given = x.clone().requires_grad_()
        y = model.up(given)
        y.backward(dy.new_ones(M, N))
        grads = {n: whole(p.grad) for n, p in model.up.named_parameters() if p.requires_grad}
        found.append((y.detach(), given.grad, grads))
        assert report.counts() == {"lora_linear": 1}
    torch.testing.assert_close(*found)


@CASES.add
def what_several_dropouts_of_peft_send():
    bare = sent_by(parallelize_module(Block().requires_grad_(False), mesh(), TORCH_PLAN), M)
    model = parallelize_module(of_peft(second=True, lora_dropout=0.5), mesh(), PLAN)
    peft_kernels.accelerate(model)
    forward, backward = sent_by(model, M)
    assert forward == [("broadcast", 2), *bare[0]]  # the seeds, where processes have the same x
    assert sorted(backward) == sorted([*bare[1], *[("all_reduce", R * K)] * 4])


@CASES.add
def several_dropouts_of_peft():
    """Along rows each process drops of its own part: the mean of many draws is what none drops."""
    plan = PLAN | {"down": RowwiseParallel(input_layouts=Replicate())}
    model = parallelize_module(of_peft(second=True, lora_dropout=0.5), mesh(), plan)
    report = peft_kernels.accelerate(model)
    x = torch.randn(1, N).expand(20000, N)
    drawn, still = model.down(x).mean(0), model.eval().down(x[:1])[0]
    torch.testing.assert_close(drawn, still, rtol=0.02, atol=0.05)
    assert report.counts() == {"lora_linear": 2}
    model = parallelize_module(of_peft(second=True, lora_dropout=0.5), mesh(), PLAN)
    report = peft_kernels.accelerate(model)
    trained(model)
    assert report.counts() == {"lora_linear": 20}


@CASES.add
def several_adapters_of_peft_in_several_dtypes():
    found = []
    for split in (False, True):
        model = of_peft(second=True).bfloat16()
        for part in (model.up.lora_A, model.up.lora_B, model.down.lora_A, model.down.lora_B):
            part["second"].float()
        if split:
            parallelize_module(model, mesh(), PLAN)
        report = peft_kernels.accelerate(model)
        torch.manual_seed(3)
        y = model(torch.randn(M, K).bfloat16())
        found.append(y.detach())
        assert report.counts() == {"lora_linear": 2}
    torch.testing.assert_close(*found, rtol=0.02, atol=0.05)


@CASES.add
def rows_of_peft_with_their_own_adapters():
    x, dy = torch.randn(2, 4, 3, K).unbind()

    def results(model) -> dict:
        x.requires_grad_().grad = None
        y = model(x)
        y.backward(dy)
        trains = ((n, p) for n, p in model.named_parameters() if p.requires_grad)
        gradients = {name: whole(p.grad) for name, p in trains}
        return {"y": y.detach(), "x": x.grad} | gradients

    plain = by_rows(of_peft(second=True))
    peft_kernels.accelerate(plain)
    model = by_rows(parallelize_module(of_peft(second=True), mesh(), PLAN))
    report = peft_kernels.accelerate(model)
    close(results(model), results(plain))
    assert report.counts() == {"multi_lora_linear": 2}
    bare = sent_by(parallelize_module(Block().requires_grad_(False), mesh(), TORCH_PLAN), 4)
    forward, backward = sent_by(model, 4)
    assert forward == bare[0]
    assert sorted(backward) == sorted([*bare[1], *[("all_reduce", R * K)] * 4])


@CASES.add
def rows_of_peft_drop_the_same():
    models = []
    for split in (False, True):
        model = of_peft(second=True, lora_dropout=0.5)
        models.append(by_rows(parallelize_module(model, mesh(), PLAN) if split else model))
        peft_kernels.accelerate(model)
    x = torch.randn(4, 3, K)
    torch.manual_seed(torch.distributed.get_rank())
    y = models[1].up(x)
    torch.manual_seed(0)
    expected = models[0].up(x)
    torch.testing.assert_close(torch.cat(everywhere(y.detach()), -1), expected.detach())
    assert not torch.allclose(models[0].up(x), expected)


def by_rows(model: nn.Module) -> nn.Module:
    """With an adapter for each of four rows."""
    names = {"adapter_names": ["second", "__base__", "default", "second"]}
    for layer in (model.up, model.down):
        layer.register_forward_pre_hook(lambda layer, a, kw: (a, kw | names), with_kwargs=True)
    return model


@CASES.add
def a_compiled_block_trains_as_in_one_process():
    model = parallelize_module(swapped(), mesh(), PLAN)
    expected = trained(swapped())
    model.compile(backend="aot_eager")
    close(trained(model), expected)


# ---- the wire ------------------------------------------------------------------------------------


def sent_by(model: nn.Module, rows: int) -> tuple[list, list]:
    x = torch.randn(rows, K, requires_grad=True)
    with Wire() as forward:
        y = model(x)
    with Wire() as backward:
        y.backward(torch.ones_like(y))
    return forward.sent, backward.sent


@CASES.add
def what_is_sent_beyond_the_bare_layers():
    for m in (M, 4 * N):
        bare = sent_by(parallelize_module(Block().requires_grad_(False), mesh(), TORCH_PLAN), m)
        assert bare == ([("all_reduce", m * K)], [("all_reduce", m * K)])
        forward, backward = sent_by(parallelize_module(swapped(), mesh(), PLAN), m)
        assert forward == bare[0]
        of_b, of_a = ("all_reduce", min(K, m) * R), ("all_reduce", R * min(K, m))
        assert sorted(backward) == sorted([*bare[1], of_b, of_a])
        forward, backward = sent_by(parallelize_module(swapped(), mesh(), TORCH_PLAN), m)
        gathered = ("all_gather_into_tensor", R * K // 2)
        assert forward == [gathered, *bare[0]]
        assert len(backward) == 4
    dropping = parallelize_module(swapped(dropout=0.5), mesh(), PLAN)
    assert ("all_reduce", R * K) in sent_by(dropping, M)[1]


@CASES.add
def an_input_that_several_layers_share_has_one_sum():
    weights = {name: distribute(t, Shard(0)) for name, t in matrices().items() if name != "x"}
    weights["lora_a"] = distribute(matrices()["lora_a"], Replicate())
    x = torch.randn(M, K, requires_grad=True)
    shared = DTensor.from_local(x, mesh(), [Replicate()], run_check=False)
    y = sum(ops.lora_linear(shared, **weights) for _ in range(3))
    with Wire() as wire:
        y.sum().backward()
    assert [count for _, count in wire.sent].count(M * K) == 1


# ---- the op --------------------------------------------------------------------------------------


def matrices(n=N, k=K, dtype=torch.float32, adapter=torch.float32, m=M) -> dict:
    torch.manual_seed(1)
    return ops.lora_linear.__globals__["example_inputs"](
        m, n, k, R, dtype=dtype, adapter_dtype=adapter
    )


def distribute(tensor, placement):
    return distribute_tensor(tensor.detach(), mesh(), [placement]).requires_grad_(
        tensor.requires_grad
    )


def results(inputs: dict, dy, op=ops.lora_linear) -> dict:
    """y and all gradients, in whole."""
    for tensor in inputs.values():
        tensor.requires_grad_().grad = None
    y = op(**inputs, scale=0.5)
    y.backward(distribute_tensor(dy, mesh(), [Replicate()]) if isinstance(y, DTensor) else dy)
    for name, tensor in inputs.items():
        assert type(tensor.grad) is type(tensor)
        if isinstance(tensor, DTensor) and name != "x":
            assert tensor.grad.placements == tensor.placements, name
    return {name: whole(t.grad) for name, t in inputs.items()} | {"y": whole(y).detach()}


@CASES.add
def every_placement_of_every_argument():
    inputs = matrices()
    dy = torch.randn(M, N)
    expected = results(dict(inputs), dy)
    matrix = Replicate(), Shard(0), Shard(1)
    several = itertools.product(matrix, matrix, matrix, matrix, (Replicate(), Shard(0)))
    for x, weight, a, b, bias in several:
        placements = {"x": x, "weight": weight, "lora_a": a, "lora_b": b, "bias": bias}
        sharded = {name: distribute(inputs[name].detach(), placements[name]) for name in inputs}
        torch.testing.assert_close(results(sharded, dy), expected, rtol=1e-5, atol=1e-5)


@CASES.add
def more_rows_than_columns():
    inputs, dy = matrices(m=4 * N), torch.randn(4 * N, N)
    expected = results(dict(inputs), dy)
    whole_one = dict.fromkeys(inputs, Replicate())
    for weight, a, b in itertools.product((Replicate(), Shard(0), Shard(1)), repeat=3):
        placements = whole_one | {"weight": weight, "lora_a": a, "lora_b": b}
        sharded = {name: distribute(inputs[name].detach(), placements[name]) for name in inputs}
        torch.testing.assert_close(results(sharded, dy), expected, rtol=1e-5, atol=1e-5)


@CASES.add
def dora_in_every_placement():
    inputs = matrices() | {"magnitude": torch.rand(N) + 0.5}
    dy = torch.randn(M, N)
    expected = results(dict(inputs), dy, ops.dora_linear)
    matrix = Replicate(), Shard(0), Shard(1)
    rows = Replicate(), Shard(0)
    for x, weight, adapter, magnitude in itertools.product(matrix, matrix, matrix, rows):
        placements = {"x": x, "weight": weight, "lora_a": adapter, "lora_b": adapter}
        placements |= {"magnitude": magnitude, "bias": Replicate()}
        sharded = {name: distribute(inputs[name].detach(), placements[name]) for name in inputs}
        found = results(sharded, dy, ops.dora_linear)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@CASES.add
def what_dora_sends():
    adapter = {
        n: t.detach() for n, t in matrices().items() if n.startswith("lora") or n == "weight"
    }
    expected = ops.dora_norm(*(adapter[n] for n in ("weight", "lora_a", "lora_b")), 0.5)
    for placement, sent in ((Shard(0), []), (Shard(1), [("allreduce", N * (R + 1) + R * R)])):
        weight = distribute(adapter["weight"], placement)
        a_of, b_of = adapter_placements(weight)
        a, b = distribute(adapter["lora_a"], *a_of), distribute(adapter["lora_b"], *b_of)
        with Wire() as wire:
            norm = ops.dora_norm(weight, a, b, 0.5)
        assert [(name.strip("_"), count) for name, count in wire.sent] == sent
        assert norm.placements == b.placements
        torch.testing.assert_close(whole(norm), expected)


@CASES.add
def sizes_that_processes_share_unevenly():
    for n, k in ((1, 1), (5, 3), (1, 9), (7, 1)):
        inputs = matrices(n, k)
        dy = torch.randn(M, n)
        expected = results(dict(inputs), dy)
        for placement in (Shard(0), Shard(1)):
            sharded = {name: distribute(t.detach(), Replicate()) for name, t in inputs.items()}
            sharded["weight"] = distribute(inputs["weight"].detach(), placement)
            torch.testing.assert_close(results(sharded, dy), expected, rtol=1e-5, atol=1e-5)


@CASES.add
def inputs_of_any_number_of_dimensions_and_sums():
    inputs = matrices()
    weights = {n: distribute(t, Replicate()) for n, t in inputs.items() if n != "x"}
    for shape in ((K,), (2, 3, K)):
        x = torch.randn(shape)
        expected = ops.lora_linear(x, **{n: t for n, t in inputs.items() if n != "x"})
        for placement in (Shard(0), Shard(1)):
            weights["weight"] = distribute(inputs["weight"], placement)
            part = DTensor.from_local(x / 2, mesh(), [Partial()])
            for given in (part, distribute(x, Replicate()), distribute(x, Shard(0))):
                y = ops.lora_linear(given, **weights)
                assert y.shape == expected.shape and y.stride() == expected.stride()
                torch.testing.assert_close(whole(y), expected)


@CASES.add
def a_bfloat16_base_under_float32_adapters():
    inputs = matrices(dtype=torch.bfloat16)
    expected = ops.lora_linear(**inputs)
    wide = {name: tensor.float() for name, tensor in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        for given in (inputs, wide):
            for placement in (Shard(0), Shard(1)):
                sharded = {name: distribute(t, Replicate()) for name, t in given.items()}
                sharded["weight"] = distribute(given["weight"], placement)
                y = ops.lora_linear(**sharded)
                assert y.dtype is torch.bfloat16
                torch.testing.assert_close(whole(y), expected, rtol=2e-2, atol=4e-2)


@CASES.add
def arguments_that_do_not_go_together():
    inputs = matrices()
    sharded = {name: distribute(t, Replicate()) for name, t in inputs.items()}
    for name in inputs:
        others = sharded | {name: inputs[name]}
        with pytest.raises(TypeError, match=f"{name} must be a DTensor, as "):
            ops.lora_linear(**others)
    other = init_device_mesh("cpu", (1, 2))
    moved = distribute_tensor(inputs["lora_b"], other, [Replicate(), Replicate()])
    with pytest.raises(ValueError, match="lora_b must be on the mesh of the others"):
        ops.lora_linear(**(sharded | {"lora_b": moved}))
    half = DTensor.from_local(inputs["weight"], mesh(), [Partial()])
    with pytest.raises(ValueError, match=r"weight must be placed as Shard\(0\), Shard\(1\) or"):
        ops.lora_linear(**(sharded | {"weight": half}))
    with pytest.raises(ValueError, match=r"lora_b has shape .* must be \[n, r\] = \[24, 4\]"):
        ops.lora_linear(**(sharded | {"lora_b": sharded["weight"]}))


# ---- dropout -------------------------------------------------------------------------------------


@CASES.add
def processes_with_the_same_x_drop_the_same():
    model = parallelize_module(swapped(dropout=0.5), mesh(), PLAN)
    plain, x = swapped(dropout=0.5), torch.randn(M, K)
    torch.manual_seed(torch.distributed.get_rank())
    y = model.up(x)
    torch.manual_seed(0)
    torch.testing.assert_close(torch.cat(everywhere(y.detach()), -1), plain.up(x))


@CASES.add
def parts_of_x_are_dropped_independently():
    inputs = {"weight": torch.zeros(K, K), "lora_a": torch.eye(K), "lora_b": torch.eye(K)}
    weights = {name: distribute(t, Replicate()) for name, t in inputs.items()}
    weights["weight"] = distribute(inputs["weight"], Shard(1))
    for seed in (None, 3):
        ones = distribute(torch.ones(64, K), Replicate())
        dropped = whole(ops.lora_linear(ones, **weights, dropout_p=0.5, seed=seed))
        left, right = dropped.chunk(2, dim=1)
        assert set(dropped.unique().tolist()) == {0.0, 2.0}
        assert 0.3 < (left == right).float().mean() < 0.7
    rows = distribute(torch.ones(64, K), Shard(0))
    weights["weight"] = distribute(inputs["weight"], Replicate())
    first, second = whole(ops.lora_linear(rows, **weights, dropout_p=0.5)).chunk(2)
    assert 0.3 < (first == second).float().mean() < 0.7


@CASES.add
def what_is_computed_again_drops_the_same():
    model = parallelize_module(swapped(dropout=0.5), mesh(), PLAN)
    gradients = []
    for again in (False, True):
        torch.manual_seed(5)
        x = torch.randn(M, K, requires_grad=True)
        y = checkpoint(model, x, use_reentrant=False) if again else model(x)
        y.square().sum().backward()
        trains = [p for p in model.parameters() if p.requires_grad]
        gradients.append([x.grad, *(whole(p.grad) for p in trains)])
        model.zero_grad()
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@CASES.tests
def test_tensor_parallel(run, case):
    run(case)
