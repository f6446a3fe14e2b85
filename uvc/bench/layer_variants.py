"""Single layers of the compared variants: one attention or MLP, forward or backward alone, by backend."""

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import uvc_kernels
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from uvc_kernels import _dispatch

from uvc.bench.roofline import Kept, Shape, Work, layer_work
from uvc.bench.variants import DENSE, TOLERANCE, Left, build, fault_of, first_line

# The variants of a layer besides the kernels; torch-pruning cuts whole models.
VARIANTS = ("dense", "compiled", "masked", "pack_torch", "compacted")


class LayerShape(NamedTuple):
    """Width, heads, neurons and tokens of a model's layers, and how many there are."""

    dim: int
    heads: int
    hidden: int
    tokens: int = 197
    head_dim: int = 64
    depth: int = 12


SHAPES = {
    "deit_tiny": LayerShape(192, 3, 768),
    "deit_small": LayerShape(384, 6, 1536),
    "deit_base": LayerShape(768, 12, 3072),
    "t2t_vit_14": LayerShape(384, 6, 1152, depth=14),
}


class Layer(NamedTuple):
    """The calls of one group, by variant; each takes a running number. `error`: the worst of the gate."""

    calls: dict[str, Callable[[int], object]]
    works: dict[str, Work]
    backends: dict[str, str]
    left: list[Left]
    error: float


def backends(op: str, device: torch.device, dtype: torch.dtype) -> tuple[list[str], list[Left]]:
    """The providers of uvc_kernels that can serve `op` on this device, and why the others cannot."""
    able, left = [], []
    for name in reversed(_dispatch.PROVIDERS):
        # On the CPU Triton is an interpreter, and the CUDA sources serve tests: neither is for speed.
        if device.type == "cpu" and name in ("triton", "cuda-host"):
            left.append(Left(name, "runs on the CPU for tests only"))
            continue
        try:
            with uvc_kernels.backend(name):
                uvc_kernels.select(op, device, dtype)
            able.append(name)
        except RuntimeError as error:
            left.append(Left(name, str(error).partition("cannot run it: ")[2] or first_line(error)))
    return able, left


def forced(run: Callable, provider: str) -> Callable:
    """`run` with every op of uvc_kernels by `provider`; "auto", "compiled": the library chooses."""
    if provider in ("auto", "compiled"):
        return run

    def forced(*arguments: object) -> object:
        with uvc_kernels.backend(provider):
            return run(*arguments)

    return forced


def layer(
    op: str,
    shape: LayerShape,
    keep: float,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    backward: bool,
    inputs: int = 1,
    variants: Sequence[str] = VARIANTS,
) -> Layer:
    """Everything to time one direction of one layer, after the variants were found to agree.

    op: "attention" or "mlp". `inputs`: how many input tensors the calls rotate among. RuntimeError when
    variants disagree with plain torch in float64.
    """
    model = VisionTransformer(
        embed_dim=shape.dim,
        depth=1,
        num_heads=shape.heads,
        mlp_ratio=shape.hidden / shape.dim,
        num_classes=10,
    )
    built, left = build("", keep, batch, device, [*variants, "on_the_fly"], dense=model)
    name = "attn" if op == "attention" else "mlp"
    modules = {variant: getattr(b.model.blocks[0], name).to(dtype).eval() for variant, b in built.items()}
    if "compiled" in modules:
        # The block was marked for compilation; here it is the layer that runs.
        modules["compiled"].compile(dynamic=False)
    converted = modules.pop("on_the_fly")
    kernel, exact = _kernel(op, converted), copy.deepcopy(converted).double()
    able, without = backends(op, device, dtype)
    runs: dict[str, tuple[Callable[[Tensor], Tensor], list[Tensor]]] = {
        variant: (module, [p for p in module.parameters() if p.requires_grad])
        for variant, module in modules.items()
    }
    for provider in able:
        runs[f"on_the_fly/{provider}"] = (forced(kernel, provider), list(converted.parameters()))
    xs, grads = (
        [torch.randn(batch, shape.tokens, shape.dim, device=device, dtype=dtype) for _ in range(inputs)]
        for _ in range(2)
    )
    if "compiled" in runs and (fault := fault_of(lambda: runs["compiled"][0](xs[0]))):
        del runs["compiled"]
        left.append(Left("compiled", fault))
    error = _agree(op, runs, exact, xs[0], grads[0], keep)
    sizes = Shape(batch, shape.tokens, shape.dim, shape.heads, shape.head_dim, shape.hidden)
    size = torch.empty((), dtype=dtype).element_size()
    works = {}
    for variant in runs:
        of = built["on_the_fly" if "/" in variant else variant]
        works[variant] = layer_work(op, sizes, _of(op, of.kept[0]), size, backward, of.full)
    calls = {
        variant: (_backward if backward else _forward)(run, xs, grads, parameters)
        for variant, (run, parameters) in runs.items()
    }
    chosen = {variant: variant.partition("/")[2] for variant in runs if "/" in variant}
    return Layer(calls, works, chosen, left + without, error)


