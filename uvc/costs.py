"""What a structure costs: MACs and parameters by one linear formula; latency comes from a table.

N tokens, D width, H heads, K head dim, L blocks.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from uvc.layers import (
    Prunable,
    Sizes,
    UnitCost,
    check_children,
    image_of,
    kind_of_block,
    lists_of,
    meta_copy,
    sizes_of,
    stem_of,
)
from uvc.structure import Structure, patch_tokens, structure_of

LINEAR = ("macs", "params")
_aten = torch.ops.aten


class Counts(NamedTuple):
    """How much each block keeps, as L ints or tensors [L]; `attn`, `mlp`: 1 if that half runs, else 0.

    `qk`, `v`: dims over all heads; `heads`: kept heads.
    """

    attn: tuple[float, ...] | Tensor
    mlp: tuple[float, ...] | Tensor
    qk: tuple[float, ...] | Tensor
    v: tuple[float, ...] | Tensor
    neuron: tuple[float, ...] | Tensor
    heads: tuple[float, ...] | Tensor


class BlockCounts(NamedTuple):
    """The entries of ``Counts`` for one block."""

    attn: float
    mlp: float
    qk: float
    v: float
    neuron: float
    heads: float


class Costs(Protocol):
    """How a metric prices a structure. `fixed`: what the model costs without any block."""

    fixed: float

    def block(self, index: int, kept: BlockCounts) -> float:
        """What block `index` costs when it keeps `kept`."""
        ...

    def at(self, counts: Counts) -> "Prices":
        """What one more unit of each kind costs where the blocks keep `counts`."""
        ...


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

    def block(self, index: int, kept: BlockCounts) -> float:
        """What block `index` costs when it keeps `kept`."""
        return _block_cost(*(part[index] for part in self[1:]), *kept)

    def at(self, counts: Counts) -> "Prices":
        """The same everywhere: the cost is linear."""
        return self


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
        heads=tuple(len(b.heads) for b in structure.blocks),
    )


def prices(model: nn.Module, metric: str, structure: Structure | None = None) -> Prices:
    """The prices of a timm, converted or compacted model in "macs" or "params", at its own input size.

    They hold while as many tokens go on from block to block as in `structure`, by default the model's own.
    """
    if metric not in LINEAR:
        raise ValueError(f"metric must be one of {', '.join(LINEAR)}, got {metric!r}")
    s = sizes_of(model)
    check_children(model, hooks=False, weight=False)
    if metric == "params":
        blocks = tuple(f"{name}." for name in lists_of(model))
        fixed = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(blocks))
        fixed += sum(s.rest)
        rows = []
        for (attn, mlp), around in zip(s.layers, s.around, strict=True):
            halves = (layer.fixed_params() + n for layer, n in zip((attn, mlp), around, strict=True))
            rows.append((*halves, *(unit.params for unit in unit_costs(attn, mlp))))
        return Prices(fixed, *zip(*rows, strict=True))
    if s.patches is None:
        raise ValueError(
            "the model has no input size of its own, so its cost is undefined; give it an img_size"
        )
    tokens = patch_tokens(structure_of(model) if structure is None else structure, s.patches)
    last = tokens[-1][1]
    return macs_at(s, tokens, fixed_macs(model, None if last == s.patches else s.prefix + last))


def macs_at(s: Sizes, tokens: Sequence[tuple[float, float]], fixed: float) -> Prices:
    """The prices in MACs where so many patch tokens reach each block and go on from its attention half."""
    rows = []
    for i, (pair, (arriving, leaving)) in enumerate(zip(s.layers, tokens, strict=True)):
        N, pairs, queries, M, terms = s.reads(i, arriving, leaving)
        qk, v, neuron = unit_costs(*pair)
        # A v dim: rows, a product for each pair, a column. A q/k dim: rows, a term of the dot product of each
        # pair, terms of positions that are read off queries, and where tokens are dropped one more row of
        # them, which ranks the tokens.
        rank = N if leaving < arriving else 0
        halves = pair[0].half_macs(N), pair[1].half_macs(M)
        v_macs = N * v.rows + queries * v.columns + pairs
        rows.append((*halves, N * qk.macs + pairs + terms + rank, v_macs, M * neuron.macs))
    return Prices(fixed, *zip(*rows, strict=True))


def unit_costs(attn: Prunable, mlp: Prunable) -> tuple[UnitCost, UnitCost, UnitCost]:
    """What a q/k dim, a v dim and a neuron cost in parameters and linear layers."""
    return attn.unit_cost("qk"), attn.unit_cost("v"), mlp.unit_cost("neuron")


class _FirstTokens(nn.Module):
    """Blocks that compute nothing and drop tokens."""

    def __init__(self, tokens: int | None):
        super().__init__()
        self.tokens = tokens

    def forward(self, x: Tensor, *masks, **arguments) -> Tensor:
        return x[:, : self.tokens]


def _rest(blocks: nn.Sequential | nn.ModuleList, tokens: int | None) -> nn.Module:
    """What is left of these blocks, on the meta device, where all halves are skipped."""
    dense = [getattr(block, "origin", block) for block in blocks]
    if not any(kind_of_block(block).stays(block) or kind_of_block(block).pools(block) > 1 for block in dense):
        return nn.Sequential(*(_FirstTokens(tokens) for _ in dense))
    left = [kind_of_block(block).take_over(meta_copy(block)) for block in dense]
    for block in left:
        block.set_skip(True, True)
    return nn.Sequential(*left) if isinstance(blocks, nn.Sequential) else nn.ModuleList(left)


def _sdpa(query: torch.Size, key: torch.Size, value: torch.Size, *rest, **_) -> int:
    # Scores and weighted values.
    return 2 * query[:-1].numel() * key[-2] * (query[-1] + value[-1])


def _sdpa_backward(
    grad: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *rest, **_
) -> int:
    # Scores again, dP and dV, dQ and dK.
    return 2 * query[:-1].numel() * key[-2] * (3 * query[-1] + 2 * value[-1])


def flop_counter() -> FlopCounterMode:
    """torch's flop counter, with formulas for the attention kernels that some versions of torch leave out."""
    formulas = {
        _aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
        _aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward,
        _aten._scaled_dot_product_fused_attention_overrideable: _sdpa,
        _aten._scaled_dot_product_fused_attention_overrideable_backward: _sdpa_backward,
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


def count_macs(model: nn.Module, images: Tensor) -> int:
    """MACs of the model's forward pass on these images in evaluation, counted call by call."""
    modes = [(module, module.training) for module in model.modules()]
    # torch's counter fails on a view of a parameter that was made without gradients.
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with flop_counter() as counter, torch.no_grad():
        functional_call(model.eval(), weights, (images,))
    for module, training in modes:  # parents first, as `train` reaches their children, too
        module.train(training)
    return counter.get_total_flops() // 2


def fixed_macs(model: nn.Module, tokens: int | None = None) -> int:
    """MACs per image outside the blocks, which leave so many tokens (None: all) to the head.

    By torch's flop counter, on a copy that holds no weights.
    """
    rest = {id(blocks): _rest(blocks, tokens) for blocks in lists_of(model).values()}
    stem_and_head = meta_copy(model, rest).eval().requires_grad_(False)
    dtype = next(stem_of(stem_and_head).parameters()).dtype
    image = torch.empty(1, *image_of(model), dtype=dtype, device="meta")
    return count_macs(stem_and_head, image)


def block_costs(costs: Costs, counts: Counts) -> tuple[float, ...] | Tensor:
    """Cost of each block, as `counts` are: L numbers, exact for ints, or a tensor [L].

    The tensor has gradients with respect to counts where the cost is linear.
    """
    if not isinstance(counts.qk, Tensor):
        return tuple(costs.block(i, BlockCounts(*kept)) for i, kept in enumerate(zip(*counts, strict=True)))
    if isinstance(costs, Prices):
        return _block_cost(*(counts.qk.new_tensor(part) for part in costs[1:]), *counts)
    return counts.qk.new_tensor(block_costs(costs, Counts(*(tuple(part.tolist()) for part in counts))))


def _block_cost(p_attn, p_mlp, p_qk, p_v, p_neuron, attn, mlp, qk, v, neuron, heads):
    return attn * (p_attn + p_qk * qk + p_v * v) + mlp * (p_mlp + p_neuron * neuron)


def total(costs: Costs, counts: Counts) -> float | Tensor:
    """R = fixed + sum over blocks of attn (p_attn + p_qk n_qk + p_v n_v) + mlp (p_mlp + p_neuron n_neuron).

    Counts are tuples of ints (the exact int comes back) or tensors [L] (a scalar tensor with gradients).
    """
    blocks = block_costs(costs, counts)
    return costs.fixed + (blocks.sum() if isinstance(blocks, Tensor) else sum(blocks))


def cost(model: nn.Module, structure: Structure | None = None) -> Cost:
    """What `model` costs per image with its own structure, or with the one given.

    MACs count patch embedding, linear layers, attention products and head: half of what torch's flop counter
    counts on the compacted model. Parameters are those of the compacted model.
    """
    structure = structure_of(model) if structure is None else structure
    kept = counts(structure)
    macs, params = (prices(model, metric, structure) for metric in LINEAR)
    blocks = map(BlockCost, block_costs(macs, kept), block_costs(params, kept))
    return Cost(total(macs, kept), total(params, kept), tuple(blocks))
