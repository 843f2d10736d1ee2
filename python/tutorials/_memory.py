"""Peak memory of one variant's training, in a process of its own.

Run as a script it trains one variant for a few steps and prints the bytes of its peak above what
the loaded model took. A process of its own because memory that one variant has freed stays with the
process, and would be free of charge for the next.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from peft_kernels.tools.bench.peak import peak, reset_peak

STEPS = 4


def peak_bytes(variant: str, seed: int) -> int | None:
    """Runs this script for ``variant``; None where the system can't tell the peak."""
    command = [sys.executable, __file__, variant, "--seed", str(seed)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1]
    return None if out == "None" else int(out)


def measure(variant: str, seed: int) -> int | None:
    import _docstrings
    from _classifier import Batches, Trainee

    train, _ = _docstrings.load(seed)
    trainee = Trainee(variant, STEPS, seed)
    batches = list(Batches().of_training(train, STEPS, seed))
    before = reset_peak()
    for tokens, labels in batches:
        trainee.step(tokens, labels)
    return None if before is None else peak() - before


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variant")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(measure(arguments.variant, arguments.seed))
