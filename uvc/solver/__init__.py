"""What chooses a structure under a budget while a model trains; by default the primal-dual search.

Symbols, defined once (L layers, H heads, K head dim, F neurons; a *segment* holds the groups that compete
with one another; a head is removed with its last v dim):

====  ================================================================================================
s     fraction of the neurons of a layer that is removed [L]
r     fraction of the q/k dims, and of the v dims, of a head that is removed [L * H] each
g     probability that a half runs, sigmoid of theta [L, 2] (attention, MLP)
y, p  multipliers of "removed groups have zero norm", one per segment of s and of r, at rest at 1
z     multiplier of the budget, in [0, 2]
q     score of a group in [0, 1]: share of the prunable cost with lower first-order importance per cost
R     cost of the structure divided by the dense cost
====  ================================================================================================

In code r and p are the ``s`` and ``y`` of the dims' families. ``pruner`` is what the training loop knows of a
method, ``search`` the default one and ``published`` the paper's code as an ablation. ``state`` holds the
symbols, ``importance`` computes q and ``objective`` R, ``step`` is the algorithm box (prox, primal, dual,
snap) and ``reference`` its slow twin in loops. ``head_basis`` gives heads dims that can compete,
``skip_gates`` are the skips, ``token_groups`` the patch tokens, ``param_groups`` the groups of a model's
weights; ``rounding`` ends on the exact budget.
"""

from uvc.solver.elastic import Joint, NestedSearch
from uvc.solver.param_groups import Groups
from uvc.solver.pruner import METHODS, Pruner, method, method_of
from uvc.solver.published import PublishedSearch
from uvc.solver.rounding import round_to_budget
from uvc.solver.search import Search
from uvc.solver.state import State
from uvc.solver.token_groups import check_tokens

__all__ = [
    "METHODS",
    "Groups",
    "Joint",
    "NestedSearch",
    "Pruner",
    "PublishedSearch",
    "Search",
    "State",
    "check_tokens",
    "method",
    "method_of",
    "round_to_budget",
]
