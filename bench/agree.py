"""Whether two runs of the benchmarks agree: the last two rows of every setting that was measured twice.

    python bench/agree.py bench/results/*/*.csv

Two runs that append to the same files, or the files of one run after those of another. Speed-ups are compared
by the wider of their two noise bands, which should hold in 99 of 100 pairs. Exit code 1 when fewer than 95 of
100 do.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from uvc.bench.regression import agreement
from uvc.bench.rows import read

ENOUGH = 0.95


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what disagrees, and how many agree; 2 when nothing was measured twice."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, help="CSV files, older before newer")
    try:
        found = agreement(row for path in parser.parse_args(arguments).files for row in read(path))
    except ValueError as error:
        parser.error(str(error))
    if not found:
        parser.error("files: no setting was measured twice; run the benchmarks again")
    for comparison in found:
        if not comparison.agrees:
            print(f"differs {comparison.name}: {comparison.change}")
    agree = sum(comparison.agrees for comparison in found)
    bands = sorted(comparison.band for comparison in found)
    print(
        f"{agree} of {len(found)} agree within the noise band ({agree / len(found):.1%}); "
        f"half of the bands are below ±{bands[len(bands) // 2]:.1%}"
    )
    return 0 if agree >= ENOUGH * len(found) else 1


if __name__ == "__main__":
    sys.exit(main())
