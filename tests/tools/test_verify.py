"""verify: what is right is right, and what is wrong, raises or changes its bits is found."""

from __future__ import annotations

import io
import json
import os
import sys
from contextlib import contextmanager

import pytest
import torch
from rich.console import Console

import peft_kernels
from peft_kernels._library import HAS_TRITON, OPS
from peft_kernels.cli import main
from peft_kernels.tools.verify import checks, parts, run
from peft_kernels.tools.verify.cases import DTYPES, cases_of
from peft_kernels.tools.verify.machine import Machine
from peft_kernels.tools.verify.subjects import Subject, subjects_of

pytestmark = pytest.mark.filterwarnings("ignore:Warning only once for all operators")

CPU = torch.device("cpu")
DIRECT = ("forward", "backward", "same bits")


def verified(capsys, *argv: str) -> tuple[int, dict]:
    code = main(["verify", "--device", "cpu", "--json", *argv])
    return code, json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


def verdicts(document: dict, check: str) -> set[str]:
    return {row["checks"][check]["verdict"] for row in document["rows"]}


@contextmanager
def kernel(name: str, function):
    """Another kernel of an op on the CPU."""
    with torch.library._scoped_library("peft_kernels", "IMPL") as library:
        library.impl(name, function, "CPU", allow_override=True)
        yield


def reference(name: str):
    return getattr(torch.ops.peft_kernels, f"{name}_ref").default


def test_no_plan_is_measured_for_its_small_shapes(monkeypatch):
    monkeypatch.setenv("PEFT_KERNELS_TUNE", "full")
    seen = []
    monkeypatch.setattr(run, "_rows", lambda *_: seen.append(os.environ["PEFT_KERNELS_TUNE"]) or [])
    run.verify(Console(file=io.StringIO()), device="cpu")
    assert seen == ["0"] and os.environ["PEFT_KERNELS_TUNE"] == "full"


# ---- what is right -----------------------------------------------------------------------------


def test_every_op_and_dtype_is_right_here(capsys):
    code, found = verified(capsys)
    assert code == 0 and found["bad"] == 0
    ran = [row for row in found["rows"] if row["checks"]["forward"]["verdict"] != "skipped"]
    short = {str(dtype).removeprefix("torch.") for dtype in DTYPES}
    assert {(row["op"], row["dtype"]) for row in ran} == {(o, d) for o in OPS for d in short}
    assert {row["plan"] for row in ran} == {"auto", "nf4 auto", "int8 auto"}
    for row in ran:
        dtype = getattr(torch, row["dtype"])
        assert row["backend"] == peft_kernels.backend_of(row["op"], "cpu", dtype)
        assert {row["checks"][name]["verdict"] for name in DIRECT} == {"right"}
        assert 0 <= row["checks"]["backward"]["error"] <= row["checks"]["backward"]["allowed"]
    assert {row["checks"]["graph"]["why"] for row in ran} == {"no GPU"}
    assert {row["checks"]["second GPU"]["why"] for row in ran} == {"no GPU"}


@pytest.mark.skipif(not HAS_TRITON, reason="plans are of Triton's kernels")
def test_plans_that_cannot_run_are_skipped_and_say_why(capsys):
    code, found = verified(capsys, "--op", "lora_linear", "multi_lora_linear", "dora_linear")
    plans = {(row["op"], row["plan"]): row["checks"] for row in found["rows"]}
    dense = [("lora_linear", plan) for plan in ("i", "ii", "library")]
    dense += [("dora_linear", plan) for plan in ("i", "ii", "library")]
    codes = [
        ("lora_linear", f"{kind} {p}") for kind in ("nf4", "int8") for p in ("fused", "scratch")
    ]
    rows = [("multi_lora_linear", plan) for plan in ("decode", "grouped", "single")]
    assert code == 0
    for name in (*dense, *codes, *rows):
        assert all("backend is 'cpu'" in found["why"] for found in plans[name].values()), name


