"""The guide for more than one machine, as it stands there, in processes of any launcher."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from parallel_models import close, llama, logits, lora, of_peft, text, trained
from processes import Cases

import peft_kernels

CASES = Cases(2)
run = CASES.fixture()

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/guides/more-than-one-machine.md"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def run_the_page() -> None:
    """In this process, which is one of a group."""
    names = {
        "torch": torch,
        "peft_kernels": peft_kernels,
        "model": llama(),
        "whole_model": lora(),
        "served_model": llama(),
        "split_model": llama(),
        "big_model": lora(),
        "sharded_model": llama(),
        "folder": str(CASES.folder / "lora"),
        "peft_model": of_peft(),
        "input_ids": text(),
        "processes": torch.distributed.get_world_size(),
    }
    if torch.distributed.get_rank() == 0:
        peft_kernels.save_adapter(lora(), CASES.folder / "lora")
    torch.distributed.barrier()
    page = PAGE.read_text()
    for found in BLOCK.finditer(page):
        line = page.count("\n", 0, found.start(1))
        exec(compile("\n" * line + found[1], str(PAGE), "exec"), names)
    torch.testing.assert_close(logits(names["big_model"]), logits(lora()))
    torch.testing.assert_close(logits(names["sharded_model"]), logits(lora()))
    split = logits(names["split_model"])
    torch.testing.assert_close(split, logits(llama()))  # B is zero still
    assert names["optimizer"].state


@CASES.add
def the_blocks_run_one_after_the_other():
    os.chdir(CASES.folder)
    run_the_page()
    assert (CASES.folder / "my-adapter/adapter_model.safetensors").exists()
    assert (CASES.folder / "checkpoint/.metadata").exists()


@CASES.tests
def test_the_guide(run, case):
    run(case)


def train_with_accelerate() -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    expected = trained(lora())
    model = accelerator.prepare(lora())
    rows = slice(accelerator.process_index, None, accelerator.num_processes)
    losses, adapters = trained(model, rows)
    close(adapters, expected[1])
    losses = accelerator.reduce(losses, "mean")
    close(losses, expected[0])


def train_a_loop_of_accelerate(folder: str) -> None:
    """Model, optimizer and batches, as ``prepare`` wraps them; the losses go into a file."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = of_peft()
    trains = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trains, lr=1e-2, eps=1e-5)
    rows = [(row + shift) % 32 for shift in range(4) for row in text()]
    batches = torch.utils.data.DataLoader(rows, batch_size=4 // accelerator.num_processes)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    report, losses = peft_kernels.accelerate(model), []
    for _ in range(2):
        for ids in batches:
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
    counts = report.counts()
    assert counts == {"lora_linear": len(losses) * len(report.layers)}, counts
    assert isinstance(accelerator.unwrap_model(model), peft.PeftModel)
    if accelerator.is_main_process:
        found = {"losses": losses, "processes": accelerator.num_processes}
        Path(folder, f"{accelerator.num_processes}.json").write_text(json.dumps(found))


def start(launcher: str, script: str, folder: Path) -> None:
    path = folder / "train.py"
    path.write_text(script)
    paths = [ROOT, ROOT / "tests/support", ROOT / "tests/distributed"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *launcher.split(), str(path)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.long
@pytest.mark.parametrize("function", [run_the_page, train_with_accelerate])
def test_torchrun_starts_it(function, tmp_path):
    script = (
        "import torch, test_guide\n"
        "torch.distributed.init_process_group('gloo')\n"
        "assert torch.distributed.get_world_size() == 2\n"
        f"test_guide.{function.__name__}()\n"
        "torch.distributed.destroy_process_group()\n"
    )
    start("torch.distributed.run --standalone --nproc-per-node 2", script, tmp_path)


@pytest.mark.long
def test_accelerate_starts_it(tmp_path):
    """Its launcher; with ``--cpu`` it would start one process, whatever number is asked for."""
    pytest.importorskip("accelerate")
    script = f"import test_guide\ntest_guide.train_a_loop_of_accelerate({str(tmp_path)!r})\n"
    given = "--num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
    losses = []
    for processes, kind in ((1, "--cpu"), (2, "--multi_gpu")):
        launcher = f"accelerate.commands.launch {kind} --num_processes {processes} {given}"
        start(launcher, script, tmp_path)
        found = json.loads((tmp_path / f"{processes}.json").read_text())
        assert found["processes"] == processes
        losses.append(found["losses"])
    close(*losses)
    assert losses[0][-1] < losses[0][0]
