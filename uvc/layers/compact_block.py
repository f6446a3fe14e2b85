"""What is left of a block after compaction: plain torch on small weights.

B batch, N tokens, D width; h heads of a group, dq and dv the q/k and v dims of each.
"""

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import GluMlp, SwiGLU
from torch import Tensor, nn

from uvc.layers._surgery import meta_copy
from uvc.layers.attention import UVCAttention, heads_of_mask, masked
from uvc.layers.block import UVCBlock, norm_last
from uvc.layers.children import carry_hooks, drop_hooks, drop_rate, is_plain
from uvc.layers.token_pruning import Slimming, due, row_scores, slim


class HeadGroup(NamedTuple):
    """Kept heads that share their numbers of dims, so that they run as one batched product."""

    heads: tuple[int, ...]
    dq: int
    dv: int


class CompactAttention(nn.Module):
    """Attention over kept rows and columns only. The rows of qkv lie group by group: its q, its k, its v."""

    def __init__(self, dense: UVCAttention, record):
        super().__init__()
        self.num_heads, self.scale = dense.num_heads, dense.scale
        dims: dict[tuple[int, int], list[tuple]] = {}
        for head, qk, v in zip(record.heads, record.qk_dims, record.v_dims, strict=True):
            dims.setdefault((len(qk), len(v)), []).append((head, qk, v))
        self.groups = tuple(HeadGroup(tuple(m[0] for m in members), *key) for key, members in dims.items())
        rows, columns = [], []
        for members in dims.values():
            q = [head * dense.head_dim + d for head, qk, _ in members for d in qk]
            v = [head * dense.head_dim + d for head, _, v in members for d in v]
            rows += q + [dense.attn_dim + i for i in q] + [2 * dense.attn_dim + i for i in v]
            columns += v
        self.qkv = smaller(dense.qkv, rows=rows)
        self.proj = smaller(dense.proj, columns=columns)
        self.attn_drop = copy.deepcopy(dense.attn_drop)
        self.proj_drop = copy.deepcopy(dense.proj_drop)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x [B, N, D] -> [B, N, D]; masks as in timm, over the heads of the dense layer."""
        return self.scored(x, None, attn_mask, is_causal)[0]

    def scored(
        self, x: Tensor, slimming: Slimming | None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """As `forward`, and the tokens' scores as in `UVCAttention.token_scores`; None without `slimming`."""
        B, N, _ = x.shape
        if not self.groups:
            return self.proj_drop(without_inputs(self.proj, x)), None
        parts = iter(
            self.qkv(x).split([len(g.heads) * d for g in self.groups for d in (g.dq, g.dq, g.dv)], dim=-1)
        )
        dropout = drop_rate(self.attn_drop)
        outputs, scores = [], None
        for group in self.groups:
            h = len(group.heads)
            q, k, v = (
                next(parts).reshape(B, N, h, d).transpose(1, 2) for d in (group.dq, group.dq, group.dv)
            )
            if slimming is not None and group.dq:
                reader = self.scale * slimming.reader(q.detach())
                row = row_scores((reader @ k.detach().transpose(-2, -1)).squeeze(2))
                scores = row if scores is None else scores + row
            mask = heads_of_mask(attn_mask, list(group.heads), self.num_heads)
            out = attend(q, k, v, self.scale, mask, is_causal, dropout)
            outputs.append(out.transpose(1, 2).reshape(B, N, h * group.dv))
        heads = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return self.proj_drop(self.proj(heads)), scores


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, is_causal: bool, dropout: float
) -> Tensor:
    """softmax(scale q k^T + mask) v for q, k [B, h, N, dq], v [B, h, N, dv]; scores are 0 when dq is 0."""
    if q.shape[-1] == v.shape[-1]:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, scale=scale
        )
    B, h, N, _ = q.shape
    q, k, v = (t.reshape(B * h, N, t.shape[-1]) for t in (q, k, v))
    # One call per product: at batch 1 the overhead of calls is what a small model's latency is made of.
    scores = torch.baddbmm(q.new_zeros(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=scale)
    if is_causal or mask is not None:
        scores = masked(scores.view(B, h, N, N), mask, is_causal).view(B * h, N, N)
    weights = scores.softmax(dim=-1)
    if dropout:
        weights = F.dropout(weights, dropout)
    return torch.bmm(weights, v).view(B, h, N, v.shape[-1])


class CompactMlp(nn.Module):
    """The two linear layers over the kept neurons only."""

    def __init__(self, dense: nn.Module, neurons: tuple[int, ...]):
        super().__init__()
        self._keep_rows(dense, list(neurons))
        self.act = copy.deepcopy(dense.act)
        self.drop1 = copy.deepcopy(dense.drop1)
        self.fc2 = smaller(dense.fc2, columns=list(neurons))
        self.drop2 = copy.deepcopy(dense.drop2)

    def _keep_rows(self, dense: nn.Module, neurons: list[int]) -> None:
        self.fc1 = smaller(dense.fc1, rows=neurons)

    def hidden(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> the kept neurons [B, N, F']."""
        return self.act(self.fc1(x))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> [B, N, D]."""
        if self.fc2.in_features == 0:
            return self.drop2(without_inputs(self.fc2, x))
        return self.drop2(self.fc2(self.drop1(self.hidden(x))))


class CompactGluMlp(CompactMlp):
    """A gated MLP whose fc1 holds value and gate, one behind the other."""

    def _keep_rows(self, dense: GluMlp, neurons: list[int]) -> None:
        self.gate_last = dense.gate_last
        self.fc1 = smaller(dense.fc1, rows=neurons + [dense.fc2.in_features + i for i in neurons])

    def hidden(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> the kept neurons [B, N, F']."""
        a, b = self.fc1(x).chunk(2, dim=-1)
        return a * self.act(b) if self.gate_last else self.act(a) * b


class CompactSwiGLU(CompactMlp):
    """A gated MLP of two first layers, fc1_g the gate and fc1_x the value."""

    def _keep_rows(self, dense: SwiGLU, neurons: list[int]) -> None:
        self.fc1_g, self.fc1_x = smaller(dense.fc1_g, rows=neurons), smaller(dense.fc1_x, rows=neurons)

    def hidden(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> the kept neurons [B, N, F']."""
        return self.act(self.fc1_g(x)) * self.fc1_x(x)


def compact_mlp(dense: nn.Module, neurons: tuple[int, ...]) -> CompactMlp:
    """The compact form of timm's or UVC's MLP `dense` over the kept neurons."""
    kinds = {GluMlp: CompactGluMlp, SwiGLU: CompactSwiGLU}
    kind = next((kind for of, kind in kinds.items() if isinstance(dense, of)), CompactMlp)
    return kind(dense, neurons)


class CompactBlock(nn.Module):
    """The running halves of a block, with `record`, the structure's entry for the block they came from."""

    def __init__(self, dense: UVCBlock, record, slimming: Slimming | None = None):
        super().__init__()
        self.record, self.slimming, self.norm_last = record, slimming, norm_last(dense)
        # In a tuple, so that it is no child: without weights, only sizes and settings are read from it.
        self._origin = (UVCBlock.take_over(meta_copy(dense)),)
        drop_hooks(self.origin.modules())
        if record.attn:
            self._keep_half(dense, "1", "attn", CompactAttention(dense.attn, record))
        if record.mlp:
            self._keep_half(dense, "2", "mlp", compact_mlp(dense.mlp, record.neurons))
        self.train(dense.training)
        carry_hooks(dense, self)

    def _keep_half(self, dense: UVCBlock, digit: str, name: str, small: nn.Module) -> None:
        carry_hooks(getattr(dense, name), small)
        self.add_module(name, small)
        for part in ("norm", "ls", "drop_path"):
            self.add_module(part + digit, copy.deepcopy(getattr(dense, part + digit, nn.Identity())))

    @property
    def origin(self) -> UVCBlock:
        """The dense block on the meta device."""
        return self._origin[0]

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x [B, N, D] -> [B, N', D], fewer if it slims; `attn_mask` and `is_causal` go to the attention."""
        slimming, scores = due(self.slimming, x, attn_mask, is_causal), None
        if self.record.attn:
            y = x if self.norm_last else self.norm1(x)
            if slimming is None:
                branch = self.attn(y, attn_mask=attn_mask, is_causal=is_causal)
            else:
                branch, scores = self.attn.scored(y, slimming)
            x = x + self.drop_path1(self.norm1(branch) if self.norm_last else self.ls1(branch))
        if slimming is not None:
            x = slim(x, scores, slimming)
        if self.record.mlp:
            branch = self.mlp(x if self.norm_last else self.norm2(x))
            x = x + self.drop_path2(self.norm2(branch) if self.norm_last else self.ls2(branch))
        return x


def smaller(dense: nn.Linear, rows: list[int] | None = None, columns: list[int] | None = None) -> nn.Linear:
    """A copy of the given rows, or columns, of `dense`; without columns the bias stays."""
    weight, bias = dense.weight.detach(), None if dense.bias is None else dense.bias.detach()
    if rows is not None:
        index = torch.tensor(rows, dtype=torch.int64, device=weight.device)
        weight, bias = weight.index_select(0, index), None if bias is None else bias.index_select(0, index)
    else:
        index = torch.tensor(columns, dtype=torch.int64, device=weight.device)
        weight, bias = weight.index_select(1, index), None if bias is None else bias.clone()
    # Made with one feature on meta and filled after, as torch's initialisation warns about zero features.
    linear = nn.Linear(1, 1, bias=bias is not None, device="meta")
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight, requires_grad=dense.weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=dense.bias.requires_grad)
    return linear


def without_inputs(linear: nn.Module, x: Tensor) -> Tensor:
    """What a linear layer without inputs adds to every token of x [B, N, D]."""
    if not is_plain(linear):
        return linear(x.new_zeros(*x.shape[:-1], 0))
    # The bias alone, as exported programs do not take matrices without columns.
    out = x.new_zeros(*x.shape[:-1], linear.out_features)
    return out if linear.bias is None else out + linear.bias
