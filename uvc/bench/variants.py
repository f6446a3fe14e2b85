"""The variants of a model that are compared, made from one set of random weights and one random structure.

dense          timm, eager, with scaled_dot_product_attention
compiled       the same, every block under torch.compile
converted      `uvc.convert`, nothing pruned
on_the_fly     `uvc.apply_structure`: full-size weights stay, kernels skip what is removed
compacted      `uvc.compaction`: physically smaller, plain torch
padded         the same with all heads as one product, padded with zeros
masked         dense products, then a multiplication by 0 or 1: what published pruning code does in training
pack_torch     index_select of the kept rows and columns, then torch's linear layers and attention
torch_pruning  dense widths cut by the package torch-pruning to about the same cost; other weights survive
"""

import copy
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import uvc
from uvc.bench.roofline import Kept, Shape, everything, kept_of, shape_of

DENSE = ("dense", "compiled", "converted")
PRUNED = ("on_the_fly", "compacted", "padded", "masked", "pack_torch")
VARIANTS = (*DENSE, *PRUNED, "torch_pruning")
# Relative errors of outputs and gradients that rounding explains.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}


class Left(NamedTuple):
    """A variant that could not be built, and why."""

    variant: str
    reason: str


class Built(NamedTuple):
    """A model, its shape and what each of its blocks keeps; `full`: its weights stayed at full size."""

    model: nn.Module
    shape: Shape
    kept: tuple[Kept, ...]
    full: bool


def build(
    name: str,
    keep: float,
    batch: int,
    device: torch.device,
    variants: Sequence[str] = VARIANTS,
    dense: nn.Module | None = None,
) -> tuple[dict[str, Built], list[Left]]:
    """The models of `variants` on `device`, and those left out; `dense` replaces timm's model `name`."""
    torch.manual_seed(0)
    dense = (timm.create_model(name) if dense is None else dense).to(device)
    structure = uvc.Structure.random(dense, keep, seed=0)
    shape = shape_of(dense, batch)
    kept = tuple(kept_of(block) for block in structure.blocks)
    whole = (everything(shape),) * len(kept)
    fly = uvc.apply_structure(copy.deepcopy(dense), structure)
    make: dict[str, Callable[[], nn.Module]] = {
        "dense": lambda: dense,
        "compiled": lambda: compiled(copy.deepcopy(dense)),
        "converted": lambda: uvc.convert(copy.deepcopy(dense)),
        "on_the_fly": lambda: fly,
        "compacted": lambda: uvc.compact(fly),
        "padded": lambda: uvc.compact(fly, "padded"),
        "masked": lambda: multiply_by_masks(copy.deepcopy(dense), structure),
        "pack_torch": lambda: pack_with_torch(copy.deepcopy(dense), structure),
    }
    built, left = {}, []
    for variant in variants:
        try:
            if variant == "torch_pruning":
                built[variant] = _torch_pruning(dense, keep, batch)
            else:
                of = whole if variant in DENSE else kept
                built[variant] = Built(make[variant](), shape, of, variant not in ("compacted", "padded"))
        except (ImportError, RuntimeError) as error:
            left.append(Left(variant, first_line(error)))
    return built, left


def fault_of(run: Callable[[], object]) -> str | None:
    """None when `run` runs, else why not, in one line: a compiler may raise anything."""
    try:
        run()
    except Exception as error:
        return first_line(error)
    return None


def first_line(error: BaseException) -> str:
    """An error as one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:160]


def compiled(model: nn.Module) -> nn.Module:
    """`model` with each block under torch.compile: one code serves all, in a fraction of the time."""
    # Raise now what inductor would raise in the middle of a measurement.
    if next(model.parameters()).device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    elif importlib.util.find_spec("triton") is None:
        raise RuntimeError("torch.compile needs triton on a GPU, and it is not installed")
    # The gradients of one forward pass are asked for again and again where single layers are timed.
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False
    # One code object serves every width and direction; past a limit dynamo would go back to eager.
    torch._dynamo.config.recompile_limit = 64
    for block in model.blocks:
        block.compile(dynamic=False)
    return model


def multiply_by_masks(model: nn.Module, structure: uvc.Structure) -> nn.Module:
    """Masks in hooks behind `qkv` and before `fc2`; a removed v dim is a zero in the projection's input."""
    for block, kept in zip(model.blocks, structure.blocks, strict=True):
        qk, v = head_masks(block.attn, kept)
        rows = torch.cat([qk.flatten(), qk.flatten(), v.flatten()])
        neurons = torch.zeros(block.mlp.fc1.out_features)
        neurons[list(kept.neurons)] = 1
        # Buffers, so that they follow the model to its device.
        block.attn.register_buffer("kept_rows", rows.to(block.attn.qkv.weight), persistent=False)
        block.mlp.register_buffer("kept_neurons", neurons.to(block.mlp.fc1.weight), persistent=False)
        block.attn.qkv.register_forward_hook(
            lambda _, args, out, attn=block.attn: out * attn.kept_rows.to(out.dtype)
        )
        block.mlp.fc2.register_forward_pre_hook(
            lambda _, args, mlp=block.mlp: (args[0] * mlp.kept_neurons.to(args[0].dtype),)
        )
    return model


def head_masks(attn: nn.Module, kept: uvc.structure.BlockStructure) -> tuple[Tensor, Tensor]:
    """0-1 masks [H, K] of the kept q/k dims and v dims."""
    qk, v = torch.zeros(2, attn.num_heads, attn.head_dim).unbind()
    for head, qk_dims, v_dims in zip(kept.heads, kept.qk_dims, kept.v_dims, strict=True):
        qk[head, list(qk_dims)] = 1
        v[head, list(v_dims)] = 1
    return qk, v


