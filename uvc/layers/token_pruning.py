"""Token slimming: which patch tokens go on, chosen per image by one row of attention.

B batch, N tokens, D width, H heads, d dims of a head.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from uvc.layers.stages import blocks_of


class Slimming(NamedTuple):
    """How many patch tokens go on from a block's attention half, and whose attention ranks them.

    `prefix`: tokens before the patches, which always stay. `by_class`: the class token's attention decides,
    else that of the tokens' mean query, where the model reads out all tokens. `always`:
    order the tokens even where all may go on.
    """

    tokens: int
    prefix: int
    by_class: bool
    always: bool = False

    def reader(self, x: Tensor) -> Tensor:
        """What attends, of tokens or queries x [..., N, d]: [..., 1, d]."""
        return x[..., :1, :] if self.by_class else x.mean(-2, keepdim=True)


def slimming(model: nn.Module, tokens: int | None) -> Slimming | None:
    """How blocks of a timm model keep `tokens` patch tokens (None: all); ValueError where none may go."""
    if tokens is None:
        return None
    blocks = blocks_of(model)
    if not all(getattr(block, "slims", True) for block in blocks):
        raise ValueError(
            "tokens: several attentions of a ParallelThingsBlock read the same ones, so none can be left "
            "out; keep all tokens"
        )
    layers = (block.attn for block in blocks)
    if (own := next((attn for attn in layers if not getattr(attn, "slims", True)), None)) is not None:
        raise ValueError(
            f"tokens: positions are part of {type(own).__name__}, so none can be left out; keep all tokens"
        )
    if not model.global_pool:
        raise ValueError(
            f"tokens: the {type(model).__name__} has global_pool '' and returns every token, so none can be "
            "left out; give it a pooled head"
        )
    return Slimming(tokens, model.num_prefix_tokens, model.global_pool == "token")


def due(slimming: Slimming | None, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Slimming | None:
    """`slimming` if x [B, N, D] has more patch tokens than may go on, or they are ordered anyway; else None.

    ValueError if tokens are to go under an attention mask, which is over all of them.
    """
    if slimming is None or not (slimming.always or x.shape[1] > slimming.prefix + slimming.tokens):
        return None
    if attn_mask is not None or is_causal:
        raise ValueError(
            f"{'attn_mask' if attn_mask is not None else 'is_causal'}: the structure drops tokens, which "
            "leaves no place for an attention mask; keep all tokens"
        )
    return slimming


def row_scores(logits: Tensor) -> Tensor:
    """Attention that each token gets, summed over heads, from logits [B, H, N]: [B, N], at least float32."""
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).sum(1)


def slim(x: Tensor, scores: Tensor | None, slimming: Slimming) -> Tensor:
    """The prefix and the best `slimming.tokens` patch tokens of every image of x [B, N, D], the best first.

    Blocks and heads do not ask for their order. scores [B, N]; None, where no attention ran, ranks by the
    tokens' norm. Gradients reach the kept tokens.
    """
    B, N, D = x.shape
    if scores is None:
        scores = x.detach().square().sum(-1, dtype=torch.promote_types(x.dtype, torch.float32))
    first = slimming.prefix
    tokens = min(slimming.tokens, N - first)
    best = scores[:, first:].topk(tokens).indices + first
    always = torch.arange(first, device=x.device).expand(B, first)
    index = torch.cat([always, best], dim=1) + N * torch.arange(B, device=x.device)[:, None]
    # Whole rows take half the time of an element-wise gather, forwards and backwards.
    return x.reshape(B * N, D).index_select(0, index.flatten()).view(B, first + tokens, D)
