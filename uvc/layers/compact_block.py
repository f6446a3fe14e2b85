"""What is left of a block after compaction: plain torch on small weights.

B batch, N tokens, D width.
"""

import copy

import torch
from timm.layers import LayerScale
from torch import Tensor, nn

from uvc.layers._surgery import meta_copy
from uvc.layers.block import InARow, UVCBlock, dropped, norm_last, scaled
from uvc.layers.children import (
    carry_hooks,
    drop_hooks,
    hooked_everywhere,
    normed,
    runs_as_it_is,
    writes_onnx,
)
from uvc.layers.compact_attention import CompactAttention
from uvc.layers.compact_mlp import CompactMlp
from uvc.layers.kinds import prunable
from uvc.layers.small_weights import passes_on
from uvc.layers.token_pruning import Slimming, due, slim

# The children of a block that does nothing besides; a scale stays where its half does.
HALVES = {"norm1", "attn", "ls1", "norm2", "mlp", "ls2"}


class CompactBlock(InARow):
    """The running halves of a block, with `record`, the structure's entry for the block they came from.

    `form` is how its heads and neurons run, one of `FORMS`.
    """

    # What it is made from.
    FULL: type[UVCBlock] = UVCBlock

    def __init__(self, dense: UVCBlock, record, slimming: Slimming | None = None, form: str = "grouped"):
        super().__init__()
        self.record, self.slimming, self.norm_last, self.form = record, slimming, norm_last(dense), form
        # In a tuple, so that it is no child: without weights, only sizes and settings are read from it.
        self._origin = (self.FULL.take_over(meta_copy(dense)),)
        drop_hooks(self.origin.modules())
        if record.attn:
            self._keep_half(dense, "1", "attn", prunable(dense.attn).compacted(record, form))
        if record.mlp:
            self._keep_half(dense, "2", "mlp", prunable(dense.mlp).compacted(record, form))
        for name in self.FULL.stays(dense):
            if name not in self._modules:
                self.add_module(name, copy.deepcopy(getattr(dense, name)))
        steps = ("residual", "attended", "fed", "ended")
        own = all(getattr(type(self), step) is getattr(InARow, step) for step in steps)
        bare = own and not self.norm_last and not self._parameters and self._modules.keys() <= HALVES
        self._children = len(self._modules) if bare else None
        self._scales = tuple(name for name in ("ls1", "ls2") if name in self._modules)
        self.train(dense.training)
        carry_hooks(dense, self)

    def _keep_half(self, dense: UVCBlock, digit: str, name: str, small: nn.Module) -> None:
        carry_hooks(getattr(dense, name), small)
        self.add_module(name, small)
        for part in (f"norm{digit}", f"ls{digit}", f"drop_path{digit}", "drop_path"):
            child = dense._modules.get(part)
            if child is not None and (part.startswith("norm") or not passes_on(child)):
                self.add_module(part, copy.deepcopy(child))
        if (gamma := dense._parameters.get(f"gamma_{digit}")) is not None:
            self.register_parameter(f"gamma_{digit}", copy.deepcopy(gamma))

    def in_form(self, form: str, halves: tuple[str, ...] = ("attn", "mlp")) -> "CompactBlock":
        """A copy whose halves, of these, run in one of `FORMS`; ValueError where weights were replaced."""
        halves = [h for h in halves if form != self.form and getattr(self.record, h)]
        memo = {id(getattr(self, half)): self._half_in_form(half, form) for half in halves}
        new = copy.deepcopy(self, memo)
        new.form = form
        return new

    def _half_in_form(self, half: str, form: str) -> nn.Module:
        old = getattr(self, half)
        # Dense weights whose entries are their own numbers show where each is in either form; 0 is padding.
        numbered = copy.deepcopy(prunable(getattr(self.origin, half))).to_empty(device="cpu").double()
        with torch.no_grad():
            for parameter in numbered.parameters():
                parameter.copy_(torch.arange(1, parameter.numel() + 1).view(parameter.shape))
        before = dict(numbered.compacted(self.record, self.form).named_parameters())
        new = numbered.compacted(self.record, form)
        mine = dict(old.named_parameters())
        if {n: p.shape for n, p in before.items()} != {n: p.shape for n, p in mine.items()}:
            raise ValueError(
                f"form: the {half} is not as it was compacted, so it cannot be {form}; compact again"
            )
        for path, module in new.named_modules():
            for name, numbers in module._parameters.items():
                if numbers is None:
                    continue
                full = f"{path}.{name}" if path else name
                module._parameters[name] = _moved(mine[full], before[full].detach(), numbers.detach())
            for name in module._buffers:
                module._buffers[name] = old.get_submodule(path)._buffers[name]
        carry_hooks(old, new)
        return new.train(old.training)

    @property
    def origin(self) -> UVCBlock:
        """The dense block on the meta device."""
        return self._origin[0]

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **positions
    ) -> Tensor:
        """x [B, N, D] -> [B, N', D], fewer if it slims; all other arguments go to the attention."""
        if attn_mask is None and not is_causal and not positions and self._is_bare():
            if x.dim() == 3 and writes_onnx():
                # Of matrices all along, so that nothing is reshaped between its products and sums.
                return self._bare(x.flatten(0, 1), x.shape[1]).unflatten(0, x.shape[:2])
            return self._bare(x)
        slimming = None if self.slimming is None else due(self.slimming, x, attn_mask, is_causal)
        scores, children = None, self._modules  # read there, as attributes of a module take a call each
        residual = self.residual(x)
        if self.record.attn:
            y = x if self.norm_last else normed(children["norm1"], x)
            if slimming is None:
                branch = self.attended(y, attn_mask=attn_mask, is_causal=is_causal, **positions)
            else:
                branch, scores = children["attn"].scored(y, slimming)
            branch = children["norm1"](branch) if self.norm_last else scaled(self, "1", branch)
            residual = residual + dropped(self, "1", branch)
        x = residual
        if slimming is not None:
            x = slim(x, scores, slimming)
        if self.record.mlp:
            branch = self.fed(x if self.norm_last else normed(children["norm2"], x))
            branch = children["norm2"](branch) if self.norm_last else scaled(self, "2", branch)
            x = x + dropped(self, "2", branch)
        return self.ended(x)

    def _is_bare(self) -> bool:
        """Whether all it does is to add to its tokens what its halves make of them, normed."""
        children = self._modules
        if len(children) != self._children or self.slimming is not None or hooked_everywhere():
            return False
        for name in self._scales:
            scale = children.get(name)
            if type(scale) is not LayerScale or not runs_as_it_is(scale):
                return False
        attn, mlp = children.get("attn"), children.get("mlp")
        if attn is not None and not (isinstance(attn, CompactAttention) and attn.adds()):
            return False
        return mlp is None or (isinstance(mlp, CompactMlp) and mlp.adds())

    def _bare(self, x: Tensor, tokens: int | None = None) -> Tensor:
        """What a bare block makes of x [B, N, D], or [B * N, D] with N `tokens`.

        At batch 1 a small model's latency is made of calls.
        """
        children = self._modules
        first, second = self._gammas() if self._scales else (None, None)
        if (attn := children.get("attn")) is not None:
            x = attn.onto(x, normed(children["norm1"], x), first, tokens)
        if (mlp := children.get("mlp")) is not None:
            x = mlp.onto(x, normed(children["norm2"], x), second)
        return x

    def _gammas(self) -> tuple[Tensor | None, Tensor | None]:
        """What the layer scales of both halves multiply by."""
        scales = (self._modules.get(name) for name in ("ls1", "ls2"))
        return tuple(None if scale is None else scale._parameters["gamma"] for scale in scales)


def _moved(values: Tensor, before: Tensor, after: Tensor) -> nn.Parameter:
    """values, whose entries have the numbers `before`, where `after` has these numbers, and zeros where 0."""
    size = int(max(t.max() if t.numel() else 0 for t in (before, after))) + 1
    place = torch.zeros(size, dtype=torch.int64)
    place[before.flatten().long()] = torch.arange(1, before.numel() + 1)
    entries = torch.cat([values.new_zeros(1), values.detach().flatten()])
    moved = entries[place[after.flatten().long()].to(values.device)].view(after.shape)
    return nn.Parameter(moved, requires_grad=values.requires_grad)
