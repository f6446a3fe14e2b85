"""The Triton provider: the pieces between the vendor's GEMMs, one file each; imported at its first use.

Under `TRITON_INTERPRET=1`, set before that, the same kernels run on CPU tensors, on request only.
"""

from ..packed import Pieces, provide
from . import activation, attention_core, bias_gradient, column_sums, gather, group_scores, prox_shrink, turn
from .launch import DTYPES, INTERPRETED

provide(
    "triton",
    "cpu" if INTERPRETED.value else "cuda",
    DTYPES,
    Pieces(
        gather.gather,
        attention_core.attention_core,
        attention_core.attention_core_backward,
        activation.activate,
        activation.activate_backward,
        column_sums.column_sums,
        group_scores.group_scores,
        prox_shrink.prox_shrink,
        turn.turn,
        bias_gradient.bias_gradient,
    ),
)
