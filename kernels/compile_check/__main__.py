"""Compiles every Triton kernel in every configuration a launcher can choose, and csrc/cuda, without a GPU.

    python -m uvc_kernels.compile_check [--target sm_90 ...] [--match TEXT ...]

Prints one row per kernel and target: registers, bytes spilled, shared memory, tensor-core instruction. Exit
code 1 when a kernel does not compile, spills, wants more shared memory than the target has, or multiplies
16-bit tiles without the tensor cores of the target or after loading them one by one.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence

from . import cuda, triton


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; 0 when every row passes, 1 when one does not, 2 when Triton cannot compile here."""
    parser = argparse.ArgumentParser(prog="python -m uvc_kernels.compile_check")
    choices = list(dict.fromkeys((*triton.TARGETS, *cuda.TARGETS)))
    parser.add_argument("--target", action="append", choices=choices, help="default: all")
    parser.add_argument("--match", action="append", default=[], help="only what contains it; may be repeated")
    chosen = parser.parse_args(arguments)
    line = "{:24} {:30} {:8} {:>9} {:>7} {:>7} {:9} {}".format
    print(line("kernel", "configuration", "target", "registers", "spilled", "shared", "tensor", "fault"))
    count = faulty = 0
    try:
        targets = chosen.target or choices
        found = triton.rows([name for name in targets if name in triton.TARGETS], chosen.match)
        if (reason := cuda.missing()) is None:
            units = cuda.rows([name for name in targets if name in cuda.TARGETS], chosen.match)
            found = itertools.chain(found, units)
        else:
            print(f"csrc/cuda is left out: {reason}", file=sys.stderr)
        for row in found:
            print(line(*("?" if value is None else value for value in row)), flush=True)
            count, faulty = count + 1, faulty + bool(row.fault)
    except (ImportError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{count} compiled, {faulty} with a fault")
    return 1 if faulty or not count else 0


if __name__ == "__main__":
    sys.exit(main())
