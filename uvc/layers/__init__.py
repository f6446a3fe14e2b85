"""The layers: timm's attention, MLPs and block, with parts that can be left out."""

# torch's flop counter knows our ops from here on.
import uvc_kernels.flops  # noqa: F401

from uvc.layers._surgery import like, meta_copy
from uvc.layers.attention import UVCAttention
from uvc.layers.block import UVCBlock
from uvc.layers.compact_block import CompactBlock
from uvc.layers.compact_layers import FORMS
from uvc.layers.convert import check, check_children, convert, families, is_compacted, set_recompute
from uvc.layers.families import Families, families_of, layers_of, units_of
from uvc.layers.geglu import UVCGeGluMlp
from uvc.layers.inputs import cfg_of, image_of, patches_of, set_image, set_tokens, stem_of, takes_any_size
from uvc.layers.kinds import prefix_of
from uvc.layers.mlp import UVCGluMlp, UVCMlp, UVCSwiGLU
from uvc.layers.prunable import NAMES, Prunable, UnitCost
from uvc.layers.token_pruning import Slimming, slimming

__all__ = [
    "FORMS",
    "NAMES",
    "CompactBlock",
    "Families",
    "Prunable",
    "Slimming",
    "UVCAttention",
    "UVCBlock",
    "UVCGeGluMlp",
    "UVCGluMlp",
    "UVCMlp",
    "UVCSwiGLU",
    "UnitCost",
    "cfg_of",
    "check",
    "check_children",
    "convert",
    "families",
    "families_of",
    "image_of",
    "is_compacted",
    "layers_of",
    "like",
    "meta_copy",
    "patches_of",
    "prefix_of",
    "set_image",
    "set_recompute",
    "set_tokens",
    "slimming",
    "stem_of",
    "takes_any_size",
    "units_of",
]
