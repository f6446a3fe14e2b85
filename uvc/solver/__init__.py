"""The primal-dual search for a structure under a budget.

Symbols, defined once (L layers, H heads, K head dim, F neurons; a *segment* holds the groups that compete
with one another):

====  ================================================================================================
s     fraction of a segment's groups that is removed: heads of a layer [L], neurons of a layer [L]
r     the same for the q/k dims and the v dims inside every head, [L * H] each
g     probability that a half runs, sigmoid of theta [L, 2] (attention, MLP)
y, p  multipliers of "removed groups have zero norm", one per segment of s and of r, at rest at 1
z     multiplier of the budget, in [0, 2]
q     score of a group in [0, 1]: share of the prunable cost with lower first-order importance per cost
R     cost of the structure divided by the dense cost
====  ================================================================================================

``basis`` gives heads the dims that compete, ``state`` holds the symbols, ``objective`` computes q and R,
``step`` is the algorithm box (prox, primal, dual, project), ``reference`` its slow twin in loops, ``gates``
the skips, ``tokens`` the patch tokens, ``groups`` ties groups to a model's weights, ``project`` ends on the
exact budget, ``published`` is the paper's code as an ablation, and ``search`` runs all of it beside a
training loop.
"""

from uvc.solver.pruner import METHODS, Pruner, method, method_of
from uvc.solver.published import PublishedSearch
from uvc.solver.search import Search
from uvc.solver.token_groups import check_tokens

__all__ = ["METHODS", "Pruner", "PublishedSearch", "Search", "check_tokens", "method", "method_of"]
