"""The ops that serve all layers in one call, scores, shrink and packing, against plain torch.

"plain_torch" is what one writes without them: a loop over the weights. Scores and shrink go over the parts of
the weights that the solver groups, packing over what attention and MLP keep. The weights are float32, as an
optimiser holds them, whatever the products run in.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import uvc_kernels
from torch import Tensor

from uvc.bench.layer_variants import Layer, LayerShape, backends, forced
from uvc.bench.roofline import Pass, Work
from uvc.bench.variants import gate

OPS = ("group_scores", "prox_shrink", "gather")
# Factors so near to one that weights which are shrunk in every sample stay normal numbers.
SHRINK = 1e-6


class Part(NamedTuple):
    """Rows (dim 0) or columns (dim 1) of a weight, each a group; `kept` [groups], bool, says which remain."""

    weight: Tensor
    dim: int
    kept: Tensor


class Packing(NamedTuple):
    """The arguments of `gather` for all layers, and the kept positions without padding for plain torch."""

    sources: list[Tensor]
    indices: list[Tensor]
    inverses: list[Tensor]
    dims: list[int]
    places: list[Tensor]


class Weights(NamedTuple):
    """One model's weights: `parts` of all layers, and their `packing`, which share memory."""

    parts: list[Part]
    packing: Packing


def weights(shape: LayerShape, keep: float, device: torch.device) -> Weights:
    """Random weights of all layers and a random structure that keeps `keep` of dims and neurons."""
    D, H, F = shape.dim, shape.heads, shape.hidden
    A = H * shape.head_dim
    parts, packings = [], []
    for _ in range(shape.depth):
        qkv, qkv_bias, proj, fc1, fc1_bias, fc2 = (
            torch.randn(size, device=device) for size in ((3 * A, D), (3 * A,), (D, A), (F, D), (F,), (D, F))
        )
        qk, v, neurons = (drawn(n, keep) for n in (A, A, F))
        heads = uvc_kernels.kept_heads(qk.view(H, -1), v.view(H, -1), device)
        kept = [mask.to(device) for mask in (qk, qk, v)]
        for rows in (qkv, qkv_bias):
            parts += [Part(*each) for each in zip(rows.split(A), (0, 0, 0), kept, strict=True)]
        neuron = neurons.to(device)
        parts += [Part(proj, 1, kept[2]), Part(fc1, 0, neuron), Part(fc1_bias, 0, neuron)]
        parts.append(Part(fc2, 1, neuron))
        packings.append(uvc_kernels.attention_packing(qkv, qkv_bias, proj, None, heads))
        records = uvc_kernels.kept_neurons(neurons, device)
        packings.append(uvc_kernels.mlp_packing(fc1, fc1_bias, None, None, fc2, None, records))
    entries = [e for packing in packings for e in zip(*packing, strict=True) if e[0] is not None]
    sources, indices, inverses, dims = (list(each) for each in zip(*entries, strict=True))
    places = [index[index >= 0].long() for index in indices]
    return Weights(parts, Packing(sources, indices, inverses, dims, places))


def drawn(n: int, keep: float) -> Tensor:
    """A bool mask [n] with `keep` of its entries True, at random."""
    return torch.zeros(n, dtype=torch.bool).index_fill_(0, torch.randperm(n)[: round(keep * n)], True)


