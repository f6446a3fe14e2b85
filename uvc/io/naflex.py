"""The constructor arguments of timm's NaFlexVit (SigLIP 2), read off its modules."""

from timm.models.naflexvit import NaFlexVit
from torch import nn

from uvc.io.arguments import VIT_BLOCKS, Arguments, Maker, drop_path, is_there, of_rope, ratio_of, where
from uvc.layers import blocks_of

TYPES = {"cat": "axial", "mixed": "mixed", "dinov3": "dinov3", "mrope": "mrope"}


def of_embeds(stem: nn.Module) -> Arguments:
    """Arguments of the stem; the size of images stands for that of the grid where that follows from it."""
    names = "interp_mode ar_preserving antialias align_corners use_grid_sample".split()
    return {
        "img_size": stem.default_img_size,
        "pos_embed_grid_size": None if stem.default_img_size else stem.pos_embed_grid_size,
        "patch_size": stem.patch_size,
        "in_chans": stem.in_chans,
        "embed_proj_type": "linear" if stem.is_linear else "conv",
        "class_token": stem.has_class_token,
        "reg_tokens": stem.num_reg_tokens,
        "dynamic_img_pad": stem.dynamic_img_pad,
        "pos_embed": stem.pos_embed_type,
        "pos_drop_rate": stem.pos_drop.p,
        **{f"pos_embed_{name}": getattr(stem, f"pos_embed_{name}") for name in names},
        **where(enable_patch_interpolator=stem.enable_patch_interpolator),
        **({} if stem.channels_last else {"patchify_channels_last": False}),
    }


def of_naflex(dense: NaFlexVit) -> Arguments:
    """Arguments of timm's NaFlexVit; ValueError where that of the installed timm does not take them all."""
    if not hasattr(dense.embeds, "pos_embed_antialias"):
        raise ValueError("a NaFlexVit is made again with timm 1.0.31 and later alone; update timm")
    blocks, pool, rope = blocks_of(dense), dense.attn_pool, dense.rope
    block = blocks[0]
    attn, mlp = block.attn, block.mlp
    scale = getattr(block, "init_values", getattr(getattr(block, "ls1", None), "init_values", None))
    fused = getattr(attn, "qkv", None) is not None
    bias = getattr(attn, "q_bias", None)
    bias = (attn.qkv.bias if fused else attn.q_proj.bias) if bias is None else bias
    of_eva = is_eva(block)
    turned = {} if rope is None else of_rope(rope)
    names = {"ref_feat_shape": "rope_ref_feat_shape"}
    turned = {names.get(name, name): value for name, value in turned.items() if name != "rope_type"}
    gated = of_eva and not hasattr(mlp, "fc1_g") and hasattr(mlp, "gate_last")
    swiglu = of_eva and (gated or hasattr(mlp, "fc1_g"))
    return {
        **of_embeds(dense.embeds),
        "num_classes": dense.num_classes,
        "global_pool": dense.global_pool,
        "embed_dim": dense.embed_dim,
        "num_heads": attn.num_heads,
        "mlp_ratio": ratio_of(dense.embed_dim, mlp.neurons if of_eva else rows_of_first(mlp)),
        "qkv_bias": bias is not None,
        "qk_norm": is_there(attn.q_norm),
        "proj_bias": attn.proj.bias is not None,
        "init_values": scale,
        "drop_rate": dense.head_drop.p,
        "proj_drop_rate": attn.proj_drop.p,
        "attn_drop_rate": attn.attn_drop.p,
        "patch_drop_rate": getattr(dense.patch_drop, "prob", 0.0),
        "drop_path_rate": getattr(drop_path(blocks[-1]), "drop_prob", 0.0),
        "pre_norm": is_there(dense.norm_pre),
        "final_norm": is_there(dense.norm) or is_there(dense.fc_norm),
        "fc_norm": is_there(dense.fc_norm),
        "pool_include_prefix": dense.pool_include_prefix,
        "use_key_only_attn_mask": dense.use_key_only_attn_mask,
        "attn_pool_num_heads": None if pool is None else pool.num_heads,
        "attn_pool_mlp_ratio": None if pool is None else ratio_of(dense.embed_dim, pool.mlp.fc1.out_features),
        "rope_type": "none" if rope is None else TYPES[of_rope(rope)["rope_type"]],
        "rope_rotate_half": getattr(attn, "rotate_half", False),
        "attn_type": kind_of(attn) if of_eva else "standard",
        "swiglu_mlp": swiglu,
        # To any number of neurons a layer may be aligned; that it is, makes one of two first layers.
        "swiglu_align_to": int(swiglu and not gated and not is_there(mlp.norm)),
        "qkv_fused": fused,
        "attn_gated": getattr(attn, "gate", None) is not None,
        "scale_mlp_norm": is_there(mlp.norm) and mlp.NORM_INSIDE,
        "scale_attn_inner_norm": is_there(attn.norm),
        **turned,
        **where(
            attn_only_layer_scale=block._parameters.get("gamma_1") is not None
            and block._parameters.get("gamma_2") is None
        ),
    }


def is_eva(block: nn.Module) -> bool:
    """Whether a block is like those of EVA, which are made where positions or gates ask for it."""
    return hasattr(block, "gamma_1")


def kind_of(attn: nn.Module) -> str:
    """The name of an attention among `attn_type`."""
    return "rope" if hasattr(attn, "num_kv_heads") or not hasattr(attn, "qkv_bias_separate") else "eva"


def rows_of_first(mlp: nn.Module) -> int:
    """The hidden width of which an MLP of a plain block is made."""
    return mlp.fc1.out_features if hasattr(mlp, "fc1") else mlp.neurons


NAMES = frozenset(
    "img_size pos_embed_grid_size patch_size in_chans embed_proj_type class_token reg_tokens dynamic_img_pad "
    "pos_embed pos_drop_rate pos_embed_interp_mode pos_embed_ar_preserving pos_embed_antialias "
    "pos_embed_align_corners pos_embed_use_grid_sample num_classes global_pool embed_dim num_heads mlp_ratio "
    "qkv_bias qk_norm proj_bias init_values drop_rate proj_drop_rate attn_drop_rate patch_drop_rate "
    "drop_path_rate pre_norm final_norm fc_norm pool_include_prefix use_key_only_attn_mask "
    "attn_pool_num_heads attn_pool_mlp_ratio rope_type rope_rotate_half attn_type swiglu_mlp swiglu_align_to "
    "qkv_fused attn_gated scale_mlp_norm scale_attn_inner_norm".split()
)
SOME = frozenset(
    "enable_patch_interpolator patchify_channels_last rope_temperature rope_grid_offset rope_grid_indexing "
    "rope_shift_coords rope_jitter_coords rope_rescale_coords rope_ref_feat_shape rope_mrope_section "
    "attn_only_layer_scale".split()
)
PARTS = ("norm_layer", "mlp_layer", "act_layer", "block_fn", "depth")
NAFLEX = Maker(NaFlexVit, of_naflex, NAMES, SOME, PARTS, VIT_BLOCKS)
