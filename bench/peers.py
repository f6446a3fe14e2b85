"""The attention core beside its peers, forward and backward, in one table; part of `make bench-gpu`.

    python bench/peers.py [--device cuda] [--images 128] [--heads 6] [--tokens 197] [--dims 64] [--out DIR]

Softmax attention of dense heads, from q, k and v to the output and back: ours by each provider that serves,
torch's scaled_dot_product_attention by each of its backends, compiled, FlashAttention and xformers where they
are installed. Each is first compared with float64 on one image; one that is wrong, or that cannot, is named
and not timed. TFLOP/s count 4 N N d forward and 10 N N d backward for each head.
"""

import argparse
import csv
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from uvc_kernels import _dispatch, kept_heads, packed
from uvc_kernels.indices import counts_of

from uvc.bench.timing import Round

PROVIDERS = {"cuda": ("cuda", "triton"), "cpu": ("cuda-host",)}
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 1e-4}
Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # of [B, H, N, d]


def sdpa(backend: SDPBackend) -> Run:
    """torch's own by one backend."""

    def run(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return run


def ours(pieces: packed.Pieces, heads: int, dims: int, device: torch.device) -> Callable:
    """The pieces of a provider; q, k and v [B N, 3 H d] lie packed, as a layer's product leaves them."""
    whole = torch.ones(heads, dims, dtype=torch.bool)
    kept = kept_heads(whole, whole, device)
    table, counts, scale = kept.table, counts_of(kept), dims**-0.5

    class Core(torch.autograd.Function):
        @staticmethod
        def forward(ctx, qkv, tokens):
            out = qkv.new_empty(len(qkv), heads * dims)
            top, inverse = (qkv.new_empty(heads, len(qkv), dtype=torch.float32) for _ in range(2))
            pieces.attention_core(qkv, table, counts, tokens, scale, out, top, inverse)
            ctx.save_for_backward(qkv, out, top, inverse)
            ctx.tokens = tokens
            return out

        @staticmethod
        def backward(ctx, grad):
            qkv, out, top, inverse = ctx.saved_tensors
            grad_qkv = torch.empty_like(qkv)
            pieces.attention_core_backward(
                qkv, out, grad, top, inverse, table, counts, ctx.tokens, scale, grad_qkv
            )
            return grad_qkv, None

    return Core.apply


def flash_attention() -> Run:
    """FlashAttention's own package."""
    func = importlib.import_module("flash_attn").flash_attn_func
    return lambda q, k, v: func(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def xformers() -> Run:
    """xformers' memory-efficient attention."""
    func = importlib.import_module("xformers.ops").memory_efficient_attention
    return lambda q, k, v: func(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def peers(device: torch.device) -> Iterator[tuple[str, Callable[[], Run]]]:
    """Names, and what makes each; making one may fail, and then it is left out by name."""
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        yield f"sdpa {backend.name.lower().removesuffix('_attention')}", lambda b=backend: sdpa(b)
    yield "sdpa math", lambda: sdpa(SDPBackend.MATH)
    if device.type == "cuda":
        # The backward pass is timed again and again on one forward pass.
        import torch._functorch.config

        torch._functorch.config.donated_buffer = False
        yield "compiled, cudnn", lambda: torch.compile(sdpa(SDPBackend.CUDNN_ATTENTION))
    yield "flash_attn", flash_attention
    yield "xformers", xformers


class Case:
    """One shape: inputs in both layouts, the exact answer of one image, and how one is judged and timed."""

    def __init__(
        self, images: int, heads: int, tokens: int, dims: int, device: torch.device, dtype: torch.dtype
    ):
        self.shape, self.device, self.dtype = (images, heads, tokens, dims), device, dtype
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(4, images, heads, tokens, dims, generator=generator).to(device, dtype)
        self.qkv = [t.requires_grad_() for t in drawn[:3].unbind()]
        self.grad = drawn[3]
        exact = [t[:1].detach().double().requires_grad_() for t in self.qkv]
        out = F.scaled_dot_product_attention(*exact)
        self.exact = [out.detach(), *torch.autograd.grad(out, exact, self.grad[:1].double())]

    def packed(self, t: torch.Tensor) -> torch.Tensor:
        """[B, H, N, d] as [B N, H d]."""
        B, H, N, d = t.shape
        return t.transpose(1, 2).reshape(B * N, H * d)

    def run_ours(self, core: Callable) -> tuple[Callable, list[torch.Tensor], torch.Tensor]:
        """What to call, on what, and the gradient to give it."""
        qkv = torch.cat([self.packed(t.detach()) for t in self.qkv], 1).requires_grad_()
        return partial(core, qkv, self.shape[2]), [qkv], self.packed(self.grad)

    def error(self, run: Callable, leaves: list[torch.Tensor], grad: torch.Tensor) -> float:
        """The worst error of the first image, relative to the largest entry of each result."""
        B, H, N, d = self.shape
        out = run()
        found = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
        if len(leaves) == 1:  # packed
            found = [found[0], *found[1].chunk(3, 1)]
            found = [t.reshape(B, N, H, d).transpose(1, 2) for t in found]
        pairs = [(a[:1].double(), b) for a, b in zip(found, self.exact, strict=True)]
        return max(float(((a - b).abs().max() / b.abs().max()).nan_to_num(float("inf"))) for a, b in pairs)

    def times(
        self, run: Callable, leaves: list[torch.Tensor], grad: torch.Tensor, rounds: int
    ) -> list[float]:
        """Milliseconds forward and backward, medians; of the device alone, where a graph can be captured."""
        out = run()
        calls = {
            "forward": lambda _: run(),
            "backward": lambda _: torch.autograd.grad(out, leaves, grad, retain_graph=True),
        }
        timed = Round(calls, self.device, replay=True)
        for _ in range(rounds):
            timed.run()
        return [timing.ms for timing in timed.timings().values()]


def rows(case: Case, rounds: int) -> Iterator[tuple[str, float, float, float, float, float, str]]:
    """Name, error, ms and TFLOP/s forward, ms and TFLOP/s backward, and why there are none."""
    images, heads, tokens, dims = case.shape
    able = [name for name in PROVIDERS[case.device.type] if serves(name, case)]
    made: list[tuple[str, Callable]] = [
        (
            f"uvc {name}",
            partial(lambda name: case.run_ours(ours(packed.provided[name], heads, dims, case.device)), name),
        )
        for name in able
    ]
    made += [
        (name, partial(lambda make: (partial(make(), *case.qkv), case.qkv, case.grad), make))
        for name, make in peers(case.device)
    ]
    flops = images * heads * tokens**2 * dims
    for name, make in made:
        try:
            call = make()
            error = case.error(*call)
            if error > TOLERANCE[case.dtype]:
                yield name, error, 0.0, 0.0, 0.0, 0.0, "wrong"
                continue
            ahead, back = case.times(*call, rounds)
        except Exception as fault:  # a peer may raise anything, and then it is left out
            said = next(iter(str(fault).strip().splitlines()), type(fault).__name__)
            yield name, float("nan"), 0.0, 0.0, 0.0, 0.0, said[:90]
            continue
        yield name, error, ahead, 4 * flops / ahead / 1e9, back, 10 * flops / back / 1e9, ""


def serves(name: str, case: Case) -> bool:
    """Whether a provider of ours can run here and passed its self-check."""
    return _dispatch.serves("attention", name, case.device, case.dtype)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table, and writes it where asked to; 1 when one of ours is wrong or none serves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    for name, value in (("images", 128), ("heads", 6), ("tokens", 197), ("dims", 64), ("rounds", 21)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, help="a folder for peers.csv")
    o = parser.parse_args(arguments)
    if o.device == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # the default one cannot be captured
    case = Case(o.images, o.heads, o.tokens, o.dims, torch.device(o.device), torch.bfloat16)
    print(
        f"attention core on {o.device}, bfloat16, {o.images} images, {o.heads} heads, {o.tokens} tokens, "
        f"{o.dims} dims"
    )
    line = "{:20} {:>8} {:>12} {:>8} {:>12} {:>8}  {}".format
    print(line("", "error", "forward, ms", "TFLOP/s", "backward, ms", "TFLOP/s", ""))
    found = []
    for row in rows(case, o.rounds):
        found.append(row)
        print(line(row[0], *(f"{n:.3g}" if n else "-" for n in row[1:6]), row[6]), flush=True)
    if o.out:
        with (o.out / "peers.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(
                ["name", "error", "forward_ms", "forward_tflops", "backward_ms", "backward_tflops", "left"]
            )
            writer.writerows(found)
    mine = [row for row in found if row[0].startswith("uvc ")]
    return 0 if mine and not any(row[6] for row in mine) else 1


if __name__ == "__main__":
    sys.exit(main())
