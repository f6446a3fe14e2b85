"""Blocks whose attention and MLP read the same tokens, side by side, in one product (ViT-22B).

B batch, N tokens, D width, A dims of all heads. The first product gives the neurons, then q, k and v.
"""

import copy
from typing import Self

from timm.models.vision_transformer import ParallelScalingBlock
from torch import Tensor, nn

from uvc.layers._surgery import take_over
from uvc.layers.block import gated
from uvc.layers.compact_layers import CompactMlp, linear_of, select
from uvc.layers.heads import Heads, Source
from uvc.layers.mlp import Neurons
from uvc.layers.other_blocks import LAYOUTS, CompactOtherBlock, Layout, OtherBlock, kind_of
from uvc.layers.other_layers import SeenHeads, SeenNeurons
from uvc.layers.prunable import Part


class SeenParallelAttention(SeenHeads, Heads):
    """The attention in such a block, whose q, k and v come behind the neurons."""

    LINEARS = ("in_proj", "proj")
    OUTSIDE = "a norm of q and k"
    slims = False

    def _named(self, module: nn.Module) -> dict[str, nn.Module]:
        children = module._modules
        names = ("in_proj", "q_norm", "k_norm", "attn_drop")
        found = {name: children[name] for name in names} | {"norm": nn.Identity()}
        return found | {"proj": children.get("attn_out_proj")}

    @classmethod
    def fault(cls, attn: nn.Module) -> str | None:
        """Beside other children: one product for the outputs of both halves."""
        if attn.proj is None:
            return "out_proj is of attention and MLP at once; heads, v dims and neurons could go"
        return super().fault(attn)

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


class CompactParallelMlp(CompactMlp):
    """The kept neurons of the MLP in such a block."""

    def _keep_rows(self, dense: nn.Module, neurons: list[int]) -> None:
        weight, bias, *_ = dense._first_layer()
        self.fc1 = linear_of(select(weight, 0, neurons), None if bias is None else select(bias, 0, neurons))


class SeenParallelMlp(SeenNeurons, Neurons):
    """The MLP in such a block."""

    LINEARS = ("in_proj", "fc2")
    SMALL = CompactParallelMlp

    def _named(self, module: nn.Module) -> dict[str, nn.Module]:
        children = module._modules
        self._drops = ("drop2",)
        self._parameters["mlp_bias"] = module._parameters["mlp_bias"]
        names = {"in_proj": "in_proj", "act": "mlp_act", "drop1": "mlp_drop", "fc2": "mlp_out_proj"}
        return {name: children.get(own) for name, own in names.items()}

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
    """timm's ParallelScalingBlock, of which halves, heads, v dims and neurons can be left out."""

    @classmethod
    def take_over(cls, block: nn.Module) -> Self:
        """One of these on the parameters, children and hooks of `block`, with nothing left out."""
        new = take_over(kind_of(block), block)
        new._layers = (
            SeenParallelAttention(new),
            SeenParallelMlp(new),
        )  # in a tuple, so that they are no children
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
            return ParallelScalingBlock.forward(self, x, attn_mask=attn_mask, is_causal=is_causal)
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


LAYOUTS["timm", "ParallelScalingBlock"] = Layout(
    ("in_norm", "in_norm"), "in_proj", mlp="in_proj", block=UVCParallelBlock, small=CompactParallelBlock
)
