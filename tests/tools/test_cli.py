"""The command line: what doctor and bench tell, what they write, and what a mistake gets."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch

import peft_kernels
from peft_kernels._library import HAS_TRITON, OPS
from peft_kernels.cli import main
from peft_kernels.tools import doctor
from peft_kernels.tools.bench import measure
from peft_kernels.tools.bench.peak import reset_peak
from peft_kernels.tools.bench.suites import lora_linear as suite

TINY = ["--shapes", "5x7x9", "--rounds", "2", "--seconds", "0"]


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = main(argv)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


# ---- help ------------------------------------------------------------------------------------


def test_help_of_bench_names_every_op_and_its_sizes(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    listed = capsys.readouterr().out.split("what MxNxK is of each:\n")[1].split("\n\n")[0]
    sizes = dict(line.strip().split("   ", 1) for line in listed.splitlines())
    assert sorted(op for ops in sizes for op in ops.split(", ")) == sorted(OPS)
    assert all(size.count(" x ") == 2 for size in sizes.values())


@pytest.mark.parametrize("command", [[], ["doctor"], ["verify"], ["bench"], ["report"], ["tune"]])
def test_help(capsys, command):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    assert "peft-kernels" in capsys.readouterr().out


# ---- doctor ----------------------------------------------------------------------------------


def rows_of(output: str, op: str) -> list[list[str]]:
    lines = (line for line in output.splitlines() if op in line)
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_doctor_names_every_ops_backend(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert torch.__version__ in out
    for op in OPS:
        rows = [row for row in rows_of(out, op) if row[0] == op]
        assert len(rows) == 8
        for _, device, dtype, backend, why in rows:
            assert backend == peft_kernels.backend_of(op, device, getattr(torch, dtype))
            assert why
            assert ("Triton" in why) <= (backend == "triton")
            assert ("its CUDA kernels" in why) <= (backend == "cuda")


def test_doctor_says_that_float64_is_the_references(capsys):
    _, out, _ = run(capsys, "doctor")
    reasons = [row[4] for row in rows_of(out, "lora_linear") if row[2] == "float64"]
    assert all("float64 is served by the reference" in reason for reason in reasons)


def test_doctor_names_a_forced_backend(capsys, monkeypatch):
    monkeypatch.setenv("PEFT_KERNELS_BACKEND", "reference")
    with peft_kernels.backend("reference"):
        _, out, _ = run(capsys, "doctor")
    assert "PEFT_KERNELS_BACKEND=reference is set" in out


@pytest.mark.skipif(not HAS_TRITON, reason="Triton")
@pytest.mark.parametrize(("capability", "widened"), [((7, 5), True), ((8, 0), False)])
def test_doctor_says_that_a_t4_multiplies_in_float32(monkeypatch, capability, widened):
    chips = pytest.importorskip("peft_kernels.triton.common.chips")
    major, minor = capability
    gpu = SimpleNamespace(major=major, minor=minor)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(chips, "arch_name", chips.arch_name.__wrapped__)
    rows = [row for row in doctor.backends("lora_linear") if row[1] == "cuda"]
    said = {dtype for _, _, dtype, _, why in rows if "no instructions of this GPU" in why}
    assert said == ({"bfloat16", "float16"} if widened else set())


# ---- bench -----------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--backward"], ["--dtype", "bfloat16"]])
def test_bench_writes_numbers_chart_and_tables(capsys, tmp_path, flags):
    markdown = tmp_path / "tables.md"
    code, out, _ = run(
        capsys, "bench", *TINY, *flags, "--out", str(tmp_path), "--markdown", str(markdown)
    )
    assert code == 0
    assert "5x7x9" in out
    (row,) = json.loads((tmp_path / "bench.json").read_text())
    assert row["timings"][suite.BARE]["ratio"] == 1.0
    assert row["peak_bytes"].keys() == row["timings"].keys()
    assert {suite.BARE, suite.FUSED, "reference", "mm + addmm_"} <= row["timings"].keys()
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert "| 5x7x9 |" in markdown.read_text()


def test_bench_of_an_unknown_op_is_one_clear_line(capsys, tmp_path):
    code, out, err = run(capsys, "bench", "no_such_op", "--out", str(tmp_path / "new"))
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert "no_such_op" in err and "lora_linear" in err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--all", "--backward"], "--all"),
        (["--rounds", "0"], "--rounds"),
        (["--seconds", "-1"], "--seconds must be at least 0; got -1.0"),
        (["--seconds", "nan"], "--seconds must be at least 0; got nan"),
        (["--device", "nowhere"], "nowhere"),
    ],
)
def test_bench_refuses_what_it_cant_do(capsys, flags, names):
    code, _, err = run(capsys, "bench", *flags)
    assert code == 2
    assert err.count("\n") == 1
    assert names in err


@pytest.mark.parametrize("flags", [["--shapes", "5x7"], ["--dtype", "int8"], ["--no-such-flag"]])
def test_bench_explains_arguments_that_dont_parse(capsys, flags):
    with pytest.raises(SystemExit) as stop:
        main(["bench", *flags])
    assert stop.value.code == 2
    assert flags[-1] in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, tune measures")
def test_tune_without_a_gpu_is_one_clear_line(capsys):
    code, _, err = run(capsys, "tune")
    assert code == 2
    assert err.count("\n") == 1
    assert "GPU" in err


needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="tune needs triton")


def tuned_with(capsys, monkeypatch, *flags):
    """What `tune` is asked for."""
    from peft_kernels.tools import tune

    asked = []
    monkeypatch.setattr(tune, "tune", lambda *args, **options: asked.append((*args, options)) or [])
    assert run(capsys, "tune", *flags)[0] == 0
    ((shapes, dtypes, options),) = asked
    return shapes, list(dtypes), options


@needs_triton
def test_tune_measures_the_shapes_that_it_is_given(capsys, monkeypatch):
    flags = "--shapes 5x12x9 70x12x9 --rank 3 8 --dropout 0.1 --dtype float16 --weights dense fp8"
    flags += " --dora"
    shapes, dtypes, options = tuned_with(capsys, monkeypatch, *flags.split())
    assert shapes == [(5, 12, 9, 3), (5, 12, 9, 8), (70, 12, 9, 3), (70, 12, 9, 8)]
    assert dtypes == [(torch.float16, torch.float32), (torch.float16, torch.float16)]
    assert (options["weights"], options["dropout_p"]) == (("", "fp8"), 0.1) and options["dora"]


@needs_triton
def test_tune_without_options_measures_its_own(capsys, monkeypatch):
    from peft_kernels.tools import tune

    shapes, dtypes, options = tuned_with(capsys, monkeypatch)
    assert (tuple(shapes), tuple(dtypes)) == (tune.SHAPES, tune.DTYPES)
    assert (options["weights"], options["dropout_p"]) == (tune.WEIGHTS, 0.0)
    assert not options["dora"]
    assert tuned_with(capsys, monkeypatch, "--dtype", "float32")[1] == [(torch.float32,) * 2]


@needs_triton
def test_tune_takes_models_by_name(capsys, monkeypatch):
    shapes, _, _ = tuned_with(capsys, monkeypatch, "--model", "bert", "--shapes", "5x12x9")
    assert (5, 12, 9, 16) in shapes and (8192, 3072, 768, 16) in shapes and len(shapes) == 22


@needs_triton
@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--rank", "8", "0"], "rank must be at least 1; got 0"),
        (["--dropout", "1"], "dropout must be at least 0 and below 1; got 1.0"),
        (["--dropout", "nan"], "dropout must be at least 0 and below 1; got nan"),
        (["--weights", "dense", "int3"], "weights must be among dense, nf4, fp4, int8, fp8; got"),
        (["--model", "gpt-9"], "model must be among llama-3-8b, "),
        (["--list", "--rank", "8"], "--list shows what is cached"),
        (["--list", "--dora"], "--list shows what is cached"),
    ],
)
def test_tune_refuses_what_it_cant_do(capsys, flags, names):
    code, _, err = run(capsys, "tune", *flags)
    assert code == 2
    assert err.count("\n") == 1
    assert names in err


@pytest.mark.parametrize("flags", [["--shapes", "5x7"], ["--dtype", "int8"], ["--rank", "many"]])
def test_tune_explains_arguments_that_dont_parse(capsys, flags):
    with pytest.raises(SystemExit) as stop:
        main(["tune", *flags])
    assert stop.value.code == 2
    assert flags[-1] in capsys.readouterr().err


# ---- what bench stands on --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rivals_compute_the_same(dtype):
    found = suite.implementations(suite.Case(5, 24, 40, dtype))
    expected = found["reference"].call(backward=False)().float()
    for name, implementation in found.items():
        if name != suite.BARE:
            actual = implementation.call(backward=False)().float()
            assert (actual - expected).norm() <= 2e-2 * expected.norm(), name


def test_every_implementation_has_the_same_gradients():
    found = suite.implementations(suite.Case(5, 24, 40, backward=True))
    torch.manual_seed(0)
    shapes = {}
    for name, implementation in found.items():
        shapes[name] = [tuple(g.shape) for g in implementation.call(backward=True)()]
    assert shapes.pop(suite.BARE) == [(5, 40)]
    assert all(found == [(5, 40), (16, 40), (24, 16)] for found in shapes.values())


def test_fused_saves_only_a_rank_sized_tensor_with_dropout_on():
    case = suite.Case(32, 256, 256)
    saved = suite.implementations(case, dropout_p=0.1)[suite.FUSED].saved_bytes()
    scalars = 64
    assert saved <= case.m * case.r * 4 + scalars


def test_saved_bytes_counts_a_storage_once_and_leaves_parameters_out():
    weight = torch.randn(8, 8, requires_grad=True)
    x = torch.randn(4, 8)

    def forward():
        y = x @ weight
        return (y.exp() * y.exp().T.sum()).sum()

    assert measure.saved_bytes(lambda: x @ weight, (x, weight)) == 0
    assert measure.saved_bytes(lambda: (x @ weight).exp(), (x, weight)) == 4 * 8 * 4
    assert measure.saved_bytes(forward, (x, weight)) >= 2 * 4 * 8 * 4


def test_saved_bytes_lets_go_of_the_graph():
    x, seen = torch.randn(4, 8, requires_grad=True), []

    def forward():
        y = x.exp()
        seen.append(weakref.ref(y))
        return y.exp()

    measure.saved_bytes(forward, (x,))
    assert seen[0]() is None


@pytest.mark.skipif(reset_peak() is None, reason="the system can't tell the peak")
def test_peak_sees_memory_that_is_free_again():
    """In a process of its own, as bench is: this one's heap is as the tests before left it."""
    size = 40_000_000
    code = (
        "import torch; from peft_kernels.tools.bench.peak import peak_bytes\n"
        f"def one(): torch.zeros({size}, dtype=torch.uint8)\n"
        "print(peak_bytes(lambda: (one(), one())), peak_bytes(lambda: None))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    peak, nothing = map(int, out.stdout.split())
    assert 0.9 * size < peak < 1.5 * size
    assert nothing < 0.1 * size


def test_interleaved_compares_within_rounds_and_drops_what_is_spent():
    clock = {"fast": 0, "slow": 0}

    def work(name: str, size: int):
        def call():
            clock[name] += 1
            return sum(range(size))

        return call

    calls = {"fast": work("fast", 20_000), "slow": work("slow", 80_000)}
    timings = measure.interleaved(calls, "fast", measure.Budget(rounds=3, seconds=0.0))
    assert timings["fast"].ratio == 1.0
    assert timings["slow"].ratio > 1.5
    assert timings["slow"].rounds >= 3 and timings["fast"].rounds >= timings["slow"].rounds


def test_a_very_slow_implementation_stops_at_its_cap():
    budget = measure.Budget(rounds=15, seconds=1.0, cap_seconds=10.0)
    assert budget.is_spent([6.0] * 3, elapsed=18.0)
    assert not budget.is_spent([6.0] * 2, elapsed=12.0)
    assert not budget.is_spent([0.01] * 20, elapsed=0.2)