def _of(op: str, kept: Kept) -> Kept:
    return kept._replace(neurons=None) if op == "attention" else kept._replace(qk=None, v=None)


def _kernel(op: str, module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The op of uvc_kernels on a converted layer's weights, also where nothing is removed."""
    if op == "attention":
        kept = uvc_kernels.kept_heads(module.kept_qk, module.kept_v, module.qkv.weight.device)
        return lambda x, m=module: uvc_kernels.attention(
            x, m.qkv.weight, m.qkv.bias, m.proj.weight, m.proj.bias, kept, m.scale
        )
    neurons = uvc_kernels.kept_neurons(module.kept_neurons, module.fc1.weight.device)
    return lambda x, m=module: uvc_kernels.mlp(x, m.fc1.weight, m.fc1.bias, m.fc2.weight, m.fc2.bias, neurons)


def _agree(op: str, runs: dict, exact: nn.Module, x: Tensor, grad: Tensor, keep: float) -> float:
    """The worst relative error of any variant's output and gradients; RuntimeError beyond rounding."""

    def results(
        run: Callable[[Tensor], Tensor], parameters: list[Tensor], dtype: torch.dtype
    ) -> list[Tensor]:
        given = x.detach().to(dtype).requires_grad_()
        out = run(given)
        return [out.detach(), *torch.autograd.grad(out, [given, *parameters], grad.to(dtype))]

    with uvc_kernels.backend("reference"):
        truth = results(_kernel(op, exact), list(exact.parameters()), torch.float64)
    worst = 0.0
    for variant, (run, parameters) in runs.items():
        if variant in DENSE and keep < 1:
            continue
        found = results(run, parameters, x.dtype)
        # The gradients of smaller weights have no counterpart.
        for part, a, b in zip(("output", "gradient of x", *exact_names(exact)), found, truth, strict=False):
            if a.shape != b.shape:
                continue
            error = float((a.double() - b).norm() / b.norm().clamp_min(1e-30))
            worst = max(worst, error)
            if not error <= TOLERANCE[x.dtype]:
                raise RuntimeError(
                    f"{op}, keep {keep}: the {part} of {variant} is off by {error:.1e}, "
                    f"allowed {TOLERANCE[x.dtype]:.0e}"
                )
    return worst


def exact_names(module: nn.Module) -> list[str]:
    """What the gradients of a layer belong to."""
    return [f"gradient of {name}" for name, _ in module.named_parameters()]


def _forward(run: Callable, xs: list[Tensor], grads: list[Tensor], parameters: list[Tensor]):
    def call(i: int) -> object:
        with torch.no_grad():
            return run(xs[i % len(xs)])

    return call


def _backward(run: Callable, xs: list[Tensor], grads: list[Tensor], parameters: list[Tensor]):
    inputs = [x.detach().requires_grad_() for x in xs]
    outputs = [run(x) for x in inputs]

    def call(i: int) -> object:
        i %= len(inputs)
        return torch.autograd.grad(outputs[i], [inputs[i], *parameters], grads[i], retain_graph=True)

    return call
