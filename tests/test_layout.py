"""The shape of the house: mirrored files, and what importing the package must not do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import peft_kernels
from peft_kernels import _library

ROOT = Path(__file__).parents[1]
OPS = sorted(p.stem for p in (ROOT / "peft_kernels/ops").glob("*.py") if not p.stem.startswith("_"))


def stems(folder: str, prefix: str) -> set[str]:
    return {p.stem.removeprefix(prefix) for p in (ROOT / folder).glob(f"{prefix}*.py")}


def test_every_op_is_public():
    assert set(OPS) <= set(peft_kernels.ops.__all__)
    assert all(callable(getattr(peft_kernels.ops, op)) for op in OPS)
    assert sorted(_library.OPS) == OPS


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_test_a_benchmark_and_a_suite(op):
    assert op in stems("tests", "test_")
    assert op in stems("benchmarks", "bench_")
    assert op in stems("peft_kernels/tools/suites", "")


def test_no_benchmark_or_suite_is_without_its_op():
    assert stems("benchmarks", "bench_") == set(OPS)
    assert stems("peft_kernels/tools/suites", "") - {"__init__"} == set(OPS)


def run_python(code: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_nothing_beyond_torch():
    out = run_python(
        "import sys, torch; before = set(sys.modules); import peft_kernels;"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    assert set(out.split()) == {"peft_kernels"}


def test_importing_the_package_asks_for_no_gpu():
    run_python(
        "import torch\n"
        "def refuse(*args, **kwargs):\n"
        "    raise AssertionError('the GPU was queried at import')\n"
        "for name in ('is_available', 'device_count', 'current_device', 'get_device_capability',\n"
        "             'get_device_properties', 'get_device_name', 'init', '_lazy_init'):\n"
        "    setattr(torch.cuda, name, refuse)\n"
        "import peft_kernels, peft_kernels.cli\n"
    )
