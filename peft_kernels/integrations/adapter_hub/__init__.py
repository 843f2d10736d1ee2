"""Models of the `adapters` library on this package's kernels: see :func:`accelerate`.

Its folders are in :mod:`peft_kernels.formats`.
"""
