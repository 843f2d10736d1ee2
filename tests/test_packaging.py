"""What is packed, and what a package without native kernels says."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import peft_kernels
from peft_kernels import _cuda_kernels
from peft_kernels._library import HAS_TRITON, NATIVE_LIBRARY
from peft_kernels.tools import doctor

ROOT = Path(__file__).parents[1]
BUILT_FROM = (
    "CMakeLists.txt",
    "LICENSE",
    "README.md",
    "CHANGELOG.md",
    "pyproject.toml",
    "setup.py",
)
WITHOUT_COMPILER = {"CXX": "no-such-compiler"}
NO_NATIVE = "peft_kernels/_no_native.txt"
SAYS = "peft_kernels has no native library"


def run(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith(("PEFT_KERNELS", "PYTHON"))
    }
    env = inherited | environment
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def build(kind: str, source: Path, out: Path, **environment: str) -> Path:
    """Builds an ``sdist`` or a ``wheel`` with what is installed here, as ``pip`` asks for it."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    run([sys.executable, "-c", code], source, **environment)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    """The repository's files."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is not a git checkout")
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = run(listing, ROOT).stdout.splitlines()
    return {name for name in names if (ROOT / name).exists()}


def copied(names: set[str], folder: Path) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def unpacked(tracked, tmp_path_factory) -> Path:
    """The sdist of the repository's files, unpacked: what ``pip install`` of it builds from."""
    folder = tmp_path_factory.mktemp("sdist")
    source = copied(tracked, folder / "source")
    (folder / "dist").mkdir()
    with tarfile.open(build("sdist", source, folder / "dist")) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (top,) = (folder / "unpacked").iterdir()
    return top


def files_of(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def install(source: Path, folder: Path, **environment: str) -> Path:
    """A folder to import the package from, as a wheel of ``source`` fills it."""
    copy, out = folder / "copy", folder / "dist"
    shutil.copytree(source, copy)
    out.mkdir()
    with zipfile.ZipFile(build("wheel", copy, out, **environment)) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


@pytest.fixture(scope="module")
def without_compiler(unpacked, tmp_path_factory) -> Path:
    return install(unpacked, tmp_path_factory.mktemp("without"), **WITHOUT_COMPILER)


@pytest.fixture(scope="module")
def pure(unpacked, tmp_path_factory) -> Path:
    asked = {"PEFT_KERNELS_NATIVE": "0"}
    return install(unpacked, tmp_path_factory.mktemp("pure"), **WITHOUT_COMPILER, **asked)


def import_from(site: Path, code: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"import peft_kernels\n{code}"]
    return run(command, site, PYTHONPATH=str(site), **environment)


# ---- what is packed --------------------------------------------------------------------------


def test_the_sdist_holds_all_that_a_build_needs_and_no_more(tracked, unpacked):
    needed = {n for n in tracked if n.startswith(("csrc/", "peft_kernels/")) or n in BUILT_FROM}
    assert {
        "csrc/cpu/matrix/tile.h",
        "csrc/common.h",
        "peft_kernels/py.typed",
        *BUILT_FROM,
    } <= needed
    packed = files_of(unpacked)
    assert needed - packed == set()
    of_the_format = {n for n in packed if n in ("PKG-INFO", "setup.cfg") or ".egg-info/" in n}
    assert packed - needed - of_the_format == {"MANIFEST.in"}


def test_a_wheel_holds_the_package_and_its_license(tracked, without_compiler):
    package = {name for name in tracked if name.startswith("peft_kernels/")}
    packed = files_of(without_compiler)
    of_the_format = {name for name in packed if ".dist-info/" in name}
    assert packed - of_the_format == package | {NO_NATIVE}
    assert any(name.endswith("/LICENSE") for name in of_the_format)


def test_a_wheel_tells_vllm_whom_to_call(without_compiler):
    (points,) = without_compiler.glob("*.dist-info/entry_points.txt")
    lines = points.read_text().splitlines()
    at = lines.index("[vllm.general_plugins]")
    assert lines[at + 1] == "peft_kernels = peft_kernels.integrations.vllm.plugin:register"


# ---- with native kernels ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tracked, tmp_path_factory) -> Path:
    """What ``make wheel`` leaves in dist/, with the native library that these tests run."""
    if not NATIVE_LIBRARY.exists():
        pytest.skip(f"there is no {NATIVE_LIBRARY}")
    source = copied(tracked, tmp_path_factory.mktemp("made") / "source")
    environment = os.path.relpath(sys.prefix, source)
    command = ["make", "-o", f"{environment}/requirements", f"VENV={environment}", "wheel"]
    run(command, source, PEFT_KERNELS_NATIVE=str(NATIVE_LIBRARY))
    return source / "dist"


@pytest.fixture(scope="module")
def installed(made, tmp_path_factory) -> Path:
    """A fresh environment with the wheel, and torch from where these tests have it."""
    folder = tmp_path_factory.mktemp("environment")
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)], ROOT)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    (wheel,) = made.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "install"]
    run([*pip, "--no-index", "--no-deps", str(wheel)], folder)
    return folder


@pytest.mark.long
def test_make_wheel_leaves_a_manylinux_wheel_and_an_sdist(made, tracked, unpacked):
    version = peft_kernels.__version__
    wheel = f"peft_kernels-{version}-py3-none-manylinux_2_28_{platform.machine()}.whl"
    assert {path.name for path in made.iterdir()} == {wheel, f"peft_kernels-{version}.tar.gz"}
    names = zipfile.ZipFile(made / wheel).namelist()
    package = {name for name in tracked if name.startswith("peft_kernels/")}
    packed = {name for name in names if ".dist-info/" not in name and not name.endswith("/")}
    assert packed == package | {"peft_kernels/_native.so"}
    with tarfile.open(made / f"peft_kernels-{version}.tar.gz") as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert files_of(unpacked) <= names


