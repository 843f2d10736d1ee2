"""What ``make check`` tests: the layout, and the ops that a change touches, in their three forms.

``python python/tools/check.py [OP ...]``. Without a name, the ops are those that the uncommitted
files name, or the last commit's where there are none; a file that all ops share counts for all.
Each is compared with float64 on its reference, on its CPU kernels and on interpreted Triton ones.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
OPS = sorted((p.stem for p in (ROOT / "peft_kernels/ops").glob("[!_]*.py")), key=len, reverse=True)
SHARED = ("peft_kernels/ops/", "peft_kernels/triton/", "peft_kernels/_library", "csrc/")


def git(*arguments: str) -> list[str]:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def changed_files() -> list[str]:
    pending = git("diff", "--name-only", "HEAD") + git("ls-files", "-o", "--exclude-standard")
    return pending or git("diff", "--name-only", "HEAD~1", "HEAD")


def ops_of(files: list[str]) -> list[str]:
    """The ops that files belong to, by the longest name in each path."""
    found = set()
    for file in files:
        own = next((op for op in OPS if op in file), None)
        if own is not None:
            found.add(own)
        elif file.startswith(SHARED):
            return OPS
    return sorted(found)


def main(names: list[str]) -> int:
    unknown = sorted(set(names) - set(OPS))
    if unknown:
        print(f"OP must be among {', '.join(sorted(OPS))}; got {', '.join(unknown)}")
        return 2
    ops = names or ops_of(changed_files())
    print(f"checking the layout and {', '.join(ops) or 'no op'}")
    chosen = ["test_layout.py"]
    for op in ops:
        chosen += [f"test_an_op[{op}-", f"(test_{op}.py and (any_shape or against_float64))"]
    tests = ["tests/test_layout.py", "tests/devices", *(f"tests/ops/test_{op}.py" for op in ops)]
    command = [sys.executable, "-m", "pytest", "-n", "auto", *tests, "-k", " or ".join(chosen)]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
