"""What the readers of every library share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft_kernels.ops import QuantizedWeight

# The weight in codes of a layer, or why kernels can't take it.
Reader = Callable[[Any], "QuantizedWeight | str"]

NOT_YET = "a weight that isn't in codes yet"
