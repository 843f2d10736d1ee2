"""dora_linear and its rivals under pytest-benchmark; cases and implementations are the suite's.

    pytest benchmarks/bench_dora_linear.py -k "512x2048x2048"

Each benchmark is timed on its own here, so absolute times drift with the machine; for ratios that
hold, measured interleaved in one run, use ``peft-kernels bench dora_linear --all``.
"""

from __future__ import annotations

from _timing import of_suite, time_one

from peft_kernels.tools.bench.suites import dora_linear as suite


@of_suite(suite)
def test_dora_linear(benchmark, case, name):
    time_one(benchmark, suite, case, name)
