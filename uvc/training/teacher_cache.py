"""The teacher's answers on disk: computed once per image and view, read by every later run with the same
images, seed and teacher, whatever its budget.

One file per epoch, N images, k the most probable classes of each: values float16 [N, k], probabilities at the
temperature of the distillation; classes int16 or int32 [N, k]; known bool [N].
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from uvc.config import Config
from uvc.io.files import one_line, write_json, write_tensors
from uvc.training.loaders import Loader
from uvc.training.losses import Distillation

META, TOP_K, FORMAT = "teacher.json", 10, 1


class TeacherCache:
    """Rows of answers by (epoch, index of the image)."""

    def __init__(self, folder: Path, about: dict[str, Any], images: int, classes: int) -> None:
        """about: what the answers depend on; a folder that holds others is a ValueError that says which."""
        about = {**about, "images": images, "classes": classes}
        self.folder, self.images, self.classes = folder, images, classes
        self.k = min(TOP_K, classes)
        self._epoch: int | None = None
        self._rows: dict[str, Tensor] = {}
        self._new = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / META).exists():
                check_folder(folder, {})
                write_json(folder / META, about)
        except OSError as error:
            raise ValueError(f"teacher_cache: {str(folder)!r} cannot be used: {one_line(error)}") from None
        check_folder(folder, about)

    def get(self, epoch: int, indices: Tensor) -> tuple[Tensor, Tensor] | None:
        """Probabilities [B, k] and their classes [B, k], or None if one is not known. indices: int64 [B]."""
        self._turn_to(epoch)
        if not bool(self._rows["known"][indices].all()):
            return None
        return self._rows["values"][indices], self._rows["classes"][indices]

    def put(self, epoch: int, indices: Tensor, probabilities: Tensor) -> None:
        """Keeps the most probable of the classes. probabilities: [B, classes]."""
        self._turn_to(epoch)
        values, classes = probabilities.topk(self.k, dim=1)
        values = values.to("cpu", torch.float16)
        if not values.isfinite().all():
            raise RuntimeError(f"teacher_cache: epoch {epoch}: the teacher's answers are not finite")
        self._rows["values"][indices] = values
        self._rows["classes"][indices] = classes.to("cpu", self._rows["classes"].dtype)
        self._rows["known"][indices] = True
        self._new = True

    def flush(self) -> None:
        """Writes what is new; rows that another run has written meanwhile stay."""
        if not self._new:
            return
        mine, theirs = self._rows, self._read(self._epoch)
        add = theirs["known"] & ~mine["known"]
        for name, rows in mine.items():
            rows[add] = theirs[name][add]
        path = self._path(self._epoch)
        try:
            write_tensors(path, mine)
        except OSError as error:
            # The run has its answers; only later runs will have to ask again.
            warnings.warn(f"teacher_cache: {one_line(error)}", stacklevel=2)
        self._new = False

    def _turn_to(self, epoch: int) -> None:
        if epoch != self._epoch:
            self.flush()
            self._epoch, self._rows = epoch, self._read(epoch)

    def _path(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch:05}.safetensors"

    def _read(self, epoch: int) -> dict[str, Tensor]:
        shape = (self.images, self.k)
        small = torch.int16 if self.classes <= 1 << 15 else torch.int32
        empty = {
            "values": torch.zeros(shape, dtype=torch.float16),
            "classes": torch.zeros(shape, dtype=small),
            "known": torch.zeros(self.images, dtype=torch.bool),
        }
        path = self._path(epoch)
        if not path.exists():
            return empty
        try:
            rows = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"teacher_cache: cannot read {path}: {one_line(error)}; delete it") from None
        if {name: (t.shape, t.dtype) for name, t in rows.items()} != {
            name: (t.shape, t.dtype) for name, t in empty.items()
        }:
            raise ValueError(f"teacher_cache: {path} holds something else; delete it")
        return rows


class CachedDistillation(Distillation):
    """``Distillation`` that asks the teacher only for views whose answers are not on disk yet.

    Of more classes than are kept, the others share the rest of the probability evenly.
    """

    def __init__(self, teacher: nn.Module, config: Config, folder: Path, loader: Loader) -> None:
        super().__init__(teacher, config.distill, config.label_smoothing, config.precision)
        about = {**depends_on(loader, config), "teacher": digest(teacher)}
        self.cache = TeacherCache(folder, about, loader.images_count, teacher.num_classes)
        self.loader = loader

    def end_epoch(self) -> None:
        """Writes what is new."""
        self.cache.flush()

    def _distill(self, student: Tensor, images: Tensor) -> tuple[Tensor, None]:
        epoch, indices = self.loader.shown.epoch, self.loader.shown.indices
        rows = self.cache.get(epoch, indices)
        if rows is None:
            with torch.no_grad():
                answers = self._run(self.teacher, images)
                self.cache.put(epoch, indices, (answers / self._temperature()).float().softmax(-1))
            rows = self.cache.get(epoch, indices)
        values, classes = (part.to(student.device, non_blocking=True) for part in rows)
        classes = classes.long()
        if self.config.kind == "hard":
            return F.cross_entropy(student, classes[:, 0]), None
        aim = fill(values.to(student.dtype), classes, student.shape[1])
        t = self.config.temperature
        return t * t * F.kl_div((student / t).log_softmax(-1), aim, reduction="batchmean"), None

    def _temperature(self) -> float:
        return 1.0 if self.config.kind == "hard" else self.config.temperature


def fill(values: Tensor, classes: Tensor, count: int) -> Tensor:
    """Probabilities of all classes, [B, count], that sum to 1, from the kept ones [B, k]."""
    rest = (1 - values.sum(1, keepdim=True)).clamp(min=0)
    others = count - values.shape[1]
    spread = rest / others if others else torch.zeros_like(rest)
    whole = spread.expand(-1, count).scatter(1, classes, values)
    return whole / whole.sum(1, keepdim=True)


def check_cache(folder: Path, loader: Any, config: Config, teacher: nn.Module | None = None) -> None:
    """ValueError where answers could not be kept in ``folder`` or are of something else, before training.

    teacher: None where it is not known yet.
    """
    if config.distill.kind == "none":
        raise ValueError(f"teacher_cache: {str(folder)!r} needs a teacher, but distill kind is 'none'")
    if config.distill.features:
        given = config.distill.features
        raise ValueError(f"teacher_cache: it keeps answers, not features; distill features {given} must be 0")
    if not isinstance(getattr(loader, "identity", None), dict):
        raise ValueError(
            "teacher_cache: train_loader does not say which image and view it shows; use one of "
            "uvc.training.data.load_data, or leave the cache out"
        )
    about = depends_on(loader, config) | ({} if teacher is None else {"teacher": digest(teacher)})
    check_folder(folder, {**about, "images": loader.images_count})


def check_folder(folder: Path, about: dict[str, Any]) -> None:
    """ValueError, naming what differs, if there are answers in ``folder`` that depend on something else."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"teacher_cache: {str(folder)!r} is a file; name a folder")
    if not (folder / META).exists():
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"teacher_cache: {str(folder)!r} holds other files; name another one")
        return
    try:
        found = json.loads((folder / META).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"teacher_cache: {str(folder / META)!r} cannot be read: {one_line(error)}") from None
    about = json.loads(json.dumps(about))
    other = sorted(name for name, value in about.items() if found.get(name) != value)
    if other:
        raise ValueError(
            f"teacher_cache: {str(folder)!r} is of another {', '.join(other)}; name another folder"
        )


def depends_on(loader: Loader, config: Config) -> dict[str, Any]:
    """What the answers depend on beside the teacher."""
    distill, mixes = config.distill, bool(config.mixup or config.cutmix)
    return {
        "format": FORMAT,
        "top_k": TOP_K,
        "data": loader.identity,
        "kind": distill.kind,
        "temperature": distill.temperature if distill.kind == "soft" else None,
        "precision": config.precision,
        "mixing": [config.mixup, config.cutmix, config.seed] if mixes else None,
    }


def digest(model: nn.Module) -> str:
    """A digest of all weights, their names and dtypes."""
    seen = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        seen.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        seen.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return seen.hexdigest()[:32]