def test_the_table_is_for_people(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["verify", "--device", "cpu", "--op", "prompt_lookup"]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("│ prompt_lookup")]
    assert len(rows) == len(DTYPES) and all("right" in row for row in rows)
    assert "skipped, no GPU: graph, second GPU" in out and "nothing wrong, of" in out


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_odd_empty_and_strided_cases(op):
    cases = {case.name: case for case in cases_of(op, torch.float32)}
    assert {"no rows", "strided"} <= cases.keys()
    laid = cases["strided"].on(CPU)
    assert not any(laid[name].is_contiguous() for name in ("x", "q", "embeddings") if name in laid)
    empty = [t for t in cases["no rows"].on(CPU).values() if isinstance(t, torch.Tensor)]
    assert any(tensor.numel() == 0 for tensor in empty)


# ---- what is wrong -----------------------------------------------------------------------------


def slightly_wrong(*args):
    embeddings, *rest = reference("prompt_lookup_fwd")(*args)
    return embeddings * (1 + 1e-3), *rest


def without_gradient(*args):
    return tuple(torch.zeros_like(t) for t in reference("prompt_lookup_bwd")(*args))


def test_a_wrong_forward_is_found(capsys):
    with kernel("prompt_lookup_fwd", slightly_wrong):
        code, found = verified(capsys, "--op", "prompt_lookup")
    assert code == 1 and found["bad"] == 2  # 1e-3 is within bfloat16's rounding
    row = next(row for row in found["rows"] if row["dtype"] == "float32")
    forward = row["checks"]["forward"]
    assert forward["verdict"] == "wrong" and forward["error"] == pytest.approx(1e-3, rel=1e-3)
    assert forward["allowed"] < 1e-5 and forward["why"].startswith("y has error 1.0e-03")
    assert row["checks"]["backward"]["verdict"] == "right"


def test_a_gradient_of_zeros_is_found_in_every_dtype(capsys):
    with kernel("prompt_lookup_bwd", without_gradient):
        code, found = verified(capsys, "--op", "prompt_lookup")
    assert code == 1 and verdicts(found, "backward") == {"wrong"}
    assert verdicts(found, "forward") == verdicts(found, "same bits") == {"right"}


def test_a_nan_is_wrong_and_json_holds_it(capsys):
    def of_nans(*args):
        embeddings, *rest = reference("prompt_lookup_fwd")(*args)
        return embeddings.fill_(torch.nan), *rest

    with kernel("prompt_lookup_fwd", of_nans):
        code, found = verified(capsys, "--op", "prompt_lookup")
    assert code == 1 and verdicts(found, "forward") == {"wrong"}
    assert {row["checks"]["forward"]["error"] for row in found["rows"]} == {None}


def test_other_bits_in_a_second_run_are_found(capsys):
    calls = []

    def wavering(*args):
        calls.append(None)
        embeddings, *rest = reference("prompt_lookup_fwd")(*args)
        return embeddings * (1 + (len(calls) % 2) * 2e-7), *rest

    with kernel("prompt_lookup_fwd", wavering):
        code, found = verified(capsys, "--op", "prompt_lookup")
    row = next(row for row in found["rows"] if row["dtype"] == "float32")["checks"]
    assert code == 1 and row["forward"]["verdict"] == "right"
    assert row["same bits"]["verdict"] == "wrong" and "y differ" in row["same bits"]["why"]


def test_a_result_of_another_dtype_is_wrong():
    case = cases_of("prompt_lookup", torch.bfloat16)[0]
    wanted = checks.wanted_of(case, torch.bfloat16)
    found = wanted.judge("y", wanted.exact["y"].float())
    assert found.verdict == "wrong" and "float32, must be" in found.why


