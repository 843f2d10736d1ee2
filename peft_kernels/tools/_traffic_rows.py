"""Prints the traffic of all ops' plans as JSON: what ``peft-kernels report`` runs.

``python -m peft_kernels.tools._traffic_rows m n k r``, with ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from peft_kernels.tools import (
    _traffic_adapter,
    _traffic_adapter_fusion,
    _traffic_lora,
    _traffic_multi_lora,
    _traffic_prefix,
)


def _main(m: int, n: int, k: int, r: int) -> None:
    rows = _traffic_lora.rows(m, n, k, r) + _traffic_multi_lora.rows(m, n, k)
    rows += _traffic_adapter.rows(m, k, r) + _traffic_adapter_fusion.rows(m, k)
    rows += _traffic_prefix.rows()
    json.dump([asdict(row) for row in rows], sys.stdout)


if __name__ == "__main__":
    _main(*map(int, sys.argv[1:]))
