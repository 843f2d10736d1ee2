"""The docstrings as the site shows them: an extension of Griffe, which reads them.

``:func:`add_prefix` `` becomes a link where a page under docs/reference shows that name, and code
where none does. The tensors of a module, which its class lists as ``Parameters``, are attributes.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from griffe import Extension, Object

PAGES = Path(__file__).parents[2] / "docs" / "reference"
ROLE = re.compile(r":(?:func|class|meth|mod|attr|data|exc):`~?\.?([^`]+)`")
SHOWN = re.compile(r"^::: (\S+)(?:\n +options:\n +members:\n((?: +- \S+\n)+))?", re.MULTILINE)


@functools.cache
def shown() -> dict[str, str]:
    """What the reference pages show: the full names of the site, by those that a reader knows.

    Where a page shows members of a module, such as ``ops.adapter.adapter``, the package that is
    around the module has them too.
    """
    names: dict[str, str] = {}
    for page in PAGES.glob("*.md"):
        for name, members in SHOWN.findall(page.read_text()):
            package = name.rpartition(".")[0]
            found = re.findall(r"- (\S+)", members)
            names |= {f"{package}.{member}": f"{name}.{member}" for member in found}
            names |= {} if found else {name: name}
    return names


def as_link(name: str) -> str:
    """A link to what ``name`` says, where it is known which that is."""
    found = [full for known, full in shown().items() if f".{known}".endswith(f".{name}")]
    owner, _, member = name.rpartition(".")
    if not found and owner in shown():
        found = [f"{shown()[owner]}.{member}"]
    return f"[`{name}`][{found[0]}]" if len(found) == 1 else f"`{name}`"


class Docstrings(Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: Object, loader: Any, **kwargs: Any) -> None:
        if obj.docstring is None:
            return
        text = ROLE.sub(lambda role: as_link(role[1]), obj.docstring.value)
        if obj.is_class:
            text = re.sub(r"^Parameters:$", "Attributes:", text, flags=re.MULTILINE)
        obj.docstring.value = text
