"""Arms and tasks of benchmarks/bypass_ablation.py, and the runs that they make.

An arm is a way to train a denoiser, as keys of train/config.py; a task is images, network and steps. Each
run of a task and seed sees the same images and noise. A run's learning rate is the best of three short runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

RATES = (2e-3, 4e-3, 8e-3)
RATE_SEED = 100
SHORT = 5  # runs that choose a learning rate have this part of the steps

BLEND = "bypass.base=blend"
CROSS = "fit.folds=5"
NO_GATE, HIDDEN = "bypass.gate=false", "bypass.show_gaussian=false"
MARGINAL = "bypass.base=marginal"
EACH_CLASS = ("data.labels=true", "bypass.gaussian=classes", "fit.max_data=65536")
CHANNEL, ESTIMATE = "bypass.centre=channel", "bypass.centre=estimate"
ARMS: dict[str, tuple[str, ...]] = {
    "edm": ("precond=edm",),
    "edm-moments": ("bypass.base=isotropic", HIDDEN, NO_GATE),
    "edm-shown": ("bypass.base=isotropic", NO_GATE),
    "bypass": ("bypass.base=gaussian", HIDDEN, NO_GATE),
    "bypass-gate": ("bypass.base=gaussian", HIDDEN),
    "bypass-shown": ("bypass.base=gaussian", NO_GATE),
    "bypass-gate-shown": ("bypass.base=gaussian",),
    "bypass-all": (BLEND,),  # with gate and shown
    "bypass-sample": (BLEND, "fit.shrinkage=none"),
    "bypass-whitened": (BLEND, "bypass.whiten=true"),
    "marginal": ("bypass.base=marginal",),  # with gate and shown
    "marginal-hidden": ("bypass.base=marginal", HIDDEN),
    "edm-shown-folds": ("bypass.base=isotropic", NO_GATE, CROSS),
    "bypass-all-folds": (BLEND, CROSS),
    "marginal-folds": ("bypass.base=marginal", CROSS),
    "edm-moments-channel": ("bypass.base=isotropic", HIDDEN, NO_GATE, CHANNEL),
    "bypass-all-channel": (BLEND, CHANNEL),
    "marginal-channel": ("bypass.base=marginal", CHANNEL),
    "edm-shown-estimate": ("bypass.base=isotropic", NO_GATE, ESTIMATE),
    "bypass-all-estimate": (BLEND, ESTIMATE),
    "marginal-estimate": ("bypass.base=marginal", ESTIMATE),  # with gate and shown: the defaults
    "marginal-estimate-folds": ("bypass.base=marginal", ESTIMATE, CROSS),  # those where images are few
    "edm-warm": ("precond=edm", "loss.gaussian_steps=150"),
    "edm-classes": ("precond=edm", "data.labels=true"),
    "bypass-classes": (BLEND, "data.labels=true", "bypass.gaussian=classes"),
    "marginal-classes": ("bypass.base=marginal", ESTIMATE, "data.labels=true"),  # one Gaussian: the defaults
    "marginal-each-class": (MARGINAL, ESTIMATE, *EACH_CLASS),
    "marginal-each-class-folds": (MARGINAL, ESTIMATE, *EACH_CLASS, CROSS),
    "bypass-mixture": (BLEND, "bypass.gaussian=mixture", "bypass.components=10"),
    "marginal-mixture": (
        *(MARGINAL, ESTIMATE, "bypass.gaussian=mixture", "bypass.components=10"),
        *("fit.max_data=65536", "fit.error_queries=512"),
    ),
    "bypass-truncated": (BLEND, "loss.sigma_max=10"),
}
HEADLINE = ("edm", "bypass-all", "marginal", "edm-moments", "edm-shown")
FEW = (*HEADLINE, "marginal-folds", "marginal-estimate-folds", "bypass-all-folds", "edm-shown-folds")
WIDE = (*HEADLINE, "marginal-estimate")
ENOUGH = (*FEW, "marginal-estimate")
PARTS = (*FEW, "bypass-shown", "marginal-hidden")
LARGEST = (
    *("edm", "bypass-all", "marginal", "marginal-estimate"),
    *("bypass-all-folds", "marginal-folds", "marginal-estimate-folds"),
)
DEFAULT, DEFAULT_FEW = {"marginal-estimate": "edm"}, {"marginal-estimate-folds": "edm"}


@dataclass(frozen=True)
class Task:
    """Images, network and steps; arms and seeds that are worth their time.

    `defaults` are the arms that the library's defaults are, and those that they are compared with.
    """

    title: str
    keys: tuple[str, ...]
    arms: tuple[str, ...] = HEADLINE
    defaults: Mapping[str, str] = field(default_factory=lambda: DEFAULT)
    seeds: int = 2
    steps: int = 1500
    rates: tuple[float, ...] = RATES  # of which arms choose one; none: they take that of the task `core`
    widths: tuple[int, ...] = ()  # of a network that sees 1, 2, 3 images, where inputs are many parameters
    features: str | None = None


CROSSED = ("marginal-estimate-folds", "marginal-each-class-folds")
CORE = tuple(arm for arm in ARMS if CROSS not in ARMS[arm] or arm in CROSSED)
N = "network.arguments"
NO_UNET = (f"{N}.channel_mult=null", f"{N}.attn_resolutions=null", f"{N}.num_blocks=4")
DIT = (*NO_UNET, "network.name=DiT", f"{N}.model_channels=128", f"{N}.patch_size=4", f"{N}.num_heads=4")
MLP = (*NO_UNET, "network.name=MLP")
MINI_EDM = ("data.pad=2", "network.arguments.channel_mult=[1,2,3,4]")
UNET = "network.arguments.model_channels=24"
FEATURES = "tests/fixtures/mnist_features"
TASKS: dict[str, Task] = {
    "core": Task(
        "MNIST",
        ("data.source={mnist}",),
        CORE,
        {**DEFAULT, "marginal-each-class-folds": "edm-classes"},
        seeds=3,
        features=FEATURES,
    ),
    "emoji32": Task(
        "emoji, colour",
        ("data.source={emoji32}", "data.groups={groups}", "data.heldout=0.15", UNET),
        FEW,
        DEFAULT_FEW,
    ),
    "digits": Task(
        "digits, 8x8",
        ("data.source=digits", "data.heldout=0.2", "network.arguments.channel_mult=[1,2]"),
        ENOUGH,
        DEFAULT_FEW,
    ),
    "patches": Task(
        "patches of photographs, colour",
        ("data.source={patches}", "data.groups={patch_groups}", "data.heldout=0.2", UNET),
        FEW,
        DEFAULT_FEW,
    ),
    # Above these rates, runs break late.
    "dit": Task("MNIST, DiT", ("data.source={mnist}", *DIT), WIDE, rates=(5e-4, 1e-3, 2e-3)),
    "mlp": Task(
        "MNIST, MLP", ("data.source={mnist}", *MLP), WIDE, rates=(5e-4, 1e-3, 2e-3), widths=(512, 492, 474)
    ),
    "mnist-300": Task(
        "300 images of MNIST",
        ("data.source={mnist}", "data.heldout=59700"),
        PARTS,
        DEFAULT_FEW,
        rates=(),
        features=FEATURES,
    ),
    "mnist-3000": Task(
        "3,000 images of MNIST",
        ("data.source={mnist}", "data.heldout=57000"),
        FEW,
        DEFAULT_FEW,
        rates=(),
        features=FEATURES,
    ),
    "mnist-10000": Task(
        "10,000 images of MNIST",
        ("data.source={mnist}", "data.heldout=50000"),
        LARGEST,
        DEFAULT_FEW,
        rates=(),
        features=FEATURES,
    ),
    # At 8e-3, which short runs would choose, three of five arms break between steps 2,000 and 4,000.
    "long": Task(
        "MNIST, larger U-Net, 10,000 steps",
        ("data.source={mnist}", *MINI_EDM),
        WIDE,
        steps=10_000,
        rates=(2e-3,),
        features=FEATURES,
    ),
}


@dataclass(frozen=True)
class Run:
    """One training."""

    task: str
    arm: str
    seed: int
    lr: float
    steps: int
    keys: tuple[str, ...] = field(default=(), compare=False)

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.task}/{self.arm}/lr{self.lr:g}-seed{self.seed}"


def runs(
    task: str, arms: list[str], seeds: int | None, errors: list[dict[str, str]], data: Mapping[str, str]
) -> Iterator[Run]:
    """All runs of a task, those of the first seeds first; learning rates are chosen when they can be.

    `errors` are the rows of the table so far.
    """
    spec = TASKS[task]
    for seed in range(-1, spec.seeds if seeds is None else seeds):
        for arm in arms:
            keys = keys_of(task, arm, data)
            if seed < 0:
                for lr in spec.rates if len(spec.rates) > 1 and arm == plain(arm) else ():
                    yield Run(task, arm, RATE_SEED, lr, spec.steps // SHORT, keys)
                continue
            rate = best_rate(task if spec.rates else "core", plain(arm), errors)
            if rate is not None:
                yield Run(task, arm, seed, rate, spec.steps, keys)


def keys_of(task: str, arm: str, data: Mapping[str, str]) -> tuple[str, ...]:
    """What sets a task's arm apart in train/config.py; `data` are the names of sources."""
    spec = TASKS[task]
    keys = tuple(key.format(**data) for key in spec.keys) + ARMS[arm]
    return (*keys, f"{N}.model_channels={spec.widths[images_seen(arm) - 1]}") if spec.widths else keys


