"""What do the bypass and the data cost in a training step?

    python benchmarks/train_step.py [--mnist FOLDER] [--repeats 7]

First, forward and backward pass of the mini-EDM CIFAR network at batch 64, float32, in EDM's preconditioning
and in the bypass with all of its parts (full-rank Gaussian of 3,072 dimensions, gate, shown Gaussian, blended
base): the ratio of the medians of interleaved repetitions in one process. Then, with a folder of MNIST's
files, the share of a training step that the mini-EDM MNIST configuration waits for its data.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import torch
from timing import Call, compare
from torch import Tensor

from gaussnet import BypassPrecond, Covariance, EDMPrecond, Gate, GaussianDenoiser, SongUNet
from train.configfile import load_config
from train.data import StepSampler, load_data, loader
from train.loss import denoising_loss, make_batch

BATCH = 64
CIFAR = {"model_channels": 96, "channel_mult": [1, 2, 2], "num_blocks": 2, "attn_resolutions": [16]}


def overhead(repeats: int) -> None:
    """Prints the cost of a bypass step over an EDM step."""
    event = (3, 32, 32)
    dim = 3072
    eigvecs = torch.linalg.qr(torch.randn(dim, dim)).Q
    gaussian = GaussianDenoiser(torch.zeros(event), Covariance(eigvecs, torch.logspace(1.5, -3, dim)))
    gate = Gate(torch.logspace(-1.3, 2, 25), torch.linspace(1, 0, 25))
    models = {
        "edm": EDMPrecond(SongUNet(32, 3, 3, **CIFAR)),
        "bypass": BypassPrecond(SongUNet(32, 6, 3, **CIFAR), gaussian, gate),
    }
    clean, noise = torch.randn(BATCH, *event).clamp(-1, 1), torch.randn(BATCH, *event)
    sigma = torch.exp(1.2 * torch.randn(BATCH) - 1.2)
    x = clean + sigma[:, None, None, None] * noise

    def step(model: BypassPrecond) -> Call:
        def call() -> None:
            model.zero_grad(set_to_none=True)
            error = (model(x, sigma) - clean).square().flatten(1).mean(1)
            (model.weight(sigma) * error).mean().backward()

        return call

    times = compare({name: step(model.train()) for name, model in models.items()}, repeats)
    print(f"a step of the bypass takes {times['bypass'] / times['edm']:.3f} of one of EDM's")


def waiting(folder: str, steps: int) -> None:
    """Prints the share of MNIST steps that goes into data, read ahead by no worker and by one."""
    config = load_config(
        Path(__file__).parent.parent / "configs" / "mnist_mini_edm.yaml", [f"data.source={folder}"]
    )
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
        print(f"MNIST, batch {batch}, {workers} workers: {share:.2%} of a step is waiting for data")


def main() -> None:
    """Prints both."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mnist", help="folder of MNIST's files")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    overhead(arguments.repeats)
    if arguments.mnist:
        waiting(arguments.mnist, steps=20)


if __name__ == "__main__":
    main()
