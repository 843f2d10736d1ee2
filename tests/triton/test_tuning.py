"""Plans that a process measures by itself: when, how, and what is kept. No GPU: times are told."""

import importlib
import json
import logging
import threading
import time
from dataclasses import replace

import pytest
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.errors import OutOfResources
from tune_caches import own_cache

import peft_kernels
from peft_kernels.ops import quantize
from peft_kernels.triton.lora_linear import plan_cache, plans, tuning

CPU = torch.device("cpu")
BF16, F32 = torch.bfloat16, torch.float32
KEY = plan_cache.device_key(CPU)

lora_linear = importlib.import_module("peft_kernels.ops.lora_linear")


def problem(direction="fwd", m=64, n=32, k=32, r=4):
    return plans.Problem(direction, F32, F32, m, n, k, r, False)


CASE = problem()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The file of an empty tune cache of the test's own."""
    monkeypatch.delenv("PEFT_KERNELS_TUNE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    yield from own_cache(tmp_path / "cache")


class GPU:
    """Tells how long a plan takes, and counts what is timed."""

    def __init__(self):
        self.times = {"i": 3.0, "ii": 1.0, "library": 2.0, "fused": 2.0, "scratch": 1.0}
        self.timed = []
        self.capturing = False

    def timer(self, call):
        plan = call.args[-1]
        call()
        self.timed.append(plan)
        return self.times[plan]


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """The CPU is taken for a GPU that Triton compiles for."""
    gpu = GPU()
    monkeypatch.setattr(tuning, "_compiles_for", lambda device: True)
    monkeypatch.setattr(tuning, "gpu_timer", gpu.timer)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpu.capturing)
    return gpu


class Runs(list):
    """Notes the plans that ran, and raises an error for some."""

    def __init__(self, **errors):
        self.errors = errors

    def __call__(self, plan):
        self.append(plan)
        if plan in self.errors:
            raise self.errors[plan]


def kept(path):
    return json.loads(path.read_text())[KEY]


# ---- the first call --------------------------------------------------------------------------


def test_the_first_call_measures_and_the_best_is_kept(cache, gpu):
    run = Runs()
    assert plans.choose(CPU, CASE, run) == "ii"
    assert run == ["i", "ii", "library"] * (1 + tuning.ROUNDS)  # once to compile; in turns
    assert gpu.timed == ["i", "ii", "library"] * tuning.ROUNDS
    assert kept(cache) == {CASE.bucket(): "ii"}
    assert plans.choose(CPU, CASE, run) == "ii"
    assert plans.choose(CPU, replace(CASE, m=50), run) == "ii"  # the same bucket
    plans.forget_cache()  # as another process would
    assert plans.choose(CPU, CASE, run) == "ii"
    assert len(gpu.timed) == 3 * tuning.ROUNDS


def test_only_plans_that_can_serve_are_measured(gpu):
    assert plans.choose(CPU, problem("bwd"), Runs()) == "library"
    assert set(gpu.timed) == {"i", "library"}


def test_the_median_counts():
    times = iter([1.0, 9.0, 8.0, 2.0, 3.0, 2.0])  # i: 1, 8, 3; library: 9, 2, 2
    found = tuning.time_plans(("i", "library"), Runs(), lambda call: next(times), rounds=3)
    assert found.milliseconds == {"i": 3.0, "library": 2.0}


def test_one_line_is_logged(caplog):
    with caplog.at_level(logging.INFO, "peft_kernels"):
        plans.choose(CPU, CASE, Runs(ii=OutOfResources(300_000, 232_448, "shared memory")))
    (line,) = caplog.messages
    assert line.startswith("measured lora_linear's plans for fwd float32/float32 m64 n32 k32 r4: i")
    assert "library 2.0000 ms" in line and "ii left out (OutOfResources: out of resource" in line


