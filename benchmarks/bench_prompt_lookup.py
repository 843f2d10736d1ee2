"""prompt_lookup and its rivals under pytest-benchmark; what is timed stands in the suite.

    pytest benchmarks/bench_prompt_lookup.py -k "8x128 and float32 forward"

Each benchmark is timed on its own here, so absolute times drift with the machine; for ratios that
hold, measured interleaved in one run, use ``peft-kernels bench prompt_lookup --all``.
"""

from __future__ import annotations

from _timing import of_suite, time_one

from peft_kernels.tools.bench.suites import prompt_lookup as suite


@of_suite(suite)
def test_prompt_lookup(benchmark, case, name):
    time_one(benchmark, suite, case, name)
