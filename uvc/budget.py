"""What a structure costs: one linear formula for every metric, for ints and for tensors with gradients.

N tokens, D width, H heads, K head dim, L blocks.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from uvc.layers import hollow
from uvc.structure import Structure, patch_tokens, sizes_of, structure_of

METRICS = ("macs", "params")


class Prices(NamedTuple):
    """What each part costs in one metric: MACs per image, or parameters.

    `fixed`: everything outside the blocks. The rest has L entries, one per block: `attn`, `mlp`: a half that
    runs, whatever it keeps; `qk`, `v`: a kept q/k dim or v dim; `neuron`: a kept neuron.
    """

    fixed: float
    attn: tuple[float, ...]
    mlp: tuple[float, ...]
    qk: tuple[float, ...]
    v: tuple[float, ...]
    neuron: tuple[float, ...]


class Counts(NamedTuple):
    """How much each block keeps, as L ints or tensors [L]; `attn`, `mlp`: 1 if that half runs, else 0."""

    attn: tuple[int, ...] | Tensor
    mlp: tuple[int, ...] | Tensor
    qk: tuple[int, ...] | Tensor
    v: tuple[int, ...] | Tensor
    neuron: tuple[int, ...] | Tensor


class BlockCost(NamedTuple):
    """MACs per image and parameters of one block."""

    macs: int
    params: int


class Cost(NamedTuple):
    """MACs per image and parameters of a model, and of each of its blocks."""

    macs: int
    params: int
    blocks: tuple[BlockCost, ...]


def counts(structure: Structure) -> Counts:
    """How much `structure` keeps in each block."""
    return Counts(
        attn=tuple(int(b.attn) for b in structure.blocks),
        mlp=tuple(int(b.mlp) for b in structure.blocks),
        qk=tuple(sum(map(len, b.qk_dims)) for b in structure.blocks),
        v=tuple(sum(map(len, b.v_dims)) for b in structure.blocks),
        neuron=tuple(len(b.neurons) for b in structure.blocks),
    )


def prices(model: nn.Module, metric: str, structure: Structure | None = None) -> Prices:
    """The prices of a timm, converted or compacted model in "macs" or "params", at its own input size.

    They hold while as many tokens go on from block to block as in `structure`, by default the model's own.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    s = sizes_of(model)
    if metric == "params":
        fixed = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("blocks."))
        row = s.dim + s.qkv_bias
        # A q/k dim is a row of q and one of k; a v dim a row of v and a column of the projection.
        parts = (s.attn_params, s.mlp_params, 2 * row, row + s.dim, s.neuron_params)
        return Prices(fixed, *((part,) * s.blocks for part in parts))
    if s.patches is None:
        raise ValueError(
            "the model has no input size of its own, so its cost is undefined; give it an img_size"
        )
    # Tokens N that reach a block, and those that go on from its attention half to its MLP.
    tokens = patch_tokens(structure_of(model) if structure is None else structure, s.patches)
    tokens = [(s.prefix + arriving, s.prefix + leaving) for arriving, leaving in tokens]
    # A v dim: a row, N^2 products, a column. A q/k dim: a row of q, one of k, a term of N^2 dot products, and
    # where tokens are dropped one more row of them, which ranks the tokens.
    v = tuple(2 * N * s.dim + N * N for N, _ in tokens)
    qk = tuple(dim + (N if left < N else 0) for dim, (N, left) in zip(v, tokens, strict=True))
    # A neuron: a row of fc1, with a gate a second one, and a column of fc2.
    neuron = tuple((s.neuron_rows + 1) * left * s.dim for _, left in tokens)
    free = (0,) * s.blocks
    return Prices(fixed_macs(model, tokens[-1][1]), free, free, qk, v, neuron)


class _FirstTokens(nn.Module):
    """Blocks that compute nothing and drop tokens."""

    def __init__(self, tokens: int | None):
        super().__init__()
        self.tokens = tokens

    def forward(self, x: Tensor) -> Tensor:
        return x[:, : self.tokens]


def fixed_macs(model: nn.Module, tokens: int | None = None) -> int:
    """MACs per image outside the blocks, which leave so many tokens (None: all) to the head.

    By torch's flop counter, on a copy that holds no weights.
    """
    blocks = nn.Sequential(_FirstTokens(tokens))
    stem_and_head = hollow(model, {id(model.blocks): blocks}).eval().requires_grad_(False)
    dtype = next(stem_and_head.patch_embed.parameters()).dtype
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        stem_and_head(torch.empty(1, model.in_chans, *model.patch_embed.img_size, dtype=dtype, device="meta"))
    return counter.get_total_flops() // 2


def block_costs(prices: Prices, counts: Counts) -> tuple[float, ...] | Tensor:
    """Cost of each block, as `counts` are: L exact ints, or a tensor [L] with gradients."""
    if isinstance(counts.qk, Tensor):
        parts = (counts.qk.new_tensor(part) for part in prices[1:])
        return _block_cost(*parts, *counts)
    return tuple(_block_cost(*block) for block in zip(*prices[1:], *counts, strict=True))


def _block_cost(p_attn, p_mlp, p_qk, p_v, p_neuron, attn, mlp, qk, v, neuron):
    return attn * (p_attn + p_qk * qk + p_v * v) + mlp * (p_mlp + p_neuron * neuron)


def total(prices: Prices, counts: Counts) -> float | Tensor:
    """R = fixed + sum over blocks of attn (p_attn + p_qk n_qk + p_v n_v) + mlp (p_mlp + p_neuron n_neuron).

    Counts are tuples of ints (the exact int comes back) or tensors [L] (a scalar tensor with gradients).
    """
    blocks = block_costs(prices, counts)
    return prices.fixed + (blocks.sum() if isinstance(blocks, Tensor) else sum(blocks))


def cost(model: nn.Module, structure: Structure | None = None) -> Cost:
    """What `model` costs per image with its own structure, or with the one given.

    MACs count patch embedding, linear layers, attention products and head: half of what torch's flop counter
    counts on the compacted model. Parameters are those of the compacted model.
    """
    structure = structure_of(model) if structure is None else structure
    kept = counts(structure)
    macs, params = (prices(model, metric, structure) for metric in METRICS)
    blocks = map(BlockCost, block_costs(macs, kept), block_costs(params, kept))
    return Cost(total(macs, kept), total(params, kept), tuple(blocks))


def smallest_reachable(model: nn.Module, metric: str) -> float:
    """The smallest budget that can be met, as a fraction of the dense cost: every block skipped."""
    dense = Structure.dense(model)
    p = prices(model, metric, dense)
    return p.fixed / total(p, counts(dense))
