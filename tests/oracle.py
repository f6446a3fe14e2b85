"""The truth for the layers: a dense timm model in which the removed contributions are absent.

Nothing of uvc computes here. Masks multiply the weights that carry a contribution (columns of the output
projection, rows of q, columns of fc2), and a skipped half's branch is multiplied by zero.
"""

import copy
import inspect
from collections.abc import Callable

import pytest
import torch
from timm.layers import GluMlp, SwiGLU, SwiGLUPacked
from timm.models.deit import VisionTransformerDistilled
from timm.models.naflexvit import NaFlexVitCfg
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import Tensor, nn
from torch.func import functional_call

import uvc
from uvc.layers import image_of, named_blocks
from uvc.models import T2TVisionTransformer
from uvc.structure import BlockStructure, Structure

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def small_vit(cls: type = VisionTransformer, **changes) -> nn.Module:
    """A ViT of 17 tokens (18 distilled): width 24, 3 blocks, 4 heads of 6 dims, 40 neurons, random biases."""
    settings = dict(
        img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=4, mlp_ratio=40 / 24, num_classes=5
    )
    model = cls(**{**settings, **changes})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    return model


GATED = dict(mlp_ratio=80 / 24, act_layer="silu")  # GluMlp halves its hidden width
T2T = dict(img_size=(48, 32), patch_size=16, qkv_bias=False)  # 7 tokens

# What `small_vit` can be: every feature of timm's class that meets a structure.
MODELS = {
    "vit": lambda: small_vit(),
    "vit without biases": lambda: small_vit(qkv_bias=False, proj_bias=False),
    "deit distilled": lambda: small_vit(VisionTransformerDistilled),
    "deit3 with layer scale": lambda: small_vit(no_embed_class=True, init_values=0.5),
    "registers, average pool, post-norm blocks": lambda: small_vit(
        reg_tokens=3, global_pool="avg", block_fn=ResPostBlock, init_values=0.5
    ),
    "map pool, quick gelu": lambda: small_vit(global_pool="map", class_token=False, act_layer="quick_gelu"),
    "one head": lambda: small_vit(num_heads=1),
    "swiglu": lambda: small_vit(mlp_layer=SwiGLU, act_layer="silu", proj_bias=False),
    "packed swiglu": lambda: small_vit(mlp_layer=SwiGLUPacked, **GATED),
    "glu, gate last": lambda: small_vit(mlp_layer=GluMlp, **GATED),
    "q/k norms": lambda: small_vit(qk_norm=True),
    "norms inside": lambda: small_vit(scale_attn_norm=True, scale_mlp_norm=True),
    "t2t performer": lambda: small_vit(T2TVisionTransformer, **T2T),
    "t2t transformer": lambda: small_vit(T2TVisionTransformer, form="transformer", **T2T),
}