def images_seen(arm: str) -> int:
    """How many images the network of an arm is shown: the noisy one, D_gauss, D_m."""
    if "precond=edm" in ARMS[arm] or HIDDEN in ARMS[arm]:
        return 1
    return 3 if "bypass.base=marginal" in ARMS[arm] else 2


def plain(arm: str) -> str:
    """The arm whose learning rate an arm takes: the same without folds, about the mean."""
    return arm.removesuffix("-folds").removesuffix("-estimate")


def best_rate(task: str, arm: str, errors: list[dict[str, str]]) -> float | None:
    """The learning rate of the lowest error in the short runs; None while one of them is missing."""
    spec = TASKS[task]
    if len(spec.rates) == 1:
        return spec.rates[0]
    logs: dict[float, list[float]] = {lr: [] for lr in spec.rates}
    for row in errors:
        if (row["task"], row["arm"], row["seed"]) == (task, arm, str(RATE_SEED)) and float(row["lr"]) in logs:
            logs[float(row["lr"])].append(float(np.log(float(row["error"]))))
    if not all(logs.values()):
        return None
    return min(logs, key=lambda lr: float(np.mean(logs[lr])))


def finished(errors: list[dict[str, str]], device: str | None = None) -> set[Run]:
    """The runs whose last step is in the table of errors; whole ones of a device, or of any."""
    ends = [row for row in errors if row["step"] == row["steps"]]
    ends = [row for row in ends if device in (None, row["device"]) or row["seed"] == str(RATE_SEED)]
    return {
        Run(row["task"], row["arm"], int(row["seed"]), float(row["lr"]), int(row["steps"])) for row in ends
    }
