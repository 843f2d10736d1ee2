"""lora_linear and its rivals under pytest-benchmark; cases and implementations are the suite's.

    pytest benchmarks/bench_lora_linear.py -k "512x2048x2048 and float32"

Each benchmark is timed on its own here, so absolute times drift with the machine; for ratios that
hold, measured interleaved in one run, use ``peft-kernels bench lora_linear --all``.
"""

from __future__ import annotations

from _timing import of_suite, time_one

from peft_kernels.tools.bench.suites import lora_linear as suite


@of_suite(suite)
def test_lora_linear(benchmark, case, name):
    time_one(benchmark, suite, case, name)
