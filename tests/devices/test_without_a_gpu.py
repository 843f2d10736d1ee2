"""The run on a GPU is collected where there is none, so that it can't rot."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which runs them")
def test_the_tests_for_a_gpu_are_collected_and_say_why_they_are_skipped():
    here = str(Path(__file__).parent)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", here, "--device", "cuda", "-rs"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    # Alike everywhere but for what is deselected, such as this test.
    reason, skipped = "torch finds no GPU here", done.stdout.splitlines()[-1]
    assert reason in done.stdout and " skipped, 1 deselected" in skipped, skipped
    assert int(skipped.split()[0]) > 60
