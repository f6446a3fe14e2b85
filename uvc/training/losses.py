"""The loss of a run: labels, and distillation from the uncompressed model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn

from uvc.config import Config, DistillConfig

# Under autocast in the named precision, None: without autocast.
DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Mixing:
    """Mixup and cutmix, by timm's ``Mixup``, which draws from numpy's global generator.

    Args:
        config: alphas; both 0 leaves batches as they are.
        num_classes: of the labels.
    """

    def __init__(self, config: Config, num_classes: int) -> None:
        self._alphas = (config.mixup, config.cutmix) if config.mixup or config.cutmix else None
        self.num_classes = num_classes

    def __bool__(self) -> bool:
        return self._alphas is not None

    def __call__(self, images: Tensor, labels: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor]:
        """images [B, C, H, W], labels int64 [B] or soft [B, classes] -> mixed copies and soft labels.

        seed: of what is drawn, so that a batch is mixed alike in every run; None: numpy's generator goes on.
        Images are mixed in pairs; the last of an odd number, or one alone, stays as it is.
        """
        if self._alphas is None:
            return images, labels
        pairs = len(images) // 2 * 2
        soft = labels if labels.dim() == 2 else F.one_hot(labels, self.num_classes).float()
        if pairs == 0:
            return images, soft
        state = np.random.get_state()
        if seed is not None:
            np.random.seed(seed % (1 << 32))
        # Asked to label image i as class i of as many as there are images, timm's Mixup answers with the
        # shares in which it has mixed them.
        mix = Mixup(*self._alphas, label_smoothing=0.0, num_classes=pairs)
        mixed, shares = mix(images[:pairs].clone(), torch.arange(pairs, device=images.device))
        if seed is not None:
            np.random.set_state(state)
        mixed_labels = shares.to(soft.dtype) @ soft[:pairs]
        return torch.cat([mixed, images[pairs:]]), torch.cat([mixed_labels, soft[pairs:]])


class Classification:
    """Cross-entropy with the labels, integer [B] or soft [B, classes].

    precision: "float32", or one of 16 bits, where models run under autocast and what they return is taken as
    float32.
    """

    labelled = True  # a batch is (images, labels)

    def __init__(self, label_smoothing: float = 0.0, precision: str = "float32") -> None:
        self.label_smoothing = label_smoothing
        if precision not in DTYPES:
            raise ValueError(
                f"precision: {precision!r} is settled by compress alone; name {', '.join(DTYPES)}"
            )
        self.half = DTYPES[precision]

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Any]:
        """Returns {"loss": scalar, "output": logits [B, classes]}. With a distillation token the two heads
        are averaged.
        """
        output = self._run(model, images)
        logits = (output[0] + output[1]) / 2 if isinstance(output, tuple) else output
        return {
            "loss": self.cross_entropy(logits, labels),
            "output": logits,
        }

    def end_epoch(self) -> None:
        """Called at the end of each epoch, and where a run is stopped."""

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean over the batch, of logits [B, classes]; soft labels in the logits' dtype."""
        labels = labels.to(logits.dtype) if labels.is_floating_point() else labels
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    def _run(self, model: nn.Module, images: Tensor) -> Any:
        """What the model returns: logits, or one of each head."""
        if self.half is None:
            return model(images)
        with torch.autocast(images.device.type, self.half):
            output = model(images)
        return tuple(t.float() for t in output) if isinstance(output, tuple) else output.float()


class Distillation(Classification):
    """(1 - weight) * cross-entropy + weight * distillation from a frozen teacher, and, if ``config.features``
    is above 0, that times the distance of the features.

    A model with a distillation token (timm's ``distilled_training``) learns labels on the class token and the
    teacher on the other. Features are what the classifier ``head`` reads, [B, D].
    """

    def __init__(
        self,
        teacher: nn.Module,
        config: DistillConfig,
        label_smoothing: float = 0.0,
        precision: str = "float32",
        mean: Callable[[Tensor], Tensor] = lambda value: value,
    ) -> None:
        """mean: over the processes that share a batch."""
        super().__init__(label_smoothing, precision)
        self.mean = mean
        self.teacher = teacher.eval().requires_grad_(False)
        self.config = config
        # What the teacher said last: a batch may go through the model several times.
        self._asked: tuple[Tensor, Any, Tensor | None] | None = None

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Any]:
        weight, features = self.config.weight, self.config.features
        output, read = self._run_and_read(model, images)
        class_logits, student_logits = output if isinstance(output, tuple) else (output, output)
        distill, aim = self._distill(student_logits, images)
        hard = self.cross_entropy(class_logits, labels)
        loss = (1 - weight) * hard + weight * distill
        if features:
            loss = loss + features * self.feature_distance(read, aim)
        logits = (class_logits + student_logits) / 2
        return {"loss": loss, "output": logits, "distill": distill.detach()}

    def _distill(self, student: Tensor, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """The distance to the teacher's answers, and what its ``head`` reads if features are asked for."""
        if self._asked is None or self._asked[0] is not images:
            with torch.no_grad():
                self._asked = (images, *self._run_and_read(self.teacher, images))
        _, answers, aim = self._asked
        return self.distance(student, answers), aim

    def _run_and_read(self, model: nn.Module, images: Tensor) -> tuple[Any, Tensor | None]:
        """What the model returns, and, if asked for, what its ``head`` reads."""
        if not self.config.features:
            return self._run(model, images), None
        read = []
        handle = model.head.register_forward_pre_hook(lambda _, args: read.append(args[0]))
        try:
            return self._run(model, images), read[0] if self.half is None else read[0].float()
        finally:
            handle.remove()

    def feature_distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Mean squared difference of features [B, D] over the teacher's mean square."""
        if student.shape != teacher.shape:
            raise ValueError(
                f"distill features: the model's are {list(student.shape)}, the teacher's "
                f"{list(teacher.shape)}; take a teacher as wide as the model, or features 0"
            )
        return (student - teacher).square().mean() / self.mean(teacher.square().mean())

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """soft: batch-mean KL of the tempered distributions times temperature^2; hard: cross-entropy with the
        teacher's argmax.
        """
        if self.config.kind == "hard":
            return F.cross_entropy(student, teacher.argmax(-1))
        t = self.config.temperature
        return (
            t
            * t
            * F.kl_div(
                (student / t).log_softmax(-1),
                (teacher / t).log_softmax(-1),
                log_target=True,
                reduction="batchmean",
            )
        )
