"""A small model of every class that is served, and what its truth is.

`EXAMPLES` is what tests of all of them go through: `test_every_class.py` fails where a class that the layers
list is in none.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import oracle
import other_models
import pytest
import torch
from oracle import MODELS, images, needs_whole_naflex, small_vit
from timm.layers import Attention, SwiGLU
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.eva import Eva
from timm.models.hiera import Hiera
from timm.models.hieradet_sam2 import HieraDet
from timm.models.naflexvit import NaFlexVit
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    VisionTransformer,
)
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos
from timm.models.vision_transformer_sam import VisionTransformerSAM
from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn

from uvc.layers import set_image, timm_classes
from uvc.structure import Structure

SIZES = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=5, mlp_ratio=1.25)
# Windows at the edge are padded, and the second stage is one window, which is not shifted.
STAGES = dict(
    img_size=(20, 16),
    patch_size=2,
    window_size=4,
    embed_dim=16,
    depths=(2, 2),
    num_heads=(2, 4),
    num_classes=5,
    mlp_ratio=1.25,
)
# The second stage pools in mask units, the third over all tokens, and each grows.
UNITS = dict(
    img_size=(32, 16),
    patch_kernel=(3, 3),
    patch_stride=(2, 2),
    patch_padding=(1, 1),
    embed_dim=8,
    num_heads=2,
    stages=(1, 2, 2),
    q_pool=2,
    mask_unit_size=(4, 4),
    mask_unit_attn=(True, False, False),
    num_classes=5,
    mlp_ratio=1.25,
)
# The second block pools, the third attends to all, windows of the fourth are padded, and it pools, too.
POOLED = dict(
    patch_kernel=(3, 3),
    patch_stride=(2, 2),
    patch_padding=(1, 1),
    embed_dim=8,
    num_heads=2,
    stages=(1, 2, 2),
    q_pool=2,
    window_spec=(4, 4, 3),
    global_att_blocks=(2,),
    global_pos_size=(3, 3),
    num_classes=5,
)
ROPE = dict(use_rot_pos_emb=True)
FLEX = dict(img_size=None, pos_embed_grid_size=(4, 4))
FREE = {"heads": 1, "qk": 1, "v": 1, "neurons": 1}
TURNED = {**FREE, "qk": 2}
ENCODERS = {"qwen3_vit": "Qwen3VitEncoder", "deepseek_vit": "DeepseekVitEncoder"}
# timm's class (the file of one that older versions lack), arguments, and what its blocks offer.
KINDS = {
    "eva": (Eva, dict(init_values=0.5), TURNED),
    "eva02": (Eva, dict(**ROPE, swiglu_mlp=True, qkv_fused=False, scale_mlp=True), TURNED | {"neurons": 0}),
    "eva02 small": (Eva, dict(**ROPE, swiglu_mlp=True), TURNED),
    "eva02 clip": (
        Eva,
        dict(**ROPE, swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True),
        {"heads": 0, "qk": 2, "v": 0, "neurons": 0},
    ),
    "eva02 enormous": (Eva, dict(use_post_norm=True), TURNED),
    "dinov3": (
        Eva,
        dict(
            rope_type="dinov3",
            rope_rotate_half=True,
            use_abs_pos_emb=False,
            num_reg_tokens=2,
            qkv_bias=False,
            init_values=0.5,
            swiglu_mlp=True,
            swiglu_align_to=8,
            **ROPE,
        ),
        TURNED,
    ),
    "perception encoder": (Eva, dict(attn_type="rope", global_pool="map", use_fc_norm=False, **ROPE), TURNED),
    "mixed rotary positions": (
        Eva,
        dict(attn_type="rope", rope_type="mixed", class_token=False, **ROPE),
        TURNED,
    ),
    "rotary positions in halves, q/k norms": (
        Eva,
        dict(attn_type="rope", rope_type="dinov3", rope_rotate_half=True, qk_norm=True, **ROPE),
        {**FREE, "qk": 0},
    ),
    "grouped queries": (Eva, dict(attn_type="rope", qkv_fused=False, num_kv_heads=2, **ROPE), TURNED),
    "grouped queries, q/k norms": (
        Eva,
        dict(
            attn_type="rope",
            rope_type="dinov3",
            rope_rotate_half=True,
            qkv_fused=False,
            # As in Sapiens 2, heads of some blocks share nothing.
            num_kv_heads=(4, 2),
            qk_norm=True,
            swiglu_mlp=True,
            **ROPE,
        ),
        {**FREE, "qk": 0},
    ),
    "differential attention": (
        VisionTransformer,
        dict(attn_layer="diff", init_values=0.5, reg_tokens=1),
        {**FREE, "v": 0},
    ),
    "differential attention, q/k norms": (
        VisionTransformer,
        # Over four dims a norm would lose more of float32 than the bound, in timm's layer too.
        dict(attn_layer="diff", qk_norm=True, qkv_bias=False, num_heads=2),
        {**FREE, "qk": 0, "v": 0},
    ),
    "talking heads": (Cait, dict(), {**FREE, "heads": 0}),
    "geglu": (VisionTransformer, dict(mlp_layer=GeGluMlp), FREE),
    "beit": (Beit, dict(use_rel_pos_bias=True, init_values=0.5, use_abs_pos_emb=False), FREE),
    "beit, one bias for all": (Beit, dict(use_shared_rel_pos_bias=True, use_rel_pos_bias=True), FREE),
    "relative positions": (VisionTransformerRelPos, dict(rel_pos_type="bias", class_token=True), FREE),
    "relative positions by an MLP": (VisionTransformerRelPos, dict(rel_pos_dim=24), FREE),
    "relative positions, post-norm": (
        VisionTransformerRelPos,
        dict(shared_rel_pos=True, block_fn=ResPostRelPosBlock),
        FREE,
    ),
    "naflex": (NaFlexVit, dict(FLEX, init_values=0.5, act_layer="gelu_tanh"), FREE),
    "naflex, rotary positions": (
        NaFlexVit,
        dict(FLEX, rope_type="axial", global_pool="avg", reg_tokens=2, swiglu_mlp=True),
        TURNED,
    ),
    "naflex, parallel things": (NaFlexVit, dict(FLEX, block_fn=ParallelThingsBlock), FREE),
    "swin": (SwinTransformer, STAGES, FREE),
    "swin, window sizes of its own in each stage": (
        SwinTransformer,
        dict(STAGES, window_size=((5, 4), (3, 2)), head_dim=(6, 4), qkv_bias=False, strict_img_size=False),
        FREE,
    ),
    "swin v2": (SwinTransformerV2, STAGES, {**FREE, "qk": 0}),
    "swin v2, positions of larger windows": (
        SwinTransformerV2,
        dict(STAGES, pretrained_window_sizes=(6, 6), always_partition=True, qkv_bias=False),
        {**FREE, "qk": 0},
    ),
    "swin v2, norms of stages": (
        SwinTransformerV2Cr,
        dict(STAGES, extra_norm_stage=True, img_size=(24, 16)),
        {**FREE, "qk": 0},
    ),
    "hiera": (Hiera, UNITS, FREE),
    "hiera, all attend to all, growing without a projection": (
        Hiera,
        dict(UNITS, mask_unit_attn=(False, False, False), use_expand_proj=False, init_values=0.5, q_pool=1),
        FREE,
    ),
    "sam 2's hiera": (HieraDet, dict(POOLED, init_values=0.5), FREE),
    "sam 2's hiera, growing without pooling": (HieraDet, dict(POOLED, q_pool=0), FREE),
    "parallel halves": (VisionTransformer, dict(block_fn=ParallelScalingBlock, init_values=0.5), FREE),
    "parallel halves, q/k norms": (
        VisionTransformer,
        dict(block_fn=ParallelScalingBlock, qk_norm=True, qkv_bias=False),
        {**FREE, "qk": 0},
    ),
    "parallel halves, one last product": (
        VisionTransformer,
        dict(block_fn=partial(ParallelScalingBlock, fuse_out_proj=True), init_values=0.5),
        FREE,
    ),
    "parallel halves, differential attention": (
        VisionTransformer,
        dict(block_fn=DiffParallelScalingBlock, init_values=0.5, reg_tokens=1),
        {**FREE, "v": 0},
    ),
    "parallel halves, differential attention, q/k norms": (
        VisionTransformer,
        # Read off one token, the norms would lose more of float32 than the bound, in timm's block too.
        dict(block_fn=DiffParallelScalingBlock, qk_norm=True, qkv_bias=False, num_heads=2, global_pool="avg"),
        {**FREE, "qk": 0, "v": 0},
    ),
    "parallel things": (VisionTransformer, dict(block_fn=ParallelThingsBlock, init_values=0.5), FREE),
    "parallel things, q/k norms": (
        VisionTransformer,
        dict(block_fn=ParallelThingsBlock, qk_norm=True, qkv_bias=False, mlp_layer=SwiGLU, global_pool="avg"),
        {**FREE, "qk": 0},
    ),
    "sam": (
        VisionTransformerSAM,
        # Windows at the edge are padded; the second block attends to all.
        dict(img_size=(20, 20), use_rel_pos=True, window_size=3, global_attn_indexes=(1,), neck_chans=6),
        {**FREE, "qk": 0},
    ),
    "sam without relative positions": (VisionTransformerSAM, dict(window_size=0, neck_chans=0), FREE),
    "qwen3": ("qwen3_vit", dict(img_size=(16, 24), pos_embed_grid_size=3, out_features=6), TURNED),
    "deepseek": ("deepseek_vit", dict(img_size=(16, 24), out_features=6), TURNED),
    "relative positions, q/k norms": (VisionTransformerRelPos, dict(qk_norm=True), {**FREE, "qk": 0}),
}


def made(name: str) -> nn.Module:
    """A small model of the kind, in evaluation, all its weights random."""
    cls, own, _ = KINDS[name]
    if cls in ENCODERS:
        found = timm_classes(cls, ENCODERS[cls])
        if not found:
            pytest.skip(f"this timm has no {cls}")
        cls = found[0]
    if name.startswith(("naflex", "swin")):
        needs_whole_naflex()  # Swin grew its arguments in the same versions
    takes = inspect.signature(cls).parameters
    if own.keys() - takes.keys() and "kwargs" not in takes:
        pytest.skip(f"the {cls.__name__} of this timm takes no {', '.join(own)}")
    torch.manual_seed(5)
    if not own.keys() & {"depths", "stages"}:
        sizes = SIZES if "kwargs" in takes else {name: SIZES[name] for name in SIZES if name in takes}
        own = {**sizes, **own}
    model = cls(**own).eval()
    if cls is HieraDet:
        set_image(model, (3, 24, 24))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def gated() -> nn.Module:
    """A ViT with a sigmoid gate on the output of every attention, as timm's constructor makes none."""
    if "gated" not in inspect.signature(Attention).parameters:
        pytest.skip("the Attention of this timm has no gate")
    model = small_vit()
    for block in model.blocks:
        block.attn.gate = torch.nn.Linear(24, 24)
    return model


