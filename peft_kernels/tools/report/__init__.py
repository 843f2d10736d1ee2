"""``peft-kernels report``: what compiler and memory see of the GPU kernels, without a GPU."""
