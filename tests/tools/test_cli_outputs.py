"""The command line's outputs: whole headings, JSON, and files that can't be written."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.table import Table

import peft_kernels
from peft_kernels._library import HAS_TRITON, OPS
from peft_kernels.cli import main
from peft_kernels.tools import printing
from peft_kernels.tools.bench.suites import lora_linear as suite

TINY = ["--shapes", "5x7x9", "--rounds", "2", "--seconds", "0"]
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="the command is about Triton's kernels")


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = main(argv)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def never(*_, **__):
    raise AssertionError("it went on")


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"peft-kernels {peft_kernels.__version__}\n"


# ---- headings --------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [None, "100", "40"])
def test_no_heading_is_cut(capsys, tmp_path, monkeypatch, columns):
    """None: a pipe, in which lines are as long as they need to be."""
    if columns is None:
        monkeypatch.delenv("COLUMNS", raising=False)
    else:
        monkeypatch.setenv("COLUMNS", columns)
    _, bench, _ = run(capsys, "bench", *TINY, "--out", str(tmp_path))
    _, doctor, _ = run(capsys, "doctor")
    assert "…" not in bench + doctor
    assert suite.FUSED in bench and "reference" in bench
    if columns is None:
        assert f"{suite.BARE}, ms" in bench and "must reach" in bench
        return
    framed = [line for line in (bench + doctor).splitlines() if line[:1] in set("│┃┏┡└├")]
    assert max(map(len, framed)) <= int(columns)
    # Three tables; where they don't fit, each part begins with the shape.
    assert (bench.count("5x7x9") == 3) == (columns == "100")


def shown(table: Table, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    printing.show(console, table)
    return console.file.getvalue().splitlines()


def test_a_table_too_wide_is_printed_in_parts():
    table = Table("name", "first heading", "second", "third", title="title")
    table.add_row("one", "1", "2", "3")
    table.add_row("two", "4", "5", "6")
    cells = [[c.strip() for c in line.strip("│").split("│")] for line in shown(table, 28)]
    rows = [row for row in cells if row[0] in ("one", "two")]
    assert rows == [["one", "1", "2"], ["two", "4", "5"], ["one", "3"], ["two", "6"]]


@needs_triton
def test_the_reports_tables_are_whole():
    from peft_kernels.tools.report import run as report

    found = made_up_report()
    console = Console(file=io.StringIO(), width=60)
    report.print_tables(console, found)
    out = console.file.getvalue()
    assert "…" not in out
    assert "a_kernel_with_a_long_name_of_its_own" in out
    assert "1 outside the budget" in out
    assert "1.50 i" in out


# ---- JSON ------------------------------------------------------------------------------------


def test_doctor_as_json_says_the_same(capsys):
    code, out, _ = run(capsys, "doctor", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["machine"]["torch"] == torch.__version__
    assert {row["op"] for row in found["backends"]} == set(OPS)
    for row in found["backends"]:
        backend = peft_kernels.backend_of(row["op"], row["device"], getattr(torch, row["dtype"]))
        assert row["backend"] == backend and row["why"]


def test_bench_as_json_prints_what_it_writes(capsys, tmp_path):
    code, out, err = run(capsys, "bench", *TINY, "--json", "--out", str(tmp_path))
    found = json.loads(out)
    assert code == 0
    assert (found["op"], found["device"]) == ("lora_linear", "cpu")
    assert found["rows"] == json.loads((tmp_path / "bench.json").read_text())
    assert "5x7x9" in err  # the tables are for people


@pytest.fixture
def plans(tmp_path):
    """The file of an empty tune cache of the test's own."""
    from tune_caches import own_cache

    yield from own_cache(tmp_path)


@needs_triton
def test_tune_lists_what_is_cached(capsys, plans):
    plans.write_text(json.dumps({"a GPU": {"fwd m1": "ii"}}))
    code, out, _ = run(capsys, "tune", "--list")
    assert code == 0
    assert all(text in out for text in ("a GPU", "fwd m1", "ii", "plans.json"))
    code, out, _ = run(capsys, "tune", "--list", "--json")
    assert code == 0
    assert json.loads(out) == {"cache": str(plans), "plans": {"a GPU": {"fwd m1": "ii"}}}


