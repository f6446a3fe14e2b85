"""The layers: timm's attention, MLPs and block, with parts that can be left out."""

from uvc.layers._surgery import hollow
from uvc.layers.attention import UVCAttention
from uvc.layers.block import UVCBlock
from uvc.layers.compact_block import CompactBlock
from uvc.layers.convert import check, convert, is_compacted, set_recompute
from uvc.layers.mlp import UVCGluMlp, UVCMlp, UVCSwiGLU
from uvc.layers.token_pruning import Slimming, slimming

__all__ = [
    "CompactBlock",
    "Slimming",
    "UVCAttention",
    "UVCBlock",
    "UVCGluMlp",
    "UVCMlp",
    "UVCSwiGLU",
    "check",
    "convert",
    "hollow",
    "is_compacted",
    "set_recompute",
    "slimming",
]
