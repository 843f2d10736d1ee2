"""Folders of a model that two processes hold in shards: each writes and reads the whole."""

import safetensors.torch
import torch
from torch import nn

from peft_kernels import load_adapter, save_adapter, swap_linear

X = torch.linspace(-1, 1, 16).reshape(2, 8)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = swap_linear(
        nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5)), ["0"], 2, alpha=4
    )
    nn.init.normal_(model[0].lora_b)
    model[2].requires_grad_(True)
    return model


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def tensors_of(folder) -> dict:
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


def in_a_process(rank: int, folder) -> None:
    store = f"file://{folder / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    try:
        plain, model = make_model(), sharded(make_model())
        assert model.module[0].lora_a.numel() < plain[0].lora_a.numel()
        save_adapter(plain, folder / f"plain {rank}")
        save_adapter(model, folder / f"sharded {rank}")
        expected, written = (tensors_of(folder / f"{n} {rank}") for n in ("plain", "sharded"))
        assert written.keys() == expected.keys()
        assert all(torch.equal(written[key], expected[key]) for key in expected)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.zero_()
        load_adapter(model, folder / f"plain {rank}")
        torch.testing.assert_close(model(X), plain(X))
    finally:
        torch.distributed.destroy_process_group()


def test_every_process_writes_and_reads_the_whole(tmp_path):
    torch.multiprocessing.spawn(in_a_process, (tmp_path,), nprocs=2)
