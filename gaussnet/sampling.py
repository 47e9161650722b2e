"""Sampling by seeds: one generator a seed, so that a seed gives the same image in any batch, on any process.

    sigmas = karras_sigmas(8)
    for seeds, images in sample_seeds(model, range(64), sigmas, solver="unipc", jump=choose_jump(model)): ...

`Jump` says where teleport starts a run: a Gaussian and the level. `choose_jump` takes both from the model, if
it has a gate, or measures the level on it. A stochastic solver goes on with the generator that drew the noise
of a seed, image by image.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gaussnet.denoisers import Denoiser, GaussianDenoiser, GuidedDenoiser
from gaussnet.edm import EDMPrecond
from gaussnet.network_denoiser import NetworkDenoiser
from gaussnet.precond import BypassPrecond
from gaussnet.samplers import SOLVERS, ModelStatistics, find_sigma_skip, karras_sigmas, teleport

GATE_TOL = 0.1  # of the gate; of the share of e(s)^2 its square


class Jump(NamedTuple):
    """Where sampling starts: the Gaussian whose flow leads there, and the level."""

    gaussian: GaussianDenoiser
    sigma_skip: float


def parse_seeds(text: str, what: str = "seeds") -> list[int]:
    """Seeds, or `what` else, from a list of numbers and ranges, ends included.

    Raises:
        ValueError: if it is none.

    Example:
        >>> parse_seeds("0-3,7")
        [0, 1, 2, 3, 7]
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()) or part.strip().endswith("-"):
            raise ValueError(f"expected {what} such as 0-63 or 1,5,9, got {text!r}")
        span = range(int(first), int(last or first) + 1)
        if not span:
            raise ValueError(f"expected ranges of {what} to increase, got {part.strip()!r} in {text!r}")
        seeds += span
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"expected {what} that differ, got {text!r}")
    return seeds


def choose_jump(
    model: Denoiser,
    gaussian: GaussianDenoiser | None = None,
    sigma_skip: float | None = None,
    sigmas: Tensor | None = None,
    seeds: Sequence[int] = range(16),
    *,
    class_labels: Tensor | None = None,
    guidance: float = 1.0,
) -> Jump:
    """The jump for a model.

    Args:
        model: to sample from.
        gaussian: of its data; default: that of a bypass model.
        sigma_skip: the level; default: where the gate of the model falls below 0.1, or, without a gate, the
            lowest level of the grid above which model and Gaussian differ by at most 0.01 e(sigma)^2.
        sigmas: the grid of the sampler; default: EDM's 18 levels. No jump goes below the last one above 0.
        seeds: of the states on which that is measured.
        class_labels: as will be sampled with, one a seed of these: with labels, a model is another one.
        guidance: as will be sampled with.

    Raises:
        ValueError: if there is no Gaussian, it stands in for the model nowhere, labels do not fit the seeds,
            or guidance has no labels.
    """
    denoiser = _guided(model, guidance, class_labels, len(seeds))
    if gaussian is None:
        bypass = isinstance(model, BypassPrecond) and not isinstance(model, EDMPrecond)
        if not bypass or not isinstance(model.gaussian, GaussianDenoiser):
            raise ValueError(f"expected a Gaussian: a {type(model).__name__} has none of its own, got None")
        gaussian = model.gaussian
    grid = karras_sigmas(18) if sigmas is None else sigmas
    if sigma_skip is None and isinstance(model, BypassPrecond) and model.gate is not None:
        level = model.gate.closes(max(GATE_TOL, model.gate_tol))
        # Where the gate of a mixture is closed, the model is that mixture, not a Gaussian.
        if level < math.inf and isinstance(model.gaussian, GaussianDenoiser):
            sigma_skip = max(level, float(grid[-2]))  # the last one from which a solver can go on
    if sigma_skip is None:
        x = float(grid[0]) * noise_of(seeds, tuple(model.event_shape)).to(gaussian.mean)
        labels = None if class_labels is None else class_labels.to(x.device)
        found = find_sigma_skip(denoiser, gaussian, x, grid, GATE_TOL**2, class_labels=labels)
        sigma_skip = found.sigma_skip
    return Jump(gaussian, sigma_skip)


