"""The native kernels under the address and undefined-behaviour sanitizers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_builds import CHECKED, PASSED

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "sanitized"


def run(*command, **environment):
    # The environment's own cmake and ninja, so that a build folder always meets the same ones.
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def runtime(name):
    return run("g++", f"-print-file-name={name}").strip()


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_native_kernels_under_sanitizers():
    options = ("-DPEFT_KERNELS_SANITIZE=ON", "-DCMAKE_CXX_COMPILER=g++")
    interpreter = f"-DPython_EXECUTABLE={sys.executable}"
    run("cmake", "-S", ".", "-B", str(BUILD), "-G", "Ninja", interpreter, *options)
    run("cmake", "--build", str(BUILD))
    tests = tuple(f"tests/ops/test_{op}.py" for op in sorted(CHECKED))
    masks = "(test_a_mask_of_the_lowest_float and auto)"
    at_once = "(test_has_the_bits and not reference) or test_the_number_of_threads"
    chosen = ("-rp", "-k", f"test_native_on_any_shape or test_rank_512 or {masks} or {at_once}")
    output = run(
        *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests, *chosen),
        LD_PRELOAD=f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        ASAN_OPTIONS="detect_leaks=0",  # the interpreter's own
        PEFT_KERNELS_NATIVE=str(BUILD / "_native.so"),
    )
    assert set(PASSED.findall(output)) == CHECKED
