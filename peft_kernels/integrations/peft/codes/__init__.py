"""PEFT's LoRA over weights in codes: a file for each library that has them, and the layers.

A library's file says which layers of PEFT's stand over it (``LAYERS``), which ``layers`` gathers.
What is in codes below them :mod:`peft_kernels.codes` reads.
"""
