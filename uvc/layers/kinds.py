"""Which layer takes the place of which of timm's: a new kind is a file of its own, and a line here."""

from timm.layers import Attention, GluMlp, Mlp, SwiGLU
from torch import nn

from uvc.layers.attention import UVCAttention
from uvc.layers.mlp import UVCGluMlp, UVCMlp, UVCSwiGLU
from uvc.layers.prunable import Prunable

ATTENTIONS: dict[type[nn.Module], type[Prunable]] = {Attention: UVCAttention}
MLPS: dict[type[nn.Module], type[Prunable]] = {Mlp: UVCMlp, GluMlp: UVCGluMlp, SwiGLU: UVCSwiGLU}


def prunable(layer: nn.Module) -> Prunable:
    """A layer that can leave parts out, on the children of `layer`, which stays as it is; or `layer`."""
    if isinstance(layer, Prunable):
        return layer
    return (ATTENTIONS | MLPS)[type(layer)].take_over(layer)
