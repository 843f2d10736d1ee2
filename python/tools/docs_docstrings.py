"""The docstrings' roles as links of the site: an extension of Griffe, which reads them.

``:func:`add_prefix` `` becomes a link where a page under docs/reference shows that name, and code
where none does.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from griffe import Extension, Object

PAGES = Path(__file__).parents[2] / "docs" / "reference"
ROLE = re.compile(r":(?:func|class|meth|mod|attr|data|exc):`~?\.?([^`]+)`")


@functools.cache
def shown() -> frozenset[str]:
    """The full names that the reference pages show."""
    texts = (page.read_text() for page in PAGES.glob("*.md"))
    return frozenset(name for text in texts for name in re.findall(r"^::: (\S+)", text, re.M))


def as_link(name: str) -> str:
    """A link to what ``name`` says, where it is known which that is."""
    found = [full for full in shown() if full == name or full.endswith("." + name)]
    owner = name.rpartition(".")[0]
    if owner in shown() and not found:
        found = [name]
    return f"[`{name}`][{found[0]}]" if len(found) == 1 else f"`{name}`"


class Roles(Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: Object, loader: Any, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(lambda role: as_link(role[1]), obj.docstring.value)
