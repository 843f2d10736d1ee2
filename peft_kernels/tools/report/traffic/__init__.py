"""The memory traffic of the Triton kernels, counted under the interpreter: a module an op."""
