"""``multi_lora_linear`` in Triton; the maths is in ``peft_kernels/ops/multi_lora_linear.py``."""
