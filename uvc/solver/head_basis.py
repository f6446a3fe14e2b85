"""The basis in which head dims compete: dims are removed one by one, and a head is free to choose what "one
dim" is.

q' = A q and k' = A^-T k leave every score q k^T as it is, v' = B v and W' = W B^-1 the output. A is chosen so
that the Gram matrices of the two sides become one diagonal matrix, which holds the singular values of Wq^T
Wk in descending order. Keeping the first r dims is then the best approximation of rank r (Eckart and Young):
balanced truncation (Moore 1981). In the basis that training left, importance is spread over all dims.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

FLOOR = 1e-6  # of the mean eigenvalue of a Gram matrix, added to each, so that a dim of no weight is no fault


@torch.no_grad()
def balance_heads(model: nn.Module) -> None:
    """Gives every head of a converted model its balanced basis, in place; the function stays, to rounding.

    Attention that is frozen, or from which something is removed already, is left as it is, and so are dims
    that stand for themselves elsewhere (in a norm of q and k, in a gate). Computed in float64.
    """
    for block in model.blocks:
        if block.attn.is_dense and all(p.requires_grad for p in block.attn.parameters()):
            _balance(block.attn)


def _balance(attn: nn.Module) -> None:
    heads, weight, bias, out = attn.num_heads, attn.qkv.weight, attn.qkv.bias, attn.proj.weight
    rows = weight.double() if bias is None else torch.cat([weight, bias[:, None]], 1).double()
    q, k, v = rows.view(3, heads, -1, rows.shape[1])  # [H, K, D + bias] each
    if "qk" in attn.free_bases:
        # A bias of k shifts all scores of a query alike, which softmax does not see.
        a, a_inverse = balancing(q @ q.mT, k[..., : weight.shape[1]] @ k[..., : weight.shape[1]].mT)
        q, k = a @ q, a_inverse.mT @ k
    if "v" in attn.free_bases:
        columns = out.double().view(len(out), heads, -1).movedim(0, -1)  # [H, K, D]
        b, b_inverse = balancing(v @ v.mT, columns @ columns.mT)
        v = b @ v
        out.copy_((b_inverse.mT @ columns).flatten(0, 1).T)
    rows = torch.cat([q, k, v]).flatten(0, 1)
    weight.copy_(rows[:, : weight.shape[1]])
    if bias is not None:
        bias.copy_(rows[:, -1])


def balancing(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """(A, A^-1) [..., K, K] for Gram matrices of two sides: A left A^T and A^-T right A^-1 are the same
    diagonal matrix, descending (but for FLOOR).
    """
    lower_left, lower_right = (_root(gram) for gram in (left, right))
    u, values, vt = torch.linalg.svd(lower_left.mT @ lower_right)
    root = values.rsqrt()
    return root[..., None] * (vt @ lower_right.mT), (lower_left @ u) * root[..., None, :]


def _root(gram: Tensor) -> Tensor:
    """Lower triangular L with L L^T = gram, its eigenvalues raised by FLOOR times their mean."""
    size = gram.shape[-1]
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(1e-30)
    return torch.linalg.cholesky(gram + FLOOR * mean * torch.eye(size, dtype=gram.dtype, device=gram.device))
