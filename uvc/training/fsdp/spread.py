"""A model whose weights, gradients and moments are spread over the processes (`fully_shard`), by rows, but
weights that lose rows by columns, so that every process keeps as much of them.

The weights of each half are gathered for its forward and its backward pass, and its gradients become means
over the processes as they are spread again; of both only what is kept is sent (`kept_parts.py`). A half that
does not run takes no part.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from uvc.layers import UVCBlock, entries_of, listed
from uvc.solver.rows import whole
from uvc.structure import apply_structure, structure_of
from uvc.training.exchange import lost
from uvc.training.fsdp.kept_parts import Gathers, KeptParts, Reduces
from uvc.training.reduction import Reduction


def spread(model: nn.Module) -> nn.Module:
    """A twin of a converted model, spread over the processes; the model itself goes to the CPU meanwhile."""
    device = next(model.parameters()).device
    twin = copy.deepcopy(model)
    if device.type != "cpu":
        model.to("cpu")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in listed(twin).values():
        # A half that is skipped is not gathered. Other kinds of blocks may read what is a half's elsewhere.
        for half in (block.attn, block.mlp) if type(block) is UVCBlock else ():
            place = _places(half, mesh.size())
            fully_shard(half, mesh=mesh, reshard_after_forward=True, shard_placement_fn=place)
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    # Without a backward pass to follow, torch would leave what stands outside of the blocks gathered.
    return fully_shard(twin, mesh=mesh, reshard_after_forward=True)


def gathered(block: nn.Module) -> list[nn.Module]:
    """What of a block is gathered as it is called: its halves, or the whole."""
    halves = [half for each in entries_of(block) for half in (each.attn, each.mlp)]
    return halves if isinstance(halves[0], FSDPModule) else [block]


def _places(half: nn.Module, count: int) -> Callable[[nn.Parameter], Shard | None]:
    """Along which dim each parameter of a half is spread over so many processes; None: by rows."""
    pruned: dict[nn.Parameter, set[int]] = {}
    for part in half.parts():
        pruned.setdefault(part.parameter, set()).add(part.dim)
    columns = {p for p, dims in pruned.items() if dims == {0} and p.dim() == 2 and p.shape[1] % count == 0}
    return lambda parameter: Shard(1) if parameter in columns else None


@torch.no_grad()
def gather(twin: nn.Module, model: nn.Module) -> None:
    """Gives a model the weights, one at a time, and the structure of its twin, and puts it where that is."""
    mine = model.state_dict()
    with lost():
        for name, tensor in twin.state_dict().items():
            mine[name].copy_(whole(tensor))
    model.to(next(twin.parameters()).device)
    apply_structure(model, structure_of(twin))


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor that each process has, spread as a parameter is, if that is spread."""
    if not isinstance(parameter, DTensor) or isinstance(tensor, DTensor) or tensor.shape != parameter.shape:
        return tensor
    tensor = tensor.to(parameter.device)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


class SpreadReduction(Reduction):
    """The gradients of a model that `fully_shard` reduces: what is left are the tensors beside them."""

    early = True

    def __init__(self, model: nn.Module, count: int) -> None:
        super().__init__(model, count)
        halves = [half for block in self.blocks for half in (block.attn, block.mlp)]
        self._parts = {half: KeptParts(half, count) for half in halves if isinstance(half, FSDPModule)}
        for half, parts in self._parts.items():
            half.set_custom_all_gather(Gathers(parts))
            half.set_custom_reduce_scatter(Reduces(parts))

    def _watch(self) -> None:
        pass

    def _lay_out(self, half: nn.Module, masks: dict[str, Tensor]) -> None:
        super()._lay_out(half, masks)
        if (parts := self._parts.get(half)) is not None:
            parts.take([self._kept.get(parameter) for parameter in half.parameters()])

    def begin(self) -> None:
        pass

    def finish(self, also: Sequence[Tensor]) -> None:
        flat = torch.cat([part.detach().flatten() for part in also])
        with lost():
            dist.all_reduce(flat)
        flat.div_(self.count)
        for tensor, mean in zip(also, flat.split([part.numel() for part in also]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    @contextmanager
    def guard(self) -> Iterator[None]:
        self.facts()  # what is gathered follows the structure
        with warnings.catch_warnings():
            # Of a block that is skipped whole; nothing changes what it returns in place.
            warnings.filterwarnings("ignore", message=".*returned a view tensor")
            try:
                yield
            except RuntimeError as error:
                if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
                    with lost():
                        raise
                raise
