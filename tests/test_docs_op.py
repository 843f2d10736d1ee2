"""The op of docs/add-an-op.md: its files, put into a copy of the package, are a whole op."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peft_kernels import _library

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/add-an-op.md").read_text()
FILE = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)^```', re.MULTILINE | re.DOTALL)
TRIED = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
ISAS = {"baseline": ()}
if os.uname().machine == "x86_64":
    ISAS["avx2"] = ("-mavx2", "-mfma", "-mf16c")
    ISAS["avx512"] = (*ISAS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512vl")

# Every backend beside float64; the arguments are the backend, and a library or none.
COMPARED = """
import sys
import torch
from errors import assert_as_good_as
import peft_kernels
from peft_kernels.nn.my_layer import MyLayer
from peft_kernels.ops.my_op import example_inputs, my_op

backend, expected, *libraries = sys.argv[1:]
for library in libraries:
    torch.ops.load_library(library)


def outcome(backend, inputs, dy):
    x, w = (t.clone().requires_grad_() for t in inputs)
    layer = MyLayer(w.numel(), dtype=w.dtype)
    layer.w = torch.nn.Parameter(w)
    with peft_kernels.backend(backend):
        y = layer(x)
        gradients = torch.autograd.grad(y, (x, layer.w), dy)
        assert torch.equal(my_op(x.detach(), w.detach()), y)
    return y.detach(), *gradients


for dtype in (torch.float32, torch.bfloat16, torch.float16):
    with peft_kernels.backend(backend):
        assert peft_kernels.backend_of("my_op", "cpu", dtype) == expected
    for m, k in ((0, 5), (3, 0), (1, 33), (70, 300), (1100, 40)):
        inputs, dy = tuple(example_inputs(m, k, dtype=dtype).values()), torch.randn(m, k).to(dtype)
        inputs = (inputs[0].T.contiguous().T, inputs[1].repeat_interleave(2)[::2])
        eager = outcome("reference", inputs, dy)
        exact = outcome("reference", [t.double() for t in inputs], dy.double())
        for found, near, right in zip(outcome(backend, inputs, dy), eager, exact, strict=True):
            assert_as_good_as(found, near, right, f"{dtype} {m} x {k}")
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A copy of the package with the page's files in it."""
    root = tmp_path_factory.mktemp("added")
    unwanted = shutil.ignore_patterns("__pycache__", "_native.so")
    shutil.copytree(ROOT / "peft_kernels", root / "peft_kernels", ignore=unwanted)
    shutil.copytree(ROOT / "csrc/cpu/matrix", root / "csrc/cpu/matrix")
    shutil.copy(ROOT / "csrc/common.h", root / "csrc")
    parts: dict[str, list[str]] = {}
    for name, text in FILE.findall(PAGE):
        parts.setdefault(name, []).append(text)
    for name, texts in parts.items():
        path = root / name
        assert not path.exists()
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n\n".join(texts))
    return root


def run(root: Path, *command: str, **environment: str) -> None:
    paths = {"PYTHONPATH": f"{root}{os.pathsep}{ROOT / 'tests/support'}"}
    if _library.NATIVE_LIBRARY.exists():
        paths["PEFT_KERNELS_NATIVE"] = str(_library.NATIVE_LIBRARY)
    whole = os.environ | paths | environment
    done = subprocess.run(command, cwd=root, env=whole, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def test_the_op_runs_on_its_reference(root):
    run(root, sys.executable, "-c", "".join(TRIED.findall(PAGE)))


@pytest.mark.skipif(not _library.HAS_TRITON, reason="triton is not installed")
def test_its_triton_kernels(root):
    run(root, sys.executable, "-c", COMPARED, "triton", "triton", TRITON_INTERPRET="1")


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_its_cpu_kernels(root):
    cpu, torch_at = root / "csrc/cpu", Path(torch.__file__).parent
    compiler = ("g++", "-std=c++20", "-O1", "-fPIC", "-w")
    compiler += ("-DTORCH_TARGET_VERSION=0x020d000000000000", "-isystem", f"{torch_at}/include")
    for isa, flags in ISAS.items():
        kernels = (f"{cpu}/my_op_kernels.cpp", "-o", f"{root}/{isa}.o")
        run(root, *compiler, *flags, f"-DPK_ISA={isa}", "-c", *kernels)
    objects = [f"{root}/{isa}.o" for isa in ISAS]
    sources = [f"{cpu}/my_op.cpp", f"{cpu}/matrix/isa.cpp"]
    linked = ("-shared", f"-L{torch_at}/lib", "-ltorch_cpu", "-ltorch", "-lc10")
    run(root, *compiler, *sources, *objects, *linked, "-o", f"{root}/my_op.so")
    for isa in ISAS:
        command = (sys.executable, "-c", COMPARED, "auto", "cpu", f"{root}/my_op.so")
        run(root, *command, PEFT_KERNELS_ISA=isa)


def test_its_python_is_formatted(root):
    """As the project's own is, so that it can be copied."""
    ours = [str(root / name) for name, _ in FILE.findall(PAGE) if name.endswith(".py")]
    pytest.importorskip("ruff")
    config = ("--config", str(ROOT / "pyproject.toml"))
    run(root, sys.executable, "-m", "ruff", "format", "--check", *config, *ours)
    run(root, sys.executable, "-m", "ruff", "check", *config, *ours)
