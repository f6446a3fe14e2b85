"""Which patch tokens are dropped: at a few sites a fraction of them each, on the one scale of all groups.

A site is a block whose attention half may let fewer tokens go on; its interval is every half from there to
the next site's attention half. The T patch tokens of an image, ranked by the block's own score, fall into G
buckets; a bucket at a site is a group. Its first-order change of the loss is that of a gate of 1 on what the
halves of the interval read of the bucket's tokens, its price what these cost there. No weights belong to a
token, so a bucket can come back, and needs neither prox nor multiplier y.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from uvc.constraints import Limit
from uvc.costs import fixed_macs, macs_at, total
from uvc.layers import blocks_of, sizes_of, slimming
from uvc.solver.importance import group_prices
from uvc.solver.objective import marginal, soft_counts, used, weights
from uvc.solver.rounding import round_to_budget
from uvc.solver.state import Masks, State, TokenState

BUCKETS = 16
MOST_SITES = 3


def check_tokens(model: nn.Module, sites: int, metrics: Sequence[str]) -> None:
    """ValueError unless `sites` blocks (0: none) can drop tokens under budgets in these metrics."""
    if sites not in range(MOST_SITES + 1):
        raise ValueError(f"solver tokens: {sites} blocks are to drop tokens; use 0 to {MOST_SITES}")
    drops = any(getattr(block, "tokens", None) is not None for block in blocks_of(model))
    if "latency" in metrics and (sites or drops):
        raise ValueError(
            "solver tokens: a latency is measured with all tokens; budget macs, or keep all tokens"
        )
    if sites == 0:
        return
    slimming(model, 1)
    if drops:
        raise ValueError(
            "solver tokens: the model drops tokens already; start from a structure that keeps all"
        )
    if "macs" not in metrics:
        raise ValueError(f"solver tokens: {' and '.join(metrics)} count no tokens; set a budget in macs")


class AllTokens:
    """The tokens of a search that drops none."""

    state: TokenState

    def __init__(self, limits: int = 1) -> None:
        self.state = TokenState.new(0, 1, limits=limits)

    def watch(self) -> None:
        """Until `observe`, backward passes tell what the halves read of each token."""

    def evidence(self) -> list[Tensor]:
        """What `observe` reads."""
        return []

    def observe(self, scale: float, decay: float) -> None:
        """If watched: the importance of every bucket follows the square of its gate's gradient."""

    def forget(self) -> None:
        """Ends what `watch` began; `observe` has nothing to read."""

    def reprice(self, state: State, limits: Sequence[Limit]) -> None:
        """Sets what a bucket costs in its interval, from what the blocks keep now."""

    def step(self, state: State, limits: Sequence[Limit]) -> Sequence[Limit]:
        """Drops or brings back a bucket at each site, as s wants it, never below the budget. The limits are
        those at the tokens left.
        """
        return limits

    def finish(self, state: State, limits: Sequence[Limit], families: Sequence[str]) -> Sequence[Limit]:
        """Ends the search for tokens; the limits are those at the tokens left."""
        return limits

    def restore(self, limits: Sequence[Limit]) -> Sequence[Limit]:
        """Gives the model the tokens of a state that was loaded; the limits are those at the tokens left."""
        return limits

    def metrics(self) -> dict[str, float]:
        """Scalars for the log."""
        return {}


def tokens_of(model: nn.Module, sites: int, limits: int) -> AllTokens:
    """What drops tokens of the model at so many sites, possibly none."""
    return Tokens(model, sites, limits) if sites else AllTokens(limits)


