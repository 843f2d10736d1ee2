"""prompt_lookup and its rivals under pytest-benchmark; what is timed stands in the suite.

    pytest benchmarks/bench_prompt_lookup.py -k "8x128 and float32 forward"

Each benchmark is timed on its own here, so absolute times drift with the machine; for ratios that
hold, measured interleaved in one run, use ``peft-kernels bench prompt_lookup --all``.
"""

from __future__ import annotations

import pytest

from peft_kernels.tools.suites import prompt_lookup as suite

NAMES = (suite.BARE, suite.FUSED, *suite.RIVALS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", suite.CASES, ids=lambda case: f"{case.shape} {case.group}")
def test_prompt_lookup(benchmark, case, name):
    implementations = suite.implementations(case)
    if name not in implementations:
        pytest.skip(f"{name} is not installed")
    implementation = implementations[name]
    call = implementation.call(case.backward)
    benchmark.group = f"{case.group} {case.shape}"
    benchmark.extra_info["must reach"] = case.target
    benchmark.extra_info["bytes saved for backward"] = implementation.saved_bytes()
    benchmark(call)
