"""``lora_linear`` in Triton; the maths is in ``peft_kernels/ops/lora_linear.py``."""
