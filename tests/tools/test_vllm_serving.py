"""The benchmark of vLLM: which cells it measures, and what its tables say of a record."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "python" / "tools"))

import vllm_serving  # noqa: E402  it lies beside the tools, which are scripts and no package
from _vllm_engine import NONE, OURS, STOCK, Batch  # noqa: E402


def options(**changed):
    own = {
        "adapters": [0, 1, 64], "stock": [1], "prompt": 64, "tokens": 24, "stock_prompt": 8,
        "stock_tokens": 4, "model": "1024", "dtype": ["float32"], "compiled": False, "threads": 2,
    }  # fmt: skip
    return argparse.Namespace(**own | changed)


def row(cell, seconds):
    peaks = dict(zip((NONE, OURS, STOCK), (1e9, 2e9, 3e9), strict=True))
    return {"cell": asdict(cell), "seconds": seconds, "peak_bytes": peaks}


def test_the_cells_of_an_engine_have_its_number_of_requests():
    small, large = vllm_serving.cells(options())
    assert [cell.batch for cell in small] == [
        Batch(0, 16, 64, 24),
        Batch(1, 16, 64, 24),
        Batch(1, 16, 8, 4),
    ]
    assert [cell.beside_stock for cell in small] == [False, False, True]
    assert [cell.batch for cell in large] == [Batch(64, 64, 64, 24)]


def test_every_model_and_dtype_is_asked():
    groups = list(vllm_serving.cells(options(model="", dtype=["float32", "bfloat16"])))
    assert len({(group[0].model, group[0].dtype) for group in groups}) == 4


@pytest.mark.parametrize(("ours", "verdict"), [(2.0, "1.00 | ≥ 0.97 reached"), (3.0, "missed")])
def test_a_ratio_is_judged_by_its_floor(ours, verdict):
    cell = next(vllm_serving.cells(options(adapters=[1], stock=[])))[0]
    seconds = {NONE: [[2.0, 4.0]] * 3, OURS: [[ours, 8.0]] * 3}
    line = vllm_serving.table([row(cell, seconds)]).splitlines()[-1]
    assert "| 1 | 16 of 64 + 24 tokens | 5.1% | 512 |" in line and verdict in line
    assert line.endswith("| 5.1% | 96 | 0.50 | ≥ 0.95 missed | 1000 | 2000 |")


def test_beside_vllms_own_the_ratio_is_to_it():
    cell = next(vllm_serving.cells(options(adapters=[1], stock=[1])))[1]
    seconds = {NONE: [[1.0, 1.0]], OURS: [[2.0, 8.0]], STOCK: [[32.0, 16.0]]}
    line = vllm_serving.table([row(cell, seconds)]).splitlines()[-1]
    assert "| 4 | 16.00 | ≥ 15 reached | 4 | 2.00 | ≥ 4 missed | 3000 | 2000 |" in line


def run(monkeypatch, tmp_path, *arguments):
    """The cells that are measured."""
    found = []

    def measured(group, rounds):
        for cell in group:
            found.append(cell)
            yield row(cell, {way: [[1.0, 1.0]] * rounds for way in (NONE, OURS, STOCK)})

    record = str(tmp_path / "record.json")
    monkeypatch.setattr(vllm_serving, "measured", measured)
    monkeypatch.setattr(sys, "argv", ["vllm_serving.py", "--json", record, *arguments])
    vllm_serving.main()
    return found


def test_a_record_is_gone_on_with(monkeypatch, tmp_path):
    part = ["--model", "1024", "--dtype", "float32", "--stock"]
    assert len(run(monkeypatch, tmp_path, *part, "--adapters", "0", "1")) == 2
    (more,) = run(monkeypatch, tmp_path, *part, "--adapters", "0", "1", "8")
    assert more.batch.adapters == 8
    (again,) = run(monkeypatch, tmp_path, *part, "--adapters", "1", "--again")
    assert again.batch.adapters == 1
    rows = json.loads((tmp_path / "record.json").read_text())
    assert [r["cell"]["batch"]["adapters"] for r in rows] == [0, 8, 1]
