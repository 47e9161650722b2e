"""What do the bypass and the data cost in a training step?

    python benchmarks/train_step.py [--mnist FOLDER] [--repeats 7]

First, forward and backward pass of the mini-EDM CIFAR network at batch 64, float32, in EDM's preconditioning
and in the bypass with all of its parts (full-rank Gaussian of 3,072 dimensions, gate, shown), with the
blended base and with that of marginals, the default of `BypassPrecond.fit`: the ratio of the medians of
interleaved repetitions in one process. Then the share of a training step that the mini-EDM MNIST
configuration waits for its data, or, without MNIST, for as many random images.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from results import Record, parser
from timing import Call, compare
from torch import Tensor

from gaussnet import BypassPrecond, Covariance, EDMPrecond, Gate, GaussianDenoiser, SongUNet
from train.configfile import load_config
from train.data import StepSampler, load_data, loader
from train.loss import denoising_loss, make_batch

CONFIG = Path(__file__).parent.parent / "configs" / "mnist_mini_edm.yaml"
CIFAR = {"model_channels": 96, "channel_mult": [1, 2, 2], "num_blocks": 2, "attn_resolutions": [16]}


def overhead(record: Record, batch: int) -> None:
    """The cost of a bypass step over an EDM step."""
    event = (3, 32, 32)
    dim = 3072
    eigvecs = torch.linalg.qr(torch.randn(dim, dim)).Q
    gaussian = GaussianDenoiser(torch.zeros(event), Covariance(eigvecs, torch.logspace(1.5, -3, dim)))
    gate = Gate(torch.logspace(-1.3, 2, 25), torch.linspace(1, 0, 25))
    pixels = torch.randint(256, (600, *event), dtype=torch.uint8).float() / 127.5 - 1
    default = BypassPrecond.fit(SongUNet(32, 9, 3, **CIFAR), pixels[:500], pixels[500:], gaussian=gaussian)
    models = {
        "edm": EDMPrecond(SongUNet(32, 3, 3, **CIFAR)),
        "bypass": BypassPrecond(SongUNet(32, 6, 3, **CIFAR), gaussian, gate),
        "marginal": default,
    }
    clean, noise = torch.randn(batch, *event).clamp(-1, 1), torch.randn(batch, *event)
    sigma = torch.exp(1.2 * torch.randn(batch) - 1.2)
    x = clean + sigma[:, None, None, None] * noise

    def step(model: BypassPrecond) -> Call:
        def call() -> None:
            model.zero_grad(set_to_none=True)
            error = (model(x, sigma) - clean).square().flatten(1).mean(1)
            (model.weight(sigma) * error).mean().backward()

        return call

    times = compare({name: step(model.train()) for name, model in models.items()}, record.options.repeats)
    for model, base in (("bypass", "blended"), ("marginal", "marginal")):
        ratio = record.number(
            f"a training step with bypass, {base} base",
            times[model] / times["edm"],
            "<= 1.05",
            "one of EDM's",
            headline=True,
        )
        record.text(f"A step with bypass, {base} base, takes {ratio:.3f} of one of EDM's.\n")


def waiting(record: Record, source: str, steps: int) -> None:
    """The share of MNIST steps that goes into data, read ahead by no worker and by one."""
    config = load_config(CONFIG, [f"data.source={source}"])
    data = load_data(config.data)
    batch = config.train.batch
    model = EDMPrecond(SongUNet(32, 1, 1, **config.network.arguments)).train()
    for workers in (0, 1):
        sampler = StepSampler(len(data.train), batch, 0, 0, steps + 1, slice(0, batch))
        batches = iter(loader(data.train, sampler, workers, pin=False))
        first: tuple[Tensor, Tensor] = next(batches)  # starts the workers
        del first
        waited, began = 0.0, time.perf_counter()
        for step in itertools.count(1):
            started = time.perf_counter()
            item = next(batches, None)
            waited += time.perf_counter() - started
            if item is None:
                break
            raw, labels = item
            part = make_batch(raw, labels, step, slice(0, batch), data, config)
            model.zero_grad(set_to_none=True)
            denoising_loss(model, model, part).backward()
        share = waited / (time.perf_counter() - began)
        record.number(
            f"waiting for data, {workers} workers", 100 * share, "<= 5", "a training step", unit="%"
        )
        record.text(f"Batch {batch}, {workers} workers: {share:.2%} of a step is waiting for data.")


def main() -> None:
    """Prints both."""
    made = parser(__doc__)
    made.add_argument("--mnist", help="folder of MNIST's files")
    made.add_argument("--repeats", type=int, default=7)
    made.add_argument("--batch", type=int, default=64, help="of the mini-EDM CIFAR network")
    made.add_argument("--steps", type=int, default=20, help="of the mini-EDM MNIST configuration")
    options = made.parse_args()
    record = Record(options)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    overhead(record, options.batch)
    with tempfile.TemporaryDirectory() as folder:
        source = options.mnist
        if source is None:
            source = f"{folder}/random.npy"
            np.save(source, np.random.default_rng(0).integers(256, size=(60_000, 28, 28), dtype=np.uint8))
        waiting(record, source, options.steps)
    record.close()


if __name__ == "__main__":
    main()
