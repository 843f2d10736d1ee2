"""The house: which room may import which, mirrored files, what an import must not do."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import peft_kernels
from peft_kernels import _library, _moved

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "peft_kernels"
OPS = sorted(p.stem for p in (PACKAGE / "ops").glob("*.py") if not p.stem.startswith("_"))

# Who may import whom. A room may also import what is in its own; rooms inside of a room follow the
# same rule, by the table of their own. None imports the package itself, which imports them all.
ROOMS = {
    "_cuda_kernels": "",
    "_library": "_cuda_kernels",
    "modules": "",
    "ops": "_library",
    "triton": "_cuda_kernels ops",
    "calls": "modules ops",
    "codes": "ops",
    "nn": "modules ops calls codes",
    "models": "modules calls codes nn",
    "integrations": "_library modules ops calls codes nn models",
    "formats": "modules ops codes nn models integrations",
    "pool": "modules ops calls codes nn models integrations formats",
    "tools": "_cuda_kernels _library ops triton nn integrations",
    "_moved": "",
    "cli": "_library tools",
}
INSIDE = {
    "triton": {
        "common": "",
        "lora_linear": "common",
        "dora_linear": "common lora_linear",
        "lora_linear_codes": "common lora_linear",
        "multi_lora_linear": "common",
        "adapter": "common lora_linear",
        "adapter_fusion": "common adapter",
        "prefix_attention": "common",
        "prompt_lookup": "common",
    },
    "integrations": {
        "served": "",
        "encoded_once": "",
        "transformers": "",
        "peft": "served encoded_once transformers",
        "adapter_hub": "served encoded_once peft transformers",
        "parallel": "",
        "vllm": "",
        "accelerated": "peft adapter_hub",
    },
    "integrations/transformers": {
        "supported": "",
        "blocks": "",
        "forwards": "",
        "row_ids": "",
        "continuous": "",
        "attention": "supported",
        "host": "forwards",
        "places": "attention host",
        "adapters": "blocks row_ids",
        "adapter_rows": "adapters row_ids",
        "runs": "attention forwards host places row_ids",
        "prefix": "attention host places runs supported",
        "soft_prompts": "attention host places prefix row_ids runs supported",
    },
    "integrations/vllm": {
        "pages": "",
        "plugin": "",
        "prompt_rows": "",
        "loading": "plugin",
        "wrapper": "pages prompt_rows",
        "layers": "pages prompt_rows wrapper loading",
        "punica": "layers pages plugin wrapper",
        "routes": "",
        "traced": "",
        "punica_gpu": "layers pages plugin routes traced wrapper",
    },
    "formats": {
        "folder": "",
        "gguf": "",
        "peft_lora": "folder",
        "peft_prompts": "folder",
        "adapter_hub": "folder",
    },
    "tools": {
        "printing": "",
        "outputs": "",
        "devices": "",
        "doctor": "printing",
        "verify": "devices printing",
        "bench": "devices outputs printing",
        "report": "outputs printing",
        "tune": "outputs printing",
    },
}


def imports_of(file: Path) -> set[tuple[str, ...]]:
    """The modules of the package that a file imports anywhere, by the parts of their names."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file} has a relative import"
            names = [f"{node.module}.{name.name}" for name in node.names]
        else:
            continue
        found |= {
            tuple(name.split(".")[1:]) for name in names if name.split(".")[0] == "peft_kernels"
        }
    return found


