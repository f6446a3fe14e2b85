"""Settings of a run: one frozen dataclass per room. Defaults follow the paper where it worked; recipes.py
returns whole configs.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class DistillConfig:
    """How the uncompressed model teaches.

    Loss = (1 - weight) * CE(labels) + weight * distillation + features * distance of the pooled features.
    """

    # "none"; "soft": batch-mean KL times temperature^2; "hard": cross-entropy with the teacher's argmax
    kind: str = "soft"
    weight: float = 0.5
    temperature: float = 2.0
    # Weight of the squared distance between what the two models give to their classifiers, relative to the
    # teacher's own square; 0: logits alone. The teacher must be as wide as the model.
    features: float = 0.0


@dataclass(frozen=True)
class DataConfig:
    """How photographs become images of a batch, in the terms of timm's training script. None: as the model
    was trained.
    """

    input_size: tuple[int, int, int] | None = None  # channels, height, width
    crop_pct: float | None = None  # of the image that evaluation sees
    mean: tuple[float, ...] | None = None  # of pixels in [0, 1], one for all channels or one of each
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    aa: str | None = None  # timm's name of a policy, such as rand-m9-mstd0.5
    reprob: float = 0.0  # of erasing a random part of a training image
    color_jitter: float = 0.4  # of training images; without effect under most policies of `aa`
    scale: tuple[float, float] = (0.08, 1.0)  # least and largest share of a training image that a crop shows


@dataclass(frozen=True)
class SolverConfig:
    """The primal-dual solver. Rates are per solver step; fractions of the search are in [0, 1]."""

    # "uvc", or "published": what the paper's code does, as an ablation; it ignores all other settings here
    method: str = "uvc"
    every: int = 2  # training steps per solver step
    primal_rate: float = 0.5  # of s and r
    prox_rate: float = 0.4  # eta in the prox w <- w / (1 + 2 eta y)
    dual_rate: float = 1.0  # of y and p
    dual_leak: float = 0.05  # how fast y and p unwind to 1
    dual_max: float = 8.0
    budget_rate: float = 0.1  # of z
    snap: float = (
        1e-3  # a removed group is set to zero below this squared norm, relative to its family's initial mean
    )
    importance_decay: float = 0.9  # of the moving average of first-order importance
    anneal: tuple[float, float] = (
        0.05,
        0.7,
    )  # the budget goes from 1 to its value, by equal factors, between these fractions of the search
    # What may be removed beside skips, of "head", "qk", "v" and "neuron". A head goes with its last v dim;
    # to remove heads whole, too, cost 2 to 15 points at small budgets, since the best dims went with the
    # rest.
    families: tuple[str, ...] = ("qk", "v", "neuron")
    # Heads are first given the basis in which their first dims are worth most; their function stays.
    balance: bool = True
    tokens: int = 0  # blocks, at most 3, at which the search may drop patch tokens; 0 keeps all
    # Dims of a head and neurons of an MLP are kept in multiples of these, as in (16, 64), since hardware runs
    # finer structures slower than they count; each divides the whole.
    grain: tuple[int, int] = (1, 1)
    skip: str = "halves"  # "none", "blocks", "halves": what a skip gate governs
    gate_every: int = 4  # training steps per gate update; only there all branches run
    gate_rate: float = 0.1
    gate_init: float = 3.0  # logit; sigmoid(3) = 0.95
    gate_weight: float = 0.3  # price of a gate in units of z
    gate_momentum: float = 0.9
    gate_freeze: float = 0.6  # gates become hard at this fraction of the search


@dataclass(frozen=True)
class Config:
    """A whole run: teacher (only when none is given), warm-up, search, post-training. Epochs are passes over
    the loader.
    """

    teacher_epochs: int = 300
    warmup_epochs: int = 5
    search_epochs: int = 25
    post_epochs: int = 120
    batch_size: int = 128
    learning_rate: float = 5e-4
    search_learning_rate: float = 1e-4
    lr_warmup_fraction: float = 0.05
    min_learning_rate: float = 1e-6
    weight_decay: float = 0.05
    clip_grad: float = 1.0
    label_smoothing: float = 0.0
    mixup: float = 0.0  # alpha of the blend of two images; 0: none
    cutmix: float = 0.0  # alpha of the patch of one image in another; with mixup, each step draws one of them
    # Above 0, the teacher and the result are averages of the weights over the steps, this much of the old one
    # at each step, less in the first.
    ema_decay: float = 0.0
    # Of the products in training: "float32", or "bfloat16", where models run under autocast. Weights, losses
    # and evaluations are float32 in both.
    precision: str = "float32"
    seed: int = 0
    checkpoint_every: int = 0  # training steps, beside the checkpoint after each epoch; 0: that alone
    threads: int | None = None  # CPU threads; None leaves torch's choice
    distill: DistillConfig = field(default_factory=DistillConfig)
    solver: SolverConfig = field(default_factory=SolverConfig)
