"""Which timm models the layers can serve, and the swap in place."""

from torch import nn

from uvc.layers.block_kinds import BLOCKS, OURS, kind_of_block
from uvc.layers.children import HOOKS, first_change
from uvc.layers.compact_block import CompactBlock
from uvc.layers.families import families_of, layers_of
from uvc.layers.inputs import is_served, trunk_of
from uvc.layers.kinds import ATTENTIONS, MLPS, kind_of_layer
from uvc.layers.other_blocks import layout_of, needs_names, seen
from uvc.layers.prepack import pack_ahead
from uvc.layers.prunable import Prunable
from uvc.layers.stages import blocks_of, listed, lists_of, named_blocks, named_entries

SUPPORTED = (
    "supported are timm's VisionTransformer, Eva, Beit, VisionTransformerRelPos, Cait, NaFlexVit, "
    "SwinTransformer (V2), Hiera, HieraDet and VisionTransformerSAM, blocks of attention and MLP in a row or "
    "side by side, with their attention, Mlp, GluMlp and SwiGLU; "
    "transformers' and torchvision's ViT, DeiT, DINOv2, DINOv3, CLIP vision and SigLIP vision"
)
# Why timm's other blocks and layers are not served, by their class or else by the file they come from.
WHY = {
    "CLIPModel": "it has blocks for text, too; give its vision_model, of which all could go",
    "convit": "its attention adds gated positions; v dims and the MLP's neurons could go",
    "crossvit": "it has branches of several widths; heads, dims and neurons inside each could go",
    "mlp_mixer": "it mixes tokens without attention; the neurons of its MLPs could go",
    "pit": "its tokens are pooled between stages; heads, dims and neurons of its blocks could go",
    "tnt": "it holds a transformer for each patch; heads, dims and neurons of both could go",
    "volo": "its first stage attends by outlook, in a window around each token; neurons could go",
    "xcit": "it attends between channels, not tokens; whole heads and neurons could go",
}


def convert(model: nn.Module) -> nn.Module:
    """Swap the attention, MLP and block modules of a timm model for UVC's, in place, and return the model.

    Parameters, state_dict keys and outputs stay. A converted model is returned as it is. A model that cannot
    be served is left as it is, and a ValueError names the layer.
    """
    check(model)
    for blocks in lists_of(model).values():
        for index, block in enumerate(blocks):
            if not isinstance(block, OURS):
                blocks[index] = kind_of_block(block).take_over(block)
        if isinstance(blocks, nn.Sequential):  # a list is never called as one
            pack_ahead(blocks)
    return model


def families(model: nn.Module) -> list[dict[str, int | tuple[str, ...]]]:
    """What may be pruned of each block of a timm, converted or compacted model.

    "heads", "qk" and "v" (dims of heads) and "neurons" give the multiple in which their units go, 0 where all
    stay; "halves" names the halves that may be skipped. ValueError for a model that `convert` cannot serve.
    """
    if not is_compacted(model):
        check(model)
    return [families_of(*layers_of(block))._asdict() for block in blocks_of(model)]


def is_compacted(model: nn.Module) -> bool:
    """Whether `model` came out of `uvc.compaction`."""
    return any(isinstance(block, CompactBlock) for block in blocks_of(model))


def _served(half: nn.Module, kinds: dict[type, type], ours: bool) -> bool:
    """Whether a half is of a class in `kinds`, or takes the place of one; in a block of ours FSDP2 may have
    given it a class of its own.
    """
    return type(half) in (*kinds, *kinds.values()) or (ours and isinstance(half, Prunable))


def check(model: nn.Module) -> None:
    """ValueError, naming the layer, unless `convert` can serve `model`."""
    blocks = listed(model)
    if not blocks:
        raise ValueError(f"the model is {described(model)}, without lists of transformer blocks; {SUPPORTED}")
    if is_compacted(model):
        raise ValueError(
            f"{next(iter(blocks))} is a CompactBlock: the model is compacted, so its structure can no longer "
            "change"
        )
    for name, block in blocks.items():
        if not isinstance(block, OURS) and not needs_names(block) and type(block) not in BLOCKS:
            raise ValueError(f"{name} is {described(block)}; {SUPPORTED}")
        _check_calls(name, block, block)
        for key, entry in named_entries(name, block).items():
            _check_halves(key, entry, isinstance(block, OURS))
    if not is_served(trunk_of(model)):
        raise ValueError(f"the model is {described(model)}; {SUPPORTED}")


def _check_calls(name: str, module: nn.Module, block: nn.Module) -> None:
    """ValueError if a dense block, or a part of it, has a forward of its own."""
    if not isinstance(block, OURS) and ("forward" in vars(module) or module._compiled_call_impl):
        raise ValueError(
            f"{name} has a forward of its own, which would run in place of the pruned one; convert "
            "the model before it is compiled or wrapped"
        )


def _check_halves(name: str, block: nn.Module, ours: bool) -> None:
    """ValueError, naming the layer, unless the halves of a block, dense or one of ours, can be served."""
    layout = layout_of(block) if needs_names(block) else None
    for half in ("attn", "mlp") if layout is None else (layout.attn, layout.mlp):
        _check_calls(f"{name}.{half}", getattr(block, half), block)
    if layout_of(block) is not None:
        block = seen(block)
    elif not _served(block.attn, ATTENTIONS, ours):
        raise ValueError(f"{name}.attn is {described(block.attn)}; {SUPPORTED}")
    elif not _served(block.mlp, MLPS, ours):
        raise ValueError(f"{name}.mlp is {described(block.mlp)}; {SUPPORTED}")
    if fault := kind_of_layer(block.attn).fault(block.attn):
        raise ValueError(f"{name}.attn.{fault}")
    if fault := kind_of_layer(block.mlp).fault(block.mlp):
        raise ValueError(f"{name}.mlp.{fault}")


def check_children(model: nn.Module, hooks: bool = True, weight: bool = True) -> None:
    """ValueError, naming the layer, where a child of an attention or MLP does more than its weights say.

    For what reads those weights, as a cost or a smaller copy does; hooks, weight: see `children.change`.
    """
    for name, block in named_blocks(model).items():
        block = seen(block)
        if hooks and any(getattr(holder, kind) for holder in getattr(block, "holders", ()) for kind in HOOKS):
            raise ValueError(
                f"{name}: what holds its norm and its attention or MLP has hooks, which nothing smaller "
                "would run; set them on the attention or MLP"
            )
        for half in ("attn", "mlp"):
            layer = getattr(block, half, None)
            if isinstance(layer, Prunable) and (fault := layer.torn()):
                raise ValueError(f"{name}.{half}: {fault}")
            if layer is not None and (fault := first_change(layer, hooks, weight)):
                raise ValueError(
                    f"{name}.{half}.{fault}, so its weights are not all that it does; merge it into "
                    "its layer, or remove it, first"
                )


def described(module: nn.Module) -> str:
    """A module's class, where it comes from, and, if known, why it is not served."""
    kind, file = type(module).__name__, type(module).__module__.rpartition(".")[2]
    why = WHY.get(kind) or WHY.get(file)
    return f"a {kind} of {file}" + (f", and {why}" if why else "")


def set_recompute(model: nn.Module, on: bool = True) -> nn.Module:
    """Trade time for memory in the pruned halves of a converted model: see `UVCAttention.set_recompute`.

    Whole blocks are recomputed by timm's own `model.set_grad_checkpointing()`.
    """
    for block in blocks_of(convert(model)):
        block.attn.set_recompute(on)
        block.mlp.set_recompute(on)
    return model
