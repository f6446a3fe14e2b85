"""Blocks whose attention and MLP read the same tokens, side by side, in one product (ViT-22B).

Where the last product is one, too, its bias is the MLP's.

B batch, N tokens, D width, A dims of all heads. The first product gives the neurons, then q, k and v; a last
one for both halves reads what the heads give, then the neurons.
"""

import copy
from typing import Self

from torch import Tensor, nn

from uvc.layers._surgery import take_over
from uvc.layers.block import UVCBlock, gated
from uvc.layers.columns import Columns
from uvc.layers.compact_mlp import CompactMlp
from uvc.layers.differential import LAMBDAS, DiffHeads
from uvc.layers.heads import Heads, Source
from uvc.layers.mlp import Neurons
from uvc.layers.other_blocks import LAYOUTS, CompactOtherBlock, Layout, OtherBlock, kind_of
from uvc.layers.other_layers import SeenHeads, SeenNeurons
from uvc.layers.prunable import Part
from uvc.layers.small_weights import linear_of, select


class SeenParallelAttention(SeenHeads, Heads):
    """The attention in such a block, whose q, k and v come behind the neurons."""

    LINEARS = ("in_proj", "proj", "out_proj")
    OUTSIDE = "a norm of q and k"
    slims = False

    def _named(self, module: nn.Module) -> dict[str, nn.Module]:
        children = module._modules
        names = ("in_proj", "q_norm", "k_norm", "attn_drop")
        found = {name: children[name] for name in names} | {"norm": nn.Identity()}
        if (whole := children.get("out_proj")) is None:
            return found | {"proj": children["attn_out_proj"]}
        self.__dict__["proj"] = Columns(whole, 0, module.in_split[1], False)
        return found | {"out_proj": whole}

    def sources(self) -> tuple[Source, Source, Source]:
        """Where q, k and v come from."""
        weight, bias = self.in_proj.weight, self.in_proj.bias
        first = weight.shape[0] - 3 * self.dims
        rows = (first + i * self.dims for i in range(3))
        return tuple(Source(weight, row, bias, row) for row in rows)

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of all heads, [B, N, A]."""
        return self.in_proj(x)[..., -3 * self.dims :].chunk(3, dim=-1)

    def fixed_params(self) -> int:
        """Parameters that stay whatever is removed: norms of q and k, the bias of the output."""
        norms = (p.numel() for norm in (self.q_norm, self.k_norm) for p in norm.parameters())
        return sum(norms) + (0 if self.proj.bias is None else self.proj.bias.numel())

    def _dense(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool, **positions) -> Tensor:
        out = self.attended_by_children(*self._heads(x), attn_mask, is_causal)
        return self.proj(out.transpose(1, 2).flatten(2))


class SeenParallelDiffAttention(DiffHeads, SeenParallelAttention):
    """The same, of two maps a head."""

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self.head_dim = 2 * module.head_dim  # K; timm calls half of it so

    def _named(self, module: nn.Module) -> dict[str, nn.Module]:
        self.lambda_init = module.lambda_init
        self._parameters.update((name, getattr(module, name)) for name in LAMBDAS)
        return super()._named(module) | {"sub_norm": module.sub_norm}

    def fixed_params(self) -> int:
        """The shares of the second map, too, and the norm of what both make."""
        own = (*(self._parameters[name] for name in LAMBDAS), *self.sub_norm.parameters())
        return super().fixed_params() + sum(p.numel() for p in own if p is not None)


class CompactParallelMlp(CompactMlp):
    """The kept neurons of the MLP in such a block."""

    def _keep_rows(self, dense: nn.Module, neurons: list[int]) -> None:
        # The neurons are the first rows of these parameters.
        weight, *bias = (select(part.parameter, 0, neurons) for part in dense._rows())
        self.fc1 = linear_of(weight, bias[0] if bias else None)


class SeenParallelMlp(SeenNeurons, Neurons):
    """The MLP in such a block."""

    LINEARS = ("in_proj", "fc2")
    SMALL = CompactParallelMlp

    def _named(self, module: nn.Module) -> dict[str, nn.Module]:
        children = module._modules
        self._drops = ("drop2",)
        self._parameters["mlp_bias"] = module._parameters["mlp_bias"]
        found = {"in_proj": children["in_proj"], "act": children["mlp_act"], "drop1": children["mlp_drop"]}
        if (whole := children.get("out_proj")) is None:
            return found | {"fc2": children["mlp_out_proj"]}
        F, A = module.in_split[:2]
        self.__dict__["fc2"], self.LINEARS = Columns(whole, A, F, True), ("in_proj", "out_proj")
        return found | {"out_proj": whole}

    def _rows(self) -> list[Part]:
        weight, bias = self.in_proj.weight, self.in_proj.bias if self.mlp_bias is None else self.mlp_bias
        found = [Part("neuron", weight, 0, self.neurons, 0)]
        return found if bias is None else [*found, Part("neuron", bias, 0, self.neurons, 0)]

    def fixed_params(self) -> int:
        """Parameters that stay whatever is removed: the bias of the output."""
        return 0 if self.fc2.bias is None else self.fc2.bias.numel()

    def _first_layer(self) -> tuple[Tensor | None, ...]:
        bias = self.in_proj.bias if self.mlp_bias is None else self.mlp_bias
        bias = None if bias is None else bias[: self.neurons]
        return self.in_proj.weight[: self.neurons], bias, None, None

    def _hidden(self, x: Tensor) -> Tensor:
        u = self.in_proj(x)[..., : self.neurons]
        return self.act(u if self.mlp_bias is None else u + self.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> [B, N, D]."""
        if self.is_dense:
            return self.fc2(self.drop1(self._hidden(x)))
        return Neurons.forward(self, x)