def images(model: nn.Module, batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random images of the model's own size."""
    return torch.randn(batch, *image_of(model), dtype=dtype)


def needs_whole_naflex() -> None:
    """Skips a test that makes a NaFlexVit again, where this timm's takes too few arguments for that."""
    if "pos_embed_antialias" not in inspect.signature(NaFlexVitCfg).parameters:
        pytest.skip("the NaFlexVit of this timm takes too few arguments to be made again")


def distilled_198() -> nn.Module:
    """A narrow distilled DeiT at the real number of tokens, 198."""
    return small_vit(VisionTransformerDistilled, img_size=224, patch_size=16, depth=2)


def structures(model: nn.Module) -> dict[str, Structure]:
    """A structure for each thing that can be absent."""
    dense, drawn = Structure.dense(model), Structure.random(model, 0.5, seed=3)

    def change(base: Structure, **fields) -> Structure:
        return Structure(tuple(BlockStructure(**{**vars(block), **fields}) for block in base.blocks))

    ragged = drawn.blocks[0]
    no_qk = BlockStructure(**{**vars(ragged), "qk_dims": ((), *ragged.qk_dims[1:])})
    free = uvc.families(model)[0]["qk"]
    half = [dict(attn=False), dict(mlp=False), dict(attn=False, mlp=False)]
    return {
        "dense": dense,
        "random at keep 0.5": drawn,
        "random at keep 0.1": Structure.random(model, 0.1, seed=5),
        "uniform with equal heads": Structure.uniform(model, heads=0.5, head_dims=0.5, neurons=0.5),
        "no heads": change(drawn, heads=(), qk_dims=(), v_dims=()),
        "no neurons": change(drawn, neurons=()),
        "a head without q/k dims": Structure((no_qk if free else ragged, *drawn.blocks[1:])),
        "halves skipped in turn": Structure(
            tuple(BlockStructure(**{**vars(b), **half[i % 3]}) for i, b in enumerate(drawn.blocks))
        ),
        "every block skipped": change(drawn, attn=False, mlp=False),
    }


def absent(model: nn.Module, structure: Structure) -> Callable[..., Tensor]:
    """A function like the plain timm `model`, without the contributions that `structure` removes."""

    def run(x: Tensor, **arguments) -> Tensor:
        parameters, handles = dict(model.named_parameters()), []
        for (name, block), kept in zip(named_blocks(model).items(), structure.blocks, strict=True):
            if isinstance(block, ParallelScalingBlock | DiffParallelScalingBlock):
                handles += without(name, block, kept, parameters)
                continue
            A = block.attn.proj.in_features
            K = A // getattr(block.attn, "heads", getattr(block.attn, "num_heads", 1))
            q, v, neurons = torch.zeros(3 * A), torch.zeros(A), torch.zeros(second(block.mlp).in_features)
            q[A:] = 1  # the dot product loses a term when its q is zero; k and v rows stay as they are
            for head, qk_dims, v_dims in zip(kept.heads, kept.qk_dims, kept.v_dims, strict=True):
                for d in qk_dims:
                    q[head * K + d] = 1
                for d in v_dims:
                    v[head * K + d] = 1
            neurons[list(kept.neurons)] = 1
            masks = {"attn.qkv.weight": q[:, None], "attn.qkv.bias": q, "attn.proj.weight": v}
            masks |= {"attn.q_bias": q[:A], "attn.q_proj.weight": q[:A, None], "attn.q_proj.bias": q[:A]}
            for part, mask in {**masks, "mlp.fc2.weight": neurons, "mlp.w2.weight": neurons}.items():
                path = place_of(name, part)
                if path in parameters:
                    parameters[path] = parameters[path] * mask.to(parameters[path])
            for runs, half in ((kept.attn, "1"), (kept.mlp, "2")):
                path = getattr(block, f"drop_path{half}", None)
                if not runs and path is None:  # CaiT's halves share one
                    scale = f"{name}.gamma_{half}"
                    parameters[scale] = parameters[scale] * 0.0
                elif not runs:
                    handles.append(path.register_forward_hook(lambda module, inputs, branch: branch * 0.0))
        out = functional_call(model, parameters, (x,), arguments)
        for handle in handles:
            handle.remove()
        return out

    return run


def place_of(block: str, part: str) -> str:
    """Where a part of an attention or MLP is: of "blocks.0[1]", the second of several in their own lists."""
    if "[" not in block:
        return f"{block}.{part}"
    name, index = block.rstrip("]").split("[")
    return f"{name}.{'attns' if part.startswith('attn') else 'ffns'}.{index}.{part}"


def without(
    name: str,
    block: ParallelScalingBlock | DiffParallelScalingBlock,
    kept: BlockStructure,
    parameters: dict[str, Tensor],
) -> list:
    """Takes contributions of a block of parallel halves out of `parameters`; gives hooks that skip halves."""
    F, A = block.in_split[:2]
    K = A // block.num_heads
    first, v, neurons = torch.ones(F + 3 * A), torch.zeros(A), torch.zeros(F)
    first[F : F + A] = 0
    for head, qk_dims, v_dims in zip(kept.heads, kept.qk_dims, kept.v_dims, strict=True):
        first[[F + head * K + d for d in qk_dims]] = 1
        v[[head * K + d for d in v_dims]] = 1
    neurons[list(kept.neurons)] = 1
    masks = {"in_proj.weight": first[:, None], "in_proj.bias": first}
    masks |= {"attn_out_proj.weight": v, "mlp_out_proj.weight": neurons}
    # One last product reads both halves, and has the MLP's bias.
    masks |= {"out_proj.weight": torch.cat([v * kept.attn, neurons * kept.mlp])}
    masks |= {"out_proj.bias": torch.tensor(float(kept.mlp))}
    for part, mask in masks.items():
        if (path := f"{name}.{part}") in parameters:
            parameters[path] = parameters[path] * mask.to(parameters[path])
    skipped = [name for name, runs in (("attn", kept.attn), ("mlp", kept.mlp)) if not runs]
    halves = (block._modules.get(f"{name}_out_proj") for name in skipped)
    return [half.register_forward_hook(lambda *given: given[2] * 0.0) for half in halves if half is not None]


def second(mlp: nn.Module) -> nn.Linear:
    """The second layer of one of timm's MLPs."""
    return mlp.fc2 if hasattr(mlp, "fc2") else mlp.w2


def gradients(model: nn.Module, out: Tensor) -> dict[str, Tensor]:
    """Gradients of a fixed random projection of `out`; zeros where a parameter takes no part."""
    model.zero_grad()
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    (out * weights.to(out)).sum().backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def error(found: Tensor, truth: Tensor, floor: float = 1e-30) -> float:
    """Largest difference over the largest magnitude of the truth, which counts as at least `floor`."""
    if truth.numel() == 0:
        return 0.0
    return float(((found - truth).abs().max() / truth.abs().max().clamp_min(floor)).detach())


def stored(model: nn.Module) -> dict[str, tuple]:
    """Names, dtypes, shapes and bytes of what a model holds. Equal ones may lie differently in memory, where
    a product may differ in its last bit: outputs are then compared with `error`.
    """
    return {
        name: (t.dtype, tuple(t.shape), t.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for name, t in model.state_dict().items()
    }


def gradient_error(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """The largest `error` over all gradients; their floor is a thousandth of the largest gradient."""
    assert found.keys() == truth.keys()
    floor = 1e-3 * max(float(t.abs().max()) for t in truth.values() if t.numel())
    return max(error(found[name], truth[name], floor) for name in truth)


def positions(model: nn.Module) -> dict[str, Tensor]:
    """For each parameter of `uvc.compact(model)`: where its entries were in the parameter of its name."""
    numbered = copy.deepcopy(model).double()
    with torch.no_grad():
        for parameter in numbered.parameters():
            parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape))
    return {name: p.detach().long() for name, p in uvc.compact(numbered).named_parameters()}
