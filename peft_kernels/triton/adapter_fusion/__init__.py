"""``adapter_fusion`` in Triton; the maths is in ``peft_kernels/ops/adapter_fusion.py``."""
