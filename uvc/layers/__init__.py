"""The layers: timm's attention, MLPs and block, with parts that can be left out."""

# torch's flop counter knows our ops from here on.
import uvc_kernels.flops  # noqa: F401

from uvc.layers._surgery import meta_copy
from uvc.layers.attention import UVCAttention
from uvc.layers.block import Reads, UVCBlock
from uvc.layers.block_kinds import compact_kind, kind_of_block
from uvc.layers.compact_attention import FORMS, heads_in_groups
from uvc.layers.compact_block import CompactBlock
from uvc.layers.convert import check, check_children, convert, families, is_compacted, set_recompute
from uvc.layers.families import Families, families_of, layers_of, units_of
from uvc.layers.geglu import UVCGeGluMlp
from uvc.layers.inputs import (
    cfg_of,
    facts_of,
    image_of,
    patches_of,
    prefix_of,
    set_image,
    set_tokens,
    stem_of,
    takes_any_size,
    trunk_of,
)
from uvc.layers.kinds import timm_classes
from uvc.layers.mlp import UVCGluMlp, UVCMlp, UVCSwiGLU
from uvc.layers.other_blocks import seen
from uvc.layers.prunable import NAMES, Prunable, UnitCost
from uvc.layers.sizes import Size, Sizes, sizes_of
from uvc.layers.stages import blocks_of, entries_of, listed, lists_of, named_blocks, replaced
from uvc.layers.things import Thing, joined
from uvc.layers.token_pruning import Slimming, slimming

__all__ = [
    "FORMS",
    "NAMES",
    "CompactBlock",
    "Families",
    "Prunable",
    "Reads",
    "Size",
    "Sizes",
    "Slimming",
    "Thing",
    "UVCAttention",
    "UVCBlock",
    "UVCGeGluMlp",
    "UVCGluMlp",
    "UVCMlp",
    "UVCSwiGLU",
    "UnitCost",
    "blocks_of",
    "cfg_of",
    "check",
    "check_children",
    "compact_kind",
    "convert",
    "entries_of",
    "facts_of",
    "families",
    "families_of",
    "heads_in_groups",
    "image_of",
    "is_compacted",
    "joined",
    "kind_of_block",
    "layers_of",
    "listed",
    "lists_of",
    "meta_copy",
    "named_blocks",
    "patches_of",
    "prefix_of",
    "replaced",
    "seen",
    "set_image",
    "set_recompute",
    "set_tokens",
    "sizes_of",
    "slimming",
    "stem_of",
    "takes_any_size",
    "timm_classes",
    "trunk_of",
    "units_of",
]