def raising(*args):
    raise RuntimeError("CUDA error: no kernel image is available\nand a page more of it")


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_what_raises_is_a_line_and_the_rest_goes_on(capsys, monkeypatch, direction):
    monkeypatch.setenv("COLUMNS", "250")
    with kernel(f"prompt_lookup_{direction[0]}wd", raising):
        code = main(["verify", "--device", "cpu", "--op", "prompt_lookup", "adapter"])
    out, err = capsys.readouterr()
    assert code == 1 and "Traceback" not in out + err
    lines = [line for line in out.splitlines() if line.startswith("failed:")]
    assert len(lines) == len(DTYPES)
    said = "RuntimeError: CUDA error: no kernel image is available"
    assert all(f"{direction} (" in line and line.endswith(said) for line in lines)
    assert sum("right" in line for line in out.splitlines() if line.startswith("│ adapter")) == 3


# ---- what only a GPU has -----------------------------------------------------------------------


def on(machine: Machine, *ops: str) -> run.Verified:
    return run.verify(Console(file=io.StringIO()), ops=ops, machine=machine)


def findings(found: run.Verified, check: str) -> dict[str, str]:
    return {row.findings[check].verdict: row.findings[check].why for row in found.rows}


def replays_what_lies_in_its_tensors(call):
    """As a graph does: it reads the tensors that it was captured with, whatever they hold."""
    return call


def replays_what_it_saw(call):
    outputs = [tensor.detach().clone() for tensor in call()]
    return lambda: outputs


def cannot_capture(call):
    raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize("op", ["prompt_lookup", "adapter"])
def test_a_graph_is_replayed_on_other_values(op):
    if peft_kernels.backend_of(op, CPU, torch.float32) == "reference":
        pytest.skip("there is no native library, and the reference needn't be captured")
    right = on(Machine(CPU, capture=replays_what_lies_in_its_tensors), op)
    assert findings(right, "graph") == {"right": ""}
    stale = on(Machine(CPU, capture=replays_what_it_saw), op)
    assert set(findings(stale, "graph")) == {"wrong"} and stale.bad() == len(DTYPES)
    refused = on(Machine(CPU, capture=cannot_capture), op)
    assert findings(refused, "graph") == {
        "failed": "RuntimeError: operation not permitted when stream is capturing"
    }


def test_the_reference_need_not_be_captured():
    with peft_kernels.backend("reference"):
        found = on(Machine(CPU, capture=cannot_capture), "prompt_lookup")
    assert findings(found, "graph") == {"skipped": "the reference needn't be captured"}
    assert found.bad() == 0


def test_the_gpu_that_is_asked_for_is_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(run, "check_device", torch.device)
    monkeypatch.setattr(run, "machine_at", Machine)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name in ("cuda:1", "cuda", "cpu:0"):
        assert run._machine(name).device == torch.device(name)
    assert current == [torch.device("cuda", 1)]


def test_a_second_device_gets_the_tensors(monkeypatch):
    seen = []
    other = torch.device("cpu", 0)
    given = checks.Case.on
    monkeypatch.setattr(
        checks.Case, "on", lambda case, device: seen.append(device) or given(case, device)
    )
    found = on(Machine(CPU, other=other), "prompt_lookup")
    assert findings(found, "second GPU") == {"right": ""}
    assert seen.count(other) == len(DTYPES)


def test_a_device_that_is_lost_is_not_asked_any_more(monkeypatch):
    """After an access out of bounds all calls on a GPU fail, of kernels that are right too."""
    monkeypatch.setattr(Machine, "is_lost", lambda self: True)
    with kernel("adapter_fwd", raising):
        found = on(Machine(CPU), "adapter", "prompt_lookup")
    first, *others = found.rows
    assert first.findings["forward"].verdict == "failed" and found.bad() == 1
    why = "the device was lost by adapter float32 auto; verify the rest with --op"
    assert {f.why for row in others for f in row.findings.values()} == {why}


