"""The constructor arguments of SAM's encoder, read off its modules."""

from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn

from uvc.io.arguments import Arguments, Maker, is_there, ratio_of


def of_sam(dense: VisionTransformerSAM) -> Arguments:
    """Arguments of timm's VisionTransformerSAM."""
    blocks, stem, necked = dense.blocks, dense.patch_embed, isinstance(dense.neck, nn.Sequential)
    block = blocks[0]
    return {
        "img_size": stem.img_size,
        "patch_size": stem.patch_size,
        "in_chans": dense.in_chans,
        "num_classes": dense.num_classes,
        "embed_dim": dense.embed_dim,
        "num_heads": block.attn.num_heads,
        "mlp_ratio": ratio_of(dense.embed_dim, block.mlp.neurons),
        "qkv_bias": block.attn.qkv.bias is not None,
        "qk_norm": is_there(block.attn.q_norm),
        "init_values": getattr(block.ls1, "init_values", None),
        "pre_norm": is_there(dense.norm_pre),
        "drop_rate": dense.head.drop.p,
        "pos_drop_rate": dense.pos_drop.p,
        "patch_drop_rate": getattr(dense.patch_drop, "prob", 0.0),
        "proj_drop_rate": block.attn.proj_drop.p,
        "attn_drop_rate": block.attn.attn_drop.p,
        "drop_path_rate": getattr(blocks[-1].drop_path1, "drop_prob", 0.0),
        "use_abs_pos": dense.pos_embed is not None,
        "use_rel_pos": block.attn.use_rel_pos,
        "window_size": max(block.window_size for block in blocks),
        "global_attn_indexes": [i for i, block in enumerate(blocks) if block.window_size == 0],
        "neck_chans": dense.neck[0].out_channels if necked else 0,
        "global_pool": dense.global_pool,
    }


NAMES = frozenset(
    "img_size patch_size in_chans num_classes embed_dim num_heads mlp_ratio qkv_bias qk_norm init_values "
    "pre_norm drop_rate pos_drop_rate patch_drop_rate proj_drop_rate attn_drop_rate drop_path_rate "
    "use_abs_pos use_rel_pos window_size global_attn_indexes neck_chans global_pool".split()
)
PARTS = ("norm_layer", "act_layer", "mlp_layer", "depth")
SAM = Maker(VisionTransformerSAM, of_sam, NAMES, frozenset(), PARTS, (None, None))
