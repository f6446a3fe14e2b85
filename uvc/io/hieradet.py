"""The constructor arguments of SAM 2's Hiera, read off its modules."""

from timm.models.hieradet_sam2 import HieraDet

from uvc.io.arguments import Arguments, Maker


def of_hieradet(dense: HieraDet) -> Arguments:
    """Arguments of timm's HieraDet; the factor that its head began with is in none of its modules."""
    blocks, stem, ends = dense.blocks, dense.patch_embed.proj, dense.stage_ends
    firsts = [0, *(end + 1 for end in ends[:-1])]
    grown = blocks[firsts[1]] if len(firsts) > 1 else None
    patches = hasattr(dense.patch_embed, "patch_size")
    return {
        "in_chans": dense.in_chans,
        "num_classes": dense.num_classes,
        "global_pool": dense.head.pool_type,
        "embed_dim": stem.out_channels,
        "num_heads": blocks[0].attn.num_heads,
        "patch_kernel": stem.kernel_size,
        "patch_stride": stem.stride,
        "patch_padding": stem.padding,
        "patch_size": dense.patch_embed.patch_size if patches else None,
        "q_pool": len(dense.q_pool_blocks),
        "q_stride": dense.q_stride,
        "stages": [end + 1 - first for first, end in zip(firsts, ends, strict=True)],
        "dim_mul": 2.0 if grown is None else grown.dim_out / grown.dim,
        "head_mul": 2.0 if grown is None else grown.attn.num_heads / blocks[0].attn.num_heads,
        "global_pos_size": tuple(dense.pos_embed.shape[-2:]),
        "window_spec": dense.window_spec,
        "global_att_blocks": dense.global_att_blocks,
        "init_values": getattr(blocks[0].ls1, "init_values", None),
        "drop_rate": dense.head.drop.p,
        "drop_path_rate": getattr(blocks[-1].drop_path1, "drop_prob", 0.0),
    }


NAMES = frozenset(
    "in_chans num_classes global_pool embed_dim num_heads patch_kernel patch_stride patch_padding patch_size "
    "q_pool q_stride stages dim_mul head_mul global_pos_size window_spec global_att_blocks init_values "
    "drop_rate drop_path_rate".split()
)
PARTS = ("norm_layer", "act_layer", "weight_init")
HIERADET = Maker(HieraDet, of_hieradet, NAMES, frozenset(), PARTS, (None, None))
