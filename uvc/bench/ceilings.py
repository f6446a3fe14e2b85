"""What this machine does at best: large matrix products and copies, measured when they are needed."""

from typing import NamedTuple

import torch

from uvc.bench.timing import Round

GIGA = 1e9


class Ceilings(NamedTuple):
    """`gflop_per_s`: the best square product in one dtype. `copies`: (bytes moved, GB/s), by size."""

    gflop_per_s: float
    copies: tuple[tuple[int, float], ...]

    @property
    def gbyte_per_s(self) -> float:
        """Of the largest copy: main memory."""
        return self.copies[-1][1]

    def seconds(self, flops: float, moved: float) -> float:
        """The least time of one pass: arithmetic or traffic, whichever takes longer.

        Traffic runs at the best rate of any copy of at least this size: what fits a cache may come out of it.
        """
        rates = [rate for size, rate in self.copies if size >= moved] or [self.gbyte_per_s]
        return max(flops / (GIGA * self.gflop_per_s), moved / (GIGA * max(rates)))

    def raised(self, other: "Ceilings") -> "Ceilings":
        """The higher of both, size by size of copies."""
        copies = dict(self.copies)
        for size, rate in other.copies:
            copies[size] = max(rate, copies.get(size, 0.0))
        return Ceilings(max(self.gflop_per_s, other.gflop_per_s), tuple(sorted(copies.items())))


def measure(device: torch.device, dtype: torch.dtype, rounds: int = 5, brief: bool = False) -> Ceilings:
    """The ceilings of `device` for products in `dtype` with torch's current number of threads.

    `brief`: with small sizes only, in a fraction of a second, to look again whether the machine was slow.
    """
    on_gpu = device.type == "cuda"
    sizes = (2048, 4096, 8192) if on_gpu else (512, 1024, 2048)
    bytes_each = [2**p for p in ((20, 22, 24, 26, 28, 31) if on_gpu else (17, 19, 21, 23, 25, 28))]
    if brief:
        sizes, bytes_each, rounds = sizes[:2], bytes_each[:4], 2
    products = {size: _product(size, device, dtype) for size in sizes}
    gemm = _best({str(size): call for size, call in products.items()}, device, rounds)
    copies = _best({str(size): _copy(size, device) for size in bytes_each}, device, rounds)
    return Ceilings(
        max(2 * size**3 / (1e6 * gemm[str(size)]) for size in sizes),
        tuple((2 * size, 2 * size / (1e6 * copies[str(size)])) for size in bytes_each),
    )


def _product(size: int, device: torch.device, dtype: torch.dtype):
    # Random numbers: products of zeros run faster on some GPUs.
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda _: torch.mm(a, b, out=out)


def _copy(size: int, device: torch.device):
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return lambda _: target.copy_(source)


def _best(calls: dict, device: torch.device, rounds: int) -> dict[str, float]:
    """The shortest milliseconds of each: a ceiling is what was reached once."""
    times = Round(calls, device, replay=True)
    for _ in range(rounds):
        times.run()
    return {name: min(timing.samples) for name, timing in times.timings().items()}
