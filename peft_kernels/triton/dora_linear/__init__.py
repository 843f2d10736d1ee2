"""``dora_linear`` in Triton; the maths is in ``peft_kernels/ops/dora_linear.py``."""
