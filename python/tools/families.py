"""Writes docs/families.md: which method is right in which class of transformers' models.

    python python/tools/families.py          # writes the page
    python python/tools/families.py --print  # only prints it

Each cell is checked as _families.py says; tests/integrations/test_families.py holds the page to it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import _families

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
HEAD = """# Which method works in which model

Tiny models of transformers' classes, built with random weights, and what each method does in them:
"right" is equal to what the model itself computes, in eager attention and float64: a prefix with
the text that its keys and values are of (in an encoder-decoder at each of its three sites; of
images with its keys and values beside the image's), a prompt with its embeddings in the rows, LoRA
with its product added to the weights, adapters with their formula. A number names the error, below,
that is raised instead. Written by `python python/tools/families.py`, with transformers 4.57.
"""
NOTES = """
A prefix of encoders leaves the text's positions alone unless `shift_positions=True` is given, as
PEFT's prefix of BERT's family moves them. What MPNet and T5 add to scores by relative position is
of the text, and a prefix' scores have nothing added (T5 counts it with `shift_positions=True`).
ALBERT's layers share a module, and so a prefix, unless they are groups of their own, as here. A
model whose scores depend on the distance to each key (DeBERTa) defines none for a prefix' keys,
and is refused.
"""


def rows(kind: str) -> Iterable[tuple[str, list[str]]]:
    """The class's name and what each method does in it."""
    for family in _families.families(kind):
        yield family.name, [_families.check(family, method) for method in _families.METHODS]


def page(tables: dict[str, list[tuple[str, list[str]]]]) -> str:
    """The page of the tables by kind."""
    texts: list[str] = []
    lines = [HEAD]
    for kind, table in tables.items():
        lines += [f"## {kind.capitalize()}\n", f"| class | {' | '.join(_families.METHODS)} |"]
        lines.append("|---" * (1 + len(_families.METHODS)) + "|")
        for name, found in table:
            cells = [_cell(text.replace(name, "the model"), texts) for text in found]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    lines.append("## The errors\n")
    lines += [f"{index}. {text}" for index, text in enumerate(texts, 1)]
    return "\n".join(lines) + "\n" + NOTES


def _cell(text: str, texts: list[str]) -> str:
    if text == "right":
        return text
    text = " ".join(text.split())
    if text not in texts:
        texts.append(text)
    return str(texts.index(text) + 1)


def main() -> None:
    made = page({kind: list(rows(kind)) for kind in _families.KINDS})
    if "--print" in sys.argv:
        print(made)
        return
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(made)


if __name__ == "__main__":
    main()
