"""Which layer takes the place of which of timm's: a new kind is a file of its own, and a line here."""

from importlib import import_module

from timm.layers import Attention, AttentionRope, DiffAttention, GluMlp, Mlp, SwiGLU
from timm.models import beit, vision_transformer_sam
from timm.models.cait import Cait, LayerScaleBlock, TalkingHeadAttn
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.hiera import Hiera, HieraBlock, MaskUnitAttention
from timm.models.hieradet_sam2 import HieraDet, MultiScaleAttention, MultiScaleBlock
from timm.models.naflexvit import NaFlexVit
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.swin_transformer import WindowAttention as SwinAttention
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from timm.models.swin_transformer_v2 import WindowAttention as SwinV2Attention
from timm.models.swin_transformer_v2_cr import (
    SwinTransformerV2Cr,
    SwinTransformerV2CrBlock,
    WindowMultiHeadAttention,
)
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from timm.models.vision_transformer_relpos import (
    RelPosAttention,
    RelPosBlock,
    ResPostRelPosBlock,
    VisionTransformerRelPos,
)
from timm.models.vitamin import GeGluMlp
from torch import nn

from uvc.layers.attention import UVCAttention
from uvc.layers.biased import UVCBeitAttention, UVCRelPosAttention
from uvc.layers.differential import UVCDiffAttention
from uvc.layers.geglu import UVCGeGluMlp
from uvc.layers.grouped import UVCGroupedRope
from uvc.layers.hieradet_attention import UVCPooledAttention
from uvc.layers.mask_units import UVCMaskUnitAttention
from uvc.layers.mlp import UVCGluMlp, UVCMlp, UVCSwiGLU
from uvc.layers.prunable import Prunable
from uvc.layers.rotary import UVCAttentionRope, UVCEvaAttention
from uvc.layers.sam import UVCSamAttention
from uvc.layers.talking import UVCTalkingHeads
from uvc.layers.windows import UVCCosineAttention, UVCWindowAttention
from uvc.layers.windows_cr import UVCCrAttention


def timm_classes(file: str, *names: str) -> tuple[type[nn.Module], ...]:
    """Classes in one of timm's files of models; none where this timm lacks the file."""
    try:
        module = import_module(f"timm.models.{file}")
    except ImportError:
        return ()
    return tuple(getattr(module, name) for name in names)


MODELS = (
    VisionTransformer,
    Eva,
    beit.Beit,
    VisionTransformerRelPos,
    Cait,
    NaFlexVit,
    SwinTransformer,
    SwinTransformerV2,
    Hiera,
    HieraDet,
    vision_transformer_sam.VisionTransformerSAM,
    SwinTransformerV2Cr,
    *timm_classes("qwen3_vit", "Qwen3VitEncoder"),
    *timm_classes("deepseek_vit", "DeepseekVitEncoder"),
    *timm_classes("gemma4_vit", "Gemma4VitEncoder"),
)
# Blocks of two halves, each a residual branch, by where its norm stands.
NORM_FIRST = (
    Block,
    EvaBlock,
    beit.Block,
    RelPosBlock,
    LayerScaleBlock,
    SwinTransformerBlock,
    HieraBlock,
    MultiScaleBlock,
    vision_transformer_sam.Block,
    *timm_classes("deepseek_vit", "DeepseekVitBlock"),
)
NORM_LAST = (
    ResPostBlock,
    EvaBlockPostNorm,
    ResPostRelPosBlock,
    SwinTransformerV2Block,
    SwinTransformerV2CrBlock,
)
ATTENTIONS: dict[type[nn.Module], type[Prunable]] = {
    Attention: UVCAttention,
    AttentionRope: UVCAttentionRope,
    DiffAttention: UVCDiffAttention,
    EvaAttention: UVCEvaAttention,
    beit.Attention: UVCBeitAttention,
    RelPosAttention: UVCRelPosAttention,
    TalkingHeadAttn: UVCTalkingHeads,
    SwinAttention: UVCWindowAttention,
    SwinV2Attention: UVCCosineAttention,
    MaskUnitAttention: UVCMaskUnitAttention,
    MultiScaleAttention: UVCPooledAttention,
    WindowMultiHeadAttention: UVCCrAttention,
    vision_transformer_sam.Attention: UVCSamAttention,
}
MLPS: dict[type[nn.Module], type[Prunable]] = {
    Mlp: UVCMlp,
    GluMlp: UVCGluMlp,
    SwiGLU: UVCSwiGLU,
    GeGluMlp: UVCGeGluMlp,
}


def kind_of_layer(layer: nn.Module) -> type[Prunable]:
    """The class that takes the place of a layer's; its own if it can leave parts out."""
    if isinstance(layer, Prunable):
        return type(layer)
    shares = getattr(layer, "num_kv_groups", 1) > 1
    return UVCGroupedRope if shares else (ATTENTIONS | MLPS)[type(layer)]


def prunable(layer: nn.Module) -> Prunable:
    """A layer that can leave parts out, on the children of `layer`, which stays as it is; or `layer`."""
    return layer if isinstance(layer, Prunable) else kind_of_layer(layer).take_over(layer)
