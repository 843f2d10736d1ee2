"""multi_lora_linear and its rivals under pytest-benchmark; what is timed stands in the suite.

    pytest benchmarks/bench_multi_lora_linear.py -k "64x1 and peft_kernels"

Each benchmark is timed on its own here, so absolute times drift with the machine; for ratios that
hold, measured interleaved in one run, use ``peft-kernels bench multi_lora_linear --all``.
"""

from __future__ import annotations

from _timing import of_suite, time_one

from peft_kernels.tools.bench.suites import multi_lora_linear as suite


@of_suite(suite)
def test_multi_lora_linear(benchmark, case, name):
    time_one(benchmark, suite, case, name)
