"""Names of weights in other programs as timm's: prefixes of wrappers, transformers, torchvision.

What timm renames itself (DINOv2's, DeiT-III's, CLIP's) is left to timm.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from functools import partial

import torch
from torch import Tensor

# What DistributedDataParallel and torch.compile put before each name.
WRAPPED = ("module", "_orig_mod")
# What a model is called as a part of another one.
# fmt: off
PARTS = {
    *WRAPPED, "backbone", "encoder", "model", "net", "network", "trunk", "vit", "visual", "image_encoder",
    "teacher", "student", "ema", "model_ema", "ema_model",
}
# fmt: on
HF_BLOCK = r"(?:encoder\.layer|layers)\.(\d+)\."
TRANSFORMERS = (
    (r"embeddings\.(cls_token|mask_token|register_tokens)", r"\1"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.distillation_token", "dist_token"),
    (r"embeddings\.patch_embeddings\.projection\.(\w+)", r"patch_embed.proj.\1"),
    (r"layernorm\.(\w+)", r"norm.\1"),
    (rf"{HF_BLOCK}(?:layernorm_before|norm1)\.(\w+)", r"blocks.\1.norm1.\2"),
    (rf"{HF_BLOCK}(?:layernorm_after|norm2)\.(\w+)", r"blocks.\1.norm2.\2"),
    (rf"{HF_BLOCK}attention\.(?:attention\.query|q_proj)\.(\w+)", r"blocks.\1.attn.qkv.\2 0"),
    (rf"{HF_BLOCK}attention\.(?:attention\.key|k_proj)\.(\w+)", r"blocks.\1.attn.qkv.\2 1"),
    (rf"{HF_BLOCK}attention\.(?:attention\.value|v_proj)\.(\w+)", r"blocks.\1.attn.qkv.\2 2"),
    (rf"{HF_BLOCK}attention\.(?:output\.dense|o_proj)\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (rf"{HF_BLOCK}(?:intermediate\.dense|mlp\.fc1)\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
    (rf"{HF_BLOCK}(?:output\.dense|mlp\.fc2)\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
    (rf"{HF_BLOCK}mlp\.weights_in\.(\w+)", r"blocks.\1.mlp.w12.\2"),
    (rf"{HF_BLOCK}mlp\.gate_proj\.(\w+)", r"blocks.\1.mlp.w12.\2 0"),
    (rf"{HF_BLOCK}mlp\.up_proj\.(\w+)", r"blocks.\1.mlp.w12.\2 1"),
    (rf"{HF_BLOCK}mlp\.(?:weights_out|down_proj)\.(\w+)", r"blocks.\1.mlp.w3.\2"),
    (rf"{HF_BLOCK}layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"(?:cls_)?classifier\.(\w+)", r"head.\1"),
    (r"distillation_classifier\.(\w+)", r"head_dist.\1"),
)
TV_BLOCK = r"encoder\.layers\.encoder_layer_(\d+)\."
TORCHVISION = (
    (r"class_token", "cls_token"),
    (r"conv_proj\.(\w+)", r"patch_embed.proj.\1"),
    (r"encoder\.pos_embedding", "pos_embed"),
    (rf"{TV_BLOCK}ln_([12])\.(\w+)", r"blocks.\1.norm\2.\3"),
    (rf"{TV_BLOCK}self_attention\.in_proj_(\w+)", r"blocks.\1.attn.qkv.\2"),
    (rf"{TV_BLOCK}self_attention\.out_proj\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (rf"{TV_BLOCK}mlp\.(?:0|linear_1)\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
    (rf"{TV_BLOCK}mlp\.(?:3|linear_2)\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
    (r"encoder\.ln\.(\w+)", r"norm.\1"),
    (r"heads\.head\.(\w+)", r"head.\1"),
)
# A weight that tells the layout, with what stands before the model's names; then its table.
LAYOUTS = (
    (r"(.*?)(?:encoder\.layer|layers)\.\d+\.attention\.(?:attention\.query|q_proj)\.weight", TRANSFORMERS),
    (r"(.*?)encoder\.layers\.encoder_layer_\d+\.self_attention\.in_proj_weight", TORCHVISION),
)


def without_wrappers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without `module.` and `_orig_mod.`, however often; ValueError if two become one."""
    return _renamed(weights, lambda name: name[len(_lead(name, WRAPPED)) :])


def to_timm(weights: Mapping[str, Tensor], known: Collection[str]) -> dict[str, Tensor]:
    """The weights under timm's names, as far as they are those of another program or a part of a model.

    known: names in the model, by which prefixes are told that few weights carry. ValueError when two weights
    get one name.
    """
    for anchor, table in LAYOUTS:
        prefixes = Counter(m[1] for name in weights if (m := re.fullmatch(anchor, name)))
        if prefixes:
            by = partial(_by, table, _likeliest(prefixes))
            return _completed(_joined(_renamed(weights, by)))
    prefixes = Counter(_lead(name, PARTS) for name in weights)
    prefix = _likeliest(prefixes)

    def short(name: str) -> str:
        if name in known:
            return name
        if prefix and name.startswith(prefix):
            return name[len(prefix) :]
        end = bare(name)
        return end if end in known and not any(start + end in weights for start in (prefix, "")) else name

    return _renamed(weights, short)


def bare(name: str) -> str:
    """A name without what models are called as parts of others."""
    return name[len(_lead(name, PARTS)) :]


def _lead(name: str, parts: Collection[str]) -> str:
    """The dotted parts at the start of a name that are among `parts`."""
    end = 0
    for part in name.split(".")[:-1]:
        if part not in parts:
            break
        end += len(part) + 1
    return name[:end]


def _likeliest(prefixes: Counter[str]) -> str:
    """The prefix that most weights carry; of a teacher and its student the teacher's."""
    averaged = ("teacher", "ema")
    return max(prefixes, key=lambda prefix: (prefixes[prefix], any(word in prefix for word in averaged)))


def _by(table: tuple[tuple[str, str], ...], prefix: str, name: str) -> str:
    # A classifier stands beside the backbone, without the last part of the backbone's prefix.
    for end in dict.fromkeys((name.removeprefix(prefix), bare(name))):
        for pattern, replacement in table:
            if match := re.fullmatch(pattern, end):
                return match.expand(replacement)
    return name


def _renamed(weights: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    found, came = {}, {}
    for name, value in weights.items():
        new = rename(name)
        if new in found:
            raise ValueError(f"both {came[new]} and {name} would be {new}; save the weights of one model")
        found[new], came[new] = value, name
    return found


def _joined(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rows that timm keeps in one matrix, told by a number after the name, one below the other."""
    found: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for name, value in weights.items():
        whole, _, place = name.partition(" ")
        if place:
            parts.setdefault(whole, {})[int(place)] = value
        else:
            found[name] = value
    for whole, rows in parts.items():
        many = 3 if ".qkv." in whole else 2
        if len(rows) < many:
            raise ValueError(f"of {whole}, {len(rows)} of {many} parts are there; save the whole model")
        if len({row.shape[1:] for row in rows.values()}) > 1:
            raise ValueError(f"the parts of {whole} differ in width; save the model again")
        found[whole] = torch.cat([rows[place] for place in range(many)])
    return found


def _completed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm knows DINOv2's names by its mask token, which a model for classification may lack."""
    if "register_tokens" in weights or any(".mlp.w12." in name for name in weights):
        weights.setdefault("mask_token", torch.zeros(1, 1))
    return weights
