"""Weights in codes of other libraries' layers: read where they lie, never converted or copied.

A file for each library, which is known by ``sys.modules`` and never imported here, says what it
reads (``readers``: the class of a layer, or of an nn.Linear's weight, and what makes a
:class:`peft_kernels.ops.QuantizedWeight` of such a layer or says why not). ``layers`` gathers
them, for :mod:`peft_kernels.nn` and the integrations.
"""
