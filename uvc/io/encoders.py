"""The constructor arguments of the vision encoders of Qwen3 and DeepSeek, and of classifiers on them."""

from collections.abc import Callable

from torch import nn

from uvc.io.arguments import Arguments, Maker, drop_path, is_there, ratio_of
from uvc.layers import timm_classes, trunk_of


def of_encoder(dense: nn.Module) -> Arguments:
    """Arguments of an encoder, or of what holds one; what reads its tokens is of the model itself."""
    encoder = trunk_of(dense)
    block, stem = encoder.blocks[0], encoder.patch_embed
    found = {
        "img_size": stem.img_size,
        "patch_size": stem.patch_size,
        "in_chans": encoder.in_chans,
        "out_features": encoder.out_features,
        "embed_dim": encoder.embed_dim,
        "depth": len(encoder.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": ratio_of(encoder.embed_dim, block.mlp.neurons),
        "rope_temperature": encoder.rope.temperature,
        "norm_eps": block.norm1.eps,
        "proj_drop_rate": block.attn.proj_drop.p,
        "attn_drop_rate": block.attn.attn_drop.p,
        "drop_path_rate": getattr(drop_path(encoder.blocks[-1]), "drop_prob", 0.0),
        "global_pool": dense.global_pool,
    }
    if encoder is not dense:
        found |= {
            "encoder_pool": dense.encoder_pool,
            "num_classes": dense.num_classes,
            "final_norm": is_there(dense.norm),
            "drop_rate": dense.head_drop.p,
        }
    return found


def of_qwen(dense: nn.Module) -> Arguments:
    """Arguments of both classes of Qwen3."""
    encoder = trunk_of(dense)
    own = {name: getattr(encoder, name) for name in ("merge_size", "pos_embed_grid_size")}
    return {**of_encoder(dense), **own}


def of_deepseek(dense: nn.Module) -> Arguments:
    """Arguments of both classes of DeepSeek."""
    encoder = trunk_of(dense)
    own = {"downsample_ratio": encoder.downsample_ratio}
    return {**of_encoder(dense), **own, "dynamic_img_pad": encoder.patch_embed.dynamic_img_pad}


ENCODER = frozenset(
    "img_size patch_size in_chans out_features embed_dim depth num_heads mlp_ratio rope_temperature norm_eps "
    "proj_drop_rate attn_drop_rate drop_path_rate global_pool".split()
)
CLASSIFIER = ENCODER | {"encoder_pool", "num_classes", "final_norm", "drop_rate"}
READ: dict[str, tuple[Callable[[nn.Module], Arguments], str, frozenset[str]]] = {
    "qwen3_vit": (of_qwen, "Qwen3Vit", frozenset({"merge_size", "pos_embed_grid_size"})),
    "deepseek_vit": (of_deepseek, "DeepseekVit", frozenset({"downsample_ratio", "dynamic_img_pad"})),
}
# Of the files that this timm has.
ENCODERS = [
    Maker(cls, read, names | own, frozenset(), (), (None, None))
    for file, (read, name, own) in READ.items()
    for kind, names in (("Encoder", ENCODER), ("Classifier", CLASSIFIER))
    for cls in timm_classes(file, f"{name}{kind}")
]