def noise_of(seeds: Sequence[int], event_shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise (n, *event_shape), float32, on the CPU, from one generator a seed."""
    return torch.stack([torch.randn(event_shape, generator=_generator(seed)) for seed in seeds])


@torch.no_grad()
def sample_seeds(
    model: Denoiser,
    seeds: Sequence[int],
    sigmas: Tensor,
    *,
    solver: str = "heun",
    jump: Jump | None = None,
    regrid: bool = True,
    batch_size: int = 64,
    class_labels: Tensor | None = None,
    guidance: float = 1.0,
    statistics: ModelStatistics | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Images of seeds, batch by batch.

    Args:
        model: any denoiser; evaluated on the device of its tensors.
        seeds: of the noise at sigmas[0].
        sigmas: decreasing levels that end in 0, shape (n + 1,).
        solver: a name of `SOLVERS`.
        jump: where teleport takes the noise first.
        regrid: whether a jump keeps the number of steps, on a new grid, or drops those before its level. From
            the last level above 0 a single step is left.
        batch_size: images at a time; it does not change them. One at a time where the solver is stochastic.
        class_labels: integers (n,) or one-hot rows (n, classes), one a seed.
        guidance: weight of the conditional denoiser over the unconditional one; 1 is no guidance.
        statistics: of the (guided) denoiser, for dpm_v3, from `compute_ems`. A jump's history is used as far
            as they reach.

    Yields:
        Seeds of the batch, and images (b, *event_shape), float32.

    Raises:
        ValueError: if the solver is unknown, labels do not fit the seeds, guidance has no labels,
            statistics are given to a solver that takes none, or an image is not finite.
    """
    if solver not in SOLVERS:
        raise ValueError(f"expected solver to be one of {', '.join(SOLVERS)}, got {solver!r}")
    denoiser = _guided(model, guidance, class_labels, len(seeds))
    method: Any = SOLVERS[solver]
    takes = set(inspect.signature(method).parameters)
    if statistics is not None and "statistics" not in takes:
        raise ValueError(f"expected statistics for dpm_v3 alone, got some for {solver}")
    fixed = {} if statistics is None else {"statistics": statistics}
    highest = math.inf if statistics is None else float(statistics.sigmas[-1])
    event_shape = tuple(model.event_shape)
    device = next((t.device for part in (model.parameters(), model.buffers()) for t in part), None)
    if "generator" in takes:
        batch_size = 1
    for start in range(0, len(seeds), batch_size):
        mine = list(seeds[start : start + batch_size])
        labels = None if class_labels is None else class_labels[start : start + batch_size].to(device)
        options = dict[str, Any](fixed)
        if "generator" in takes:
            options["generator"] = _generator(mine[0])
            noise = torch.randn(1, *event_shape, generator=options["generator"])
        else:
            noise = noise_of(mine, event_shape)
        x, grid = (float(sigmas[0]) * noise).to(device), sigmas
        if jump is not None and jump.sigma_skip < float(sigmas[0]):
            steps = len(sigmas) - 1 if regrid and jump.sigma_skip > float(sigmas[-2]) else None
            x, grid, history = teleport(
                jump.gaussian, x, sigmas, sigma_skip=jump.sigma_skip, steps=steps, return_history=True
            )
            if "history" in takes:
                options["history"] = [entry for entry in history if entry[0] <= highest]
        images = method(denoiser, x, grid, class_labels=labels, **options).float()
        good = images.flatten(1).isfinite().all(1).tolist()
        if not all(good):
            seed = mine[good.index(False)]
            raise ValueError(
                f"expected finite images, got NaN or infinite values by {solver} for seed {seed}"
            )
        yield mine, images


def one_hot(model: Denoiser, classes: Sequence[int]) -> Tensor:
    """Class labels of a network in rows, as EDM's networks take them; integers for other denoisers.

    Raises:
        ValueError: if a class is not among those of the network.
    """
    index = torch.tensor(classes)
    label_dim = getattr(model.model, "label_dim", 0) if isinstance(model, NetworkDenoiser) else None
    if label_dim is None:
        return index
    if not label_dim or int(index.min()) < 0 or int(index.max()) >= label_dim:
        got = sorted(set(classes))
        raise ValueError(f"expected classes in [0, {label_dim}), those of the network, got {got}")
    return torch.nn.functional.one_hot(index, int(label_dim)).float()


def _guided(model: Denoiser, guidance: float, class_labels: Tensor | None, seeds: int) -> Denoiser:
    """What is sampled: the model, or with guidance the one between it and itself without labels."""
    if class_labels is not None and len(class_labels) != seeds:
        raise ValueError(f"expected {seeds} class_labels, one a seed, got {len(class_labels)}")
    if guidance != 1 and class_labels is None:
        raise ValueError(f"expected class_labels for guidance={guidance}, got None")
    return model if guidance == 1 else GuidedDenoiser(model, model, guidance)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
