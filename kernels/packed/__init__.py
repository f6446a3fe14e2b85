"""The ops of every provider that packs kept weights for the vendor's GEMM: triton, cuda, cuda-host.

Attention and MLP are written here once, as pack, GEMM, piece, GEMM, with their gradients and fakes; a
provider supplies the pieces between the GEMMs. See `pieces.py` for what it must supply.
"""

import torch

from .. import _dispatch
from . import attention, attention_with_positions, gather, mlp, solver
from .pieces import Pieces, Provider

__all__ = ["Pieces", "provide", "provided"]

# By provider, for what measures them by themselves.
provided: dict[str, Pieces] = {}


def provide(name: str, device: str, dtypes: tuple[torch.dtype, ...], pieces: Pieces) -> None:
    """Makes `name` a backend for tensors of this device type and these dtypes."""
    provided[name] = pieces
    provider = Provider(name.replace("-", "_"), device, pieces)
    for module in (attention, attention_with_positions, gather, mlp, solver):
        for op, run in module.define(provider).items():
            _dispatch.provide(op, name, run, device, dtypes, packs=True)
