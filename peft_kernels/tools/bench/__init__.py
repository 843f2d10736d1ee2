"""``peft-kernels bench``: an op beside its rivals. A suite an op; what measures and prints them."""
