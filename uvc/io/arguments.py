"""The constructor arguments of timm's classes, read off their modules, as far as they travel as JSON.

What is read is judged by whether a rebuild gives the same modules, not here.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import timm.layers
from timm.models.beit import Beit
from timm.models.beit import Block as BeitBlock
from timm.models.cait import Cait, LayerScaleBlock
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from timm.models.vision_transformer_relpos import RelPosBlock, ResPostRelPosBlock, VisionTransformerRelPos
from torch import nn

from uvc.layers import UVCMlp, blocks_of
from uvc.models import T2TVisionTransformer

Arguments = dict[str, Any]


class Maker(NamedTuple):
    """How a model of one class is made again.

    read: arguments that are plain values. optional: those that `read` gives only where they say something, as
    older files know nothing of them. parts: arguments that other fields of a file tell, of "norm_layer",
    "act_layer", "mlp_layer", "block_fn", "weight_init" and "depth". blocks: the block that normalises first,
    the one last, and if there are any those with parallel halves.
    """

    make: type[nn.Module]
    read: Callable[[nn.Module], Arguments]
    arguments: frozenset[str]
    optional: frozenset[str]
    parts: tuple[str, ...]
    blocks: tuple[Callable[..., nn.Module] | None, ...]


def is_there(module: nn.Module | None) -> bool:
    """Whether timm made a module, and no identity in its place."""
    return module is not None and not isinstance(module, nn.Identity)


def mlp_ratio(dense: nn.Module) -> float:
    """The ratio of which timm makes the hidden width of the first layer."""
    mlp = blocks_of(dense)[0].mlp
    return ratio_of(dense.embed_dim, mlp.fc1.out_features if hasattr(mlp, "fc1") else mlp.neurons)


def ratio_of(D: int, F: int) -> float:
    """A ratio of which timm makes F of D."""
    # timm rounds width * ratio down, which for some ratios loses a neuron; half a neuron more is safe.
    return F / D if int(D * (F / D)) == F else (F + 0.5) / D


def of_all(dense: nn.Module) -> Arguments:
    """Arguments that all classes take."""
    blocks, stem = blocks_of(dense), dense.patch_embed
    block = blocks[0]
    return {
        "img_size": stem.img_size,
        "patch_size": stem.patch_size,
        "in_chans": dense.in_chans,
        "num_classes": dense.num_classes,
        "global_pool": dense.global_pool,
        "embed_dim": dense.embed_dim,
        "num_heads": block.attn.num_heads,
        "drop_rate": dense.head_drop.p,
        "proj_drop_rate": block.attn.proj_drop.p,
        "attn_drop_rate": block.attn.attn_drop.p,
        "drop_path_rate": getattr(drop_path(blocks[-1]), "drop_prob", 0.0),
    }


def drop_path(block: nn.Module) -> nn.Module:
    """The stochastic depth of a block's first half."""
    return block.drop_path1 if hasattr(block, "drop_path1") else block.drop_path


def where(**flags: bool) -> Arguments:
    """The flags that are true."""
    return {name: True for name, flag in flags.items() if flag}


def of_vit(dense: VisionTransformer) -> Arguments:
    """Arguments of timm's VisionTransformer and of classes after it."""
    block, stem = blocks_of(dense)[0], dense.patch_embed
    has_fc_norm = is_there(dense.fc_norm)
    parallel = isinstance(block, ParallelScalingBlock | DiffParallelScalingBlock)
    scale = block.ls if parallel else block if block.norm_last else block.ls1
    differential = isinstance(block.attn, timm.layers.DiffAttention)
    return {
        **of_all(dense),
        **({"proj_drop_rate": block.mlp.drop1.p} if parallel else {}),
        **({"attn_layer": "diff"} if differential else {}),
        "mlp_ratio": mlp_ratio(dense),
        "qkv_bias": block.attn.sources()[0].bias is not None,
        "proj_bias": (block.mlp.fc2 if parallel else block.attn.proj).bias is not None,
        "init_values": getattr(scale, "init_values", None),
        "class_token": dense.has_class_token,
        "pos_embed": "none" if dense.pos_embed is None else "learn",
        "no_embed_class": dense.no_embed_class,
        "reg_tokens": dense.num_reg_tokens,
        "pre_norm": is_there(dense.norm_pre),
        "final_norm": has_fc_norm or is_there(dense.norm),
        "fc_norm": has_fc_norm,
        "pool_include_prefix": dense.pool_include_prefix,
        "dynamic_img_size": dense.dynamic_img_size,
        "dynamic_img_pad": getattr(stem, "dynamic_img_pad", False),
        "pos_drop_rate": dense.pos_drop.p,
        "patch_drop_rate": getattr(dense.patch_drop, "prob", 0.0),
        **where(
            qk_norm=is_there(block.attn.q_norm),
            scale_attn_norm=is_there(block.attn.norm),
            scale_mlp_norm="neurons" in block.mlp.ties(),
        ),
    }


