"""The guide for more than one machine, as it stands there, in processes of any launcher."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parallel_models import llama, logits, lora, of_peft, text, trained
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
        "peft_model": of_peft(),
        "input_ids": text(),
        "processes": torch.distributed.get_world_size(),
    }
    page = PAGE.read_text()
    for found in BLOCK.finditer(page):
        line = page.count("\n", 0, found.start(1))
        exec(compile("\n" * line + found[1], str(PAGE), "exec"), names)
    torch.testing.assert_close(logits(names["big_model"]), logits(lora()))
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
    torch.testing.assert_close(adapters, expected[1], rtol=1e-6, atol=1e-6)
    losses = accelerator.reduce(losses, "mean")
    torch.testing.assert_close(losses, expected[0], rtol=1e-6, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("function", [run_the_page, train_with_accelerate])
def test_torchrun_starts_it(function, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import torch, test_guide\n"
        "torch.distributed.init_process_group('gloo')\n"
        "assert torch.distributed.get_world_size() == 2\n"
        f"test_guide.{function.__name__}()\n"
        "torch.distributed.destroy_process_group()\n"
    )
    paths = [ROOT, ROOT / "tests/support", ROOT / "tests/distributed"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2"
    command = [sys.executable, *launcher.split(), str(script)]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