ONE_OP = """
import sys, torch, peft_kernels
assert peft_kernels.__file__.startswith(sys.prefix), peft_kernels.__file__
assert peft_kernels.backend_of("lora_linear", "cpu", torch.float32) == "cpu"
x, w, a, b = (torch.randn(shape) for shape in ((5, 32), (48, 32), (4, 32), (48, 4)))
y = peft_kernels.ops.lora_linear(x, w, a, b, scale=0.5)
torch.testing.assert_close(y, x @ w.T + 0.5 * (x @ a.T) @ b.T)
"""


@pytest.mark.long
def test_the_wheel_works_where_there_is_no_compiler(installed):
    path = {"PATH": str(installed / "bin"), "COLUMNS": "200"}
    assert all(shutil.which(tool, path=path["PATH"]) is None for tool in ("g++", "cmake", "ninja"))
    doctor = run([str(installed / "bin/peft-kernels"), "doctor"], installed, **path).stdout
    assert "native library" in doctor and "not loaded" not in doctor
    run([str(installed / "bin/python"), "-W", "error", "-c", ONE_OP], installed, **path)


# ---- without native kernels ------------------------------------------------------------------


def test_a_build_without_a_compiler_says_so_once_at_import(without_compiler):
    err = import_from(without_compiler, "import peft_kernels.nn, peft_kernels.pool").stderr
    assert err.count(SAYS) == 1
    assert "RuntimeWarning" in err
    assert "it was not built, because no-such-compiler was not found" in err
    assert "PEFT_KERNELS_NATIVE=0" in err


@pytest.mark.parametrize(
    "setting", [{"PEFT_KERNELS_NATIVE": "0"}, {"PEFT_KERNELS_BACKEND": "reference"}]
)
def test_who_asks_for_pure_python_at_run_time_is_not_warned(without_compiler, setting):
    assert import_from(without_compiler, **setting).stderr == ""


def test_who_installed_pure_python_is_not_warned(pure):
    assert import_from(pure).stderr == ""


def test_doctor_gives_the_same_reason(without_compiler, pure):
    code = "from peft_kernels.cli import main; main(['doctor'])"
    out = import_from(without_compiler, code, COLUMNS="200").stdout
    assert "not loaded: it was not built, because no-such-compiler was not found" in out
    assert "needs CMake, ninja and a C++ compiler" in out
    assert "because PEFT_KERNELS_NATIVE=0 was set" in import_from(pure, code, COLUMNS="200").stdout


def test_doctor_says_what_was_built_without_nvcc(monkeypatch):
    if doctor.native_info() is None:
        pytest.skip("the native library isn't loaded")
    monkeypatch.setattr(_cuda_kernels, "are_built", lambda: False)
    assert dict(doctor.machine())["its CUDA kernels"] == "not built"
    monkeypatch.setattr(_cuda_kernels, "are_built", lambda: True)
    assert dict(doctor.machine())["its CUDA kernels"] != "not built"


def test_a_library_that_cant_be_loaded_is_one_clear_error(tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_text("no library")
    command = [sys.executable, "-c", "import peft_kernels"]
    env = os.environ | {"PEFT_KERNELS_NATIVE": str(broken), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("OSError: peft_kernels' native library can't be loaded")
    assert str(broken) in last and "PEFT_KERNELS_NATIVE=0" in last


# ---- environment variables -------------------------------------------------------------------


def import_with(code: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"import peft_kernels\n{code}"]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    env["PYTHONPATH"] = str(ROOT)
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "variable, value, must_be",
    [
        ("PEFT_KERNELS_NATIVE", "yes", "must be 0 for no native library, 1 for"),
        ("PEFT_KERNELS_NATIVE", os.sep, "must be 0 for no native library, 1 for"),
        ("PEFT_KERNELS_BACKEND", "cpu", "must be one of auto, reference, triton"),
    ],
)
def test_a_variable_with_nonsense_is_named_at_import(variable, value, must_be):
    last = import_with(**{variable: value}).stderr.splitlines()[-1]
    assert last.startswith(f"ValueError: {variable} {must_be}")
    assert f"got {value!r}" in last


def test_an_empty_variable_is_an_unset_one():
    of_ours = "NATIVE", "BACKEND", "ISA", "CACHE", "TUNE"
    names = [f"PEFT_KERNELS_{name}" for name in of_ours]
    code = "import torch; print(peft_kernels.backend_of('adapter', 'cpu', torch.float32))"
    done, plain = import_with(code, **dict.fromkeys(names, "")), import_with(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, plain.stdout, plain.stderr)


IN_BFLOAT16 = """
import torch
x, w, a, b = (torch.randn(s, dtype=torch.bfloat16) for s in ((5, 32), (48, 32), (4, 32), (48, 4)))
with peft_kernels.backend("triton"):
    y = peft_kernels.ops.lora_linear(x, w, a, b)
exact = x.double() @ w.double().T + x.double() @ a.double().T @ b.double().T
assert (y.double() - exact).norm() < 0.01 * exact.norm()
"""


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("on", ["1", "true", "ON"])
def test_the_interpreter_is_on_wherever_triton_says_so(on):
    done = import_with(IN_BFLOAT16, TRITON_INTERPRET=on)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("off", [{}, {"TRITON_INTERPRET": "0"}])
def test_triton_on_a_cpu_without_its_interpreter_says_what_to_do(off):
    last = import_with(IN_BFLOAT16, **off).stderr.splitlines()[-1]
    assert last.startswith("RuntimeError: backend 'triton' runs tensors on a CPU only under")
    assert "TRITON_INTERPRET=1" in last
