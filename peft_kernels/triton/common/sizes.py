"""Arithmetic of sizes on the host. Triton's own functions of these names look at each argument for
what kernels may give them, and were a third of a launcher's time.
"""


def cdiv(size: int, block: int) -> int:
    """How many blocks hold ``size``."""
    return -(-size // block)


def next_power_of_2(size: int) -> int:
    """The least power of two that isn't smaller; 1 for 0."""
    return 1 << max(size - 1, 0).bit_length()
