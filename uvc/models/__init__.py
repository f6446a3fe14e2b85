"""Models that timm does not have; importing this package registers them with timm."""

from .digits import uvc_vit_digits, uvc_vit_digits_distilled
from .t2t import (
    T2TVisionTransformer,
    t2t_vit_14,
    t2t_vit_19,
    t2t_vit_24,
    t2t_vit_t_14,
    t2t_vit_t_19,
    t2t_vit_t_24,
)

__all__ = [
    "T2TVisionTransformer",
    "t2t_vit_14",
    "t2t_vit_19",
    "t2t_vit_24",
    "t2t_vit_t_14",
    "t2t_vit_t_19",
    "t2t_vit_t_24",
    "uvc_vit_digits",
    "uvc_vit_digits_distilled",
]