@pytest.mark.parametrize(
    "error",
    [
        OutOfResources(300_000, 232_448, "shared memory"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("Triton Error [CUDA]: an error"),
    ],
)
def test_a_plan_that_cant_run_is_left_out(cache, gpu, error):
    assert plans.choose(CPU, CASE, Runs(ii=error)) == "library"
    assert "ii" not in gpu.timed and kept(cache) == {CASE.bucket(): "library"}


def test_where_no_plan_runs_the_default_is_taken_and_nothing_kept(cache):
    error = torch.OutOfMemoryError("CUDA out of memory")
    run = Runs(i=error, ii=error, library=error)
    assert plans.choose(CPU, CASE, run) == plans.default_plan("other", CASE)
    assert not cache.exists() and len(run) == 3
    plans.choose(CPU, CASE, run)
    assert len(run) == 3  # not again


def test_a_mistake_of_ours_is_not_hidden():
    with pytest.raises(KeyError):
        plans.choose(CPU, CASE, Runs(ii=KeyError("x")))


def test_a_cache_that_cant_be_written_is_warned_of(cache):
    cache.parent.parent.mkdir(exist_ok=True)
    cache.parent.write_text("a file where the folder would be")
    run = Runs()
    with pytest.warns(UserWarning) as found:
        assert plans.choose(CPU, CASE, run) == "ii"
    assert any("PEFT_KERNELS_CACHE" in str(w.message) for w in found)
    ran = len(run)
    assert plans.choose(CPU, CASE, run) == "ii"
    assert plans.choose(CPU, replace(CASE, m=50), run) == "ii"
    assert len(run) == ran


# ---- when nothing is measured ----------------------------------------------------------------


@pytest.mark.parametrize("off", [{"m": 0}, {"n": 0}, {"k": 0}])
def test_not_without_numbers(gpu, off):
    plans.choose(CPU, replace(CASE, **off), Runs())
    assert not gpu.timed


def test_not_where_a_plan_is_forced(gpu):
    with plans.force("i"):
        assert plans.choose(CPU, CASE, Runs()) == "i"
    assert not gpu.timed


def test_not_while_a_graph_is_captured(gpu):
    gpu.capturing = True
    assert plans.choose(CPU, CASE, Runs()) == plans.default_plan("other", CASE)
    assert not gpu.timed
    gpu.capturing = False
    assert plans.choose(CPU, CASE, Runs()) == "ii"


def test_not_under_deterministic_algorithms(gpu, monkeypatch):
    torch.use_deterministic_algorithms(True)
    try:
        plans.choose(CPU, CASE, Runs())
        assert not gpu.timed
        monkeypatch.setenv("PEFT_KERNELS_TUNE", "1")  # but where it is asked for
        plans.choose(CPU, problem(m=1024), Runs())
        assert gpu.timed
    finally:
        torch.use_deterministic_algorithms(False)


def test_not_on_a_cpu_nor_in_the_interpreter(monkeypatch):
    monkeypatch.undo()
    assert not tuning._compiles_for(CPU)
    assert triton.knobs.runtime.interpret and not tuning._compiles_for(torch.device("cuda"))
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert tuning._compiles_for(torch.device("cuda"))


def test_not_on_fake_tensors(gpu):
    with FakeTensorMode(), peft_kernels.backend("triton"):
        y = lora_linear.lora_linear(**lora_linear.example_inputs(5, 32, 32, 4))
    assert y.shape == (5, 32) and not gpu.timed


# ---- PEFT_KERNELS_TUNE -----------------------------------------------------------------------


SAME, CLOSE, NEAR, FAR = problem(m=50), problem(n=64), problem(m=128), problem(m=1024)


@pytest.mark.parametrize(
    ("value", "measured"),
    [
        ("0", set()),
        ("1", {NEAR, FAR}),
        ("", {NEAR, FAR}),
        ("full", {CLOSE, NEAR, FAR}),
    ],
)
@pytest.mark.parametrize("known", [SAME, CLOSE, NEAR, FAR])
def test_what_its_values_measure(gpu, monkeypatch, value, measured, known):
    monkeypatch.setenv("PEFT_KERNELS_TUNE", value)
    plan_cache.save({KEY: {known.bucket(): "i"}})
    plan = plans.choose(CPU, CASE, Runs())
    assert bool(gpu.timed) is (known in measured)
    assert plan == ("ii" if known in measured else "library" if known is FAR else "i")


def test_nonsense_is_named(monkeypatch):
    monkeypatch.setenv("PEFT_KERNELS_TUNE", "yes")
    with pytest.raises(ValueError, match="PEFT_KERNELS_TUNE must be one of 0, 1, full; got 'yes'"):
        plans.choose(CPU, CASE, Runs())


# ---- ranks, processes, threads ---------------------------------------------------------------


def rank_by_variable(monkeypatch):
    monkeypatch.setenv("RANK", "1")


def rank_by_torch(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)


@pytest.mark.parametrize("in_rank_1", [rank_by_variable, rank_by_torch])
def test_other_ranks_read_what_rank_0_has_measured(gpu, monkeypatch, in_rank_1):
    in_rank_1(monkeypatch)
    now = 100.0
    monkeypatch.setattr(plans.time, "monotonic", lambda: now)
    assert plans.choose(CPU, CASE, Runs()) == "library"
    known, version = plan_cache._plans, plan_cache._known_by
    plan_cache.save({KEY: {CASE.bucket(): "i"}})  # as rank 0 does
    plan_cache._plans, plan_cache._known_by = known, version
    assert plans.choose(CPU, CASE, Runs()) == "library"  # the file isn't looked at each time
    now += tuning.LOOK_AGAIN_SECONDS
    assert plans.choose(CPU, CASE, Runs()) == "i"
    monkeypatch.setattr(plan_cache, "_version", None)  # and no more
    now = 1e9
    assert plans.choose(CPU, CASE, Runs()) == "i"
    assert not gpu.timed


def test_a_rank_that_is_no_number_is_0(gpu, monkeypatch):
    monkeypatch.setenv("RANK", "first")
    plans.choose(CPU, CASE, Runs())
    assert gpu.timed


def test_other_ranks_measure_where_it_is_asked_for(gpu, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("PEFT_KERNELS_TUNE", "1")
    plans.choose(CPU, CASE, Runs())
    assert gpu.timed


def test_what_another_process_has_measured_isnt_again(cache, gpu):
    plans.choose(CPU, problem(m=1024), Runs())
    gpu.timed.clear()
    theirs = {KEY: {CASE.bucket(): "i"}}
    cache.write_text(json.dumps(theirs))
    assert plans.choose(CPU, CASE, Runs()) == "i"
    assert not gpu.timed


def test_a_choice_stays_in_its_process():
    """A call that is made again, by checkpointing say, has the same bits."""
    plan_cache.save({KEY: {problem(n=64).bucket(): "i"}})
    assert plans.choose(CPU, CASE, Runs()) == "i"
    plan_cache.save({KEY: {CASE.bucket(): "library"}})
    assert plans.choose(CPU, CASE, Runs()) == "i"
    assert plans.choose(CPU, replace(CASE, m=50), Runs()) == "library"


def test_one_of_several_threads_measures(gpu):
    threads, start = 4, threading.Barrier(4)
    found, run = [], Runs()

    def slowly(plan):
        time.sleep(0.01)
        run(plan)

    def work():
        start.wait()
        found.append(plans.choose(CPU, CASE, slowly))

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == ["ii"] * threads
    assert len(run) == 3 * (1 + tuning.ROUNDS)


# ---- through the launchers, in the interpreter -----------------------------------------------


def trained(weight=None, dropout_p=0.0):
    """The outputs of a forward and backward, and the inputs."""
    torch.manual_seed(0)
    inputs = lora_linear.example_inputs(5, 32, 64, 4, dtype=F32)
    if weight is not None:
        inputs["weight"] = quantize(inputs["weight"], weight)
    for name in ("x", "lora_a", "lora_b"):
        inputs[name].requires_grad_()
    with peft_kernels.backend("triton"):
        y = lora_linear.lora_linear(**inputs, dropout_p=dropout_p)
        y.sum().backward()
    return [y, *(inputs[name].grad for name in ("x", "lora_a", "lora_b"))], inputs


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("best", ["i", "library"])
def test_a_call_that_measures_gives_what_its_best_plan_gives(cache, gpu, best):
    with plans.force(best):
        expected, _ = trained(dropout_p=0.3)
        state = torch.get_rng_state()
    gpu.times[best] = 0.5
    out, inputs = trained(dropout_p=0.3)
    assert same(out, expected)
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn for the other plans
    torch.manual_seed(0)
    untouched = lora_linear.example_inputs(5, 32, 64, 4, dtype=F32)
    assert all(torch.equal(inputs[name], untouched[name]) for name in untouched)
    assert gpu.timed == ["i", "ii", "library"] * 3 + ["i", "library"] * 3
    bucket = "float32/float32 m8 n32 k64 r4 dropout"
    assert kept(cache) == {f"fwd {bucket}": best, f"bwd {bucket}": best}


@pytest.mark.parametrize("best", ["fused", "scratch"])
def test_over_codes_the_dense_plan_is_measured_within(cache, gpu, best):
    with plans.force(best):
        expected, _ = trained("nf4")
    cache.unlink(missing_ok=True)
    plans.forget_cache()
    gpu.times[best] = 0.5
    out, _ = trained("nf4")
    bucket = "float32/float32 m8 n32 k64 r4"
    assert kept(cache) == {
        f"fwd {bucket}": "ii",
        f"bwd {bucket}": "library",
        f"fwd {bucket} 4-bit/row/nested": best,
        f"bwd {bucket} 4-bit/row/nested": best,
    }
    assert same(out, expected)


def test_dora_measures_too(cache, gpu):
    dora_linear = importlib.import_module("peft_kernels.ops.dora_linear")
    with peft_kernels.backend("triton"):
        dora_linear.dora_linear(**dora_linear.example_inputs(5, 32, 64, 4, dtype=F32))
    assert kept(cache) == {"fwd float32/float32 m8 n32 k64 r4 gain": "ii"}


# ---- the timer -------------------------------------------------------------------------------


def test_the_timer_flushes_before_it_starts(monkeypatch):
    done = []

    class Buffer:
        def zero_(self):
            done.append("flush")

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("event")

        def synchronize(self):
            done.append("wait")

        def elapsed_time(self, end):
            assert end is not self
            return 0.25

    def empty(size, *, dtype, device):
        assert size * dtype.itemsize >= 256e6 and device == "cuda"
        return Buffer()

    monkeypatch.undo()
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert tuning.gpu_timer(lambda: done.append("call")) == 0.25
    assert done == ["flush"] * tuning.FLUSHES + ["event", "call", "event", "wait"]
