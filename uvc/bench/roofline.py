"""What a shape must do at least: FLOPs and bytes of every pass, and the time no implementation can beat.

FLOPs are two per multiply-accumulate. Each pass reads its inputs once and writes its outputs once; norm and
residual are one pass, bias and activation belong to their product, and no pass stores the N x N weights of
attention. For a layer that keeps Q q/k dims and V v dims over all heads and F neurons, forward:

    pass                 FLOPs          numbers moved
    norm and residual    0              4 M D
    qkv                  2 M D (2Q+V)   M D + D (2Q+V) + M (2Q+V)
    attention core       2 M N (Q+V)    M (2Q+V) + M V
    projection           2 M V D        M V + V D + M D
    first MLP product    2 M D F        M D + D F + M F   (in training M F more: what GELU's gradient needs)
    second MLP product   2 M F D        M F + F D + M D

B batch, N tokens, M = B*N, D width, H heads, K head dim, A = H*K. The backward pass has both gradients of
every product, and a core of 2 M N (3Q + 2V) FLOPs: dV, dP, dQ, dK and the scores once more.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from uvc.bench.ceilings import Ceilings
from uvc.costs import counts, fixed_macs
from uvc.structure import BlockStructure, Structure


class Pass(NamedTuple):
    """One trip through memory: FLOPs and bytes."""

    flops: int
    bytes: int


class Work(NamedTuple):
    """Passes that follow one another."""

    passes: tuple[Pass, ...]

    @property
    def flops(self) -> int:
        """Of all passes."""
        return sum(p.flops for p in self.passes)

    @property
    def bytes(self) -> int:
        """Of all passes."""
        return sum(p.bytes for p in self.passes)

    def floor_ms(self, ceilings: Ceilings) -> float:
        """Milliseconds below which no implementation gets: per pass, arithmetic or traffic at its ceiling."""
        return 1e3 * sum(ceilings.seconds(*p) for p in self.passes)


class Shape(NamedTuple):
    """Sizes of a transformer. `stem`: MACs per image before the blocks; `pixels`: numbers in an image."""

    batch: int
    tokens: int
    dim: int
    heads: int
    head_dim: int
    hidden: int
    stem: int = 196 * 768 * 192
    pixels: int = 3 * 224 * 224
    classes: int = 1000


class Kept(NamedTuple):
    """Kept q/k dims, v dims and neurons of one layer; a skipped half keeps None of its kind."""

    qk: int | None
    v: int | None
    neurons: int | None


def shape_of(model: nn.Module, batch: int) -> Shape:
    """The shape of a timm VisionTransformer; ValueError for one that is not built of plain MLPs."""
    attn, mlp, D = model.blocks[0].attn, model.blocks[0].mlp, model.embed_dim
    if not hasattr(mlp, "fc1") or mlp.fc1.out_features != mlp.fc2.in_features:
        raise ValueError(f"the MLP is a {type(mlp).__name__}; only the work of plain MLPs is counted")
    A, heads, classes = attn.qkv.out_features // 3, attn.num_heads, model.num_classes
    return Shape(
        batch=batch,
        tokens=model.patch_embed.num_patches + model.num_prefix_tokens,
        dim=D,
        heads=heads,
        head_dim=A // heads,
        hidden=mlp.fc1.out_features,
        stem=fixed_macs(model) - D * classes,
        pixels=model.in_chans * math.prod(model.patch_embed.img_size),
        classes=classes,
    )


def everything(shape: Shape) -> Kept:
    """Nothing is removed."""
    A = shape.heads * shape.head_dim
    return Kept(A, A, shape.hidden)


def kept_of(block: BlockStructure) -> Kept:
    """How much one block of a structure keeps."""
    n = counts(Structure((block,)))
    qk, v = (n.qk[0], n.v[0]) if block.attn else (None, None)
    return Kept(qk, v, n.neuron[0] if block.mlp else None)


def product(m: int, k: int, n: int, size: int, result: int | None = None) -> Pass:
    """[m, k] times [k, n], `size` bytes per number; `result`: how many numbers are written, unless m*n."""
    return Pass(2 * m * k * n, size * (m * k + k * n + (m * n if result is None else result)))


def attention_forward(s: Shape, kept: Kept, size: int) -> list[Pass]:
    """qkv, the core, the projection."""
    M, rows = s.batch * s.tokens, 2 * kept.qk + kept.v
    core = 2 * M * s.tokens * (kept.qk + kept.v)
    return [
        product(M, s.dim, rows, size),
        Pass(core, size * M * (rows + kept.v)),
        product(M, kept.v, s.dim, size),
    ]


def attention_backward(s: Shape, kept: Kept, size: int, full: bool, recompute: bool = True) -> list[Pass]:
    """Both gradients of each product, and the core: dV, dP, dQ, dK and the scores once more.

    `full`: weight gradients are written at full size, zeros included.
    """
    M, A, rows = s.batch * s.tokens, s.heads * s.head_dim, 2 * kept.qk + kept.v
    core = 2 * M * s.tokens * (2 * kept.qk + 2 * kept.v + (kept.qk if recompute else 0))
    return [
        product(M, s.dim, kept.v, size),
        product(kept.v, M, s.dim, size, A * s.dim if full else None),
        Pass(core, size * M * (2 * rows + 2 * kept.v)),
        product(M, rows, s.dim, size),
        product(rows, M, s.dim, size, 3 * A * s.dim if full else None),
    ]


def mlp_forward(s: Shape, kept: Kept, size: int, training: bool) -> list[Pass]:
    """Two products; in training the first also leaves what the activation's gradient needs."""
    M, F = s.batch * s.tokens, kept.neurons
    return [
        product(M, s.dim, F, size, (2 if training else 1) * M * F),
        product(M, F, s.dim, size),
    ]


