"""One row of the table that `compile_check` prints."""

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