@pytest.mark.skipif(not HAS_TRITON, reason="plans are of Triton's kernels")
def test_a_plan_is_in_force_while_it_is_verified(monkeypatch):
    from peft_kernels.triton.lora_linear import plans

    seen = {}

    def note(wanted, device):
        seen[current.label] = plans._forced
        return iter(())

    monkeypatch.setattr(checks, "_both_directions", note)
    monkeypatch.setattr(checks, "worst", lambda found: checks.Finding("right"))
    wanted = [checks.wanted_of(case, torch.float32) for case in cases_of("lora_linear", DTYPES[0])]
    with peft_kernels.backend("triton"):
        for current in subjects_of("lora_linear", CPU):
            assert current.backend == "triton" and not current.skipped
            checks.check(current, wanted, Machine(CPU), 0)
    forced = {name: name.split()[-1] for name in seen if not name.endswith("auto")}
    assert {name: seen[name] for name in forced} == forced and len(forced) == 10
    assert {seen[name] for name in seen if name.endswith("auto")} == {None}


def test_a_plan_of_multi_lora_is_asked_for():
    asked = []
    case = checks.Case("a case", lambda **inputs: asked.append(inputs), {}, ())
    subject = Subject("multi_lora_linear", "triton", torch.float32, "grouped")
    subject.asked(case).call(x=1)
    assert asked == [{"x": 1, "plan": "grouped"}]


# ---- in several processes ----------------------------------------------------------------------


def test_several_processes_find_the_same(capsys):
    flags = ("--op", "prompt_lookup", "adapter", "--dtype", "bfloat16", "--seed", "3")
    here, there = (verified(capsys, *flags, "--jobs", jobs) for jobs in ("1", "2"))
    assert here[0] == there[0] == 0 and len(here[1]["rows"]) == 2
    assert here[1]["rows"] == there[1]["rows"] and there[1]["seed"] == 3


def test_a_process_that_dies_is_a_finding_about_its_part(monkeypatch):
    def command(part, device, seed):
        dies = part[0].dtype is torch.float16
        # What a crash prints need not be text.
        own = "import os; os.write(2, b'Fatal: \\xff gone'); os.abort()"
        return [sys.executable, "-c", own] if dies else ours(part, device, seed)

    ours = parts.command
    monkeypatch.setattr(parts, "command", command)
    subjects = [s for s in subjects_of("prompt_lookup", CPU) if s.dtype is not torch.bfloat16]
    right, died = parts.in_processes(Console(file=io.StringIO()), subjects, CPU, 0, 2)
    assert not right.bad() and {found.verdict for found in died.findings.values()} == {"failed"}
    assert died.findings["forward"].why == "its process ended with exit code -6: Fatal: \ufffd gone"


def test_a_process_that_hangs_is_ended(monkeypatch):
    sleeps = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(parts, "command", lambda *arguments: sleeps)
    monkeypatch.setattr(parts, "SECONDS", 1.0)
    console = Console(file=io.StringIO())
    (row, *_) = parts.in_processes(console, list(subjects_of("adapter", CPU)), CPU, 0, 3)
    assert row.findings["graph"].why == "its process was ended after 1 s"


def test_a_gpu_has_a_process_for_each_core_and_a_cpu_one(monkeypatch):
    monkeypatch.setattr(parts.os, "cpu_count", lambda: 6)
    assert parts.default_jobs(torch.device("cuda", 0)) == 6 and parts.default_jobs(CPU) == 1
    monkeypatch.setattr(parts.os, "cpu_count", lambda: 64)
    assert parts.default_jobs(torch.device("cuda", 0)) == parts.MOST


# ---- mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--op", "no_such_op"], "no_such_op"),
        (["--device", "meta"], "meta"),
        (["--jobs", "0"], "--jobs"),
        (["--device", "hpu"], "hpu"),  # torch would import a module for it
        (["--seed", "-1"], "--seed must be from 0 to"),
        (["--seed", str(2**64)], "--seed must be from 0 to"),
    ],
)
def test_a_mistake_is_one_line(capsys, flags, names):
    assert main(["verify", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and names in err
