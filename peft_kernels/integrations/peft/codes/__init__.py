"""PEFT's LoRA over weights in codes: a file for each library that has them, and the layers.

A library's file says what it reads (``readers``: the class of a layer below, and what makes a
:class:`peft_kernels.ops.QuantizedWeight` of such a layer or says why not) and which layers of
PEFT's stand over it (``LAYERS``). ``bases`` gathers the former, ``layers`` the latter.
"""
