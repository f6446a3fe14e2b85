"""UVCBlock: a timm transformer block whose two halves can be skipped or gated, and that can drop tokens.

B batch, N tokens, D width.
"""

from typing import Any, NamedTuple, Self

from torch import Tensor, nn

from uvc.layers._surgery import take_over
from uvc.layers.children import normed
from uvc.layers.kinds import ATTENTIONS, MLPS, NORM_LAST, prunable
from uvc.layers.token_pruning import Slimming, due, slim


class Reads(NamedTuple):
    """What the halves of a block read of an image.

    tokens: those that the attention makes q, k and v of; pairs: of a query and a key, in one head; queries:
    tokens that the attention gives; hidden: tokens in the MLP; terms: products of a q/k dim beside those of
    pairs.
    """

    tokens: float
    pairs: float
    queries: float
    hidden: float
    terms: float = 0


class InARow(nn.Module):
    """How the halves of a block, on the fly or compact, read tokens [B, N, D]: all attend to all."""

    def stays(self) -> tuple[str, ...]:
        """Children that run whichever half is skipped."""
        return ()

    def pools(self) -> int:
        """How many tokens become one."""
        return 1

    def residual(self, x: Tensor) -> Tensor:
        """What the attention half adds its branch to."""
        return x

    def ended(self, x: Tensor) -> Tensor:
        """What the block gives of what its halves leave."""
        return x

    def reads(self, arriving: float, leaving: float) -> Reads:
        """What is read where so many tokens arrive, and so many go on from the attention half."""
        return Reads(arriving, arriving * arriving, arriving, leaving)

    def attended(self, y: Tensor, **arguments) -> Tensor:
        """What the attention makes of the input of its half."""
        return self._modules["attn"](y, **arguments)

    def fed(self, y: Tensor) -> Tensor:
        """What the MLP makes of the input of its half."""
        return self._modules["mlp"](y)


class UVCBlock(InARow):
    """The children of one of timm's blocks of two halves, norm first or norm last, under the same names.

    A skipped half is its residual alone: its branch, bias included, does not run. Gates are scalar tensors
    that multiply a half's branch, for gradients with respect to skipping; None means no multiplication.
    With a `Slimming`, only so many patch tokens go on from the attention half, for good: those to which the
    attention gives most (see `tokens.py`), or of the largest norm where it is skipped.
    """

    @classmethod
    def take_over(cls, block: nn.Module) -> Self:
        """A UVCBlock on the children and hooks of `block`, with attention and MLP taken over, all running."""
        new = take_over(cls, block)
        if type(new.attn) in ATTENTIONS:
            new.attn = prunable(new.attn)
        if type(new.mlp) in MLPS:
            new.mlp = prunable(new.mlp)
        new.norm_last = norm_last(block)
        new._skip = (False, False)
        new._gates = (None, None)
        new._slimming = None
        return new

    def __getstate__(self) -> dict[str, Any]:
        # Gates are part of a graph, of which no copy can be made.
        gates = tuple(None if gate is None else gate.detach() for gate in self._gates)
        return {**super().__getstate__(), "_gates": gates}

    def set_skip(self, attn: bool, mlp: bool) -> None:
        """Skip (True) or run (False) the attention half and the MLP half."""
        self._skip = (bool(attn), bool(mlp))

    @property
    def skip_attn(self) -> bool:
        """Whether the attention half is skipped."""
        return self._skip[0]

    @property
    def skip_mlp(self) -> bool:
        """Whether the MLP half is skipped."""
        return self._skip[1]

    def set_slimming(self, slimming: Slimming | None) -> None:
        """Let only some patch tokens go on from the attention half; None lets all."""
        self._slimming = slimming

    def selection(self) -> tuple[Any, ...]:
        """What is kept and skipped, to be taken up again by `select`."""
        return self.attn.selection(), self.mlp.selection(), self._skip, self._slimming

    def select(self, selection: tuple[Any, ...]) -> None:
        """Keep and skip what was kept and skipped when this block's `selection` was taken."""
        attn, mlp, self._skip, self._slimming = selection
        self.attn.select(attn)
        self.mlp.select(mlp)

    @property
    def tokens(self) -> int | None:
        """How many patch tokens go on from the attention half; None: all."""
        return None if self._slimming is None else self._slimming.tokens

    @property
    def has_gates(self) -> bool:
        """Whether a half has a gate."""
        return any(gate is not None for gate in self._gates)

    def set_gates(self, attn: Tensor | None, mlp: Tensor | None) -> None:
        """Multiply the branch of each half by a scalar tensor; None leaves it as it is."""
        self._gates = (attn, mlp)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **positions
    ) -> Tensor:
        """x [B, N, D] -> [B, N', D], fewer if it slims; all other arguments go to the attention."""
        slimming, scores = due(self._slimming, x, attn_mask, is_causal), None
        residual = self.residual(x)
        if not self._skip[0]:
            y = x if self.norm_last else normed(self.norm1, x)
            if slimming is not None:
                scores = self.attn.token_scores(y, slimming)
            branch = self.attended(y, attn_mask=attn_mask, is_causal=is_causal, **positions)
            branch = self.norm1(branch) if self.norm_last else scaled(self, "1", branch)
            residual = residual + dropped(self, "1", gated(branch, self._gates[0]))
        x = residual
        if slimming is not None:
            x = slim(x, scores, slimming)
        if not self._skip[1]:
            if self.norm_last:
                branch = self.norm2(self.fed(x))
            else:
                branch = scaled(self, "2", self.fed(normed(self.norm2, x)))
            x = x + dropped(self, "2", gated(branch, self._gates[1]))
        return self.ended(x)


def norm_last(block: nn.Module) -> bool:
    """Whether a block normalises the branch's output instead of its input."""
    return getattr(block, "norm_last", isinstance(block, NORM_LAST))


def scaled(block: nn.Module, half: str, branch: Tensor) -> Tensor:
    """The branch of half "1" or "2" times the layer scale of its block: a child, a parameter, or none."""
    if (scale := block._modules.get(f"ls{half}")) is not None:
        return scale(branch)
    gamma = block._parameters.get(f"gamma_{half}")
    return branch if gamma is None else gamma * branch


def dropped(block: nn.Module, half: str, branch: Tensor) -> Tensor:
    """The branch of a half behind its stochastic depth, which some blocks share between halves."""
    own = block._modules.get(f"drop_path{half}", block._modules.get("drop_path"))
    return branch if own is None else own(branch)


def gated(branch: Tensor, gate: Tensor | None) -> Tensor:
    """The branch times its gate."""
    return branch if gate is None else branch * gate.to(branch.dtype)