class Parallel(nn.Module):
    """What blocks on the fly and compact ones share."""

    def stays(self) -> tuple[str, ...]:
        """The norm of what both halves read, and the layer scale of their sum."""
        return ("in_norm", "ls")

    def summed(self, x: Tensor, attn: bool, mlp: bool, gates=(None, None), **masks) -> Tensor:
        """x [B, N, D] and the sum of the branches that run."""
        if not attn and not mlp:
            return x
        y, branches = self.in_norm(x), []
        if attn:
            branches.append(gated(self.attn(y, **masks), gates[0]))
        if mlp:
            branches.append(gated(self.mlp(y), gates[1]))
        return x + self.drop_path(self.ls(sum(branches[1:], branches[0])))


class UVCParallelBlock(Parallel, OtherBlock):
    """One of timm's two such blocks, of which halves and what layers of both offer can be left out."""

    @classmethod
    def take_over(cls, block: nn.Module) -> Self:
        """One of these on the parameters, children and hooks of `block`, with nothing left out."""
        new = take_over(kind_of(block), block)
        layers = (new.layout.kind(new), SeenParallelMlp(new))
        new._layers = layers  # in a tuple, so that they are no children
        new.norm_last = False
        new._skip, new._gates, new._slimming = (False, False), (None, None), None
        return new

    @property
    def attn(self) -> SeenParallelAttention:
        """The attention, as a layer that can leave parts out."""
        self._layers[0].see(self)
        return self._layers[0]

    @property
    def mlp(self) -> SeenParallelMlp:
        """The MLP, the same."""
        self._layers[1].see(self)
        return self._layers[1]

    def around(self) -> tuple[int, int]:
        """Parameters of both halves outside their layers: they share them."""
        return 0, 0

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x [B, N, D] -> [B, N, D]; masks as in timm."""
        attn, mlp = self.attn, self.mlp
        if attn.is_dense and mlp.is_dense and not any(self._skip) and self._gates == (None, None):
            return super(UVCBlock, self).forward(x, attn_mask=attn_mask, is_causal=is_causal)
        runs = (not skip for skip in self._skip)
        return self.summed(x, *runs, self._gates, attn_mask=attn_mask, is_causal=is_causal)


class CompactParallelBlock(Parallel, CompactOtherBlock):
    """The running halves of such a block, on small weights."""

    FULL = UVCParallelBlock

    def _keep_half(self, dense: UVCParallelBlock, digit: str, name: str, small: nn.Module) -> None:
        self.add_module(name, small)
        self.add_module("drop_path", copy.deepcopy(dense.drop_path))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x [B, N, D] -> [B, N, D]; masks as in timm."""
        return self.summed(x, self.record.attn, self.record.mlp, attn_mask=attn_mask, is_causal=is_causal)


_PARALLEL = Layout(
    ("in_norm", "in_norm"),
    "in_proj",
    kind=SeenParallelAttention,
    mlp="in_proj",
    block=UVCParallelBlock,
    small=CompactParallelBlock,
)
LAYOUTS["timm", "ParallelScalingBlock"] = _PARALLEL
LAYOUTS["timm", "DiffParallelScalingBlock"] = _PARALLEL._replace(kind=SeenParallelDiffAttention)
