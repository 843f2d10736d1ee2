"""bench on a GPU: the clock, the shapes and the baseline, with a device that is made up."""

from __future__ import annotations

import importlib
import io
import json

import pytest
import torch
from rich.console import Console

from peft_kernels._library import OPS
from peft_kernels.tools.bench import gpu, measure, run
from peft_kernels.tools.bench.suites import lora_linear as suite

CARD = {"name": "a card", "architecture": "sm_90", "driver": "580.1", "sm_mhz": "1755"}


class FakeGPU:
    """A queue of work, each with its milliseconds, that runs when it is waited for."""

    def __init__(self):
        self.queue, self.now, self.order = [], 0.0, []

    def launch(self, name: str, milliseconds: float):
        self.queue.append((name, milliseconds, None))

    def synchronize(self):
        for name, milliseconds, event in self.queue:
            self.now += milliseconds
            self.order.append(name)
            if event is not None:
                event.at = self.now
        self.queue.clear()

    def event(self):
        return FakeEvent(self)

    def clock(self, **options) -> gpu.EventClock:
        flush = lambda: self.launch("flush", 90.0)  # noqa: E731
        return gpu.EventClock(flush, self.event, self.synchronize, **options)


class FakeEvent:
    def __init__(self, device: FakeGPU):
        self.device, self.at = device, None

    def record(self):
        self.device.queue.append(("event", 0.0, self))

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.at is not None and end.at is not None, "read before the GPU was waited for"
        return end.at - self.at


# ---- the clock -------------------------------------------------------------------------------


def test_a_call_is_timed_between_events_behind_a_flush():
    device = FakeGPU()
    times = iter([2.0, 9.0, 3.0])
    seconds = device.clock()(lambda: device.launch("kernel", next(times)), 3)
    assert seconds == pytest.approx(3.0 / 1e3)  # the median of the calls, without the flushes
    assert device.order == ["flush", "event", "kernel", "event"] * 3


def test_what_was_launched_before_is_not_counted():
    device = FakeGPU()
    device.launch("another's", 500.0)
    assert device.clock()(lambda: device.launch("kernel", 2.0), 1) == pytest.approx(2.0 / 1e3)


def test_interleaved_goes_by_the_clock_that_it_is_given():
    device = FakeGPU()
    calls = {
        "bare": lambda: device.launch("bare", 0.01),
        "ours": lambda: device.launch("ours", 0.012),
    }
    budget = measure.Budget(rounds=3, seconds=0.0)
    found = measure.interleaved(calls, "bare", budget, device.clock(most=4))
    assert found["ours"].ratio == pytest.approx(1.2) and found["bare"].ratio == 1.0
    assert found["bare"].median == pytest.approx(0.01 / 1e3)
    # Two calls to warm up, and three rounds of at most four.
    assert device.order.count("ours") == device.order.count("bare") == 2 + 3 * 4


# ---- baseline and shapes ---------------------------------------------------------------------


@pytest.mark.parametrize("op", ["lora_linear", "dora_linear", "multi_lora_linear"])
@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float32), ("meta", torch.bfloat16)])
def test_the_bare_layer_is_float32_on_a_cpu_and_elsewhere_as_the_case(op, device, dtype):
    own = importlib.import_module(f"peft_kernels.tools.bench.suites.{op}")
    (case,) = own.cases([(5, 24, 40)], torch.bfloat16, False)
    assert case.bare_dtype("cuda") is case.bare_dtype("cuda:1") is torch.bfloat16
    inputs = (
        own._inputs(case, "cpu", 0.0) if op == "multi_lora_linear" else own._inputs(case, "cpu")
    )
    bare = own._bare(inputs, case.bare_dtype(device))
    assert bare.call(backward=False)().dtype is bare.x.dtype is dtype


@pytest.mark.parametrize("op", ["adapter", "adapter_fusion"])
def test_layers_without_adapters_are_float32_beside_bfloat16(op, tmp_path):
    """Whatever the rivals do to the layers that they are made of."""
    request = run.Request(op=op, shapes=[(8, 64, 4)], dtype=torch.bfloat16, rounds=1, seconds=0.0)
    own = run.find_suite(op)
    (case,) = run.select_cases(own, request)
    found = own.implementations(case)
    assert {name: one.call(False)().dtype for name, one in found.items()} == {
        name: torch.float32 if name == own.BARE else torch.bfloat16 for name in found
    }


@pytest.mark.parametrize("has_bfloat16", [True, False])
@pytest.mark.parametrize("op", OPS)
def test_every_op_has_shapes_for_a_gpu(op, has_bfloat16, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: has_bfloat16)
    request = run.Request(op=op, everything=True, device="cuda")
    cases = run.select_cases(run.find_suite(op), request)
    dtype = torch.bfloat16 if has_bfloat16 else torch.float16
    assert {case.dtype for case in cases} == {dtype}
    ways = [case.backward for case in cases]
    assert ways.count(True) == ways.count(False) == len(gpu.SHAPES[op]) >= 2


def test_a_cpus_floors_are_not_a_gpus(tmp_path):
    case = next(iter(suite.TARGETS))
    timing = measure.Timing(1.0, 2.0, 3)
    timings = {suite.BARE: timing, suite.FUSED: timing}
    here, there = (run.Row(case, timings, {}, has_floor=floor) for floor in (True, False))
    assert here.verdict(suite.FUSED).endswith(run.MISSED) and there.verdict(suite.FUSED) == ""
    assert [row["target"] for row in run.to_record([here, there])] == [case.target, None]


# ---- the whole of it -------------------------------------------------------------------------


def test_the_gpu_of_a_number_is_the_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    gpu.make_current("cuda")
    gpu.make_current("cuda:1")
    assert chosen == ["cuda:1"]


@pytest.fixture
def card(monkeypatch):
    """The CPU as a GPU whose events take 1 ms for each call."""
    monkeypatch.setattr(gpu, "is_gpu", lambda device: True)
    monkeypatch.setattr(gpu, "event_clock", lambda device: lambda call, repeats: 1e-3)
    monkeypatch.setattr(run, "card", lambda device: dict(CARD))


def test_bench_names_the_card_and_its_clocks(card, tmp_path):
    console = Console(file=io.StringIO(), width=200)
    request = run.Request(shapes=[(5, 24, 40)], rounds=2, seconds=0.0, out=tmp_path)
    rows = run.bench(console, request)
    assert "card: name a card, architecture sm_90, driver 580.1, sm_mhz 1755" in (
        console.file.getvalue()
    )
    document = json.loads(json.dumps(run.to_document(request, rows)))
    assert document["card"] == CARD
    (row,) = document["rows"]
    assert {timing["median"] for timing in row["timings"].values()} == {1e-3}
    assert row["target"] is None


def test_on_a_cpu_there_is_no_card():
    assert run.to_document(run.Request(), [])["card"] is None


def test_what_is_compiled_is_compiled_for_each_case(monkeypatch):
    """torch compiles a function for so many values, and runs it as it is from then on."""
    done = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: done.append("reset"))

    class Suite:
        @staticmethod
        def implementations(case, **options):
            done.append((options["compiled"], options["dropout_p"]))
            return {}

    run._built(Suite, None, run.Request(compiled=True))
    run._built(Suite, None, run.Request(compiled=True), 0.1)
    run._built(Suite, None, run.Request())
    assert done == ["reset", (True, 0.0), (True, 0.1), (False, 0.0)]
