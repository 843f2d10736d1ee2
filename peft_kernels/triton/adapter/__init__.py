"""``adapter`` in Triton; the maths is in ``peft_kernels/ops/adapter.py``."""