class Example(NamedTuple):
    """A small model in evaluation, all its weights random, and how it and its truth are run.

    read: of a model and images, its output; absent: of a model, a structure and images, the output without
    what the structure removes; saved: whether a constructor makes it, so that it can be saved.
    """

    make: Callable[[], nn.Module]
    read: Callable[[nn.Module, Tensor], Tensor] = nn.Module.__call__
    absent: Callable[[nn.Module, Structure, Tensor], Tensor] = lambda *to: oracle.absent(*to[:2])(to[2])
    images: Callable[[nn.Module], Tensor] = images
    saved: bool = True


def vit(name: str) -> nn.Module:
    """One of the oracle's."""
    torch.manual_seed(5)
    return MODELS[name]().eval()


def gemma() -> nn.Module:
    """Gemma 4's encoder with a classifier, whose layers clip."""
    found = timm_classes("gemma4_vit", "Gemma4VitClassifier")
    if not found:
        pytest.skip("this timm has no gemma4_vit")
    torch.manual_seed(5)
    sizes = dict(patch_size=4, embed_dim=24, depth=3, num_heads=3, head_dim=8, intermediate_size=40)
    model = found[0](**sizes, num_classes=5, position_embedding_size=8, use_clipped_linears=True).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
        for name, bound in model.named_buffers():
            if name.endswith(("_min", "_max")):
                bound.fill_(-0.5 if name.endswith("_min") else 0.5)
    return set_image(model, (3, 16, 16))


OFFERED = {
    **{name: offered for name, (_, _, offered) in KINDS.items()},
    "gemma": {**FREE, "qk": 0, "v": 0},
}
EXAMPLES = {
    **{name: Example(partial(made, name)) for name in KINDS},
    **{name: Example(partial(vit, name)) for name in MODELS},
    "gemma": Example(gemma, absent=other_models.absent),
    "gated attention": Example(lambda: gated().eval(), saved=False),
    **{
        f"{name} of others": Example(
            partial(other_models.made, name), other_models.read, other_models.absent, other_models.images
        )
        for name in other_models.MODELS
    },
}
