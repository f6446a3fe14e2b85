"""The processes of a run, as `torchrun` or `accelerate launch` have started them: one global batch, one
structure, one voice. Without a launcher `Alone` stands in, which does nothing and costs nothing.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from uvc.environment import launched, launched_as
from uvc.io.files import one_line
from uvc.solver.rows import is_spread
from uvc.training.checkpoint import Checkpoints
from uvc.training.exchange import lost
from uvc.training.loaders import Loader
from uvc.training.reduction import NoReduction, Reduction
from uvc.training.shares import HandedOut, check_share

PATIENCE = timedelta(minutes=30)  # rank 0 may measure for minutes while the others wait


class Alone:
    """The only process of a run."""

    rank, count = 0, 1
    device: torch.device | None = None  # where this process trains, if its launcher says so

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def check(self, train: DataLoader, mixes: bool, model: nn.Module) -> None:
        """ValueError, in one line, for what several processes cannot train as one does."""

    def share(self, loader: DataLoader, training: bool) -> DataLoader:
        """A loader of this process's rows of each batch."""
        return loader

    def copy(self, model: nn.Module) -> None:
        """Gives the model the weights and buffers that it has in rank 0."""

    def spread(self, model: nn.Module) -> nn.Module:
        """What is trained in the model's place where its weights are spread: in one process itself."""
        return model

    def gather(self, trained: nn.Module, model: nn.Module) -> None:
        """Gives a model the weights and the structure of what `spread` has made of it."""

    def checkpoints(self, path: Path | None, model: nn.Module) -> Checkpoints:
        """The file of an unfinished run."""
        return Checkpoints(path)

    def seed(self, seed: int) -> None:
        """Seeds torch: rank 0 as a process alone, each other one apart."""
        torch.manual_seed(seed if self.rank == 0 else hash((seed, self.rank)) % (1 << 63))

    def told(self, say: Callable[[], str]) -> str:
        """What `say` returns in rank 0; it is called there alone."""
        return say()

    def total(self, numbers: Sequence[int]) -> list[int]:
        """Sums over the processes."""
        return list(numbers)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes, of what has no gradient."""
        return value

    def each(self, value: Tensor) -> list[Tensor]:
        """The tensors of all processes, equally large, by rank."""
        return [value]

    def wait(self) -> None:
        """Returns when all processes have come here."""

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """One process after the other does this, rank 0 first."""
        yield

    def reduction(self, model: nn.Module) -> NoReduction:
        """What makes gradients those of the global batch."""
        return NoReduction()

    def compare(self, facts: Callable[[], Mapping[str, Any]], flags: tuple[bool, ...] = ()) -> None:
        """Begins to compare facts, which must be equal in all processes, and to join flags."""

    def settle(self, where: str) -> None:
        """Ends the last `compare`. RuntimeError that names `where` and the first fact that differs."""

    def joined(self, flags: tuple[bool, ...]) -> tuple[bool, ...]:
        """Flags that are set in any process: of several, those of the last `settle`."""
        return flags


class Several(Alone):
    """One of several processes; Accelerate has made the group and chosen the device.

    threads: those of the CPU; None leaves what torch has, or the share of this process if that is less.
    """

    def __init__(self, cpu: bool, threads: int | None = None) -> None:
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs

        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing and not dist.is_initialized():
            raise ValueError(
                f"{missing[0]}: it is not set, though {launched()} processes are to find one another "
                "there; start them by torchrun or accelerate launch"
            )
        present = torch.get_num_threads()
        try:
            with warnings.catch_warnings():
                # Without OMP_NUM_THREADS Accelerate sets a number of threads, whatever was chosen before.
                warnings.filterwarnings("ignore", message="OMP_NUM_THREADS")
                accelerator = Accelerator(
                    cpu=cpu, mixed_precision="no", kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)]
                )
        except (RuntimeError, ValueError, OSError) as error:
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise RuntimeError(
                f"the processes cannot meet at {place}: {one_line(error):.200}; look at MASTER_ADDR and "
                "MASTER_PORT, or name another --master_port"
            ) from None
        torch.set_num_threads(threads or min(present, torch.get_num_threads()))
        self.rank, self.count = accelerator.process_index, accelerator.num_processes
        self.device = accelerator.device
        self._names: list[str] = []
        self._sent: tuple[Tensor, Any] | None = None
        self._flags: tuple[bool, ...] = ()

    def check(self, train: DataLoader, mixes: bool, model: nn.Module) -> None:
        check_share(train, self.count, mixes)
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and any(
                p.requires_grad for p in module.parameters()
            ):
                raise ValueError(
                    f"{name}: a batch norm, whose statistics would differ between {self.count} processes; "
                    "freeze it, or train in one process"
                )

    def share(self, loader: DataLoader, training: bool) -> DataLoader:
        if isinstance(loader, Loader):
            loader.take_share(self.rank, self.count)
            return loader
        known = isinstance(loader, HandedOut)
        return loader if known else HandedOut(loader, self.rank, self.count, self.device, training)

    def copy(self, model: nn.Module) -> None:
        with lost():
            for tensor in (*model.parameters(), *model.buffers()):
                if not is_spread(tensor):
                    dist.broadcast(tensor.detach(), 0)

    def spread(self, model: nn.Module) -> nn.Module:
        from uvc.training.fsdp.spread import spread

        return spread(model)

    def gather(self, trained: nn.Module, model: nn.Module) -> None:
        if trained is not model:
            from uvc.training.fsdp.spread import gather

            gather(trained, model)

    def checkpoints(self, path: Path | None, model: nn.Module) -> Checkpoints:
        if not is_spread(next(model.parameters())):
            return Checkpoints(path)
        from uvc.training.fsdp.checkpoint import SpreadCheckpoints

        return SpreadCheckpoints(path)

    def told(self, say: Callable[[], str]) -> str:
        data = torch.tensor(list(say().encode()) if self.main else [], dtype=torch.uint8).to(self.device)
        size = torch.tensor([len(data)]).to(self.device)
        with lost():
            dist.broadcast(size, 0)
            data = data if self.main else data.new_empty(int(size))
            dist.broadcast(data, 0)
        return bytes(data.tolist()).decode()

    def total(self, numbers: Sequence[int]) -> list[int]:
        sums = torch.tensor(list(numbers), dtype=torch.int64).to(self.device)
        with lost():
            dist.all_reduce(sums)
        return sums.tolist()

    def mean(self, value: Tensor) -> Tensor:
        value = value.detach().clone()
        with lost():
            dist.all_reduce(value)
        return value / self.count

    def each(self, value: Tensor) -> list[Tensor]:
        found = [torch.empty_like(value, device=self.device) for _ in range(self.count)]
        with lost():
            dist.all_gather(found, value.to(self.device))
        return [tensor.to(value.device) for tensor in found]

    def wait(self) -> None:
        self.total([])

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        for _ in range(self.rank):
            self.wait()
        yield
        for _ in range(self.count - self.rank):
            self.wait()

    def reduction(self, model: nn.Module) -> Reduction:
        if not is_spread(next(model.parameters())):
            return Reduction(model, self.count)
        from uvc.training.fsdp.spread import SpreadReduction

        return SpreadReduction(model, self.count)

    def compare(self, facts: Callable[[], Mapping[str, Any]], flags: tuple[bool, ...] = ()) -> None:
        found = facts()
        self._names = list(found)
        hashes = [_hash(value) for value in found.values()]
        # The largest of h and of -h over the processes: they cancel where h is the same in all.
        vector = torch.tensor([*map(int, flags), *hashes, *(-h for h in hashes)], dtype=torch.int64)
        vector = vector.to(self.device)
        with lost():
            self._sent = vector, dist.all_reduce(vector, dist.ReduceOp.MAX, async_op=True)

    def settle(self, where: str) -> None:
        vector, work = self._sent
        with lost():
            work.wait()
        values, many = vector.tolist(), len(self._names)
        highest, lowest = values[-2 * many : -many], values[-many:]
        self._flags = tuple(map(bool, values[: -2 * many]))
        for name, high, low in zip(self._names, highest, lowest, strict=True):
            if high != -low:
                raise RuntimeError(
                    f"{where}: the {self.count} processes differ in {name}; all must have the same versions, "
                    "settings and data; what was saved before can be resumed"
                )

    def joined(self, flags: tuple[bool, ...]) -> tuple[bool, ...]:
        return self._flags or (False,) * len(flags)


ALONE = Alone()
_started: Several | None = None


def here(device: str, threads: int | None = None) -> Alone:
    """The processes of the run that this one belongs to; made when first asked for.

    device: "cpu" or "cuda...", where the run computes; threads: those that --threads asks for. ValueError or
    RuntimeError when they cannot meet.
    """
    global _started
    if launched() == 1:
        return ALONE
    if _started is None:
        _started = Several(device == "cpu", threads)
    return _started


def speaks() -> bool:
    """Whether this process is the one to say why a run ends: the first that asks; rank 0, as long as they
    have not met.
    """
    if launched() == 1:
        return True
    if not dist.is_initialized():
        return launched_as() == 0
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set_timeout(timedelta(seconds=5))
        first = store.add("uvc/said", 1) == 1
        # Rank 0 may keep the store: it stays until the others have asked, if they still can.
        end = time.monotonic() + 5
        while dist.get_rank() == 0 and store.add("uvc/said", 0) < launched() and time.monotonic() < end:
            time.sleep(0.05)
        return first
    except (RuntimeError, ValueError):
        return True  # who kept it is the one that was lost


def _hash(value: Any) -> int:
    """63 bits of a tensor's bytes, or of what `repr` says."""
    if isinstance(value, Tensor):
        # A tensor without dims has no bytes to view.
        value = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    else:
        value = repr(value).encode()
    return int.from_bytes(blake2b(value, digest_size=8).digest(), "big") >> 1