def op(
    name: str,
    shape: LayerShape,
    keep: float,
    device: torch.device,
    dtype: torch.dtype,
    backward: bool = False,
    inputs: int = 1,
) -> Layer:
    """Everything to time one op over all layers, after it was found to agree with plain torch in float64.

    name: of `OPS`; scores are those of weights and gradients, and do not depend on `keep`. dtype: of what
    `gather` packs. backward: of `gather` alone. `inputs`: among how many models the calls rotate.
    RuntimeError when results disagree.
    """
    torch.manual_seed(0)
    models = [weights(shape, keep, device) for _ in range(inputs)]
    able, left = backends(name, device, torch.float32)
    able = [provider for provider in able if provider != "reference"] or able
    if name == "gather":
        make = {"plain_torch": lambda packing: plain_gather(packing, dtype)}
        make |= {f"kernel/{p}": forced(lambda packing: kernel_gather(packing, dtype), p) for p in able}
        error = agree_gather(make, models[0].packing, dtype)
        direction = _backward if backward else _forward
        calls = {variant: direction(run, [m.packing for m in models], dtype) for variant, run in make.items()}
    else:
        plain, kernel = (
            (plain_scores, kernel_scores) if name == "group_scores" else (plain_shrink, kernel_shrink)
        )
        others = [second(name, m.parts) for m in models]
        make = {"plain_torch": plain, **{f"kernel/{p}": forced(kernel, p) for p in able}}
        error = agree_parts(name, make, models[0].parts, others[0])
        pairs = [(m.parts, other) for m, other in zip(models, others, strict=True)]
        calls = {variant: _rotating(run, pairs) for variant, run in make.items()}
    least = {variant: work(name, models[0], dtype, backward, variant == "plain_torch") for variant in make}
    chosen = {variant: variant.partition("/")[2] for variant in make if "/" in variant}
    return Layer(calls, least, chosen, left, error)


def second(name: str, parts: Sequence[Part]) -> list[Tensor] | Tensor:
    """What goes with the weights: gradients for scores, one flat tensor of factors for the shrink."""
    if name == "group_scores":
        return [torch.randn_like(part.weight) for part in parts]
    kept = torch.cat([part.kept for part in parts])
    return torch.where(kept, 1 - SHRINK * torch.rand(kept.shape, device=kept.device), 0.0)


def plain_scores(parts: Sequence[Part], gradients: Sequence[Tensor]) -> Tensor:
    """A product and a sum per part."""
    products = [part.weight * gradient for part, gradient in zip(parts, gradients, strict=True)]
    return torch.cat(
        [p if p.dim() == 1 else p.sum(1 - part.dim) for p, part in zip(products, parts, strict=True)]
    )


def kernel_scores(parts: Sequence[Part], gradients: list[Tensor]) -> Tensor:
    """One call."""
    return uvc_kernels.group_scores([p.weight for p in parts], gradients, [p.dim for p in parts])


def plain_shrink(parts: Sequence[Part], factors: Tensor) -> None:
    """A product in place per part."""
    for part, factor in zip(parts, factors.split([len(p.kept) for p in parts]), strict=True):
        part.weight.mul_(factor[:, None] if part.weight.dim() == 2 and part.dim == 0 else factor)


def kernel_shrink(parts: Sequence[Part], factors: Tensor) -> None:
    """One call."""
    uvc_kernels.prox_shrink([p.weight for p in parts], factors, [p.dim for p in parts])


def plain_gather(packing: Packing, dtype: torch.dtype) -> list[Tensor]:
    """An index_select, and a cast, per weight; without the padding, which only our products want."""
    each = zip(packing.sources, packing.dims, packing.places, strict=True)
    return [source.index_select(dim, places).to(dtype) for source, dim, places in each]


def kernel_gather(packing: Packing, dtype: torch.dtype) -> list[Tensor]:
    """One call."""
    return uvc_kernels.gather(packing.sources, packing.indices, packing.inverses, packing.dims, dtype)


def agree_parts(
    name: str, make: dict[str, Callable], parts: list[Part], other: list[Tensor] | Tensor
) -> float:
    """The worst relative error of any variant's scores or shrunk weights; RuntimeError beyond rounding."""
    worst, sizes = 0.0, [len(part.kept) for part in parts]
    for variant, run in make.items():
        copies = [part._replace(weight=part.weight.clone()) for part in parts]
        result = run(copies, other)
        found = result.split(sizes) if name == "group_scores" else [part.weight for part in copies]
        extra = other if name == "group_scores" else other.split(sizes)
        for i, part in enumerate(parts):
            # One part at a time: all of them in float64 would be gigabytes.
            double, factor = part.weight.double(), extra[i].double()
            if name == "group_scores":
                product = double * factor
                truth = product if product.dim() == 1 else product.sum(1 - part.dim)
            else:
                truth = double * (factor[:, None] if double.dim() == 2 and part.dim == 0 else factor)
            worst = max(worst, gate({"float64": truth, variant: found[i]}, torch.float32, name))
    return worst


