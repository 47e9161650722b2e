"""What is measured on a finished run of benchmarks/bypass_ablation.py; writes RUN/measured.json.

python benchmarks/bypass_measure.py RUN [--features FOLDER] [--samples 1000]

gradient noise      tr(cov of the gradient) / |gradient|^2, in images: the batch beyond which larger ones
help little (McCandlish et al. 2018, arXiv 1812.06162), from batches of 64 and of all
frechet, kernel     of samples to the training images, in the features given, with 35 evaluations of
Heun and with 8 of DPM-Solver++ 2M, no teleport
memorised           share of the samples of Heun that are copies of training images
parameters          of the network
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from gaussnet import CrossFit, Denoiser, dpmpp_2m, from_pretrained, heun, karras_sigmas
from gaussnet.metrics import (
    FeatureStatistics,
    extract_features,
    kernel_distance,
    load_extractor,
    memorisation,
    to_uint8,
)
from gaussnet.precond import BypassPrecond
from gaussnet.sampling import noise_of
from train.config import Config
from train.configfile import load_config
from train.data import Data, batch_indices, load_data
from train.loss import denoising_loss, make_batch
from train.models import fit_folds

PARTS = 24  # batches of the gradient's variance
SAMPLERS = {"heun 35": (heun, 18), "dpmpp_2m 8": (dpmpp_2m, 8)}


def gradient_noise(model: BypassPrecond, config: Config, data: Data, cross: CrossFit | None) -> float:
    """The gradient-noise scale at the final weights, in images; `cross` are the closed forms of training."""
    whole = slice(0, config.train.batch)
    squares, total = 0.0, None
    model.train()
    for step in range(PARTS):
        index = batch_indices(len(data.train), config.train.batch, config.train.steps + step, config.seed)
        raw, labels = (part.to(model.gaussian.mean.device) for part in data.train[index])
        batch = make_batch(raw, labels, config.train.steps + step, whole, data, config)
        model.zero_grad()
        denoising_loss(model, model, batch, cross=cross).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()
        squares += float(gradient.square().sum()) / PARTS
        total = gradient if total is None else total + gradient
    model.eval()
    assert total is not None
    small, large = config.train.batch, PARTS * config.train.batch
    mean = float((total / PARTS).square().sum())
    signal = (large * mean - small * squares) / (large - small)  # their appendix A.1
    return (squares - mean) / (1 / small - 1 / large) / signal if signal > 0 else float("inf")


@torch.no_grad()
def samples_of(model: Denoiser, name: str, count: int, n_classes: int) -> Tensor:
    """Samples (count, C, H, W) by seeds; labels in turn."""
    solver, steps = SAMPLERS[name]
    parts: list[Tensor] = []
    device = next(model.buffers()).device
    for seeds in torch.arange(count).split(250):
        x = 80 * noise_of(seeds.tolist(), tuple(model.event_shape)).to(device)
        classes = (seeds % max(n_classes, 1)).to(device)
        labels = None if not n_classes else torch.nn.functional.one_hot(classes, n_classes).float()
        parts.append(solver(model, x, karras_sigmas(steps), class_labels=labels))
    return torch.cat(parts).float().cpu()


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--features")
    parser.add_argument("--samples", type=int, default=1000)
    options = parser.parse_args()
    config = load_config(options.run / "config.yaml")
    data = load_data(config.data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = from_pretrained(options.run).to(device)
    assert isinstance(model, BypassPrecond)
    cross = fit_folds(config, data, Accelerator(cpu=device.type == "cpu"))
    parameters = sum(p.numel() for p in model.parameters())
    values: dict[str, float] = {
        "parameters": parameters,
        "gradient noise": gradient_noise(model, config, data, cross),
    }
    model.requires_grad_(False)
    images = data.train.tensor()[:20_000]
    extractor = None if options.features is None else load_extractor(options.features).to(device)
    real = torch.empty(0) if extractor is None else torch.cat(list(extract_features(extractor, images))).cpu()
    for name in SAMPLERS:
        drawn = to_uint8(samples_of(model, name, options.samples, data.n_classes)).float() / 127.5 - 1
        if extractor is not None:
            fake = torch.cat(list(extract_features(extractor, drawn))).cpu()
            values[f"frechet, {name}"] = FeatureStatistics.fit(fake).distance(FeatureStatistics.fit(real))
            size, generator = min(1000, len(real), len(fake)), torch.Generator().manual_seed(0)
            values[f"kernel, {name}"] = kernel_distance(
                real[:5000], fake, subset_size=size, generator=generator
            ).mean
        if name == "heun 35":
            values["memorised"] = memorisation(drawn, images).share
    rows = [{"name": name, "value": value} for name, value in values.items()]
    (options.run / "measured.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
