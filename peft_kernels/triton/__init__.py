"""Triton kernels, a package an op: ``launch.py``, its kernels and its plans.

Imported at an op's first call on a GPU (or under ``TRITON_INTERPRET=1``), never with the package.
What several ops share is in ``common``; nothing here is imported by another room but ``tools``.
"""
