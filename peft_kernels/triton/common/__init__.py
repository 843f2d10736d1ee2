"""What the ops' Triton kernels and launchers share; it knows none of the ops."""
