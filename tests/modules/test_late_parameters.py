"""Parameters that come into DistributedDataParallel after it was built, in two processes."""

import warnings

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from peft_kernels import swap_linear
from peft_kernels.integrations.transformers.adapters import insert_adapter
from peft_kernels.nn import BottleneckAdapter

WIDTH = 8


def in_two_processes(rank: int, folder: str) -> None:
    """What each process sees: an error for a late parameter's step, else the mean's gradients."""
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    x = torch.randn(2, 3, WIDTH)
    warnings.simplefilter("ignore")

    def gradient(put, first):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4))
        model = put(model) if first else model
        model = DistributedDataParallel(model)
        model = model if first else put(model)
        model.eval()(x[rank])
        try:
            model.train()(x[rank]).square().mean().backward()
        except RuntimeError as error:
            with model.no_sync():
                model(x[rank])
            return str(error)
        mine = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        other = [torch.empty_like(mine) for _ in range(2)]
        torch.distributed.all_gather(other, mine)
        return torch.equal(*other)

    def swap(model):
        return swap_linear(model, ["0"], 2, alpha=4)

    def insert(model):
        model.requires_grad_(False)
        insert_adapter(model, "0", BottleneckAdapter(WIDTH, 4))
        return model

    found = [gradient(put, first) for put in (swap, insert) for first in (True, False)]
    torch.save(found, f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


def test_a_step_of_ddp_that_would_not_average_is_an_error(tmp_path):
    torch.multiprocessing.spawn(in_two_processes, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        swapped, late_swap, inserted, late_insert = torch.load(tmp_path / str(rank))
        assert swapped is True and inserted is True
        for error in (late_swap, late_insert):
            assert "came after DistributedDataParallel wrapped the model" in error
            assert "put adapters in first, then wrap" in error
