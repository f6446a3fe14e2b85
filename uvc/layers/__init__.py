"""The layers: timm's attention, MLPs and block, with parts that can be left out."""

from uvc.layers._common import hollow
from uvc.layers.attention import UVCAttention
from uvc.layers.block import UVCBlock
from uvc.layers.compact import CompactBlock
from uvc.layers.convert import check, convert, is_compacted, set_recompute
from uvc.layers.mlp import UVCGluMlp, UVCMlp, UVCSwiGLU
from uvc.layers.tokens import Slimming, slimming

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
