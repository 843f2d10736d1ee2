"""``prompt_lookup`` in Triton; the maths is in ``peft_kernels/ops/prompt_lookup.py``."""
