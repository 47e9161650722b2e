"""The Frechet distance between samples and training images while a network learns."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from gaussnet import count_nfe, heun, karras_sigmas
from gaussnet.metrics import FeatureStatistics, extract_features, load_extractor
from gaussnet.metrics.features import rounded
from train.callbacks import Run
from train.config import ConfigError
from train.data import fit_source, generator_for
from train.writing import append_csv

log = logging.getLogger("train")


class Frechet:
    """The distance at regular steps, of samples from fixed noise; the processes share samples and features.

    Raises:
        ConfigError: if the feature extractor cannot be had.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.options = run, run.config.frechet
        self.reference: FeatureStatistics | None = None
        self.nfe = 0  # of a sample
        if not self.options.every:
            return
        try:
            self.extractor = load_extractor(self.options.extractor).to(run.accelerator.device).eval()
        except (ImportError, OSError, ValueError) as error:
            raise ConfigError(f"frechet.extractor: {error}") from error
        rank, world = run.accelerator.process_index, run.accelerator.num_processes
        images = fit_source(run.data.train, rank, world)
        batches = images.split(self.options.batch) if isinstance(images, Tensor) else images
        self.reference = self._statistics(iter(batches))

    def due(self, step: int) -> bool:
        """Whether the distance is measured after this step."""
        every = self.options.every
        return every > 0 and step > 0 and (step % every == 0 or step == self.run.config.train.steps)

    def __call__(self, step: int) -> None:
        if not self.due(step) or self.reference is None:
            return
        self.nan = torch.zeros((), device=self.run.accelerator.device)
        distance = self._statistics(self._samples()).distance(self.reference)
        if self.run.total(self.nan) > 0:
            log.warning(f"step {step}: samples of the model have NaN, and no Frechet distance")
            distance = math.nan
        if self.run.accelerator.is_main_process:
            row = {"step": step, "frechet": distance, "samples": self.options.samples, "NFE": self.nfe}
            append_csv(self.run.folder.frechet, [row])
        self.run.accelerator.log({"frechet": distance}, step=step)

    def _statistics(self, batches: Iterator[Tensor]) -> FeatureStatistics:
        features = extract_features(self.extractor, batches, self.options.batch)
        return FeatureStatistics.fit(features, all_processes=self.run.accelerator.num_processes > 1)

    @torch.no_grad()
    def _samples(self) -> Iterator[Tensor]:
        """This process's samples, rounded to 8 bits as files are; one generator a sample."""
        run, device = self.run, self.run.accelerator.device
        share = run.share(self.options.samples)
        sigmas = karras_sigmas(self.options.steps)
        for seeds in torch.arange(share.start, share.stop).split(self.options.batch):
            draws = [
                torch.randn(
                    run.data.event_shape, generator=generator_for(run.config.seed, "frechet", int(seed))
                )
                for seed in seeds
            ]
            labels = run.data.one_hot(run.data.classes[seeds % len(run.data.classes)].to(device))
            start = float(sigmas[0]) * torch.stack(draws).to(device)
            with count_nfe(run.average) as nfe:
                images = heun(run.average, start, sigmas, class_labels=labels)
            self.nfe = nfe()
            self.nan += images.isnan().any()
            yield rounded(images.nan_to_num(0.0))
