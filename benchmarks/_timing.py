"""How a suite's cases and implementations become benchmarks."""

from __future__ import annotations

import pytest


def of_suite(suite):
    """Parametrizes a benchmark by ``case`` and by the ``name`` of an implementation."""

    def decorate(function):
        names = (suite.BARE, suite.FUSED, *suite.RIVALS)
        by_case = pytest.mark.parametrize(
            "case", suite.CASES, ids=lambda case: f"{case.shape} {case.group}"
        )
        return pytest.mark.parametrize("name", names)(by_case(function))

    return decorate


def time_one(benchmark, suite, case, name):
    """Times one implementation of a case, and notes its target and what it saves."""
    implementations = suite.implementations(case)
    if name not in implementations:
        pytest.skip(f"{name} has no part in this case, or is not installed")
    implementation = implementations[name]
    call = implementation.call(case.backward)
    benchmark.group = f"{case.group} {case.shape}"
    benchmark.extra_info["must reach"] = case.target
    benchmark.extra_info["bytes saved for backward"] = implementation.saved_bytes()
    benchmark(call)
