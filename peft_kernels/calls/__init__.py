"""What a running call carries down to the layers: routes, rows' ids, what is turned off.

It lies in context variables, never on a model or in a thread. The layers of :mod:`peft_kernels.nn`
read it; who decides what is carried (a pool, a prefix, ``disabled``) isn't known here.
"""
