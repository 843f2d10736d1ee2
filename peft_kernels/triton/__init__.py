"""Triton kernels: one module of launchers per op, its kernels and its plans beside it.

Imported at an op's first call on a GPU (or under ``TRITON_INTERPRET=1``), never with the package.
"""
