"""Models that timm does not have; importing this package registers them with timm."""

from .digits import uvc_vit_digits, uvc_vit_digits_distilled

__all__ = ["uvc_vit_digits", "uvc_vit_digits_distilled"]
