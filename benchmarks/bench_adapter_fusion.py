"""adapter_fusion and its rivals under pytest-benchmark; what is timed stands in the suite.

    pytest benchmarks/bench_adapter_fusion.py -k "float32 forward"

Each benchmark is timed on its own here, so absolute times drift with the machine; for ratios that
hold, measured interleaved in one run, use ``peft-kernels bench adapter_fusion --all``.
"""

from __future__ import annotations

from _timing import of_suite, time_one

from peft_kernels.tools.bench.suites import adapter_fusion as suite


@of_suite(suite)
def test_adapter_fusion(benchmark, case, name):
    time_one(benchmark, suite, case, name)