class Tokens(AllTokens):
    """The tokens of one model during a search.

    Args:
        model: converted, and fit for it (`check_tokens`).
        sites: how many blocks may drop tokens, 1 to 3: the last one and, evenly apart, earlier ones.
        limits: how many budgets there are.
    """

    def __init__(self, model: nn.Module, sites: int, limits: int = 1) -> None:
        self.model, self.sizes = model, sizes_of(model)
        depth, patches = len(self.sizes.blocks), self.sizes.patches
        # The last block is always one: behind its attention a class token needs no other token.
        self.sites = sorted({depth - 1 - depth * i // (sites + 1) for i in range(sites)})
        self._slimming = slimming(model, patches)
        buckets = min(BUCKETS, patches)
        # left[n]: how many tokens are left without the n worst buckets.
        self.left = [patches - round(patches * n / buckets) for n in range(buckets + 1)]
        self.state = TokenState.new(len(self.sites), buckets, limits=limits)
        places = [sum(place < n for n in self.left) - 1 for place in range(patches)]
        self._bucket = torch.tensor(places, device="cpu")
        self._read = torch.zeros(len(self.sites), patches, device=next(model.parameters()).device)
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._fixed: dict[int, int] = {}
        self.apply()

    def apply(self, ended: bool = False) -> None:
        """Gives the model the tokens of the state; until the search has ended every site orders them."""
        for site, dropped in zip(self.sites, self.state.dropped, strict=True):
            slims = self._slimming._replace(tokens=self.left[dropped], always=not ended)
            blocks_of(self.model)[site].set_slimming(None if ended and dropped == 0 else slims)

    def watch(self) -> None:
        self.forget()  # from a pass that is repeated
        for index, block in enumerate(blocks_of(self.model)):
            for half, reached in ((block.attn, index), (block.mlp, index + 1)):
                interval = sum(site < reached for site in self.sites) - 1
                if interval >= 0:
                    self._hooks.append(half.register_forward_pre_hook(partial(self._watch, interval)))

    def _watch(self, interval: int, half: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not (torch.is_grad_enabled() and args[0].requires_grad):
            return None
        # A node of its own in the graph, as the input of a half may also be the residual.
        x = args[0].view_as(args[0])
        x.register_hook(partial(self._add, interval, x.detach()))
        return (x, *args[1:])

    def _add(self, interval: int, x: Tensor, grad: Tensor) -> None:
        # dloss/dg of a gate g = 1 on the token in place n: the sum over images of x[n] . dloss/dx[n]
        gates = (x * grad).sum(-1, dtype=self._read.dtype).sum(0)[self.sizes.prefix :]
        self._read[interval, : len(gates)] += gates

    def evidence(self) -> list[Tensor]:
        return [self._read] if self._hooks else []

    def observe(self, scale: float, decay: float) -> None:
        if not self._hooks:
            return
        state = self.state
        gates = torch.zeros_like(state.importance).index_add_(1, self._bucket, self._read.cpu() / scale)
        self.forget()
        # A bucket that is dropped keeps its importance.
        dropped = torch.tensor(state.dropped, device=gates.device)[:, None]
        there = torch.arange(gates.shape[1], device=gates.device) >= dropped
        state.importance.lerp_(gates.square(), (1.0 - decay) * there.to(gates.dtype))

    def forget(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._read.zero_()

    def limits(self, limits: Sequence[Limit], dropped: Sequence[int]) -> tuple[Limit, ...]:
        """The limits, with MACs priced where so many buckets are dropped at each site."""
        tokens = self._spans([self.left[n] for n in dropped])
        last = tokens[-1][1]
        if last not in self._fixed:
            self._fixed[last] = fixed_macs(self.model, self.sizes.prefix + last)
        costs = macs_at(self.sizes, tokens, self._fixed[last])
        return tuple(m._replace(costs=costs) if m.metric == "macs" else m for m in limits)

    def _spans(self, left: Sequence[float]) -> list[tuple[float, float]]:
        """Patch tokens that reach each block, and that go on from its attention half."""
        after, spans, arriving = dict(zip(self.sites, left, strict=True)), [], self.sizes.patches
        for block in range(len(self.sizes.blocks)):
            leaving = after.get(block, arriving)
            spans.append((arriving, leaving))
            arriving = leaving
        return spans

    def reprice(self, state: State, limits: Sequence[Limit]) -> None:
        counts, patches = soft_counts(state), self.sizes.patches
        left = [self.left[n] for n in self.state.dropped]
        shares = weights(state.z.tolist())
        prices = torch.zeros(len(left), len(limits), dtype=torch.float64)
        for m, limit in enumerate(limits):
            if limit.metric != "macs":
                continue
            whole = float(total(macs_at(self.sizes, self._spans(left), 0), counts))
            for i in range(len(left)):
                fewer = [n - patches / (len(self.left) - 1) * (i == j) for j, n in enumerate(left)]
                prices[i, m] = whole - float(total(macs_at(self.sizes, self._spans(fewer), 0), counts))
        scale = torch.tensor([s * limits[0].dense / m.dense for s, m in zip(shares, limits, strict=True)])
        self.state.price.copy_((prices @ scale.double()).clamp_min(1.0))
        buckets = self.state.importance.shape[1]
        self.state.shares = [float(p) * buckets / m.dense for p, m in zip(prices.sum(0), limits, strict=True)]

    def step(self, state: State, limits: Sequence[Limit]) -> Sequence[Limit]:
        now, wanted = self.state.dropped, self.state.wanted()
        then = [n + (w > n) - (w < n) for n, w in zip(now, wanted, strict=True)]
        for i in range(len(then) - 1, 0, -1):
            then[i - 1] = min(then[i - 1], then[i])
        back = [min(pair) for pair in zip(now, then, strict=True)]
        if then != back and not self._fits(state, limits, then):
            then = back
        return limits if then == now else self._drop(then, limits)

    def _fits(self, state: State, limits: Sequence[Limit], dropped: Sequence[int]) -> bool:
        """Whether a limit is still reached with so many buckets dropped at each site."""
        return used(state.alive(), self.limits(limits, dropped)) >= 1.0

    def _drop(self, dropped: list[int], limits: Sequence[Limit]) -> tuple[Limit, ...]:
        """The model drops these buckets; its costs are those without them."""
        self.state.dropped = dropped
        self.apply()
        return self.limits(limits, dropped)

    def finish(self, state: State, limits: Sequence[Limit], families: Sequence[str]) -> Sequence[Limit]:
        """Buckets are dropped while they are worth less per cost than the group worth most per cost that
        rounding would remove instead.
        """
        self.reprice(state, limits)
        while True:
            bound = largest_removed(state, limits, round_to_budget(state, limits, families))
            dropped = self.next_below(bound)
            if dropped is None or not self._fits(state, limits, dropped):
                break
            limits = self._drop(dropped, limits)
        self.apply(ended=True)
        return limits

    def restore(self, limits: Sequence[Limit]) -> Sequence[Limit]:
        return self._drop(self.state.dropped, limits)

    def metrics(self) -> dict[str, float]:
        kept = self.left[self.state.dropped[-1]] / self.left[0]
        return {"removed_token": float(self.state.s.mean()), "kept_tokens": kept}

    def next_below(self, ratio: float) -> list[int] | None:
        """Buckets dropped once the one worth least per cost is, too; None if it is worth `ratio` or more."""
        ratios, now, best = self.state.ratio().tolist(), self.state.dropped, None
        for i, dropped in enumerate(now):
            last = i + 1 == len(self.sites)
            free = dropped + 1 < len(ratios[i]) and (last or dropped < now[i + 1])
            if free and ratios[i][dropped] < ratio:
                best, ratio = i, ratios[i][dropped]
        return None if best is None else [n + (i == best) for i, n in enumerate(now)]


def largest_removed(state: State, limits: Sequence[Limit], masks: Masks) -> float:
    """The largest importance per cost among the groups alive that `masks` leave out; 0 without any."""
    found, alive = 0.0, state.alive()
    for name, price in group_prices(state, marginal(state, limits)).items():
        kept = getattr(masks, name)
        ratio = state.geometry.spread(name, state.families[name].importance / price)
        ratio = ratio[getattr(alive, name) & ~kept]
        found = max(found, float(ratio.max()) if len(ratio) else 0.0)
    return found
