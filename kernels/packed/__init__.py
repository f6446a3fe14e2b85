"""The ops of every provider that packs kept weights for the vendor's GEMM: triton, cuda, cuda-host.

Attention and MLP are written here once, as pack, GEMM, piece, GEMM, with their gradients and fakes; a
provider supplies the pieces between the GEMMs. See `pieces.py` for what it must supply.
"""

from .pieces import Pieces, provide

__all__ = ["Pieces", "provide"]