def of_t2t(dense: T2TVisionTransformer) -> Arguments:
    """Arguments of a T2T-ViT: those of a ViT, and the form of its stem."""
    return {**of_vit(dense), "form": dense.patch_embed.form}


ROPES = {
    "RotaryEmbeddingCat": "cat",
    "RotaryEmbeddingMixed": "mixed",
    "RotaryEmbeddingDinoV3": "dinov3",
    "RotaryEmbeddingMRope": "mrope",
}


def of_eva(dense: Eva) -> Arguments:
    """Arguments of timm's Eva, the class of EVA-02, DINOv3 and others with rotary positions."""
    block, stem, rope = dense.blocks[0], dense.patch_embed, dense.rope
    attn, mlp = block.attn, block.mlp
    gated, fused = type(mlp) is not UVCMlp, attn.qkv is not None
    rotary = isinstance(attn, timm.layers.AttentionRope)
    source = (attn.qkv if rotary else None) if fused else attn.q_proj
    qkv_bias = attn.q_bias if source is None else source.bias
    pool = dense.attn_pool
    shared = [getattr(b.attn, "num_kv_heads", b.attn.num_heads) for b in dense.blocks]
    return {
        **of_all(dense),
        "mlp_ratio": ratio_of(dense.embed_dim, mlp.neurons),
        "qkv_bias": qkv_bias is not None,
        "qkv_fused": fused,
        "swiglu_mlp": gated,
        # To any number of neurons a layer may be aligned; that it is, makes one of two first layers.
        "swiglu_align_to": int(gated and hasattr(mlp, "fc1_g") and not is_there(mlp.norm)),
        "scale_mlp": is_there(mlp.norm),
        "scale_attn_inner": is_there(attn.norm),
        "attn_type": "rope" if rotary else "eva",
        "pos_drop_rate": dense.pos_drop.p,
        "patch_drop_rate": getattr(dense.patch_drop, "prob", 0.0),
        "init_values": getattr(block, "init_values", None),
        "class_token": dense.cls_token is not None,
        "num_reg_tokens": 0 if dense.reg_token is None else dense.reg_token.shape[1],
        "no_embed_class": dense.no_embed_class,
        "use_abs_pos_emb": dense.pos_embed is not None,
        "use_rot_pos_emb": rope is not None,
        "rope_rotate_half": getattr(attn, "rotate_half", False),
        "use_post_norm": block.norm_last,
        "use_pre_transformer_norm": is_there(dense.norm_pre),
        "use_post_transformer_norm": is_there(dense.norm),
        "use_fc_norm": is_there(dense.fc_norm),
        "attn_pool_num_heads": None if pool is None else pool.num_heads,
        "attn_pool_mlp_ratio": None if pool is None else pool.mlp.fc1.out_features / dense.embed_dim,
        "dynamic_img_size": dense.dynamic_img_size,
        "dynamic_img_pad": getattr(stem, "dynamic_img_pad", False),
        "head_init_scale": dense.head_init_scale,
        **({} if rope is None else of_rope(rope)),
        **({} if shared == [attn.num_heads] * len(shared) else {"num_kv_heads": shared}),
        **where(
            qk_norm=is_there(attn.q_norm),
            attn_only_layer_scale=block._parameters.get("gamma_1") is not None
            and block._parameters.get("gamma_2") is None,
        ),
    }


def of_rope(rope: nn.Module) -> Arguments:
    """Arguments that make rotary positions; what a kind does not have is left out."""
    named = {
        "rope_grid_offset": "grid_offset",
        "rope_grid_indexing": "grid_indexing",
        "rope_temperature": "temperature",
        "rope_shift_coords": "shift_coords",
        "rope_jitter_coords": "jitter_coords",
        "rope_rescale_coords": "rescale_coords",
        "ref_feat_shape": "ref_feat_shape",
        "rope_mrope_section": "mrope_section",
    }
    found = {name: getattr(rope, own) for name, own in named.items() if getattr(rope, own, None) is not None}
    return {"rope_type": ROPES.get(type(rope).__name__, type(rope).__name__), **found}


def of_beit(dense: Beit) -> Arguments:
    """Arguments of timm's Beit."""
    block = dense.blocks[0]
    return {
        **of_all(dense),
        "mlp_ratio": ratio_of(dense.embed_dim, block.mlp.neurons),
        "qkv_bias": block.attn.q_bias is not None,
        "swiglu_mlp": type(block.mlp) is not UVCMlp,
        "scale_mlp": is_there(block.mlp.norm),
        "pos_drop_rate": dense.pos_drop.p,
        "init_values": block.init_values,
        "use_abs_pos_emb": dense.pos_embed is not None,
        "use_rel_pos_bias": block.attn.relative_position_bias_table is not None,
        "use_shared_rel_pos_bias": dense.rel_pos_bias is not None,
        **where(use_fc_norm=is_there(dense.fc_norm) and dense.global_pool != "avg"),
    }


