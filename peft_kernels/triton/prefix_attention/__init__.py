"""``prefix_attention`` in Triton; the maths is in ``peft_kernels/ops/prefix_attention.py``."""
