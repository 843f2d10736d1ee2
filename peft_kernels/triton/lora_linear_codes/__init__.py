"""``lora_linear`` over weights in codes, in Triton; the maths is in ``ops/_quantized.py``."""
