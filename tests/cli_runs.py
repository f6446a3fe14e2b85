"""A model for digits that a run compresses in a second, and what tests of runs share."""

import json

from timm.models import generate_default_cfgs, register_model

from uvc.models import uvc_vit_digits

EPOCHS = {"teacher": 1, "warmup": 1, "search": 2, "post": 1}
SHORT = ["--model", "uvc_test_vit", "--batch-size", "216", "--quiet"]
SHORT += [word for name, count in EPOCHS.items() for word in (f"--{name}-epochs", str(count))]

default_cfgs = generate_default_cfgs({"uvc_test_vit": {"input_size": (1, 8, 8), "num_classes": 10}})


@register_model
def uvc_test_vit(pretrained=False, **options):
    """The ViT for digits, small."""
    return uvc_vit_digits(pretrained, **{"embed_dim": 24, "depth": 3, "num_heads": 2, **options})


def summary(folder):
    """What a finished run says of itself."""
    return json.loads((folder / "summary.json").read_text())
