"""What do samplers and teleport cost outside of the network?

    python benchmarks/sampler_overhead.py [--batch 256] [--repeats 7]

The network of configs/cifar10_mini_edm.yaml (untrained: its time does not depend on its weights) and a
Gaussian of full rank, D = 3,072. All times are from one process, interleaved, as shares of one evaluation of
the network alone on a batch: a step of each solver without any network, the jump, and the jump with its
history for multistep solvers; then what the bypass adds to an evaluation.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from results import Record, parser
from timing import compare
from torch import Tensor

from gaussnet import SOLVERS, BypassPrecond, Covariance, GaussianDenoiser, SongUNet, karras_sigmas, teleport
from gaussnet.samplers import ModelStatistics, log_snr_sigmas
from train.configfile import load_config

CONFIG = Path(__file__).parent.parent / "configs" / "cifar10_mini_edm.yaml"
SHAPE = (3, 32, 32)
STEPS = 18
TIMED = (
    "euler",
    "heun",
    "edm_stochastic",
    "dpmpp_2s",
    "dpmpp_2m",
    "dpmpp_3m",
    "unipc",
    "pndm",
    "ipndm",
    "deis",
    "dpm_v3",
)


def natural_gaussian(generator: torch.Generator) -> GaussianDenoiser:
    """Full rank, with a random basis and a spectrum that falls as that of photographs."""
    dim = SHAPE[0] * SHAPE[1] * SHAPE[2]
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    eigvals = 200.0 / torch.arange(1, dim + 1) ** 1.5
    return GaussianDenoiser(torch.zeros(SHAPE), Covariance(basis.contiguous(), eigvals))


def main() -> None:
    """Prints the table."""
    made = parser(__doc__)
    made.add_argument("--batch", type=int, default=256)
    made.add_argument("--repeats", type=int, default=7)
    options = made.parse_args()
    record = Record(options)
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    generator = torch.Generator().manual_seed(0)
    gaussian = natural_gaussian(generator)
    arguments = load_config(CONFIG).network.arguments
    network = SongUNet(img_resolution=32, in_channels=6, out_channels=3, **arguments).eval()
    model = BypassPrecond(network, gaussian).eval()
    x = 80 * torch.randn(options.batch, *SHAPE, generator=generator)
    inputs, noise_labels = torch.randn(options.batch, 6, 32, 32), torch.zeros(options.batch)
    sigmas = karras_sigmas(STEPS)

    levels = log_snr_sigmas(STEPS)[:-1].flip(0)
    one = torch.ones(STEPS, *SHAPE, dtype=torch.float64)
    given = {"generator": generator, "statistics": ModelStatistics(levels, one, 0 * one, 0 * one)}

    def identity(x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return x

    def steps_of(name: str) -> Any:
        method: Any = SOLVERS[name]
        taken = inspect.signature(method).parameters
        extra = {key: value for key, value in given.items() if key in taken}
        return lambda: method(identity, x, sigmas, **extra)

    calls: dict[str, Any] = {
        "network": lambda: network(inputs, noise_labels),
        "model": lambda: model(x, torch.full((options.batch,), 1.0)),
        "jump": lambda: teleport(gaussian, x, sigmas, skip=5),
        "jump with history": lambda: teleport(gaussian, x, sigmas, skip=5, return_history=True),
        **{name: steps_of(name) for name in TIMED},
    }
    times = compare(calls, options.repeats)
    evaluation = times["network"]
    against = "one evaluation of the network"
    shares = {
        name: record.number(
            f"a step of {name}", 100 * times[name] / STEPS / evaluation, "<= 1", against, unit="%"
        )
        for name in TIMED
    }
    record.number(
        "the dearest step of a solver", max(shares.values()), "<= 1", against, unit="%", headline=True
    )
    for name in ("jump", "jump with history"):
        shares[name] = record.number(name, 100 * times[name] / evaluation, "<= 100", against, unit="%")
    shares["an evaluation of the bypass model, over that of its network"] = record.number(
        "an evaluation of the bypass model, beyond its network's",
        100 * (times["model"] / evaluation - 1),
        against=against,
        unit="%",
    )
    record.text(f"Batch {options.batch}; one evaluation of the network takes {evaluation:.2f} s.\n")
    labels = {name: f"a step of {name}" for name in TIMED}
    record.table(
        ["what", "of one evaluation of the network"],
        ([labels.get(name, name), f"{share:.3f}%"] for name, share in shares.items()),
    )
    record.close()


if __name__ == "__main__":
    main()