@needs_triton
def test_tune_as_json(capsys, plans, monkeypatch):
    from peft_kernels.tools import tune

    cpu = torch.device("cpu")
    problem = tune.plans.Problem("fwd", torch.bfloat16, torch.float32, 5, 12, 9, 3, False)
    measured = [tune.Measurement(problem, {"i": 2.0, "library": 1.0}, "library")]
    monkeypatch.setattr(tune, "_require_gpu", lambda: cpu)
    monkeypatch.setattr(tune, "_measure", lambda *_: measured)
    code, out, err = run(capsys, "tune", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["cache"] == str(plans) and "buckets written" in err
    times = {"i": 2.0, "library": 1.0}
    row = {"bucket": problem.bucket(), "milliseconds": times, "best": "library", "left_out": {}}
    assert row in found["measurements"]


def made_up_report():
    from peft_kernels.tools.report import modelled
    from peft_kernels.tools.report import run as report
    from peft_kernels.tools.report.compile import CompiledRow
    from peft_kernels.tools.report.traffic.counted import TrafficRow

    sizes = {"multi_lora_linear": (2, 3, 4), "adapter_fusion": (2, 3, 4)}
    traffic = [
        TrafficRow(op, "fwd", "i", sizes.get(op, (2, 3, 4, 5)), 1, 0.5, 1000, 500, 0)
        for op in report.TRAFFIC_VIEWS
    ]
    name = "a_kernel_with_a_long_name_of_its_own"
    kernel = ("sm_80", name, "bf16/f32", "float32", "64x64", 40)
    good = CompiledRow(*kernel, 0, 1024, 2048, {"HMMA": 3}, True)
    spilling = CompiledRow(*kernel, 8, 1024, 2048, {"HMMA": 3}, True)
    shape = modelled.ModelledRow("sm_80", 1, 2, 3, "i", "64x64x64", 1, "", 3.0, 2.0)
    return report.Found(traffic, [good, spilling], [], [shape])


@needs_triton
def test_report_as_json(capsys, tmp_path, monkeypatch):
    from peft_kernels.tools.report import run as report

    made_up = made_up_report()
    monkeypatch.setattr(report, "find", lambda console: made_up)
    code, out, _ = run(capsys, "report", "--json")
    found = json.loads(out)
    assert code == 1
    assert found["outside"] == 1
    assert [row["within_budget"] for row in found["compiled"]] == [True, False]
    assert [row["op"] for row in found["traffic"]] == [row.op for row in made_up.traffic]
    assert [(row["chip"], row["m"], row["ratio"]) for row in found["modelled"]] == [
        ("sm_80", 1, 1.5)
    ]


# ---- what can't be written -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--out", "file", "must be a folder; "),
        ("--out", "file/inside", "file/inside can't be written: Not a directory"),
        ("--out", "taken", "must be a file"),
        ("--markdown", "file/inside/tables.md", "file/inside can't be written: Not a directory"),
        ("--markdown", "taken", "must be a file"),
    ],
)
def test_bench_finds_an_unwritable_output_before_it_measures(
    capsys, tmp_path, monkeypatch, option, value, says
):
    monkeypatch.setattr("peft_kernels.tools.bench.run.measure", never)
    (tmp_path / "file").touch()
    (tmp_path / "taken/bench.json").mkdir(parents=True)
    given = ["--out", str(tmp_path), option, str(tmp_path / value)]
    code, out, err = run(capsys, "bench", *TINY, *given)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert option in err and says in err


def test_a_disk_that_fails_while_writing_is_one_clear_line(capsys, tmp_path, monkeypatch):
    def full(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    code, out, err = run(capsys, "bench", *TINY, "--out", str(tmp_path))
    assert code == 2
    assert "5x7x9" in out  # what was measured isn't lost
    assert "bench.json can't be written: No space left on device" in err
    assert err.count("\n") == 1


@needs_triton
def test_tune_finds_an_unwritable_cache_before_it_measures(capsys, plans, monkeypatch):
    plans.mkdir()  # where the file would be
    monkeypatch.setattr("peft_kernels.tools.tune._require_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr("peft_kernels.tools.tune._measure", never)
    code, _, err = run(capsys, "tune")
    assert code == 2
    assert err.count("\n") == 1
    assert "PEFT_KERNELS_CACHE" in err and str(plans) in err


@needs_triton
def test_report_finds_an_unwritable_cache_before_it_compiles(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setattr("peft_kernels.tools.report.run._run", never)
    code, _, err = run(capsys, "report")
    assert code == 2
    assert err.count("\n") == 1
    assert "TRITON_CACHE_DIR" in err and str(tmp_path / "file") in err
