"""Where a model's transformer blocks are: in one list, in a list of each stage, or somewhere in a wrapper."""

from collections.abc import Sequence

from torch import nn

from uvc.layers._surgery import like

LISTS = nn.Sequential | nn.ModuleList
# Package and class of the blocks that are looked for in models without a list of that name.
KNOWN: set[tuple[str, str]] = set()


def is_block(module: nn.Module) -> bool:
    """Whether a module is a transformer block: one that is known, or what took the place of one."""
    kind = type(module)
    known = (kind.__module__.partition(".")[0], kind.__name__) in KNOWN
    return known or hasattr(module, "set_skip") or hasattr(module, "in_form")


def lists_of(model: nn.Module) -> dict[str, nn.Sequential | nn.ModuleList]:
    """The lists of blocks of a model by their names, in the order in which they run; {} without any."""
    found = {"blocks": getattr(model, "blocks", None)}
    if found["blocks"] is None:
        own = "layers" if hasattr(model, "layers") else "stages"
        stages = getattr(model, own, None)
        stages = enumerate(stages if isinstance(stages, LISTS) else ())
        found = {f"{own}.{i}.blocks": getattr(stage, "blocks", None) for i, stage in stages}
    if found and all(isinstance(blocks, LISTS) and len(blocks) for blocks in found.values()):
        return found
    lists = ((name, module) for name, module in model.named_modules() if isinstance(module, LISTS))
    return {name: module for name, module in lists if len(module) and is_block(module[0])}


def named_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """All blocks by their names, in the order in which they run."""
    lists = lists_of(model).items()
    return {f"{name}.{i}": block for name, blocks in lists for i, block in blocks.named_children()}


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
