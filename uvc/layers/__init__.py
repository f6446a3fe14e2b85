"""The layers: timm's attention, MLPs and block, with parts that can be left out."""

# torch's flop counter knows our ops from here on.
import uvc_kernels.flops  # noqa: F401

from uvc.layers._surgery import meta_copy
from uvc.layers.attention import UVCAttention
from uvc.layers.block import UVCBlock
from uvc.layers.compact_block import CompactBlock
from uvc.layers.convert import check, check_children, convert, is_compacted, set_recompute
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
    "check_children",
    "convert",
    "is_compacted",
    "meta_copy",
    "set_recompute",
    "slimming",
]
