"""The pages of docs/: what they say is held by tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


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
