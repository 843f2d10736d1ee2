"""How a tool that measures is called: its table is printed, and its record written if asked."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


def main(doc: str | None, measure: Callable[[], Rows], table: Callable[[Rows], str]) -> None:
    """Measures, prints the table, and writes the rows where ``--json`` says."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--json", type=Path, help="where the record goes")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows = measure()
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
