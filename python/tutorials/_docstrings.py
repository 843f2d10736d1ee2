"""A real text-classification set that every Python carries: the standard library's docstrings.

The task is to tell which package a docstring comes from. The sources are parsed, never imported.
The split is by module: no file gives docstrings to both sides, and a text that two modules share is
in neither. Every label's name is masked in every text, since "Base class of all email errors" would
give its answer away and leave nothing to learn.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

LABELS = (
    "asyncio",
    "email",
    "http",
    "importlib",
    "logging",
    "multiprocessing",
    "unittest",
    "urllib",
    "wsgiref",
    "xml",
)
ROOT = Path(sysconfig.get_path("stdlib"))
MASK = "[MASK]"
MIN_WORDS = 5
_NAMES = re.compile(rf"\b(?:{'|'.join(LABELS)})\b", re.IGNORECASE)


@dataclass(frozen=True)
class Example:
    """One docstring: its masked text, its label's index in LABELS and the module it stands in."""

    text: str
    label: int
    module: str


def load(seed: int = 0, test_share: float = 0.3) -> tuple[list[Example], list[Example]]:
    """The train and the test examples, shuffled by ``seed``; the split stays the same."""
    train: list[Example] = []
    test: list[Example] = []
    for label in range(len(LABELS)):
        examples = read_package(label)
        held_out = held_out_modules([e.module for e in examples], test_share)
        test += [e for e in examples if e.module in held_out]
        train += [e for e in examples if e.module not in held_out]
    train, test = without_shared_texts(train, test)
    random.Random(seed).shuffle(train)
    random.Random(seed).shuffle(test)
    return train, test


def read_package(label: int) -> list[Example]:
    """Every docstring of at least MIN_WORDS words in the package LABELS[label], tests left out."""
    examples = []
    for path in sorted((ROOT / LABELS[label]).rglob("*.py")):
        module = path.relative_to(ROOT).with_suffix("")
        if not {"test", "tests"} & set(module.parts):
            texts = map(masked, _docstrings(path))
            examples += [Example(t, label, ".".join(module.parts)) for t in texts]
    return examples


def masked(text: str) -> str:
    """``text`` on one line, with each word that is a label's name replaced by the mask token."""
    return _NAMES.sub(MASK, " ".join(text.split()))


def _docstrings(path: Path) -> list[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = ast.walk(ast.parse(path.read_bytes()))
    texts = (ast.get_docstring(node) for node in nodes if isinstance(node, documented))
    return [text for text in texts if text and len(text.split()) >= MIN_WORDS]


def held_out_modules(modules: list[str], share: float) -> set[str]:
    """Modules, smallest first, until they hold ``share`` of the package's docstrings.

    ``modules`` has each docstring's module. Never all of them are held out. Smallest first keeps
    the big, typical modules for training and puts many different modules into the test.
    """
    sizes = Counter(modules)
    held_out: set[str] = set()
    taken = 0
    for module in sorted(sizes, key=lambda name: (sizes[name], name))[:-1]:
        if taken >= share * len(modules):
            break
        held_out.add(module)
        taken += sizes[module]
    return held_out


def without_shared_texts(
    train: list[Example], test: list[Example]
) -> tuple[list[Example], list[Example]]:
    """Keeps one of each text, and none of a text that has two labels or is on both sides."""
    places = defaultdict(set)
    for name, split in (("train", train), ("test", test)):
        for e in split:
            places[e.text].add((name, e.label))

    def kept(split: list[Example]) -> list[Example]:
        unique = {e.text: e for e in split}
        return [e for e in unique.values() if len(places[e.text]) == 1]

    return kept(train), kept(test)
