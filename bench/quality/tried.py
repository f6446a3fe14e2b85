"""Scores and bases that were tried in UVC's search, each as a method of its own.

G groups a segment: dims of a head, or neurons of a layer. a: what a step says of a group to first order,
[S, G], the gradient of a gate of 1 on it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.quality.context import Context
from uvc.layers import blocks_of
from uvc.solver import head_basis, method
from uvc.solver.search import Search
from uvc.solver.state import FAMILIES
from uvc.solver.step import prox

IMAGES = 16  # of a batch, whose activations are looked at
SEEN = 512  # training images for bases from activations
RIDGE = 1e-3  # of the mean eigenvalue of a second moment


@method("cross_terms")
class CrossTerms(Search):
    """Dims of a head are worth what their removal costs beside that of those on their way out: with the mean
    M of a a^T of a head, M_ii + 2 sum of M_ij over those j.
    """

    def observe(self, scale: float = 1.0) -> None:
        super().observe(scale)
        slopes = self.groups.first_order() if self._changes.keys() & {"qk", "v"} else {}
        moments = self.__dict__.setdefault("moments", {})
        for name in ("qk", "v"):
            if name not in self._changes:
                continue
            family, a = self.state.families[name], slopes[name] / scale
            if name not in moments:
                moments[name] = a.new_zeros(*a.shape, a.shape[1])
            moments[name].lerp_(a[:, :, None] * a[:, None, :], self._rates(name)[:, :, None])
            del self._changes[name]
            own = moments[name].diagonal(dim1=1, dim2=2)
            going = (family.removed() & ~family.dead).to(own.dtype)
            with_them = torch.einsum("sij,sj->si", moments[name], going) - own * going
            family.importance.copy_((own + 2 * with_them).clamp_min(0.0))


@method("fisher_probe")
class FisherProbe(Search):
    """Importance from a second pass in every `every`-th step, over labels drawn from the model's own answers:
    an unbiased diagonal of the Fisher matrix, which is the Gauss-Newton part of the Hessian.
    """

    def __init__(self, model: nn.Module, *args, **kwargs) -> None:
        super().__init__(model, *args, **kwargs)
        self.drawn = torch.Generator().manual_seed(kwargs.get("seed", 0) + 1)
        self.images: Tensor | None = None
        model.register_forward_pre_hook(self._see)

    def _see(self, model: nn.Module, args: tuple) -> None:
        if model.training and torch.is_grad_enabled() and self.images is not args[0]:
            self.images = args[0]

    def observe(self, scale: float = 1.0) -> None:
        super().observe(scale)
        if not self._changes.keys() & set(FAMILIES) or self.images is None:
            return
        parameters = list(self.model.parameters())
        kept = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        logits = self.model(self.images)
        labels = torch.multinomial(logits.detach().softmax(1), 1, generator=self.drawn)[:, 0]
        F.cross_entropy(logits, labels).backward()
        for name, a in self.groups.first_order().items():
            self._changes[name] = a.square()
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient
        self.images = None


@method("compensated")
class Compensated(Search):
    """What the prox takes of the output of groups is given to those that stay: with the second moment M of
    what the output weights W read, W_T += W_S M_ST M_TT^-1 for the part of S that is lost; T: the groups that
    are not on their way out.
    """

    def __init__(self, model: nn.Module, *args, **kwargs) -> None:
        super().__init__(model, *args, **kwargs)
        self.read: dict[nn.Module, Tensor] = {}
        self.moments: dict[nn.Module, Tensor] = {}
        for block in self.groups.blocks:
            for half in (block.attn, block.mlp):
                half.register_forward_hook(self._see)

    def _see(self, half: nn.Module, args: tuple, _: object) -> None:
        if half.training and torch.is_grad_enabled():
            self.read[half] = args[0].detach()[:IMAGES]

    @torch.no_grad()
    def _prox(self) -> dict[str, Tensor]:
        self._receive()
        factors, geometry = prox(self.state, self.config)._asdict(), self.groups.geometry
        dead = {name: geometry.spread(name, family.dead) for name, family in self.state.families.items()}
        for layer, block in enumerate(self.groups.blocks):
            for name, half in (("v", block.attn), ("neuron", block.mlp)):
                if half in self.read:
                    self._compensate(half, factors[name][layer].flatten(), dead[name][layer].flatten())
        self.read.clear()
        return super()._prox()

    def _compensate(self, half: nn.Module, factor: Tensor, dead: Tensor) -> None:
        x = self.read[half]
        hidden = inner(half, x).flatten(0, 1)
        moment = hidden.T @ hidden / len(hidden)
        moment = self.moments[half] = (
            torch.lerp(self.moments[half], moment, 0.1) if half in self.moments else moment
        )
        going, stays = factor < 1.0, (factor == 1.0) & ~dead
        if not going.any() or not stays.any():
            return
        within = moment[stays][:, stays].double()
        within.diagonal().add_(RIDGE * within.diagonal().mean())
        weight = (half.proj if hasattr(half, "proj") else half.fc2).weight
        given = torch.linalg.solve(within, moment[stays][:, going].double())  # [T, S]
        # Both sides of a group shrink, and what it reads of x with them.
        lost = weight[:, going].double() * (1.0 - factor[going].double().square())
        weight[:, stays] += (lost @ given.T).to(weight.dtype)


def inner(half: nn.Module, x: Tensor) -> Tensor:
    """What the last linear layer of attention or MLP reads, [B, N, A or F]; dead groups are zero in it."""
    if not hasattr(half, "qkv"):
        return half.act(F.linear(x, half.fc1.weight, half.fc1.bias))
    B, N, _ = x.shape
    q, k, v = half.qkv(x).view(B, N, 3, half.num_heads, half.head_dim).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, scale=half.scale).transpose(1, 2).flatten(2)


@torch.no_grad()
def balance_by_activations(model: nn.Module, context: Context) -> nn.Module:
    """Gives heads of a converted model the bases in which the second moments of q and k, and of v and what is
    read of it, become one diagonal matrix: as `head_basis`, of activations in place of weights.
    """
    blocks = blocks_of(model)
    second: list[list[Tensor]] = [[] for _ in blocks]
    about: list[list[Tensor]] = [[] for _ in blocks]

    def see(layer: int):
        def hook(_: nn.Module, args: tuple) -> None:
            x = args[0].double()
            x = torch.cat([x, x.new_ones(*x.shape[:2], 1)], 2)
            second[layer].append(torch.einsum("bni,bnj->ij", x, x) / x[..., 0].numel())
            x = x - x.mean(1, keepdim=True)
            about[layer].append(torch.einsum("bni,bnj->ij", x, x) / x[..., 0].numel())

        return hook

    handles = [block.attn.register_forward_pre_hook(see(i)) for i, block in enumerate(blocks)]
    model.eval()
    for images in context.train.images[:SEEN].split(64):
        model(images)
    for handle in handles:
        handle.remove()
    for layer, block in enumerate(blocks):
        _balance(block.attn, torch.stack(second[layer]).mean(0), torch.stack(about[layer]).mean(0))
    return model


def _balance(attn: nn.Module, moment: Tensor, centred: Tensor) -> None:
    heads, out = attn.num_heads, attn.proj.weight
    sources = attn.sources()
    q, k, v = (head_basis._rows(source, attn.dims).view(heads, attn.head_dim, -1) for source in sources)
    # What k has in common over the tokens of an image, softmax does not see.
    a, a_inverse = head_basis.balancing(q @ moment @ q.mT, k @ centred @ k.mT)
    q, k = a @ q, a_inverse.mT @ k
    columns = out.double().view(len(out), heads, -1).movedim(0, -1)  # [H, K, D]
    b, b_inverse = head_basis.balancing(v @ moment @ v.mT, columns @ columns.mT)
    v = b @ v
    out.copy_((b_inverse.mT @ columns).flatten(0, 1).T)
    for source, rows in zip(sources, (q, k, v), strict=True):
        rows = rows.flatten(0, 1)
        source.weight[source.row :][: attn.dims].copy_(rows[:, :-1])
        if source.bias is not None:
            source.bias[source.bias_row :][: attn.dims].copy_(rows[:, -1])
