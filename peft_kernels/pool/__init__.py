"""Many adapters on one model: what is held, in which pages, in which version, and who reads it.

Which rows a route serves, and its way down to the layers, is in :mod:`peft_kernels.calls`; the
layer itself in :mod:`peft_kernels.nn`; folders in :mod:`peft_kernels.formats`.
"""

from peft_kernels.pool.adapter_pool import AdapterPool
from peft_kernels.pool.continuous import ContinuousBatching
from peft_kernels.pool.pages import PoolFullError
from peft_kernels.pool.store import PoolMemory

__all__ = ["AdapterPool", "ContinuousBatching", "PoolFullError", "PoolMemory"]
