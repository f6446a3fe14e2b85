"""Which block takes the place of which of timm's, on the fly and compact."""

from timm.models import vision_transformer_sam
from timm.models.hiera import HieraBlock
from timm.models.hieradet_sam2 import MultiScaleBlock
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.swin_transformer_v2_cr import SwinTransformerV2CrBlock
from timm.models.vision_transformer import ParallelThingsBlock
from torch import nn

# Gives the layout of its blocks.
import uvc.layers.gemma  # noqa: F401
from uvc.layers.block import UVCBlock
from uvc.layers.compact_block import CompactBlock
from uvc.layers.hiera_block import CompactHieraBlock
from uvc.layers.hieradet_block import CompactHieraDetBlock
from uvc.layers.kinds import NORM_FIRST, NORM_LAST
from uvc.layers.other_blocks import CompactOtherBlock, layout_of
from uvc.layers.parallel import LAYOUTS
from uvc.layers.sam_block import CompactSamBlock
from uvc.layers.stages import KNOWN
from uvc.layers.things import CompactThing, CompactThingsBlock, Thing, UVCThingsBlock
from uvc.layers.window_blocks import CompactSwinBlock, CompactSwinCrBlock, CompactSwinV2Block

# The compact forms of blocks that read their tokens in ways of their own; of all others it is CompactBlock.
COMPACT: dict[type[nn.Module], type[CompactBlock | CompactThingsBlock]] = {
    SwinTransformerBlock: CompactSwinBlock,
    SwinTransformerV2Block: CompactSwinV2Block,
    SwinTransformerV2CrBlock: CompactSwinCrBlock,
    HieraBlock: CompactHieraBlock,
    MultiScaleBlock: CompactHieraDetBlock,
    vision_transformer_sam.Block: CompactSamBlock,
    Thing: CompactThing,
    ParallelThingsBlock: CompactThingsBlock,
}
BLOCKS = (*NORM_FIRST, *NORM_LAST, ParallelThingsBlock)
# What took the place of a block.
OURS = (UVCBlock, UVCThingsBlock)


KNOWN.update(LAYOUTS, (("timm", kind.__name__) for kind in BLOCKS))


def compact_kind(block: nn.Module) -> type[CompactBlock | CompactThingsBlock]:
    """The compact form of one of timm's blocks, or of what takes its place."""
    if (layout := layout_of(block)) is not None:
        return layout.small or CompactOtherBlock
    return next((small for kind, small in COMPACT.items() if isinstance(block, kind)), CompactBlock)


def kind_of_block(block: nn.Module) -> type[UVCBlock | UVCThingsBlock]:
    """The class that takes the place of a block's; its own if it did."""
    return type(block) if isinstance(block, OURS) else compact_kind(block).FULL
