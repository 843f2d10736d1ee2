"""Builds the native library with CMake and ninja, or says why not and installs pure Python."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
NOTE = "peft_kernels/_no_native.txt"  # read by peft_kernels/_library.py
NATIVE = os.environ.get("PEFT_KERNELS_NATIVE", "1")  # 0 for none, or the path of one built before


def missing() -> str | None:
    """Why the native library can't be built here, or None."""
    if NATIVE == "0":
        return "PEFT_KERNELS_NATIVE=0 was set"
    if NATIVE != "1":
        return None
    compiler = os.environ.get("CXX", "g++" if shutil.which("g++") else "c++")
    for tool in (compiler.split()[0], "cmake", "ninja"):
        if shutil.which(tool) is None:
            return f"{tool} was not found"
    try:
        import torch  # noqa: F401 - only its presence matters here
    except ImportError:
        return "torch is not importable in the build environment"
    return None


class BuildWithNote(build_py):
    """Leaves word in the package of why it has no native library: pip shows no build's output."""

    def run(self) -> None:
        super().run()
        note = (ROOT if self.editable_mode else Path(self.build_lib)) / NOTE
        note.unlink(missing_ok=True)
        if reason:
            note.write_text(f"{reason}\n")


class CMakeBuild(build_ext):
    """Runs CMake for the one extension there is: peft_kernels/_native.so."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place: a running process keeps the library it has mapped.
        scratch = output.with_name(output.name + ".new")
        shutil.copyfile(self.built() if NATIVE == "1" else NATIVE, scratch)
        scratch.replace(output)

    def built(self) -> Path:
        build = ROOT / "build" / "native"
        build.mkdir(parents=True, exist_ok=True)
        configure = ["-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))  # e.g. -DPEFT_KERNELS_CUDA=OFF
        subprocess.run(["cmake", str(ROOT), *configure], cwd=build, check=True)
        subprocess.run(["cmake", "--build", "."], cwd=build, check=True)
        return build / "_native.so"


class AnyPython(bdist_wheel):
    """Tags the wheel for every Python 3: torch loads the native library, Python doesn't."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


reason = missing()
if reason:
    print(f"peft_kernels: installing without native kernels, because {reason}.", file=sys.stderr)
setup(
    ext_modules=[] if reason else [Extension("peft_kernels._native", sources=[])],
    cmdclass={"bdist_wheel": AnyPython, "build_ext": CMakeBuild, "build_py": BuildWithNote},
)
