"""A tune cache of a test's own."""

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

from peft_kernels.triton.lora_linear import plan_cache, plans


def own_cache(folder: Path) -> Iterator[Path]:
    """The file of an empty cache in ``folder``; a fixture yields from it."""
    with patch.dict("os.environ", PEFT_KERNELS_CACHE=str(folder)):
        plans.forget_cache()
        yield plan_cache.cache_file()
    plans.forget_cache()