def rooms_in(folder: Path) -> set[str]:
    found = {p.stem for p in folder.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    return found - {"__init__"}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_the_table_allows(room):
    allowed = {room, *ROOMS[room].split()}
    files = (
        (PACKAGE / room).rglob("*.py") if (PACKAGE / room).is_dir() else [PACKAGE / f"{room}.py"]
    )
    for file in files:
        for name in imports_of(file):
            # The package's own names, such as its version, are for the tools that print them.
            is_room = bool(name) and name[0] in ROOMS
            assert name[0] in allowed if is_room else room in ("tools", "cli"), (file, name)


@pytest.mark.parametrize(
    ("folder", "room"), [(folder, room) for folder, table in INSIDE.items() for room in table]
)
def test_rooms_inside_of_a_room(folder, room):
    here, table = tuple(folder.split("/")), INSIDE[folder]
    path = PACKAGE / folder / room
    for file in path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]:
        for name in imports_of(file):
            if name[: len(here)] == here and len(name) > len(here) and name[len(here)] in table:
                assert name[len(here)] in {room, *table[room].split()}, (file, name)


def test_the_tables_name_every_room_and_point_one_way():
    assert set(ROOMS) == rooms_in(PACKAGE)
    for folder, table in [("", ROOMS), *INSIDE.items()]:
        assert set(table) == rooms_in(PACKAGE / folder)
        known: set[str] = set()
        for room, allowed in table.items():
            assert set(allowed.split()) <= known, room
            known.add(room)


@pytest.mark.parametrize("init", sorted(PACKAGE.rglob("__init__.py")), ids=str)
def test_every_room_says_what_it_is(init):
    assert ast.get_docstring(ast.parse(init.read_text()))


def test_the_matrix_room_includes_nothing_outside_of_itself():
    room = ROOT / "csrc/cpu/matrix"
    included = re.findall(r'#include "(.*)"', "".join(p.read_text() for p in room.iterdir()))
    assert included and all((room / name).exists() and "/" not in name for name in included)


def test_cpu_kernels_know_nothing_of_torch():
    for file in (ROOT / "csrc/cpu").rglob("*_kernels.cpp"):
        seen, open_files = set(), [file]
        while open_files:
            path = open_files.pop()
            text = path.read_text()
            # torch/headeronly is types alone, without the library.
            assert "torch/" not in text.replace("torch/headeronly/", ""), path
            seen.add(path)
            found = {(path.parent / name).resolve() for name in re.findall('#include "(.*)"', text)}
            open_files += found - seen


def stems(folder: str, prefix: str) -> set[str]:
    return {p.stem.removeprefix(prefix) for p in (ROOT / folder).glob(f"{prefix}*.py")}


def test_every_op_is_public():
    assert set(OPS) <= set(peft_kernels.ops.__all__)
    assert all(callable(getattr(peft_kernels.ops, op)) for op in OPS)
    assert sorted(_library.OPS) == OPS


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_test_a_benchmark_and_a_suite(op):
    assert op in stems("tests/ops", "test_")
    assert op in stems("benchmarks", "bench_")
    assert op in stems("peft_kernels/tools/bench/suites", "")


def test_no_benchmark_or_suite_is_without_its_op():
    assert stems("benchmarks", "bench_") == set(OPS)
    assert stems("peft_kernels/tools/bench/suites", "") - {"__init__"} == set(OPS)


@pytest.mark.parametrize("op", [op for op in OPS if f"{op}_fwd" not in _library._WITHOUT_TRITON])
def test_every_op_with_triton_kernels_has_their_room(op):
    assert {"launch", "kernels"} <= rooms_in(PACKAGE / "triton" / op)


def test_tests_have_the_rooms_of_the_package():
    rooms = {p.name for p in (ROOT / "tests").iterdir() if p.is_dir() and any(p.glob("*.py"))}
    packages = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    assert rooms == packages | {"cuda", "devices", "distributed", "peers", "support"}


def test_every_test_file_has_a_name_of_its_own():
    """pytest imports them by their bare names, so that a second one can't be collected."""
    names = [p.name for p in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(n for n in set(names) if names.count(n) > 1) == []


@pytest.mark.parametrize("old", _moved.MOVED)
def test_old_import_paths_are_the_new_modules(old):
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"^{old} is {_moved.MOVED[old]} now"):
        module = importlib.import_module(old)
    assert module is importlib.import_module(_moved.MOVED[old])
    assert module.__spec__.name == module.__name__ == _moved.MOVED[old]


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