def mlp_backward(s: Shape, kept: Kept, size: int, full: bool) -> list[Pass]:
    """Both gradients of each product; the activation's gradient reads what was left for it."""
    M, F = s.batch * s.tokens, kept.neurons
    written = s.hidden * s.dim if full else None
    hidden = product(M, s.dim, F, size)
    return [
        Pass(hidden.flops, hidden.bytes + size * M * F),
        product(F, M, s.dim, size, written),
        product(M, F, s.dim, size),
        product(F, M, s.dim, size, written),
    ]


def layer_work(op: str, s: Shape, kept: Kept, size: int, backward: bool, full: bool = True) -> Work:
    """One attention or MLP layer, forward (for inference) or backward alone."""
    if op == "attention":
        passes = attention_backward(s, kept, size, full) if backward else attention_forward(s, kept, size)
    else:
        passes = mlp_backward(s, kept, size, full) if backward else mlp_forward(s, kept, size, False)
    return Work(tuple(passes))


def solver_work(s: Shape, layers: int) -> Work:
    """A step of the solver on float32 weights: scores from gradients, the shrink, norms.

    Gradients are read on one side of each group only: of q, of the projection and of the second MLP matrix.
    """
    A, F = s.heads * s.head_dim, s.hidden
    weights = layers * ((4 * A + 2 * F) * s.dim + 3 * A + F)
    gated = layers * ((2 * A + F) * s.dim + A)
    return Work((Pass(2 * gated, 8 * gated), Pass(weights, 8 * weights), Pass(2 * weights, 4 * weights)))


def model_work(
    s: Shape, kept: Iterable[Kept], size: int, training: bool, params: int = 0, full: bool = True
) -> Work:
    """Inference, or a training step with AdamW over `params` float32 parameters.

    Where products run in 2 bytes (autocast), every parameter is cast once per pass. `full` as in
    `attention_backward`.
    """
    M = s.batch * s.tokens
    norm = Pass(0, 4 * size * M * s.dim)
    stem = Pass(2 * s.batch * s.stem, size * s.batch * (s.pixels + s.tokens * s.dim))
    head = product(s.batch, s.dim, s.classes, size)
    passes = [stem, norm, head]
    if training:
        # Images have no gradient, the head has both. AdamW reads weight, gradient, averages; writes three.
        passes += [stem, norm, head, head, Pass(0, 28 * params)]
    if size < 4:
        passes.append(Pass(0, (4 + size) * params))
    for layer in kept:
        if layer.v is not None:
            passes += [norm, *attention_forward(s, layer, size)]
            if training:
                passes += [norm, *attention_backward(s, layer, size, full)]
        if layer.neurons is not None:
            passes += [norm, *mlp_forward(s, layer, size, training)]
            if training:
                passes += [norm, *mlp_backward(s, layer, size, full)]
    return Work(tuple(passes))
