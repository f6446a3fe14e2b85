"""The constructor arguments of Hiera, read off its modules."""

from timm.models.hiera import Hiera

from uvc.io.arguments import Arguments, Maker, ratio_of
from uvc.layers import image_of


def of_hiera(dense: Hiera) -> Arguments:
    """Arguments of timm's Hiera; the factor that its head began with is in none of its modules."""
    blocks, stem, ends = dense.blocks, dense.patch_embed.proj, dense.stage_ends
    firsts = [0, *(end + 1 for end in ends[:-1])]
    last = len(blocks) - 1
    grown = blocks[firsts[1]] if len(firsts) > 1 else None
    expanding = [block for block in blocks if block.do_expand]
    windowed = dense.pos_embed_win is not None
    return {
        "img_size": image_of(dense)[1:],
        "in_chans": dense.in_chans,
        "embed_dim": stem.out_channels,
        "num_heads": blocks[0].attn.heads,
        "num_classes": dense.num_classes,
        "global_pool": dense.head.pool_type,
        "stages": [end + 1 - first for first, end in zip(firsts, ends, strict=True)],
        "q_pool": dense.q_pool,
        "q_stride": dense.q_stride,
        "mask_unit_size": dense.mask_unit_size,
        # The first block of a stage attends as the stage before.
        "mask_unit_attn": [blocks[min(first + 1, last)].attn.use_mask_unit_attn for first in firsts],
        "use_expand_proj": all(block.proj is not None for block in expanding),
        "dim_mul": 2.0 if grown is None else grown.dim_out / grown.dim,
        "head_mul": 2.0 if grown is None else grown.attn.heads / blocks[0].attn.heads,
        "patch_kernel": stem.kernel_size,
        "patch_stride": dense.patch_stride,
        "patch_padding": stem.padding,
        "mlp_ratio": ratio_of(blocks[0].dim_out, blocks[0].mlp.neurons),
        "drop_path_rate": getattr(blocks[-1].drop_path1, "drop_prob", 0.0),
        "init_values": getattr(blocks[0].ls1, "init_values", None),
        "drop_rate": dense.head.drop.p,
        "patch_drop_rate": dense.patch_drop_rate,
        "sep_pos_embed": dense.pos_embed_spatial is not None,
        "abs_win_pos_embed": windowed,
        "global_pos_size": tuple(dense.pos_embed.shape[-2:]) if windowed else (14, 14),
    }


NAMES = frozenset(
    "img_size in_chans embed_dim num_heads num_classes global_pool stages q_pool q_stride mask_unit_size "
    "mask_unit_attn use_expand_proj dim_mul head_mul patch_kernel patch_stride patch_padding mlp_ratio "
    "drop_path_rate init_values drop_rate patch_drop_rate sep_pos_embed abs_win_pos_embed "
    "global_pos_size".split()
)
HIERA = Maker(Hiera, of_hiera, NAMES, frozenset(), ("norm_layer", "weight_init"), (None, None))