class PackedAttention(nn.Module):
    """Kept rows by index_select, heads padded with zero rows to the longest, one attention call."""

    def __init__(self, attn: nn.Module, kept: uvc.structure.BlockStructure) -> None:
        super().__init__()
        self.qkv, self.proj, self.scale = attn.qkv, attn.proj, attn.scale
        self.heads, K, A = len(kept.heads), attn.head_dim, attn.num_heads * attn.head_dim
        self.width = max([1, *map(len, kept.qk_dims), *map(len, kept.v_dims)])
        lists = [
            (offset, dims)
            for offset, of in ((0, kept.qk_dims), (A, kept.qk_dims), (2 * A, kept.v_dims))
            for dims in zip(kept.heads, of, strict=True)
        ]
        rows, on, columns = [], [], []
        for offset, (head, dims) in lists:
            padding = self.width - len(dims)
            rows += [offset + head * K + d for d in dims] + [0] * padding
            on += [1.0] * len(dims) + [0.0] * padding
        for place, (head, dims) in enumerate(zip(kept.heads, kept.v_dims, strict=True)):
            columns += [(place * self.width + i, head * K + d) for i, d in enumerate(dims)]
        device = attn.qkv.weight.device
        self.register_buffer("rows", torch.tensor(rows, device=device))
        self.register_buffer("on", torch.tensor(on, device=device)[:, None])
        places = torch.tensor(columns, device=device, dtype=torch.int64).reshape(-1, 2)
        self.register_buffer("from_heads", places[:, 0].contiguous())
        self.register_buffer("columns", places[:, 1].contiguous())

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        """x [B, N, D] -> [B, N, D]."""
        B, N, _ = x.shape
        weight = self.qkv.weight.index_select(0, self.rows) * self.on
        bias = None if self.qkv.bias is None else self.qkv.bias.index_select(0, self.rows) * self.on[:, 0]
        qkv = F.linear(x, weight, bias).reshape(B, N, 3, self.heads, self.width)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).reshape(B, N, -1)
        columns = self.proj.weight.index_select(1, self.columns)
        return F.linear(out.index_select(2, self.from_heads), columns, self.proj.bias)


class PackedMlp(nn.Module):
    """Kept rows and columns by index_select, then torch's linear layers."""

    def __init__(self, mlp: nn.Module, kept: uvc.structure.BlockStructure) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act = mlp.fc1, mlp.fc2, mlp.act
        self.register_buffer("neurons", torch.tensor(kept.neurons, device=mlp.fc1.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> [B, N, D]."""
        bias = None if self.fc1.bias is None else self.fc1.bias.index_select(0, self.neurons)
        hidden = self.act(F.linear(x, self.fc1.weight.index_select(0, self.neurons), bias))
        return F.linear(hidden, self.fc2.weight.index_select(1, self.neurons), self.fc2.bias)


def pack_with_torch(model: nn.Module, structure: uvc.Structure) -> nn.Module:
    """What plain torch does about a structure without any kernel of ours."""
    for block, kept in zip(model.blocks, structure.blocks, strict=True):
        block.attn, block.mlp = PackedAttention(block.attn, kept), PackedMlp(block.mlp, kept)
    return model


def _torch_pruning(dense: nn.Module, keep: float, batch: int) -> Built:
    """The dense model with heads and neurons cut by torch-pruning; ImportError where it is not installed."""
    try:
        import torch_pruning
    except ImportError:
        raise ImportError("the package torch-pruning is not installed") from None
    model = copy.deepcopy(dense)
    device = next(model.parameters()).device
    if keep < 1:
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        image = torch.randn(1, model.in_chans, *model.patch_embed.img_size, device=device)
        # The residual stream keeps its width, as in every other variant here.
        stream = [module for name, module in model.named_modules() if name in ("patch_embed.proj", "head")]
        stream += [part for block in model.blocks for part in (block.attn.proj, block.mlp.fc2)]
        with warnings.catch_warnings():
            # It asks what to do with the embeddings; nothing, as the residual stream keeps its width.
            warnings.simplefilter("ignore", UserWarning)
            pruner = torch_pruning.pruner.BasePruner(
                model,
                image,
                importance=torch_pruning.importance.GroupMagnitudeImportance(),
                pruning_ratio=1 - keep,
                ignored_layers=stream,
                num_heads={block.attn.qkv: block.attn.num_heads for block in model.blocks},
                prune_num_heads=False,
                prune_head_dims=True,
            )
        pruner.step()
        for block in model.blocks:
            attn = block.attn
            attn.num_heads = pruner.num_heads[attn.qkv]
            attn.head_dim = attn.qkv.out_features // (3 * attn.num_heads)
            attn.attn_dim = attn.num_heads * attn.head_dim
    attn, mlp = model.blocks[0].attn, model.blocks[0].mlp
    smaller = {"heads": attn.num_heads, "head_dim": attn.head_dim, "hidden": mlp.fc1.out_features}
    shape = shape_of(dense, batch)._replace(**smaller)
    return Built(model, shape, (everything(shape),) * len(model.blocks), False)


def gate(outputs: dict[str, Tensor], dtype: torch.dtype, what: str) -> float:
    """The worst relative error among tensors that must agree; RuntimeError when it exceeds rounding."""
    worst, (first, *others) = 0.0, outputs
    for variant in others:
        a, b = (outputs[w].double() for w in (variant, first))
        error = float((a - b).norm() / b.norm().clamp_min(1e-30))
        worst = max(worst, error)
        if not error <= TOLERANCE[dtype]:
            allowed = f"allowed {TOLERANCE[dtype]:.0e}"
            raise RuntimeError(f"{what}: {variant} and {first} disagree by {error:.1e}, {allowed}")
    return worst
