"""Top-1 counts each image once, whatever form its label has; what has no accuracy is refused in one line."""

import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from uvc.config import Config
from uvc.training.compress import compress
from uvc.training.evaluation import count_right, evaluate, targets


class Lookup(nn.Module):
    """Logits [B, C] from images that hold their own number."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images):
        return self.logits[images.flatten(1)[:, 0].long()]


def batches(labels, size):
    images = torch.arange(len(labels)).float()[:, None, None, None].expand(-1, 1, 2, 2)
    return list(zip(images.split(size), labels.split(size), strict=True))


LOGITS = torch.randn(11, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 4, (11,), generator=torch.Generator().manual_seed(1))
RIGHT = sum(int(row.argmax()) == int(label) for row, label in zip(LOGITS, LABELS, strict=True))
SOFT = 0.6 * F.one_hot(LABELS, 4) + 0.1

FORMS = {
    "int64": LABELS,
    "uint8": LABELS.to(torch.uint8),
    "one-hot float": F.one_hot(LABELS, 4).float(),
    "one-hot int64": F.one_hot(LABELS, 4),
    "one-hot bool": F.one_hot(LABELS, 4).bool(),
    "soft": SOFT,
    "soft bfloat16": SOFT.bfloat16(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1, 3, 4, 8, 11], ids="batches of {}".format)
def test_every_form_of_label_gives_the_count_of_right_answers_in_batches_of_any_size(form, size):
    assert count_right(Lookup(LOGITS), batches(FORMS[form], size)) == (RIGHT, 11)
    assert evaluate(Lookup(LOGITS), batches(FORMS[form], size)) == pytest.approx(100 * RIGHT / 11)


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (LABELS.float(), "labels are float32"),
        (LABELS[:, None], r"labels are int64 \[4, 1\]"),
        (F.one_hot(LABELS, 5).float(), r"float32 \[4, 5\]; give classes as integers \[B\]"),
        (F.one_hot(LABELS, 3 + 1)[:, None], r"int64 \[4, 1, 4\]"),
        (LABELS + 1, "labels are . to 4, but the model has classes 0 to 3"),
        (LABELS - 1, "labels are -1 to"),
        (LABELS * 0 - 100, "labels are -100"),
        (torch.ones(11, 4), "must be probabilities"),
        (torch.zeros(11, 4), "must be probabilities"),
        (SOFT * torch.nan, "must be probabilities"),
        (F.one_hot(LABELS, 4) * 2.0 - 0.25, "must be probabilities"),
        (LABELS.bool(), r"bool \[4\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_labels_without_a_meaning_are_refused_in_one_line_and_the_mode_comes_back(labels, says):
    model = Lookup(LOGITS).train()
    with pytest.raises(ValueError, match=says) as caught:
        evaluate(model, batches(labels, 4))
    assert "\n" not in str(caught.value) and str(caught.value).startswith("val_loader: ") and model.training


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_have_no_accuracy(value):
    logits = LOGITS.clone()
    logits[6, 2] = value
    with pytest.raises(RuntimeError, match="val_loader: batch 1: the model's logits are NaN or infinite"):
        evaluate(Lookup(logits), batches(LABELS, 4))


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ({"pixels": 1}, "a batch is a dict"),
        ((torch.zeros(2, 1, 2, 2), LABELS[:2], LABELS[:2]), "a batch is a tuple of 3"),
        ((torch.zeros(2, 1, 2, 2), [0, 1]), "labels are a list"),
        ((torch.zeros(2, 1, 2, 2, dtype=torch.uint8), LABELS[:2]), "images are uint8"),
        ((torch.zeros(2, 1, 2, 2), LABELS[:3]), r"images \[2, 1, 2, 2\] but labels \[3\]"),
        ((torch.zeros(2, 1, 2, 2), LABELS[0]), r"labels \[\]"),
    ],
)
def test_batches_of_another_kind_are_refused_in_one_line(batch, says):
    with pytest.raises(ValueError, match=f"val_loader: .*{says}"):
        evaluate(Lookup(LOGITS), [batch])


@pytest.mark.parametrize("loader", ["train_loader", "val_loader"])
@pytest.mark.parametrize("shape", [(4, 3, 6, 6), (4, 1, 8, 8), (4, 3, 8), (4, 8, 8, 3)])
def test_images_of_another_size_than_the_models_are_refused_in_one_line(shape, loader):
    model = VisionTransformer(img_size=8, patch_size=4, num_classes=4, embed_dim=12, depth=1, num_heads=2)
    good, bad = ([(torch.randn(s), torch.arange(4))] for s in ((4, 3, 8, 8), shape))
    loaders = (bad, good) if loader == "train_loader" else (good, bad)
    says = re.escape(f"{loader}: images are {list(shape)}, the model takes [B, 3, 8, 8]")
    with pytest.raises(ValueError, match=says):
        compress(model, *loaders, 0.7, config=Config(warmup_epochs=1, search_epochs=1, post_epochs=0))


@pytest.mark.parametrize("options", [{"dynamic_img_size": True}, {"strict_img_size": False}], ids=str)
def test_a_model_for_any_size_takes_any_size(options):
    stem = partial(PatchEmbed, **options) if "strict_img_size" in options else PatchEmbed
    options = {} if "strict_img_size" in options else options
    sizes = dict(
        img_size=8, patch_size=4, num_classes=4, embed_dim=12, depth=1, num_heads=2, pos_embed="none"
    )
    model = VisionTransformer(**sizes, **options, embed_layer=stem)
    assert count_right(model, [(torch.randn(4, 3, 12, 12), torch.arange(4))])[1] == 4


def test_a_model_that_gives_no_logits_and_a_loader_without_images_are_refused():
    with pytest.raises(ValueError, match=r"it returns \[4, 1, 2, 2\], not logits \[4, classes\]"):
        evaluate(nn.Identity(), batches(LABELS, 4))
    with pytest.raises(ValueError, match="yields no images"):
        evaluate(Lookup(LOGITS), [])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_gets_its_images_in_its_own_dtype(dtype):
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4)).to(dtype)
    right, total = count_right(model, batches(LABELS, 4))
    images = torch.cat([images for images, _ in batches(LABELS, 4)])
    assert total == 11 and right == int((model(images.to(dtype)).argmax(1) == LABELS).sum())


def test_labels_become_what_cross_entropy_takes_with_the_same_loss():
    wanted = F.cross_entropy(LOGITS, LABELS)
    for form in ("uint8", "one-hot float", "one-hot int64", "one-hot bool"):
        given = targets(FORMS[form], 4, "train_loader")
        torch.testing.assert_close(F.cross_entropy(LOGITS, given), wanted)
