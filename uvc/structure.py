"""What is kept of a model: frozen records, JSON in and out, put on a model and read back.

H heads, K head dim, F hidden neurons, L blocks.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from uvc.layers import (
    Size,
    Sizes,
    Slimming,
    blocks_of,
    check,
    convert,
    is_compacted,
    sizes_of,
    slimming,
    units_of,
)


@dataclass(frozen=True)
class BlockStructure:
    """What is kept of one block.

    `attn`, `mlp`: False skips that half; its groups stay on record. `heads`: kept head indices; `qk_dims`,
    `v_dims`: per kept head, its kept dims; `neurons`: kept neuron indices. Indices ascend. A head without v
    dims adds nothing and is dropped. `tokens`: how many patch tokens go on from the attention half, to
    the MLP and all later blocks; None lets all that arrive. ValueError for anything else.
    """

    attn: bool
    mlp: bool
    heads: tuple[int, ...]
    qk_dims: tuple[tuple[int, ...], ...]
    v_dims: tuple[tuple[int, ...], ...]
    neurons: tuple[int, ...]
    tokens: int | None = None

    def __post_init__(self):
        if self.tokens is not None and (type(self.tokens) is not int or self.tokens < 1):
            raise ValueError(f"tokens must be a number of patch tokens, at least 1, got {self.tokens!r:.60}")
        for name in ("attn", "mlp"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        heads, neurons = indices("heads", self.heads), indices("neurons", self.neurons)
        dims = {}
        for name in ("qk_dims", "v_dims"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple) or len(value) != len(heads):
                raise ValueError(
                    f"{name} must have one entry for each of the {len(heads)} kept heads, got {value!r:.60}"
                )
            dims[name] = [indices(f"{name} of head {head}", d) for head, d in zip(heads, value, strict=True)]
        kept = [i for i, v in enumerate(dims["v_dims"]) if v]
        object.__setattr__(self, "heads", tuple(heads[i] for i in kept))
        object.__setattr__(self, "qk_dims", tuple(dims["qk_dims"][i] for i in kept))
        object.__setattr__(self, "v_dims", tuple(dims["v_dims"][i] for i in kept))
        object.__setattr__(self, "neurons", neurons)

    def contains(self, other: "BlockStructure") -> bool:
        """Whether everything that `other` keeps of a block is kept here, too."""
        mine = {h: dims for h, *dims in zip(self.heads, self.qk_dims, self.v_dims, strict=True)}
        halves = self.attn >= other.attn and self.mlp >= other.mlp
        tokens = self.tokens is None or (other.tokens is not None and other.tokens <= self.tokens)
        return (
            halves
            and tokens
            and set(other.neurons) <= set(self.neurons)
            and all(
                head in mine and set(qk) <= set(mine[head][0]) and set(v) <= set(mine[head][1])
                for head, qk, v in zip(other.heads, other.qk_dims, other.v_dims, strict=True)
            )
        )


def indices(name: str, values: object) -> tuple[int, ...]:
    """`values` as a tuple of strictly ascending, non-negative ints; ValueError naming `name` otherwise."""
    if not isinstance(values, list | tuple) or any(type(v) is not int for v in values):
        raise ValueError(f"{name} must be a list of integers, got {values!r:.60}")
    if values and values[0] < 0:
        raise ValueError(f"{name} must not be negative, got {values[0]}")
    for a, b in itertools.pairwise(values):
        if a >= b:
            raise ValueError(f"{name} must ascend without repeats, got {a} before {b}")
    return tuple(values)


@dataclass(frozen=True)
class Structure:
    """What is kept of every block of a model; compares by value, and travels as JSON."""

    blocks: tuple[BlockStructure, ...]

    def __post_init__(self):
        object.__setattr__(self, "blocks", tuple(self.blocks))

    @classmethod
    def dense(cls, model: nn.Module) -> "Structure":
        """Everything is kept."""
        return cls.uniform(model)

    @classmethod
    def uniform(
        cls,
        model: nn.Module,
        heads: float = 1.0,
        head_dims: float = 1.0,
        neurons: float = 1.0,
        blocks: float = 1.0,
    ) -> "Structure":
        """Keep the first units of each family, the same in every block, and run the first blocks.

        Each argument is a fraction in [0, 1] of its family, rounded to whole units: `heads` of the heads,
        `head_dims` of the q/k dims and v dims of each kept head, `neurons` of the neurons, `blocks` of the
        blocks. What a layer does not offer stays.
        """
        s = sizes_of(model)
        n_blocks, kept = portion("blocks", blocks, len(s.blocks)), []
        for i, (offered, size) in enumerate(zip(s.families, s.each, strict=True)):
            n_heads, n_neurons = (
                portion("heads", heads, size.heads),
                portion("neurons", neurons, size.neurons),
            )
            dims = portion("head_dims", head_dims, size.head_dim)
            n = n_heads if offered.heads else size.heads
            v = tuple(range(dims if offered.v else size.head_dim))
            units = units_of(s.layers[i][0])
            units = units[: dims // len(units[0])] if offered.qk else units
            qk = tuple(sorted(dim for unit in units for dim in unit))
            neuron = tuple(range(n_neurons if offered.neurons else size.neurons))
            runs = i < n_blocks
            kept.append(BlockStructure(runs, runs, tuple(range(n)), (qk,) * n, (v,) * n, neuron))
        return cls(tuple(kept))

    @classmethod
    def random(cls, model: nn.Module, keep: float, seed: int = 0) -> "Structure":
        """Keep round(keep * F) neurons and round(keep * H * K) (head, dim) units of every block, at random.

        How many heads survive is drawn among what is possible, then q/k dims and v dims are drawn apart
        within the surviving heads, so that heads are ragged. What a layer does not offer stays. The same seed
        gives the same structure.
        """
        s = sizes_of(model)
        generator = torch.Generator("cpu").manual_seed(seed)
        return cls(tuple(random_block(s, i, keep, generator) for i in range(len(s.blocks))))

    def with_tokens(
        self, model: nn.Module, keep: float | Sequence[float], at: Sequence[int] | None = None
    ) -> "Structure":
        """This structure with tokens left out: of those that reach block at[i], `keep` (or keep[i]) go on.

        keep: fractions in (0, 1]; counts are rounded, and at least 1. at: ascending block indices; by default
        the blocks after a quarter, a half and three quarters of the depth. Other blocks let all go on.
        ValueError for other fractions, blocks that are not there, or a model without an input size.
        """
        s = sizes_of(model)
        depth = len(s.blocks)
        at = sorted({depth * i // 4 for i in (1, 2, 3)}) if at is None else indices("at", at)
        keep = [keep] * len(at) if isinstance(keep, int | float) else keep
        if len(keep) != len(at) or not all(0 < fraction <= 1 for fraction in keep):
            raise ValueError(f"keep must be a fraction in (0, 1], or {len(at)} of them, got {keep}")
        if at and at[-1] >= depth:
            raise ValueError(f"at names block {at[-1]}, the model has only {depth}")
        if s.patches is None:
            raise ValueError(
                "the model has no input size of its own, so no number of tokens; give it an img_size"
            )
        tokens, left = {}, s.patches
        for block, fraction in zip(at, keep, strict=True):
            tokens[block] = left = max(1, round(fraction * left))
        kept = Structure(tuple(replace(b, tokens=tokens.get(i)) for i, b in enumerate(self.blocks)))
        fit(kept, s)
        return kept

    def contains(self, other: "Structure") -> bool:
        """Whether everything that `other` keeps is kept here, too."""
        pairs = zip(self.blocks, other.blocks, strict=False)
        return len(self.blocks) == len(other.blocks) and all(block.contains(o) for block, o in pairs)

    def to_json(self) -> str:
        """This structure as one line of JSON."""
        return json.dumps(self.to_data(), separators=(",", ":"))

    def to_data(self) -> dict[str, Any]:
        """This structure as JSON takes it."""
        blocks = [asdict(block) for block in self.blocks]
        for block in blocks:
            # Only where it says something, as older files have no such key.
            if block["tokens"] is None:
                del block["tokens"]
        return {"blocks": blocks}

    @classmethod
    def from_json(cls, text: str) -> "Structure":
        """The structure written by `to_json`; ValueError, in one line, for anything else."""
        try:
            data = json.loads(text)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the structure is not JSON: {error}") from None
        return cls.from_data(data)

    @classmethod
    def from_data(cls, data: object) -> "Structure":
        """The structure in parsed JSON; ValueError, in one line, for anything else."""
        if not isinstance(data, dict) or set(data) != {"blocks"} or not isinstance(data["blocks"], list):
            raise ValueError('a structure must be an object with the one key "blocks", a list')
        fields = [name for name in BlockStructure.__dataclass_fields__ if name != "tokens"]
        blocks = []
        for i, block in enumerate(data["blocks"]):
            if not isinstance(block, dict) or set(block) - {"tokens"} != set(fields):
                raise ValueError(
                    f"blocks[{i}] of the structure must have exactly the keys {', '.join(fields)}, "
                    "and tokens where some are left out"
                )
            try:
                blocks.append(BlockStructure(**block))
            except ValueError as error:
                raise ValueError(f"blocks[{i}] of the structure: {error}") from None
        return cls(tuple(blocks))


def portion(name: str, fraction: float, whole: int) -> int:
    """`fraction` of `whole` in whole units; ValueError unless the fraction lies in [0, 1]."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"{name} must be a fraction between 0 and 1, got {fraction}")
    return round(fraction * whole)


