"""What is left of a block after compaction: plain torch on small weights.

B batch, N tokens, D width.
"""

import copy

from torch import Tensor, nn

from uvc.layers._surgery import meta_copy
from uvc.layers.block import UVCBlock, dropped, norm_last, scaled
from uvc.layers.children import carry_hooks, drop_hooks
from uvc.layers.kinds import prunable
from uvc.layers.token_pruning import Slimming, due, slim


class CompactBlock(nn.Module):
    """The running halves of a block, with `record`, the structure's entry for the block they came from."""

    def __init__(self, dense: UVCBlock, record, slimming: Slimming | None = None):
        super().__init__()
        self.record, self.slimming, self.norm_last = record, slimming, norm_last(dense)
        # In a tuple, so that it is no child: without weights, only sizes and settings are read from it.
        self._origin = (UVCBlock.take_over(meta_copy(dense)),)
        drop_hooks(self.origin.modules())
        if record.attn:
            self._keep_half(dense, "1", "attn", prunable(dense.attn).compacted(record))
        if record.mlp:
            self._keep_half(dense, "2", "mlp", prunable(dense.mlp).compacted(record.neurons))
        self.train(dense.training)
        carry_hooks(dense, self)

    def _keep_half(self, dense: UVCBlock, digit: str, name: str, small: nn.Module) -> None:
        carry_hooks(getattr(dense, name), small)
        self.add_module(name, small)
        for part in (f"norm{digit}", f"ls{digit}", f"drop_path{digit}", "drop_path"):
            if (child := dense._modules.get(part)) is not None:
                self.add_module(part, copy.deepcopy(child))
        if (gamma := dense._parameters.get(f"gamma_{digit}")) is not None:
            self.register_parameter(f"gamma_{digit}", copy.deepcopy(gamma))

    @property
    def origin(self) -> UVCBlock:
        """The dense block on the meta device."""
        return self._origin[0]

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **positions
    ) -> Tensor:
        """x [B, N, D] -> [B, N', D], fewer if it slims; all other arguments go to the attention."""
        slimming, scores = due(self.slimming, x, attn_mask, is_causal), None
        if self.record.attn:
            y = x if self.norm_last else self.norm1(x)
            if slimming is None:
                branch = self.attn(y, attn_mask=attn_mask, is_causal=is_causal, **positions)
            else:
                branch, scores = self.attn.scored(y, slimming)
            x = x + dropped(self, "1", self.norm1(branch) if self.norm_last else scaled(self, "1", branch))
        if slimming is not None:
            x = slim(x, scores, slimming)
        if self.record.mlp:
            branch = self.mlp(x if self.norm_last else self.norm2(x))
            x = x + dropped(self, "2", self.norm2(branch) if self.norm_last else scaled(self, "2", branch))
        return x
