"""Settings of a run: frozen dataclasses that refuse values out of range as they are made.

Defaults follow the paper where it worked; `uvc.recipes` returns whole configs, `uvc.app.resolve` puts a TOML
file and the command line over them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Real
from typing import Literal

from uvc.settings import (
    BadSetting,
    Count,
    Decay,
    Number,
    Positive,
    Share,
    Size,
    UpToThree,
    Weight,
    check_fields,
    renamed,
)

METRICS = ("macs", "params", "latency")


@dataclass(frozen=True)
class DistillConfig:
    """How the uncompressed model teaches.

    Loss = (1 - weight) * CE(labels) + weight * distillation + features * distance of the pooled features.
    """

    # "soft": batch-mean KL times temperature^2; "hard": cross-entropy with the teacher's argmax
    kind: Literal["none", "soft", "hard"] = "soft"
    weight: Share = 0.5
    temperature: Positive = 2.0
    # Weight of the squared distance between what the two models give to their classifiers, relative to the
    # teacher's own square; 0: logits alone. The teacher must be as wide as the model.
    features: Weight = 0.0

    def __post_init__(self) -> None:
        check_fields(self, "distill ")
        if self.features and self.kind == "none":
            raise BadSetting("features", f"{self.features} has no teacher where kind is 'none'", "distill ")


@dataclass(frozen=True)
class DataConfig:
    """How photographs become images of a batch, in the terms of timm's training script. None: as the model
    was trained.
    """

    input_size: tuple[Size, Size, Size] | None = None  # channels, height, width; of the model, too
    # Patch tokens of an image, of a model that takes images of any size: costs are counted for so many.
    tokens_per_image: Size | None = None
    crop_pct: Positive | None = None  # of the image that evaluation sees
    mean: tuple[Number, ...] | None = None  # of pixels in [0, 1], one for all channels or one of each
    std: tuple[Positive, ...] | None = None
    interpolation: str | None = None
    aa: str | None = None  # timm's name of a policy, such as rand-m9-mstd0.5
    reprob: Share = 0.0  # of erasing a random part of a training image
    color_jitter: Weight = 0.4  # of training images; without effect under most policies of `aa`
    # Least and largest share of a training image that a crop shows.
    scale: tuple[Share, Share] = (0.08, 1.0)

    def __post_init__(self) -> None:
        check_fields(self)


@renamed(grain="round_to")
@dataclass(frozen=True)
class SolverConfig:
    """The primal-dual solver. Rates are per solver step; fractions of the search are in [0, 1].

    `grain` is the former name of `round_to`.
    """

    # "uvc"; "published": what the paper's code does, as an ablation, without the other settings here; or a
    # method of one's own (`uvc.solver.Pruner`).
    method: str = "uvc"
    every: Size = 2  # training steps per solver step
    primal_rate: Weight = 0.5  # of s and r
    prox_rate: Weight = 0.4  # eta in the prox w <- w / (1 + 2 eta y)
    dual_rate: Weight = 1.0  # of y and p
    dual_leak: Share = 0.05  # how fast y and p unwind to 1
    dual_max: Positive = 8.0
    budget_rate: Weight = 0.1  # of z
    # A removed group is set to zero below this squared norm, relative to its family's initial mean.
    snap: Weight = 1e-3
    importance_decay: Share = 0.9  # of the moving average of first-order importance
    # The budget goes from 1 to its value, by equal factors, between these fractions of the search.
    anneal: tuple[Share, Share] = (0.05, 0.7)
    # What may be removed beside skips. A head is removed with its last v dim; to remove heads whole, round v
    # dims to the head dim.
    families: tuple[Literal["qk", "v", "neuron"], ...] = ("qk", "v", "neuron")
    # Heads are first given the basis in which their first dims are worth most; their function stays.
    balance: bool = True
    tokens: UpToThree = 0  # blocks at which the search may drop patch tokens; 0 keeps all
    # Dims of a head and neurons of an MLP are kept in multiples of these, as in (16, 64), since hardware runs
    # finer structures slower than they count; each divides the whole. "auto": what a curve of sizes, measured
    # with one image, says of this machine.
    round_to: tuple[Size, Size] | Literal["auto"] = (1, 1)
    skip: Literal["none", "blocks", "halves"] = "halves"  # what a skip gate governs
    gate_every: Size = 4  # training steps per gate update; only there all branches run
    gate_rate: Weight = 0.1
    gate_init: Number = 3.0  # logit; sigmoid(3) = 0.95
    gate_weight: Weight = 0.3  # price of a gate in units of z
    gate_momentum: Decay = 0.9
    gate_freeze: Weight = 0.6  # gates become hard at this fraction of the search

    def __post_init__(self) -> None:
        check_fields(self, "solver ")


@dataclass(frozen=True)
class Config:
    """How a run trains: teacher (only when none is given), warm-up, search, post-training. Epochs are passes
    over the loader.
    """

    teacher_epochs: Count = 300
    warmup_epochs: Count = 5
    search_epochs: Count = 25
    post_epochs: Count = 120
    batch_size: Size = 128
    learning_rate: Positive = 5e-4
    search_learning_rate: Positive = 1e-4
    lr_warmup_fraction: Share = 0.05
    min_learning_rate: Weight = 1e-6
    weight_decay: Weight = 0.05
    clip_grad: Positive = 1.0
    label_smoothing: Share = 0.0
    mixup: Weight = 0.0  # alpha of the blend of two images; 0: none
    cutmix: Weight = 0.0  # alpha of the patch of one image in another; with mixup, a step draws one of them
    # Above 0, the teacher and the result are averages of the weights over the steps, this much of the old one
    # at each step, less in the first.
    ema_decay: Decay = 0.0
    # Of the products in training: in 16 bits models run under autocast. Weights, losses and evaluations are
    # float32 in all. "auto": float32 or 16 bits, whichever a step was measured to be faster in at the start.
    precision: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    seed: Count = 0
    # Of the model and of its teacher, if that is trained: names of parameters or of modules around them, with
    # *, ? and [abc] as in a shell. They get no gradient and stay as they are, and so do groups with a part in
    # them.
    freeze: tuple[str, ...] = ()
    # A batch goes through the model in so many parts, whose gradients add up, where it does not fit whole.
    accumulate: Size = 1
    # Blocks are computed again in the backward pass instead of being kept: less memory, a third more time.
    grad_checkpointing: bool = False
    # Weights, gradients and moments are spread over the processes (FSDP2), for models that one device
    # does not hold with them.
    fsdp: bool = False
    compile: str | None = (
        None  # a backend of torch.compile, as "inductor", which then runs blocks in training
    )
    checkpoint_every: Count = 0  # training steps, beside the checkpoint after each epoch; 0: that alone
    checkpoint_minutes: Weight = 0.0  # as well; 0: none
    # So many steps whose loss or gradient is not finite are left out before such a one ends the run.
    skip_not_finite: Count = 0
    threads: Size | None = None  # CPU threads; None leaves torch's choice
    distill: DistillConfig = field(default_factory=DistillConfig)
    solver: SolverConfig = field(default_factory=SolverConfig)

    def __post_init__(self) -> None:
        check_fields(self)


# A tuple: one model for several fractions, largest first.
Budget = float | dict[str, float] | tuple[float, ...]
Plain = bool | int | float | str
Arguments = dict[str, Plain | tuple[Plain, ...]]


@dataclass(frozen=True)
class RunConfig:
    """All that `uvc compress` was asked for. `out` and `resume` tell where a run is, the rest what it is."""

    out: str | None = None
    resume: bool = False
    recipe: str = "default"
    data: str = "digits"
    data_root: str | None = None  # where a data set that timm names is stored
    workers: Count = 0  # processes that read images; 0: this one
    images: DataConfig = field(default_factory=DataConfig)
    model: str = "uvc_vit_digits"
    model_args: Arguments = field(default_factory=dict)  # of timm.create_model
    teacher: str | None = None  # trained weights of the model, or of it with another classifier
    pretrained: bool = False  # take timm's own in their place, from its hub
    teacher_cache: str | None = None  # folder that keeps the teacher's answers for other runs
    budget: Budget = 0.5
    metric: Literal["macs", "params", "latency"] = "macs"  # of a budget that is a single fraction
    latency_table: str | None = None  # None: that of the run, or one measured on `device`
    latency_batch: Size | None = None  # images per forward pass in a table measured here; None: 1
    trackers: tuple[Literal["wandb", "mlflow"], ...] = ()  # that get what TensorBoard gets, and the settings
    device: str = "cpu"
    training: Config = field(default_factory=Config)

    def __post_init__(self) -> None:
        check_fields(self)
        try:
            named = self.budgets
        except ValueError as error:
            raise BadSetting("budget", str(error).removeprefix("budget: ")) from None
        if self.pretrained and self.teacher:
            raise BadSetting(
                "pretrained", f"true, but the teacher is {self.teacher!r}; leave one of them out"
            )
        if "latency" not in named and (self.latency_table or self.latency_batch):
            name = "latency_table" if self.latency_table else "latency_batch"
            raise BadSetting(
                name, f"{getattr(self, name)!r}, but no budget is in latency; add metric latency"
            )
        if self.latency_table and self.latency_batch:
            raise BadSetting("latency_batch", f"{self.latency_batch}, but the latency table has its own")

    @property
    def budgets(self) -> dict[str, float]:
        """The fraction of each metric; of several budgets the largest."""
        return named_budgets(nested_budgets(self.budget)[0], self.metric)

    @property
    def seed(self) -> int:
        """Of weights, order and augmentation."""
        return self.training.seed

    @property
    def threads(self) -> int | None:
        """CPU threads."""
        return self.training.threads


def nested_budgets(
    budget: float | Mapping[str, float] | Sequence[float],
) -> tuple[float | Mapping[str, float], ...]:
    """The budgets of one model: several fractions, which must descend, or the one that is given."""
    if not isinstance(budget, (tuple, list)):
        return (budget,)
    shown = ", ".join(map(str, budget))
    if len(budget) < 2:
        raise ValueError(f"budget: a list of one, {shown or 'or none'}; give the fraction, or several")
    for fraction in budget:
        if isinstance(fraction, Mapping):
            raise ValueError(f"budget: {fraction!r} among several; those are fractions of one metric")
        named_budgets(fraction, METRICS[0])
    if any(a <= b for a, b in pairwise(budget)):
        raise ValueError(f"budget: {shown} must descend, as in 0.7, 0.5, 0.33")
    return tuple(map(float, budget))


def named_budgets(budget: float | Mapping[str, float], metric: str) -> dict[str, float]:
    """{metric: fraction} of a budget given either way; ValueError for what is no fraction or no metric."""
    named = dict(budget) if isinstance(budget, Mapping) else {metric: budget}
    if not named:
        raise ValueError('budget: {} names no metric; give a fraction, or a dict such as {"macs": 0.5}')
    for name, fraction in named.items():
        if name not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {name!r}")
        if not isinstance(fraction, Real) or not 0.0 < fraction <= 1.0:  # so that nan fails too
            raise ValueError(
                f"budget: {fraction!r} is not a fraction in (0, 1]; 0.5 keeps half of the dense cost"
            )
    return named
