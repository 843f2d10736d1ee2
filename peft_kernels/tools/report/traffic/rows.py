"""Prints the traffic of all ops' plans as JSON: what ``peft-kernels report`` runs.

``python -m peft_kernels.tools.report.traffic.rows m n k r``, with ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from peft_kernels.tools.report.traffic import (
    adapter,
    adapter_fusion,
    lora_linear,
    lora_linear_codes,
    multi_lora_linear,
    prefix_attention,
    prompt_lookup,
)


def _main(m: int, n: int, k: int, r: int) -> None:
    rows = lora_linear.rows(m, n, k, r) + lora_linear_codes.rows(n, k, r)
    rows += multi_lora_linear.rows(m, n, k)
    rows += adapter.rows(m, k, r) + adapter_fusion.rows(m, k)
    rows += prefix_attention.rows() + prompt_lookup.rows()
    json.dump([asdict(row) for row in rows], sys.stdout)


if __name__ == "__main__":
    _main(*map(int, sys.argv[1:]))
