"""What the machine code of the attention kernels says of their speed, without a GPU.

    python -m uvc_kernels.compile_check.static [--write]

Compiles csrc/cuda's attention for sm_90a, reads the innermost loops that multiply, runs the same launches of
one head on the host build for what a launch asks for and for the banks that matrix loads meet, and models the
time on one H200 (the device of the limits below). The model: every resource of a multiprocessor, and memory,
is busy for so long; the kernel takes between the longest of these (all overlap) and their sum (none does).
Exit code 1 where a kernel spills or is worse than in the stored table; --write stores the new one. It is a
model: nothing of it was measured.
"""

import argparse
import csv
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from . import cuda

TARGET = "sm_90a"
STORED = Path(__file__).resolve().parents[2] / "bench" / "results" / f"gate-{TARGET}.csv"
# What a launch of one head of so many tokens and dims runs, forward and backward; of bfloat16.
CASES = [(tokens, dims) for dims in (32, 64, 128) for tokens in (197, 577)]

# One H200: multiprocessors, Hz, bytes/s as a copy reaches them. An H100 has the same but 3.0e12 bytes/s.
PROCESSORS, CLOCK, BANDWIDTH = 132, 1.755e9, 4.3e12
SCHEDULERS, REGISTERS, SHARED, THREADS = 4, 65536, 228 * 1024, 2048
# Cycles of a multiprocessor: mma.sync of 16 x 8 x 16 at 62% of what wgmma reaches (4 cycles a scheduler), an
# instruction issued, one of the special functions (16 lanes a cycle), and 128 bytes of shared memory.
MMA, ISSUE, SPECIAL = 4 / 0.62 / SCHEDULERS, 1 / SCHEDULERS, 32 / 16

# Limits: attention core by bandwidth, FLOP/s; training step, images/s; and the heads of all layers.
LIMITS = {"forward": 424e12, "backward": 529e12}
MODELS = {"DeiT-T": (56.4e3, 36), "DeiT-S": (22.0e3, 72), "DeiT-B": (6.49e3, 144)}
TOLERANCE = 1.01


class Loop(NamedTuple):
    """Instructions of one innermost loop: on tensor cores, loads of matrices, other loads and stores of
    shared memory, special functions, and all.
    """

    multiplies: int
    matrices: int
    loads: int
    stores: int
    special: int
    all: int


class Launch(NamedTuple):
    """What the host build did for one head: matrix loads and their turns of shared memory, its launch, and
    the matrix loads of the scheduler that has most, of four equal ones a quarter.
    """

    matrices: float
    turns: float
    blocks: float
    threads: int
    shared: int
    busiest: float


class Fact(NamedTuple):
    """A row of the table, of one head: ns if all overlaps and if nothing does; cycles of shared memory."""

    kernel: str
    tokens: int
    dims: int
    registers: int
    spilled: int
    shared: int
    threads: int
    blocks_per_processor: int
    multiplies_per_load: float
    turns_per_matrix: float
    instructions: int
    shared_cycles: int
    ns_best: float
    ns_worst: float
    nvcc: str


def loops(code: str) -> list[Loop]:
    """The loops that multiply; of those compiled twice, with constant steps and without, the shorter."""
    alike: dict[tuple, list[Loop]] = {}
    for body in cuda.loops_that_multiply(code):
        names = [re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0] for text in body]
        counts = (names.count(name) for name in ("HMMA", "LDSM", "LDS", "STS", "MUFU"))
        loop = Loop(*counts, len(names))
        alike.setdefault(loop[:5], []).append(loop)
    return [loop for found in alike.values() for loop in sorted(found)[: math.ceil(len(found) / 2)]]


