"""What do the bypass and teleport cost on a GPU?

    python benchmarks/gpu_step.py [--batch 256] [--repeats 15] [--compile]

A training step (forward, backward, AdamW) of EDM's CIFAR-10 network (DDPM++, 55.7 M parameters) and of the
one of configs/mnist_mini_edm.yaml, in EDM's preconditioning, around a Gaussian of full rank, and around
marginals, the default; in TF32, in bfloat16, and in bfloat16 with the network compiled. Ratios of the medians
of interleaved repetitions in one process; memory is the peak over a step. Then sampling: the jump over an
evaluation of the network, and 18 steps of Heun over a jump and the 13 that it leaves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from results import Record, parser
from timing import Call, compare
from torch import Tensor

from gaussnet import (
    BypassPrecond,
    EDMPrecond,
    Gate,
    GaussianDenoiser,
    SongUNet,
    heun,
    karras_sigmas,
    teleport,
)
from train.configfile import load_config

MNIST = Path(__file__).parent.parent / "configs" / "mnist_mini_edm.yaml"
CIFAR = {
    "model_channels": 128,
    "channel_mult": [2, 2, 2],
    "num_blocks": 4,
    "attn_resolutions": [16],
    "dropout": 0.13,
}
MODES = ("TF32", "bfloat16", "bfloat16, compiled")


def images(channels: int, count: int = 8192) -> Tensor:
    """Smooth random fields in 256 values, (count, channels, 32, 32) in [-1, 1], on the CPU."""
    waves = torch.fft.rfft2(torch.randn(count, channels, 32, 32))
    h, w = torch.fft.fftfreq(32)[:, None], torch.fft.rfftfreq(32)
    fields = torch.fft.irfft2(waves / (h**2 + w**2 + 1e-3) ** 0.75)
    return ((fields / fields.std() / 2).clamp(-1, 1) * 127.5).round() / 127.5


def models(channels: int, arguments: dict[str, Any], device: str) -> dict[str, BypassPrecond]:
    """Three preconditionings of the same network."""
    data = images(channels).to(device)
    train, heldout = data[:-1024], data[-1024:]
    gaussian = GaussianDenoiser.fit(train)
    gate = Gate(torch.logspace(-1.3, 2, 25), torch.linspace(1, 0, 25))

    def network(shown: int) -> SongUNet:
        return SongUNet(32, shown * channels, channels, **arguments)

    made = {
        "edm": EDMPrecond(network(1)),
        "gaussian": BypassPrecond(network(2), gaussian, gate),
        "marginal": BypassPrecond.fit(network(3).to(device), train, heldout),
    }
    return {name: model.to(device) for name, model in made.items()}


def step(model: BypassPrecond, clean: Tensor, mode: str) -> Call:
    """A training step."""
    model.train()
    if "compiled" in mode:
        model.model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=clean.is_cuda)
    sigma = torch.exp(1.2 * torch.randn(len(clean), device=clean.device) - 1.2)
    x = clean + sigma[:, None, None, None] * torch.randn_like(clean)

    def call() -> None:
        with autocast(mode, clean.device.type):
            error = (model(x, sigma) - clean).square().flatten(1).mean(1)
            loss = (model.weight(sigma) * error).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return call


def autocast(mode: str, device: str) -> AbstractContextManager[Any]:
    """The precision of a mode."""
    return torch.autocast(device, torch.bfloat16) if "bfloat16" in mode else nullcontext()


def peak(call: Call) -> float:
    """MB allocated at once during a call, with what was there before."""
    if not torch.cuda.is_available():
        return float("nan")
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() / 2**20


def training(record: Record, name: str, channels: int, arguments: dict[str, Any]) -> Iterator[list[str]]:
    """A row for each mode and preconditioning."""
    made = models(channels, arguments, record.options.device)
    clean = images(channels, record.options.batch).to(record.options.device)
    for mode in MODES[: 3 if record.options.compile else 2]:
        calls = {kind: step(model, clean, mode) for kind, model in made.items()}
        for call in calls.values():
            call()
        memory = {kind: peak(call) for kind, call in calls.items()}
        times = compare(calls, record.options.repeats)
        for kind in calls:
            ratio = times[kind] / times["edm"]
            if kind != "edm":
                what = f"on a GPU, {name}, {mode}: a training step, {kind} base"
                shown = (name, mode, kind) == ("EDM CIFAR-10", "bfloat16", "marginal")
                record.number(what, ratio, "<= 1.1", "one of EDM's", headline=shown)
            speed = record.options.batch / times[kind]
            yield [name, mode, kind, f"{ratio:.3f}", f"{memory[kind] / memory['edm']:.2f}", f"{speed:.0f}"]


def sampling(record: Record) -> None:
    """The jump, and what it saves."""
    count, device = record.options.batch, record.options.device
    model = models(3, CIFAR, device)["gaussian"].eval()
    x, sigmas = 80 * torch.randn(count, 3, 32, 32, device=device), karras_sigmas(18)
    assert isinstance(model.gaussian, GaussianDenoiser)
    gaussian, level = model.gaussian, torch.full((count,), 1.0, device=device)

    def jump_and_heun() -> Tensor:
        start, rest = teleport(gaussian, x, sigmas, skip=5)
        return heun(model, start, rest)

    calls: dict[str, Call] = {
        "evaluation": lambda: model(x, level),
        "gaussian": lambda: gaussian(x, level),
        "jump": lambda: teleport(gaussian, x, sigmas, skip=5),
        "heun": lambda: heun(model, x, sigmas),
        "jump and heun": jump_and_heun,
    }
    with torch.no_grad(), autocast("bfloat16", x.device.type):
        times = compare(calls, max(record.options.repeats // 3, 1))
    against = "an evaluation of EDM's CIFAR-10 network in bfloat16"
    for name in ("jump", "gaussian"):
        share = record.number(
            f"on a GPU: {name}",
            100 * times[name] / times["evaluation"],
            "<= 100",
            against,
            unit="%",
            headline=name == "jump",
        )
        record.text(f"{name}: {share:.2f}% of {against}")
    ratio = record.number(
        "on a GPU: 18 steps of Heun over a jump and 13", times["heun"] / times["jump and heun"], ">= 1.3"
    )
    record.text(f"18 steps of Heun over a jump and 13 steps: {ratio:.2f}")


def main() -> None:
    """Prints the tables."""
    made = parser(__doc__)
    made.add_argument("--batch", type=int, default=256)
    made.add_argument("--repeats", type=int, default=15)
    made.add_argument("--compile", action="store_true", help="the third mode, too (minutes)")
    made.add_argument("--device", default="cuda")
    record = Record(made.parse_args())
    torch.set_num_threads(record.options.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(0)
    head = ["network", "precision", "base", "time of a step over EDM's", "memory over EDM's", "images per s"]
    for name, channels, arguments in (
        ("mini-EDM MNIST", 1, load_config(MNIST).network.arguments),
        ("EDM CIFAR-10", 3, CIFAR),
    ):
        record.table(head, training(record, name, channels, arguments))
    sampling(record)
    record.close()


if __name__ == "__main__":
    main()
