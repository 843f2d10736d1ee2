"""vLLM: its LoRA requests on the kernels of many adapters.

``plugin`` is what vLLM calls in each of its processes; ``punica`` is the class that vLLM's layers
call, and ``pages`` the storage of their adapters. ``vllm`` is imported in ``punica`` alone, and in
``plugin`` once vLLM calls it.
"""