def random_block(s: Sizes, i: int, keep: float, generator: torch.Generator) -> BlockStructure:
    """Block `i` with `keep` of its v dims and q/k dims over a random number of heads, where it offers them;
    of q/k dims that go in pairs, as many pairs as fit.
    """
    offered, size = s.families[i], s.each[i]
    units, n_neurons = portion("keep", keep, size.heads * size.head_dim), portion("keep", keep, size.neurons)

    def draw(n: int, of: int) -> list[int]:
        return sorted(torch.randperm(of, generator=generator, device="cpu")[:n].tolist())

    whole = list(range(size.head_dim))
    if offered.v:
        # Every kept head needs at least one v dim and holds at most K of them.
        fewest, most = -(-units // size.head_dim), min(size.heads, units)
        n_heads = int(torch.randint(fewest, most + 1, (), generator=generator, device="cpu"))
        n_heads = n_heads if offered.heads else size.heads
        heads = draw(n_heads, size.heads)
        v = [draw(1, size.head_dim) for _ in heads]
        rest = [(i, d) for i in range(n_heads) for d in range(size.head_dim) if d != v[i][0]]
        for j in draw(max(units - n_heads, 0), len(rest)):
            v[rest[j][0]].append(rest[j][1])
    else:
        heads = draw(round(keep * size.heads) if offered.heads else size.heads, size.heads)
        v = [whole for _ in heads]
    qk = [[] if offered.qk else whole for _ in heads]
    if offered.qk:
        together = units_of(s.layers[i][0])
        groups = len(heads) * len(together)
        for j in draw(min(units // len(together[0]), groups), groups):
            qk[j // len(together)] += together[j % len(together)]
    neurons = tuple(draw(n_neurons if offered.neurons else size.neurons, size.neurons))
    return BlockStructure(
        True,
        True,
        tuple(heads),
        tuple(tuple(sorted(d)) for d in qk),
        tuple(tuple(sorted(d)) for d in v),
        neurons,
    )


def apply_structure(model: nn.Module, structure: Structure) -> nn.Module:
    """Leave out, in place, what `structure` does not keep; weights stay. Returns the model, now converted.

    ValueError when the model cannot be served or the structure does not fit its sizes; then nothing changes.
    """
    slimmings = fit_structure(model, structure)
    convert(model)
    s = sizes_of(model)
    for block, size, kept, slims in zip(s.blocks, s.each, structure.blocks, slimmings, strict=True):
        block.attn.set_kept(*head_masks(kept, size))
        block.mlp.set_kept(neuron_mask(kept, size))
        block.set_skip(not kept.attn, not kept.mlp)
        block.set_slimming(slims)
    return model


def fit(structure: Structure, s: Sizes) -> None:
    """ValueError unless `structure` fits a model of these sizes, and keeps what its layers do not offer."""
    if len(structure.blocks) != len(s.blocks):
        raise ValueError(f"the structure has {len(structure.blocks)} blocks, the model {len(s.blocks)}")
    for i, (block, (heads, head_dim, neurons)) in enumerate(zip(structure.blocks, s.each, strict=True)):
        families = [("heads", block.heads, heads), ("neurons", block.neurons, neurons)]
        families += [
            (f"qk_dims of head {h}", d, head_dim) for h, d in zip(block.heads, block.qk_dims, strict=True)
        ]
        families += [
            (f"v_dims of head {h}", d, head_dim) for h, d in zip(block.heads, block.v_dims, strict=True)
        ]
        for name, kept, size in families:
            if kept and kept[-1] >= size:
                raise ValueError(f"{name} of block {i} keeps index {kept[-1]}, the model has only {size}")
        check_offered(i, block, s)
    patch_tokens(structure, s.patches)


def check_offered(i: int, block: BlockStructure, s: Sizes) -> None:
    """ValueError, naming the layer and what ties it, where block `i` leaves out what it does not offer."""
    masks = head_masks(block, s.each[i]), (neuron_mask(block, s.each[i]),)
    for half, layer, mask in zip(("attn", "mlp"), s.layers[i], masks, strict=True):
        if fault := layer.torn(mask):
            raise ValueError(f"blocks.{i}.{half}: {fault}")


def head_masks(block: BlockStructure, size: Size) -> tuple[Tensor, Tensor]:
    """Bool masks [H, K] of the kept q/k dims and v dims."""
    qk, v = torch.zeros(2, size.heads, size.head_dim, dtype=torch.bool, device="cpu").unbind()
    for head, qk_dims, v_dims in zip(block.heads, block.qk_dims, block.v_dims, strict=True):
        qk[head, list(qk_dims)] = True
        v[head, list(v_dims)] = True
    return qk, v


def neuron_mask(block: BlockStructure, size: Size) -> Tensor:
    """Bool mask [F] of the kept neurons."""
    mask = torch.zeros(size.neurons, dtype=torch.bool, device="cpu")
    mask[list(block.neurons)] = True
    return mask


def patch_tokens(structure: Structure, patches: int | None) -> list[tuple[int, int]]:
    """Patch tokens that reach each block, and that go on from its attention half; ValueError if more should.

    patches: how many reach the first block; None, where that is not known, allows no dropped tokens.
    """
    tokens = []
    for i, block in enumerate(structure.blocks):
        arriving = tokens[-1][1] if tokens else patches
        if block.tokens is not None and (arriving is None or block.tokens > arriving):
            raise ValueError(
                f"tokens of block {i} is {block.tokens}, but {arriving or 'an unknown number'} reach it"
            )
        tokens.append((arriving, arriving if block.tokens is None else block.tokens))
    return tokens


def fit_structure(model: nn.Module, structure: Structure) -> list[Slimming | None]:
    """What each block of `model` does to tokens; ValueError unless `structure` fits the model."""
    fit(structure, sizes_of(model))
    return [slimming(model, block.tokens) for block in structure.blocks]


def structure_of(model: nn.Module) -> Structure:
    """What is kept of a timm model (everything), a converted one, or a compacted one (as compacted)."""
    if is_compacted(model):
        return Structure(tuple(block.record for block in blocks_of(model)))
    if not all(hasattr(block, "skip_attn") for block in blocks_of(model)):
        return Structure.dense(model)
    check(model)
    blocks = []
    for block in blocks_of(model):
        qk, v = block.attn.kept_qk, block.attn.kept_v
        heads = v.any(1).nonzero().flatten().tolist()
        blocks.append(
            BlockStructure(
                attn=not block.skip_attn,
                mlp=not block.skip_mlp,
                heads=tuple(heads),
                qk_dims=tuple(tuple(qk[h].nonzero().flatten().tolist()) for h in heads),
                v_dims=tuple(tuple(v[h].nonzero().flatten().tolist()) for h in heads),
                neurons=tuple(block.mlp.kept_neurons.nonzero().flatten().tolist()),
                tokens=block.tokens,
            )
        )
    return Structure(tuple(blocks))
