"""What is looked at while a network learns: score probes, held-out error, samples, Frechet distance.

Each is built once, with its fixed queries or noise, and called with the step. Every process calls it and does
its share; the main one writes. They leave the random state of the training as it was.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from gaussnet import BypassPrecond, GaussianDenoiser, ScoreProbe, heun, karras_sigmas, plots, teleport
from gaussnet.probes import log_spaced
from train.config import Config
from train.data import Data, generator_for
from train.models import Analytic
from train.rundir import RunFolder
from train.writing import append_csv

log = logging.getLogger("train")


@dataclass
class Run:
    """What the callbacks see."""

    config: Config
    folder: RunFolder
    accelerator: Accelerator
    data: Data
    gaussian: GaussianDenoiser
    model: BypassPrecond  # with the weights that are trained
    averages: dict[float, BypassPrecond]  # by half-life in thousands of images; the first is the run's model

    @property
    def average(self) -> BypassPrecond:
        """The model of the run."""
        return next(iter(self.averages.values()))

    def share(self, count: int) -> slice:
        """This process's part of `count` queries, which the processes divide evenly but for the last."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        size = -(-count // world)
        return slice(min(rank * size, count), min((rank + 1) * size, count))

    def total(self, x: Tensor) -> Tensor:
        """The sum over the processes."""
        return cast(Tensor, self.accelerator.reduce(x, reduction="sum"))

    def heldout(self, count: int) -> tuple[Tensor, Tensor | None]:
        """This process's part of the first held-out images, on its device, and their one-hot labels."""
        count = min(count, len(self.data.heldout))
        raw, labels = self.data.heldout[torch.arange(count)[self.share(count)]]
        device = self.accelerator.device
        return self.data.heldout.to_float(raw.to(device)), self.data.one_hot(labels.to(device))

    def noise(self, count: int, *key: int | str) -> Tensor:
        """This process's part of noise for `count` images, on its device; all of it is drawn by the key."""
        noise = torch.randn(count, *self.data.event_shape, generator=generator_for(self.config.seed, *key))
        return noise[self.share(count)].to(self.accelerator.device)

    def initial(self, count: int, *key: int | str) -> tuple[Tensor, Tensor | None]:
        """This process's part of the noise of `count` samples, and one-hot labels of all classes in turn.

        There are a few more of them where needed, so that no process is without any.
        """
        world, device = self.accelerator.num_processes, self.accelerator.device
        count = -(-count // world) * world
        classes = self.data.classes
        labels = classes[torch.arange(count)[self.share(count)] % len(classes)]
        return self.noise(count, *key), self.data.one_hot(labels.to(device))


class Probes:
    """Score probes at log-spaced steps, of the trained weights and their average."""

    def __init__(self, run: Run, analytic: Analytic) -> None:
        config, accelerator = run.config, run.accelerator
        world = accelerator.num_processes
        count = max(world, min(config.probe.queries, len(run.data.train)) // world * world)
        raw, labels = run.data.train[torch.arange(count)]
        labels = run.data.one_hot(labels)
        self.run = run
        self.probe = ScoreProbe(
            analytic.named(),
            run.data.train.to_float(raw).to(accelerator.device),
            sigmas=config.probe.sigmas,
            generator=generator_for(config.seed, "probe"),
            share=(accelerator.process_index, world),
            class_labels=None if labels is None else labels.to(accelerator.device),
        )
        # A training step costs three evaluations an image; a probe is of two networks at two kinds of them.
        # On small networks, comparing with all references costs half as much again (measured on the digits).
        one = int(1.6 * len(config.probe.sigmas) * count * 4)
        affordable = int(config.probe.share * config.train.steps * config.train.batch * 3 / one)
        times = max(2, min(config.probe.times, affordable))
        if times < config.probe.times:
            log.info(
                f"probes: {times} of {config.probe.times}, to stay below {config.probe.share:.0%} of the run"
            )
        self.steps = set(log_spaced(config.train.steps, times))
        self.seconds = 0.0

    def __call__(self, step: int) -> None:
        if step not in self.steps:
            return
        run, started = self.run, time.perf_counter()
        for weights, model in (("raw", run.model), ("ema", run.average)):
            values = self.probe.measure(model)
            values = cast(Tensor, run.accelerator.gather(values.movedim(-1, 0).contiguous())).movedim(0, -1)
            if run.accelerator.is_main_process:
                rows = self.probe.rows(values)
                append_csv(run.folder.probes, ({"step": step, "weights": weights, **row} for row in rows))
        self.seconds += time.perf_counter() - started


class Heldout:
    """The denoising error on held-out images, and the best model so far by its mean over the levels."""

    def __init__(self, run: Run) -> None:
        self.run = run
        options = run.config.heldout
        self.clean, self.labels = run.heldout(options.queries)
        self.count = min(options.queries, len(run.data.heldout))
        self.noise = run.noise(self.count, "held out")
        self.bands = mode_bands(run.gaussian, options.bands) if options.bands else []

    def due(self, step: int) -> bool:
        """Whether the error is measured after this step."""
        every = self.run.config.heldout.every
        return every > 0 and (step % every == 0 or step == self.run.config.train.steps)

    def __call__(self, step: int) -> None:
        if not self.due(step):
            return
        run = self.run
        names = {"raw": run.model} | {
            "ema" if i == 0 else f"ema-{halflife:g}": model
            for i, (halflife, model) in enumerate(run.averages.items())
        }
        rows: list[dict[str, Any]] = []
        modes: list[dict[str, Any]] = []
        sigmas = run.config.heldout.sigmas
        for name, model in names.items():
            axes = run.gaussian.covariance.eigvecs if self.bands else None
            sums = run.total(error_sums(model, self.clean, self.noise, sigmas, self.labels, axes))
            errors = (sums[:, 0] / (self.count * run.data.train.event_shape.numel())).tolist()
            modes += [{"step": step, "weights": name, **row} for row in self.by_band(sums[:, 1:])]
            # Relative to the Gaussian's own error, every level weighs the same.
            relative = [
                error / float(run.gaussian.bayes_error(sigma))
                for error, sigma in zip(errors, sigmas, strict=True)
            ]
            rows += [
                {"step": step, "weights": name, "sigma": sigma, "error": error, "relative": share}
                for sigma, error, share in zip(sigmas, errors, relative, strict=True)
            ]
        if not run.accelerator.is_main_process:
            return
        append_csv(run.folder.heldout, rows)
        if modes:
            append_csv(run.folder.modes, modes)
        mine = [row["relative"] for row in rows if row["weights"] == "ema"]
        now = sum(mine) / len(mine)
        run.accelerator.log({"heldout_error": now}, step=step)
        if now < run.folder.best_saved()[1]:  # NaN is not
            run.folder.save_best(run.average, step, now)

    def by_band(self, errors: Tensor) -> list[dict[str, Any]]:
        """Rows of the mean squared error along the axes of each band; `errors` are sums (levels, axes)."""
        eigvals = self.run.gaussian.covariance.eigvals.double().cpu()
        rows: list[dict[str, Any]] = []
        for sigma, along in zip(self.run.config.heldout.sigmas, errors.cpu() / self.count, strict=True):
            for axes in self.bands:
                lam = eigvals[axes]
                rows.append(
                    {
                        "sigma": sigma,
                        "axes": len(axes),
                        "variance": float(lam.mean()),
                        "error": float(along[axes].mean()),
                        "gaussian": float((lam * sigma**2 / (lam + sigma**2)).mean()),
                    }
                )
        return rows


def mode_bands(gaussian: GaussianDenoiser, count: int) -> list[Tensor]:
    """At most `count` bands of axes, the largest variance first, as wide as they have to be: 1, 2, 4, ..."""
    order = gaussian.covariance.eigvals.argsort(descending=True).cpu()
    ends = sorted({min(2**k - 1, len(order)) for k in range(count)} | {len(order)})
    return [order[start:end] for start, end in pairwise(ends)]


def denoising_errors(
    model: Any, clean: Tensor, noise: Tensor, sigmas: Sequence[float], labels: Tensor | None
) -> Tensor:
    """The sum of squared denoising errors at each level, (levels,), float64."""
    return error_sums(model, clean, noise, sigmas, labels)[:, 0]


@torch.no_grad()
def error_sums(
    model: Any,
    clean: Tensor,
    noise: Tensor,
    sigmas: Sequence[float],
    labels: Tensor | None,
    axes: Tensor | None = None,
) -> Tensor:
    """Sums of squared denoising errors: the whole, then along each of the axes (D, r); (levels, 1 + r)."""
    axes = clean.new_zeros(clean.shape[1:].numel(), 0) if axes is None else axes
    totals = torch.zeros(len(sigmas), 1 + axes.shape[1], dtype=torch.float64, device=clean.device)
    for i, sigma in enumerate(sigmas):
        for part in torch.arange(len(clean), device=clean.device).split(256):
            if not len(part):  # the share of one process of more than there are images
                break
            own = None if labels is None else labels[part]
            error = model(clean[part] + sigma * noise[part], sigma, own) - clean[part]
            error = error.flatten(1)
            totals[i, 0] += error.double().square().sum()
            totals[i, 1:] += (error @ axes.to(error)).double().square().sum(0)
    return totals


class Samples:
    """A picture of samples from fixed noise, with and without teleport."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.noise, self.labels = run.initial(run.config.samples.count, "samples")

    def __call__(self, step: int) -> None:
        run, options = self.run, self.run.config.samples
        if not (options.every and step % options.every == 0):
            return
        sigmas = karras_sigmas(options.steps)
        start = float(sigmas[0]) * self.noise
        rows: dict[str, Tensor] = {}
        for name, skip in (("model", 0), (f"teleport,\n{options.skip} steps", options.skip)):
            images = heun(
                run.average, *teleport(run.gaussian, start, sigmas, skip=skip), class_labels=self.labels
            )
            rows[name] = cast(Tensor, run.accelerator.gather(images))[: options.count].cpu()
        if run.accelerator.is_main_process:
            run.folder.pictures.mkdir(exist_ok=True)
            plots.image_rows(rows, run.folder.pictures / f"step-{step:09d}.png")
