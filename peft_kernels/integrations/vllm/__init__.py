"""vLLM: its LoRA requests on the kernels of many adapters.

``plugin`` is what vLLM calls in each of its processes. ``punica`` is the class that vLLM's layers
call on a CPU, and ``punica_gpu`` on a GPU, with ``routes``, the buffers of a step, and ``traced``,
the ops that a compiled graph has. Both have ``pages``, the storage of adapters, and ``layers``, how
vLLM's layers come to it; ``loading`` refuses adapters that vLLM would serve as others. ``plugin``
imports ``vllm`` once vLLM calls it.
"""
