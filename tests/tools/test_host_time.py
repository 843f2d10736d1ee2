"""The tool that times launchers: its record has every op, and as many launches as there are now."""

import json
import sys
from pathlib import Path

import pytest
import torch

from peft_kernels._library import OPS

sys.path.insert(0, str(Path(__file__).parents[2] / "python" / "tools"))

import _results
import host_time

COUNTED = ("what", "launches_forward", "launches_forward_backward")


def test_the_record_has_the_launches_of_now(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(host_time, "ROUNDS", 1)
    monkeypatch.setattr(host_time, "CALLS", 1)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    threads = torch.get_num_threads()
    found = host_time.measure()
    torch.set_num_threads(threads)
    record = json.loads(_results.HOST_TIME.read_text())
    assert {row["what"] for row in record} == {host_time.BARE, "absorb", *OPS}
    counted = [[row[name] for name in COUNTED] for row in record]
    assert [[row[name] for name in COUNTED] for row in found] == counted
