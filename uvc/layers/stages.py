"""Where a model's transformer blocks are: in one list, or in a list of each stage."""

from collections.abc import Sequence

from torch import nn

from uvc.layers._surgery import like


def lists_of(model: nn.Module) -> dict[str, nn.Sequential | nn.ModuleList]:
    """The lists of blocks of a model by their names, in the order in which they run; {} without any."""
    lists = nn.Sequential | nn.ModuleList
    found = {"blocks": getattr(model, "blocks", None)}
    if found["blocks"] is None:
        stages = getattr(model, "layers", None)
        stages = enumerate(stages if isinstance(stages, lists) else ())
        found = {f"layers.{i}.blocks": getattr(stage, "blocks", None) for i, stage in stages}
    return found if all(isinstance(blocks, lists) and len(blocks) for blocks in found.values()) else {}


def named_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """All blocks by their names, in the order in which they run."""
    lists = lists_of(model).items()
    return {f"{name}.{i}": block for name, blocks in lists for i, block in enumerate(blocks)}


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """All blocks in the order in which they run."""
    return list(named_blocks(model).values())


def replaced(model: nn.Module, blocks: Sequence[nn.Module]) -> dict[int, object]:
    """For `copy.deepcopy`: a memo by which a copy of the model has these in the place of its blocks."""
    memo, rest = {}, list(blocks)
    for old in lists_of(model).values():
        mine, rest = rest[: len(old)], rest[len(old) :]
        memo[id(old)] = like(old, mine)
    return memo