def of_relpos(dense: VisionTransformerRelPos) -> Arguments:
    """Arguments of timm's VisionTransformerRelPos."""
    block = dense.blocks[0]
    shared = dense.shared_rel_pos is not None
    positions = dense.shared_rel_pos if shared else block.attn.rel_pos
    mlp = getattr(positions, "mlp", None)
    kind = "bias" if mlp is None else "mlp_swin" if positions.mode == "swin" else "mlp"
    scale = block if block.norm_last else block.ls1
    return {
        **of_all(dense),
        "mlp_ratio": mlp_ratio(dense),
        "qkv_bias": block.attn.qkv.bias is not None,
        "qk_norm": is_there(block.attn.q_norm),
        "init_values": getattr(scale, "init_values", None),
        "class_token": dense.cls_token is not None,
        "fc_norm": is_there(dense.fc_norm),
        "rel_pos_type": kind,
        "rel_pos_dim": None if mlp is None else mlp.fc1.out_features,
        "shared_rel_pos": shared,
    }


def of_cait(dense: Cait) -> Arguments:
    """Arguments of timm's Cait; the value that layer scales begin at is in none of its modules."""
    last = dense.blocks_token_only
    return {
        **of_all(dense),
        "mlp_ratio": mlp_ratio(dense),
        "qkv_bias": dense.blocks[0].attn.qkv.bias is not None,
        "pos_drop_rate": dense.pos_drop.p,
        "depth_token_only": len(last),
        "mlp_ratio_token_only": ratio_of(dense.embed_dim, last[0].mlp.fc1.out_features) if last else 4.0,
    }


ALL = frozenset(
    "img_size patch_size in_chans num_classes global_pool embed_dim num_heads drop_rate proj_drop_rate "
    "attn_drop_rate drop_path_rate mlp_ratio qkv_bias init_values".split()
)
VIT = ALL | frozenset(
    "proj_bias class_token pos_embed no_embed_class reg_tokens pre_norm final_norm fc_norm "
    "pool_include_prefix dynamic_img_size dynamic_img_pad pos_drop_rate patch_drop_rate".split()
)
VIT_SOME = frozenset("qk_norm scale_attn_norm scale_mlp_norm attn_layer".split())
EVA = ALL | frozenset(
    "qkv_fused swiglu_mlp swiglu_align_to scale_mlp scale_attn_inner attn_type pos_drop_rate patch_drop_rate "
    "class_token num_reg_tokens no_embed_class use_abs_pos_emb use_rot_pos_emb rope_rotate_half "
    "use_post_norm use_pre_transformer_norm use_post_transformer_norm use_fc_norm attn_pool_num_heads "
    "attn_pool_mlp_ratio dynamic_img_size dynamic_img_pad head_init_scale".split()
)
EVA_SOME = frozenset(
    "qk_norm num_kv_heads attn_only_layer_scale rope_type rope_grid_offset rope_grid_indexing "
    "rope_temperature rope_shift_coords rope_jitter_coords rope_rescale_coords ref_feat_shape "
    "rope_mrope_section".split()
)
BEIT = ALL | frozenset(
    "swiglu_mlp scale_mlp pos_drop_rate use_abs_pos_emb use_rel_pos_bias use_shared_rel_pos_bias".split()
)
RELPOS = ALL | frozenset("qk_norm class_token fc_norm rel_pos_type rel_pos_dim shared_rel_pos".split())

CAIT = (ALL - {"init_values"}) | {"pos_drop_rate", "depth_token_only", "mlp_ratio_token_only"}
CAIT_PARTS = ("norm_layer", "act_layer", "depth")

VIT_PARTS = ("weight_init", "norm_layer", "mlp_layer", "act_layer", "block_fn", "depth")
VIT_BLOCKS = (
    Block,
    ResPostBlock,
    ParallelScalingBlock,
    partial(ParallelScalingBlock, fuse_out_proj=True),
    DiffParallelScalingBlock,
    ParallelThingsBlock,
)
MAKERS = {
    maker.make.__name__: maker
    for maker in (
        Maker(VisionTransformer, of_vit, VIT, VIT_SOME, VIT_PARTS, VIT_BLOCKS),
        Maker(VisionTransformerDistilled, of_vit, VIT, VIT_SOME, VIT_PARTS, VIT_BLOCKS),
        Maker(T2TVisionTransformer, of_t2t, VIT | {"form"}, VIT_SOME, VIT_PARTS, VIT_BLOCKS),
        Maker(Eva, of_eva, EVA, EVA_SOME, ("norm_layer", "depth"), (EvaBlock, EvaBlockPostNorm)),
        Maker(Beit, of_beit, BEIT, frozenset({"use_fc_norm"}), ("norm_layer", "depth"), (BeitBlock, None)),
        Maker(Cait, of_cait, CAIT, frozenset(), CAIT_PARTS, (LayerScaleBlock, None)),
        Maker(
            VisionTransformerRelPos,
            of_relpos,
            RELPOS,
            frozenset(),
            ("weight_init", "norm_layer", "act_layer", "block_fn", "depth"),
            (RelPosBlock, ResPostRelPosBlock),
        ),
    )
}
