"""Writes benchmarks/results/gpu-traffic.json: what `peft-kernels report` counts, without compiling.

    python python/tools/traffic.py

It takes about a minute, and needs Triton and no GPU.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from _results import RESULTS

from peft_kernels.tools.report.run import TRAFFIC_SIZES, traffic_table

RECORD = RESULTS / "gpu-traffic.json"


def counted() -> list[dict[str, Any]]:
    """The traffic of every op's plans, as JSON holds it."""
    rows = [dataclasses.asdict(row) for row in traffic_table(*TRAFFIC_SIZES)]
    return json.loads(json.dumps(rows))


if __name__ == "__main__":
    RECORD.write_text(json.dumps(counted(), indent=2) + "\n")