def agree_gather(make: dict[str, Callable], packing: Packing, dtype: torch.dtype) -> float:
    """The worst relative error of any variant's packed weights and gradients, zeros where nothing belongs."""
    worst = 0.0
    for variant, run in make.items():
        with torch.enable_grad():
            leaves = packing._replace(sources=[s.detach().requires_grad_() for s in packing.sources])
            packed = run(leaves)
        cotangents = [torch.randn_like(p) for p in packed]
        gradients = torch.autograd.grad(packed, leaves.sources, cotangents)
        for i, (source, dim, places) in enumerate(
            zip(packing.sources, packing.dims, packing.places, strict=True)
        ):
            index = packing.indices[i]
            here = (
                (index >= 0).nonzero()[:, 0]
                if packed[i].shape[dim] == len(index)
                else torch.arange(len(places))
            )
            here = here.to(source.device)
            chosen = source.index_select(dim, places).to(dtype)
            truth = torch.zeros_like(packed[i]).index_copy(dim, here, chosen)
            given = cotangents[i].index_select(dim, here).to(source.dtype)
            whole = torch.zeros_like(source).index_copy(dim, places, given)
            for what, a, b in (("weights", packed[i], truth), ("gradients", gradients[i], whole)):
                error = gate({"plain_torch": b.detach(), variant: a.detach()}, dtype, f"gather, {what}")
                worst = max(worst, error)
    return worst


def work(name: str, model: Weights, dtype: torch.dtype, backward: bool, plain: bool) -> Work:
    """Every number that must be read or written, once; in one pass, as it is one call."""
    if name == "gather":
        sizes = [
            (s.numel(), s.numel() // s.shape[d] * len(p))
            for s, _, _, d, p in zip(*model.packing, strict=True)
        ]
        whole, kept = (sum(each) for each in zip(*sizes, strict=True))
        return Work((Pass(0, dtype.itemsize * kept + 4 * (whole if backward else kept)),))
    whole = sum(part.weight.numel() for part in model.parts)
    groups = sum(len(part.kept) for part in model.parts)
    if name == "group_scores":
        return Work((Pass(2 * whole, 4 * (2 * whole + groups)),))
    # A product reads what it will turn to zero, a kernel that knows better need not.
    read = whole if plain else sum(_kept_numbers(part) for part in model.parts)
    return Work((Pass(read, 4 * (read + whole + groups)),))


def _kept_numbers(part: Part) -> int:
    return part.weight.numel() // len(part.kept) * int(part.kept.sum())


def _rotating(run: Callable, pairs: list[tuple]) -> Callable[[int], object]:
    def call(i: int) -> object:
        with torch.no_grad():
            return run(*pairs[i % len(pairs)])

    return call


def _forward(run: Callable, packings: list[Packing], dtype: torch.dtype) -> Callable[[int], object]:
    return _rotating(run, [(packing,) for packing in packings])


def _backward(run: Callable, packings: list[Packing], dtype: torch.dtype) -> Callable[[int], object]:
    leaves = [p._replace(sources=[s.detach().requires_grad_() for s in p.sources]) for p in packings]
    outputs = [run(packing) for packing in leaves]
    grads = [[torch.randn_like(tensor) for tensor in packed] for packed in outputs]

    def call(i: int) -> object:
        i %= len(leaves)
        return torch.autograd.grad(outputs[i], leaves[i].sources, grads[i], retain_graph=True)

    return call
