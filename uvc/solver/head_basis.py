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

from uvc.layers import blocks_of

FLOOR = 1e-6  # of the mean eigenvalue of a Gram matrix, added to each, so that a dim of no weight is no fault


@torch.no_grad()
def balance_heads(model: nn.Module) -> None:
    """Gives every head of a converted model its balanced basis, in place; the function stays, to rounding.

    Attention that is frozen, or from which something is removed already, is left as it is, and so are dims
    that stand for themselves elsewhere (in a norm of q and k, in a gate). Computed in float64.
    """
    for block in blocks_of(model):
        if block.attn.is_dense and all(p.requires_grad for p in block.attn.parameters()):
            _balance(block.attn)


def _balance(attn: nn.Module) -> None:
    heads, out = attn.num_heads, attn.proj.weight
    sources = attn.sources()
    q, k, v = (_rows(source, attn.dims).view(heads, attn.head_dim, -1) for source in sources)
    if "qk" in attn.free_bases:
        # A bias of k shifts all scores of a query alike, which softmax does not see.
        a, a_inverse = balancing(q @ q.mT, k[..., :-1] @ k[..., :-1].mT)
        q, k = a @ q, a_inverse.mT @ k
    if "v" in attn.free_bases:
        columns = out.double().view(len(out), heads, -1).movedim(0, -1)  # [H, K, D]
        b, b_inverse = balancing(v @ v.mT, columns @ columns.mT)
        v = b @ v
        out.copy_((b_inverse.mT @ columns).flatten(0, 1).T)
    for source, rows in zip(sources, (q, k, v), strict=True):
        rows = rows.flatten(0, 1)
        source.weight[source.row :][: attn.dims].copy_(rows[:, :-1])
        if source.bias is not None:
            source.bias[source.bias_row :][: attn.dims].copy_(rows[:, -1])


def _rows(source, dims: int) -> Tensor:
    """The rows of one source with their bias, zero without one, as a last column [A, D + 1], in float64."""
    weight = source.weight[source.row :][:dims].double()
    bias = weight.new_zeros(dims) if source.bias is None else source.bias[source.bias_row :][:dims].double()
    return torch.cat([weight, bias[:, None]], 1)


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
