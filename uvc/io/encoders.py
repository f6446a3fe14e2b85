"""The constructor arguments of the vision encoders of Qwen3, DeepSeek and Gemma 4, and of classifiers."""

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


def of_gemma(dense: nn.Module) -> Arguments:
    """Arguments of both classes of Gemma 4."""
    encoder = trunk_of(dense)
    block = encoder.blocks[0]
    attn, mlp = block.attn.seen, block.mlp
    found = {
        "patch_size": encoder.patch_size,
        "in_chans": encoder.in_chans,
        "global_pool": dense.global_pool,
        "embed_dim": encoder.embed_dim,
        "depth": len(encoder.blocks),
        "num_heads": attn.num_heads,
        "head_dim": attn.head_dim,
        "num_kv_heads": attn.num_kv_heads,
        "intermediate_size": mlp.neurons,
        "norm_eps": block.norm1.eps,
        "rope_theta": encoder.rotary_emb.rope_theta,
        "position_embedding_size": encoder.patch_embed.position_embedding_size,
        "pooling_kernel_size": encoder.pooling_kernel_size,
        "standardize": encoder.std_bias is not None,
        "use_clipped_linears": bool(attn.q_proj._buffers),
        "proj_drop_rate": attn.proj_drop.p,
        "attn_drop_rate": attn.attn_drop.p,
        "drop_path_rate": getattr(encoder.blocks[-1].drop_path, "drop_prob", 0.0),
    }
    if encoder is not dense:
        found |= {
            "encoder_pool": dense.encoder_pool,
            "num_classes": dense.num_classes,
            "final_norm": is_there(dense.norm),
            "drop_rate": dense.head_drop.p,
        }
    return found


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
GEMMA = frozenset(
    "patch_size in_chans global_pool embed_dim depth num_heads head_dim num_kv_heads intermediate_size "
    "norm_eps rope_theta position_embedding_size pooling_kernel_size standardize use_clipped_linears "
    "proj_drop_rate attn_drop_rate drop_path_rate".split()
)
ENCODERS += [
    Maker(cls, of_gemma, names, frozenset(), (), (None, None))
    for kind, names in (("Encoder", GEMMA), ("Classifier", GEMMA | (CLASSIFIER - ENCODER)))
    for cls in timm_classes("gemma4_vit", f"Gemma4Vit{kind}")
]