def blocks_per_processor(registers: int, threads: int, shared: int) -> int:
    """How many blocks share a multiprocessor."""
    warps = threads // 32
    # Registers belong to a scheduler, and are given to warps by 256.
    by_registers = REGISTERS // SCHEDULERS // (math.ceil(registers * 32 / 256) * 256) * SCHEDULERS // warps
    return min(by_registers, SHARED // (shared + 1024), THREADS // threads)


def executed(found: Sequence[Loop], launch: Launch) -> Loop:
    """How many of each instruction a head takes."""
    times = launch.matrices / sum(loop.matrices for loop in found)
    return Loop(*(times * sum(column) for column in zip(*found, strict=True)))


def shared_cycles(total: Loop, launch: Launch) -> float:
    """Cycles of shared memory: matrices, other loads of 16 bytes, stores, and what fills it."""
    return launch.turns + 4 * total.loads + total.stores + launch.blocks * launch.shared / 128


def model(found: Sequence[Loop], launch: Launch, bytes_moved: int) -> tuple[float, float]:
    """ns of one head on the whole GPU, if all overlaps and if nothing does."""
    total = executed(found, launch)
    # The scheduler with most work ends last.
    uneven = SCHEDULERS * launch.busiest / launch.matrices
    cycles = (
        uneven * MMA * total.multiplies,
        uneven * ISSUE * total.all,
        uneven * SPECIAL * total.special,
        shared_cycles(total, launch),
    )
    memory = bytes_moved / BANDWIDTH
    best, worst = (value / CLOCK / PROCESSORS for value in (max(cycles), sum(cycles)))
    return 1e9 * max(best, memory), 1e9 * max(worst, memory)


def launches(tokens: int, dims: int) -> dict[str, Launch]:
    """What the host build does for one head of many, forward and backward."""
    import torch
    from uvc_kernels import _C, kept_heads
    from uvc_kernels.indices import counts_of

    whole = torch.ones(1, dims, dtype=torch.bool)
    kept = kept_heads(whole, whole)
    counts, ops = counts_of(kept), torch.ops.uvc_kernels

    def recorded(images: int) -> Launch:
        matrices, turns, blocks, threads, shared, _, busiest = _C.host_record()
        return Launch(matrices / images, turns / images, blocks / images, threads, shared, busiest / images)

    # One image for each scheduler, as work may go around among them.
    qkv = torch.randn(SCHEDULERS * tokens, len(kept.rows)).bfloat16()
    heads, (top, inverse) = qkv.new_empty(len(qkv), len(kept.columns)), torch.empty(2, 1, len(qkv))
    _C.host_record()
    # As with many heads: on few multiprocessors one block does a head.
    with mock.patch.dict(os.environ, UVC_HOST_PROCESSORS="1"):
        ops.cuda_attention_core(qkv, kept.table, counts, tokens, 0.125, heads, top, inverse)
    forward, qkv, heads = recorded(SCHEDULERS), qkv[:tokens].clone(), heads[:tokens].clone()
    top, inverse = (t[:, :tokens].clone() for t in (top, inverse))
    ops.cuda_attention_core_backward(
        qkv, heads, heads, top, inverse, kept.table, counts, tokens, 0.125, torch.empty_like(qkv)
    )
    return {"forward": forward, "backward": recorded(1)}


def facts() -> list[Fact]:
    """The table of this source tree. RuntimeError where there is no nvcc, or what disassembles is missing."""
    if (reason := cuda.missing()) is not None:
        raise RuntimeError(f"the static gate is left out: {reason}")
    compiled = {}
    for unit in ("attention.cu", "attention_backward.cu"):
        report, codes = cuda.machine_code(unit, TARGET)
        for name, said in cuda.reported(report):
            compiled[cuda.readable(name)] = (said, codes.get(name, ""))
    out, version = [], compiler()
    for tokens, dims in CASES:
        for way, launch in launches(tokens, dims).items():
            kernel = "forward" if way == "forward" else "whole" if launch.blocks == 1 else "stream"
            said, code = compiled[kernel, f"bf16 width {dims}"]
            found = loops(code)
            if not found:
                raise RuntimeError(f"the static gate: no loop of {kernel} multiplies; is nvdisasm missing?")
            registers = int(re.search(r"Used (\d+) registers", said)[1])
            spilled = int(re.search(r"(\d+) bytes spill stores", said)[1])
            blocks = blocks_per_processor(registers, launch.threads, launch.shared)
            moved = (4 if way == "forward" else 8) * tokens * dims * 2
            best, worst = model(found, launch, moved)
            total = Loop(*map(sum, zip(*found, strict=True)))
            out.append(
                Fact(
                    f"{way} {kernel}" if way == "backward" else way,
                    tokens,
                    dims,
                    registers,
                    spilled,
                    launch.shared,
                    launch.threads,
                    blocks,
                    round(total.multiplies / total.matrices, 3),
                    round(launch.turns / launch.matrices / 4, 3),
                    total.all,
                    round(shared_cycles(executed(found, launch), launch)),
                    round(best, 2),
                    round(worst, 2),
                    version,
                )
            )
    return out


def read(file: Path = STORED) -> list[Fact]:
    """The stored table; empty where there is none."""
    if not file.exists():
        return []
    with file.open() as rows:
        kinds = Fact.__annotations__
        return [Fact(**{k: kinds[k](v) for k, v in row.items()}) for row in csv.DictReader(rows)]


def worse(found: Sequence[Fact], stored: Sequence[Fact]) -> list[str]:
    """A line for every figure that is worse than the stored one, and for what spills."""
    before = {fact[:3]: fact for fact in stored}
    lines = []
    for new in found:
        old = before.get(new[:3])
        if old is None:
            lines.append(f"{' '.join(map(str, new[:3]))}: not in the stored table; --write stores it")
            continue
        if new.spilled:
            lines.append(f"{' '.join(map(str, new[:3]))}: spills {new.spilled} bytes")
        for name in Fact._fields[3:-1]:
            was, now = getattr(old, name), getattr(new, name)
            less_is_worse = name in ("blocks_per_processor", "multiplies_per_load")
            bad = now * TOLERANCE < was if less_is_worse else now > was * TOLERANCE
            if name not in ("threads", "spilled") and bad:
                lines.append(f"{' '.join(map(str, new[:3]))}: {name} was {was} and is {now}")
    return lines


def report(found: Sequence[Fact]) -> list[str]:
    """The table, and what it makes of the DeiT models."""
    line = "{:16} {:>6} {:>4} {:>9} {:>7} {:>7} {:>7} {:>6} {:>9} {:>5} {:>12} {:>13} {:>19}".format
    titles = ("kernel", "tokens", "dims", "registers", "spilled", "shared", "threads", "blocks", "mma:load")
    out = [line(*titles, "turns", "instructions", "shared cycles", "model, TFLOP/s")]
    for fact in found:
        flops = (4 if fact.kernel == "forward" else 10) * fact.tokens**2 * fact.dims
        low, high = (flops / ns / 1e3 for ns in (fact.ns_worst, fact.ns_best))
        out.append(line(*fact[:12], f"{low:.0f} to {high:.0f}"))
    core = {fact.kernel.split()[0]: fact for fact in found if fact[1:3] == (197, 64)}
    flops = {"forward": 4 * 197**2 * 64, "backward": 10 * 197**2 * 64}
    least = sum(1e9 * flops[way] / LIMITS[way] for way in core)
    out.append("training step, images/s on one H200: the limit, and with these kernels instead of it")
    for name, (limit, heads) in MODELS.items():
        rates = [
            1e9 / (1e9 / limit + heads * (sum(getattr(fact, key) for fact in core.values()) - least))
            for key in ("ns_worst", "ns_best")
        ]
        out.append(f"{name}: {limit:,.0f}; {rates[0]:,.0f} to {rates[1]:,.0f}")
    return out


def compiler() -> str:
    """The version of nvcc, on which every figure depends."""
    said = subprocess.run([cuda._nvcc(), "--version"], capture_output=True, text=True).stdout
    return re.search(r"V([\d.]+)", said)[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; 1 when something is worse than stored, 2 when it cannot be made here."""
    parser = argparse.ArgumentParser(prog="python -m uvc_kernels.compile_check.static")
    parser.add_argument("--write", action="store_true", help=f"store the table in {STORED.name}")
    chosen = parser.parse_args(arguments)
    try:
        found = facts()
    except (ImportError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"nvcc {found[0].nvcc}", *report(found), sep="\n")
    if chosen.write:
        with STORED.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(Fact._fields)
            writer.writerows(found)
        return 0
    stored = read()
    lines = worse(found, stored)
    if lines and stored and stored[0].nvcc != found[0].nvcc:
        lines.append(f"the stored table is of nvcc {stored[0].nvcc}, on which all figures depend")
    print(*lines, sep="\n")
    print("the static gate: worse than stored" if lines else "the static gate: nothing is worse than stored")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
