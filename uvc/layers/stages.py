"""Where a model's transformer blocks are: in one list, in a list of each stage, or somewhere in a wrapper."""

from collections.abc import Callable, Sequence

from torch import nn

from uvc.layers._surgery import like

LISTS = nn.Sequential | nn.ModuleList
# Package and class of the blocks that are looked for in models without a list of that name.
KNOWN: set[tuple[str, str]] = set()
# What takes blocks of several attentions and MLPs apart, by their class.
SEVERAL: dict[type[nn.Module], Callable[[nn.Module], list[nn.Module]]] = {}


def is_block(module: nn.Module) -> bool:
    """Whether a module is a transformer block: one that is known, or what took the place of one."""
    kind = type(module)
    known = (kind.__module__.partition(".")[0], kind.__name__) in KNOWN
    several = isinstance(module, tuple(SEVERAL))
    return known or several or hasattr(module, "set_skip") or hasattr(module, "in_form")


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
    found = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, LISTS) and len(module) and is_block(module[0]) and not inside:
            found[name] = module
    return found


def entries_of(block: nn.Module) -> list[nn.Module]:
    """What of a block has an entry of its own in a structure: itself, or what it has several of."""
    apart = next((apart for kind, apart in SEVERAL.items() if isinstance(block, kind)), None)
    return [block] if apart is None else apart(block)


def named_entries(name: str, block: nn.Module) -> dict[str, nn.Module]:
    """The entries of the block of this name: "blocks.3", or "blocks.3[0]" and so on where it has several."""
    entries = entries_of(block)
    return {name: block} if entries == [block] else {f"{name}[{i}]": each for i, each in enumerate(entries)}


def listed(model: nn.Module) -> dict[str, nn.Module]:
    """All blocks that the model calls, by their names, in the order in which they run."""
    lists = lists_of(model).items()
    return {f"{name}.{i}": block for name, blocks in lists for i, block in blocks.named_children()}


def named_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """All blocks with an entry in a structure, by their names, in order."""
    return {
        key: entry
        for name, block in listed(model).items()
        for key, entry in named_entries(name, block).items()
    }


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """All blocks with an entry in a structure, in order."""
    return [entry for block in listed(model).values() for entry in entries_of(block)]


def replaced(model: nn.Module, blocks: Sequence[nn.Module]) -> dict[int, object]:
    """For `copy.deepcopy`: a memo by which a copy of the model has these in the place of those `listed`."""
    memo, rest = {}, list(blocks)
    for old in lists_of(model).values():
        mine, rest = rest[: len(old)], rest[len(old) :]
        memo[id(old)] = like(old, mine)
    return memo
