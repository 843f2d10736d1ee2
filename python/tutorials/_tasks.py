"""Eight questions about the code that a docstring stands in: eight tasks, on the same texts.

The texts are the first paragraphs of the docstrings of the standard library's functions and
classes; the answers come from the syntax tree. One split by module serves all eight tasks, so a
text to test on comes from a module that none of them was trained on. Yes/no questions have as many
examples of either answer: guessing is right half of the time.
"""

from __future__ import annotations

import ast
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import _docstrings
from _docstrings import LABELS, Example

# Kinds of functions by the first word of their names: "get" of get_name, getName, __getitem__.
VERBS = {
    "get": ("get", "getitem", "getattr"),
    "ask": ("is", "has", "can"),
    "set": ("set", "setitem", "setattr"),
    "read": ("read", "load"),
    "find": ("find", "search", "match"),
    "add": ("add", "append", "insert", "register", "put"),
    "make": ("create", "make", "new", "build"),
    "write": ("write", "dump", "print", "send"),
    "begin": ("open", "start", "connect", "begin"),
    "end": ("close", "stop", "end", "quit", "clear", "remove", "del", "delete"),
}
MOOD = re.compile(
    r"(Add|Call|Check|Clear|Close|Compare|Convert|Create|Construct|Find|Format|Get|Handle|"
    r"Initialize|Make|Parse|Read|Register|Remove|Return|Set|Take|Write)(s?)\b"
)
NO_YES = ("no", "yes")
TEST_SHARE = 0.3
MAX_TRAIN, MAX_TEST = 1200, 300
# Tests, and what isn't the standard library though it lies in its folder.
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"}

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Code:
    """A function or class, the node that it stands in, and the start of its docstring, masked."""

    node: Definition
    parent: ast.AST
    module: str
    text: str


@dataclass(frozen=True)
class Task:
    """One question, its answers, and examples whose labels are indices of answers."""

    name: str
    question: str
    answers: tuple[str, ...]
    train: list[Example]
    test: list[Example]


def load(seed: int = 0) -> list[Task]:
    """The eight tasks; ``seed`` draws the examples, the modules to test on stay the same."""
    codes = list(read_library())
    held_out = _held_out_modules(codes)
    return [_task(name, codes, held_out, seed) for name in QUESTIONS]


# ---- the questions: each gives the index of the answer, or None where it can't be asked --------


def package(code: Code) -> int | None:
    top = code.module.partition(".")[0]
    return LABELS.index(top) if top in LABELS else None


def verb(code: Code) -> int | None:
    if isinstance(code.node, ast.ClassDef):
        return None
    first = re.split(r"_|(?<=[a-z])(?=[A-Z])", code.node.name.strip("_"))[0].lower()
    return next((i for i, words in enumerate(VERBS.values()) if first in words), None)


def is_class(code: Code) -> int:
    return int(isinstance(code.node, ast.ClassDef))


def is_method(code: Code) -> int | None:
    if isinstance(code.node, ast.ClassDef):
        return None
    return int(isinstance(code.parent, ast.ClassDef))


def is_special(code: Code) -> int | None:
    if isinstance(code.node, ast.ClassDef):
        return None
    return int(code.node.name.startswith("__") and code.node.name.endswith("__"))


def returns(code: Code) -> int | None:
    if isinstance(code.node, ast.ClassDef):
        return None
    return int(any(isinstance(n, ast.Return) and n.value for n in _statements(code.node)))


def has_arguments(code: Code) -> int | None:
    if isinstance(code.node, ast.ClassDef):
        return None
    own = code.node.args
    named = len(own.posonlyargs) + len(own.args) + len(own.kwonlyargs)
    self_too = isinstance(code.parent, ast.ClassDef)
    return int(named > self_too or own.vararg is not None or own.kwarg is not None)


def mood(code: Code) -> int | None:
    verb = MOOD.match(code.text)
    return None if verb is None else int(verb[2] == "s")


QUESTIONS: dict[str, tuple[str, tuple[str, ...], Callable[[Code], int | None]]] = {
    "package": ("which package is it from?", LABELS, package),
    "verb": ("what does the function's name say it does?", tuple(VERBS), verb),
    "class": ("is it a class?", NO_YES, is_class),
    "method": ("is the function a method?", NO_YES, is_method),
    "special": ("is its name a __special__ one?", NO_YES, is_special),
    "returns": ("does it return a value?", NO_YES, returns),
    "arguments": ("does it take arguments?", NO_YES, has_arguments),
    "mood": ('"Returns ..." rather than "Return ..."?', NO_YES, mood),
}


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Every statement in a function, but not those of functions and classes within."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):
            yield child
            if not isinstance(child, Definition):
                yield from _statements(child)


# ---- the data --------------------------------------------------------------------------------


def read_library() -> Iterator[Code]:
    """Every function and class whose docstring begins with at least MIN_WORDS words."""
    for path in sorted(_docstrings.ROOT.rglob("*.py")):
        module = path.relative_to(_docstrings.ROOT).with_suffix("")
        if LEFT_OUT & set(module.parts):
            continue
        for node, parent in _definitions(ast.parse(path.read_bytes())):
            text = (ast.get_docstring(node) or "").partition("\n\n")[0]
            if len(text.split()) >= _docstrings.MIN_WORDS:
                yield Code(node, parent, ".".join(module.parts), _docstrings.masked(text))


def _definitions(parent: ast.AST) -> Iterator[tuple[Definition, ast.AST]]:
    """Every function and class below a node, with the node that it stands in."""
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, Definition):
            yield node, parent
        if not isinstance(node, ast.expr):
            yield from _definitions(node)


def _held_out_modules(codes: list[Code]) -> set[str]:
    """A share of each package's modules; modules outside of packages count as one package."""
    packages = defaultdict(list)
    for code in codes:
        top, dot, _ = code.module.partition(".")
        packages[top if dot else ""].append(code.module)
    return set().union(
        *(_docstrings.held_out_modules(modules, TEST_SHARE) for modules in packages.values())
    )


def _task(name: str, codes: list[Code], held_out: set[str], seed: int) -> Task:
    question, answers, ask = QUESTIONS[name]
    examples = [Example(c.text, a, c.module) for c in codes if (a := ask(c)) is not None]
    train, test = _docstrings.without_shared_texts(
        [e for e in examples if e.module not in held_out],
        [e for e in examples if e.module in held_out],
    )
    balanced = answers == NO_YES
    return Task(
        name,
        question,
        answers,
        _drawn(train, MAX_TRAIN, seed, balanced),
        _drawn(test, MAX_TEST, seed, balanced),
    )


def _drawn(examples: list[Example], count: int, seed: int, balanced: bool) -> list[Example]:
    """At most ``count`` of them in random order; if ``balanced``, as many of either answer."""
    draw = random.Random(seed)
    drawn = draw.sample(examples, len(examples))
    if balanced:
        no, yes = ([e for e in drawn if e.label == answer] for answer in (0, 1))
        half = min(len(no), len(yes), count // 2)
        drawn = draw.sample(no[:half] + yes[:half], 2 * half)
    return drawn[:count]
