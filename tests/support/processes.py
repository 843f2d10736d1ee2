"""Tests that run in several processes at once, which are started once for a whole file.

A file has cases, functions that every process runs, each after the other:

    CASES = Cases(2)

    @CASES.add
    def columns(): ...

    run = CASES.fixture()

    @CASES.tests
    def test_sharded(run, case):
        run(case)
"""

from __future__ import annotations

import datetime
import importlib
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from peft_kernels.calls.carried import carried

# Imports take longer than tests do: a server has them once, which processes are forked from. It
# finds what is installed alone.
PRELOADED = [
    "peft",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "transformers.models.llama.modeling_llama",
]
SECONDS = 60  # a collective that one process never comes to


class Cases:
    """The cases of a file, and how many processes run them."""

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self.functions: dict[str, Callable[[], None]] = {}
        self.folder = Path()  # of all of them, in each process and in the test's

    def add(self, function: Callable[[], None]) -> Callable[[], None]:
        self.functions[function.__name__] = function
        return function

    def tests(self, test: Callable) -> Callable:
        """Parametrizes a test by ``case``."""
        return pytest.mark.parametrize("case", self.functions)(test)

    def fixture(self):
        """What runs all the cases at first, and then tells of each."""

        @pytest.fixture(scope="module")
        def run(request, tmp_path_factory):
            folder = self.folder = tmp_path_factory.mktemp("processes")
            names = list(self.functions)
            error: Exception | None = None
            arguments = (self.processes, str(folder), request.module.__name__, names)
            multiprocessing.set_forkserver_preload(PRELOADED)
            try:
                torch.multiprocessing.start_processes(
                    _in_a_process, arguments, nprocs=self.processes, start_method="forkserver"
                )
            except Exception as raised:
                error = raised

            def tell(case: str) -> None:
                if error is None:
                    return
                done = [(folder / f"{rank}.done").read_text().split() for rank in _ranks(self)]
                if not all(case in names for names in done):
                    raise error

            return tell

        return run


def _ranks(cases: Cases) -> range:
    return range(cases.processes)


def _in_a_process(rank: int, size: int, folder: str, module: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=SECONDS),
    )
    done = Path(folder, f"{rank}.done")
    done.touch()
    cases: Cases = importlib.import_module(module).CASES
    cases.folder = Path(folder)
    try:
        for name in names:
            torch.manual_seed(0)
            cases.functions[name]()
            assert not any(carried().values()), f"{name} leaves something carried"
            dist.barrier()
            with done.open("a") as file:
                file.write(f"{name}\n")
    finally:
        dist.destroy_process_group()


def everywhere(value) -> list:
    """What each process has."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


class Wire(TorchDispatchMode):
    """The collectives that run within it, each with how many elements a process gives to it."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("_c10d_functional", "c10d"):
            name = func.overloadpacket.__name__.strip("_")
            if name not in ("wait_tensor", "wrap_tensor_autograd"):
                given = args[1 if name.endswith("_base") else 0]  # those have the output first
                tensors = given if isinstance(given, list) else [given]
                self.sent.append((name, sum(tensor.numel() for tensor in tensors)))
        return func(*args, **(kwargs or {}))
