"""The constructor arguments of Swin Transformers, read off their modules: one of each for every stage."""

from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr

from uvc.io.arguments import Arguments, Maker, is_there, ratio_of


def windows_of(dense: SwinTransformer | SwinTransformerV2 | SwinTransformerV2Cr) -> list[list[int]]:
    """[height, width] of each stage's windows, as asked for; ValueError where timm does not keep them."""
    if not hasattr(dense, "_ref_window_sizes"):
        raise ValueError("a Swin is made again with timm 1.0.31 and later alone; update timm")
    return [list(size) for size in dense._ref_window_sizes]


def of_stages(dense: SwinTransformer | SwinTransformerV2) -> Arguments:
    """Arguments of both classes of Swin Transformers."""
    firsts, stem = [stage.blocks[0] for stage in dense.layers], dense.patch_embed
    return {
        "img_size": stem.img_size,
        "patch_size": stem.patch_size,
        "in_chans": dense.in_chans,
        "num_classes": dense.num_classes,
        "global_pool": dense.global_pool,
        "embed_dim": dense.embed_dim,
        "depths": [len(stage.blocks) for stage in dense.layers],
        "num_heads": [block.attn.num_heads for block in firsts],
        "window_size": windows_of(dense),
        "always_partition": firsts[0].always_partition,
        "strict_img_size": stem.strict_img_size,
        "drop_rate": dense.head.drop.p,
        "proj_drop_rate": firsts[0].attn.proj_drop.p,
        "attn_drop_rate": firsts[0].attn.attn_drop.p,
        "drop_path_rate": getattr(dense.layers[-1].blocks[-1].drop_path1, "drop_prob", 0.0),
    }


def of_swin(dense: SwinTransformer) -> Arguments:
    """Arguments of timm's SwinTransformer."""
    firsts = [stage.blocks[0] for stage in dense.layers]
    return {
        **of_stages(dense),
        "head_dim": [block.attn.head_dim for block in firsts],
        "mlp_ratio": [ratio_of(block.dim, block.mlp.neurons) for block in firsts],
        "qkv_bias": firsts[0].attn.qkv.bias is not None,
    }


def of_swin_v2(dense: SwinTransformerV2) -> Arguments:
    """Arguments of timm's SwinTransformerV2."""
    firsts = [stage.blocks[0] for stage in dense.layers]
    return {
        **of_stages(dense),
        "mlp_ratio": ratio_of(firsts[0].dim, firsts[0].mlp.neurons),
        "qkv_bias": firsts[0].attn.q_bias is not None,
        "pretrained_window_sizes": [block.attn.pretrained_window_size for block in firsts],
    }


def of_swin_cr(dense: SwinTransformerV2Cr) -> Arguments:
    """Arguments of timm's SwinTransformerV2Cr."""
    firsts, stem = [stage.blocks[0] for stage in dense.stages], dense.patch_embed
    # Norms of blocks inside a stage tell their period; at its end, one is of the stage.
    places = [i + 1 for s in dense.stages for i, b in enumerate(s.blocks[:-1]) if is_there(b.norm3)]
    period = min(places, default=0)
    ends = [(len(s.blocks), is_there(s.blocks[-1].norm3)) for s in dense.stages[:-1]]
    return {
        "img_size": stem.img_size,
        "patch_size": dense.patch_size,
        "in_chans": dense.in_chans,
        "num_classes": dense.num_classes,
        "global_pool": dense.head.global_pool.pool_type,
        "embed_dim": firsts[0].dim,
        "depths": [len(stage.blocks) for stage in dense.stages],
        "num_heads": [block.attn.num_heads for block in firsts],
        "window_size": windows_of(dense),
        "always_partition": firsts[0].always_partition,
        "strict_img_size": stem.strict_img_size,
        "drop_rate": dense.head.drop.p,
        "proj_drop_rate": firsts[0].attn.proj_drop.p,
        "attn_drop_rate": firsts[0].attn.attn_drop.p,
        "drop_path_rate": getattr(dense.stages[-1].blocks[-1].drop_path1, "drop_prob", 0.0),
        "mlp_ratio": ratio_of(firsts[0].dim, firsts[0].mlp.neurons),
        "init_values": firsts[0].init_values,
        "extra_norm_period": period,
        "extra_norm_stage": any(there and not (period and n % period == 0) for n, there in ends),
    }


STAGES = frozenset(
    "img_size patch_size in_chans num_classes global_pool embed_dim depths num_heads window_size "
    "always_partition strict_img_size drop_rate proj_drop_rate attn_drop_rate drop_path_rate mlp_ratio "
    "qkv_bias".split()
)
NO_BLOCKS = (None, None)
CR = frozenset(
    "img_size patch_size in_chans num_classes global_pool embed_dim depths num_heads window_size "
    "always_partition strict_img_size drop_rate proj_drop_rate attn_drop_rate drop_path_rate mlp_ratio "
    "init_values extra_norm_period extra_norm_stage".split()
)
SWIN = (
    Maker(SwinTransformerV2Cr, of_swin_cr, CR, frozenset(), ("norm_layer", "weight_init"), NO_BLOCKS),
    Maker(
        SwinTransformer, of_swin, STAGES | {"head_dim"}, frozenset(), ("norm_layer", "weight_init"), NO_BLOCKS
    ),
    Maker(
        SwinTransformerV2,
        of_swin_v2,
        STAGES | {"pretrained_window_sizes"},
        frozenset(),
        ("norm_layer", "act_layer"),
        NO_BLOCKS,
    ),
)
