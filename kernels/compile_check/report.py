"""The table that compiling for GPUs that are not here ends in."""

from typing import NamedTuple


class Row(NamedTuple):
    """What came out of one kernel for one target; None is what could not be read."""

    kernel: str
    configuration: str
    target: str
    registers: int | None
    spilled: int | None
    shared: int
    instruction: str
    fault: str
