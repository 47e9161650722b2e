"""How far is the arithmetic from exact, over dtype, noise level, condition number and rank?

    python benchmarks/conditioning.py

The errors, and what they are relative to: `conditioning_cases.py`. Their bounds are here.
"""

from __future__ import annotations

from itertools import product

import torch
from conditioning_cases import (
    CONDITIONS,
    DTYPES,
    MIXTURES,
    RANKS,
    SIGMAS,
    STEPS,
    Errors,
    covariance,
    draws,
    exact,
    gate_errors,
    gaussian,
    gaussian_errors,
    mixture_errors,
    relative,
    weight_errors,
)
from results import Record, parser

from gaussnet import GaussianDenoiser

FLOAT32, FLOAT64 = 1e-5, 1e-13
# u - U U^T u is of size sigma, and the difference of two of size ||u||: it is rounded by eps ||u||/sigma.
OUTSIDE = 1e-11
# u f(Sigma) u and D - x are of size sigma^2, of terms of size ||u||^2 and ||x||: by eps ||u||^2/sigma^2.
# Responsibilities and what they weight have the error of their logits, the log densities.
SQUARED = 1e-8
LOOSER = {
    "score": OUTSIDE,
    "gradient of log density": OUTSIDE,
    "flow up": OUTSIDE,
    "log density": SQUARED,
    "marginal: score": SQUARED,
    "mixture: denoiser": OUTSIDE,  # components that share x agree on most of it
    "mixture: responsibilities": SQUARED,
    "mixture: score": SQUARED,
    "mixture: gradient of log density": SQUARED,
    "mixture: log density": SQUARED,
}
WIDE = ("flow: psi", "flow: xi", "gate: closing level")  # float64 whatever the buffers are


def bound(quantity: str, dtype: str = "float64") -> float:
    """What an error must not exceed."""
    return FLOAT32 if dtype == "float32" and quantity not in WIDE else LOOSER.get(quantity, FLOAT64)


def keep(worst: Errors, errors: Errors) -> None:
    """The larger ones."""
    for name, value in errors.items():
        worst[name] = max(worst.get(name, 0.0), value)


def over_conditions(dtype: str) -> dict[float, Errors]:
    """The largest errors of each condition number, over noise levels and ranks."""
    worst: dict[float, Errors] = {condition: {} for condition in CONDITIONS}
    for condition, sigma in product(CONDITIONS, SIGMAS):
        for rank in RANKS:
            keep(worst[condition], gaussian_errors(dtype, sigma, condition, rank))
        for kind in MIXTURES:
            keep(worst[condition], mixture_errors(dtype, sigma, condition, kind))
    return worst


def stored_errors(condition: float, rank: str) -> tuple[float, float, float]:
    """Of score, flow up and, in nats, log density, at the least noise: float32 against the law it rounds."""
    single, sigma = gaussian("float32", condition, rank), SIGMAS[0]
    law = GaussianDenoiser(single.mean.double(), covariance(condition, rank))
    x = draws(single, sigma, 32)
    wide = x.double()
    score, flow = exact(law.score(wide, sigma)), exact(law.flow(wide, sigma, SIGMAS[-1]))
    off = single.log_prob(x, sigma).double() - law.log_prob(wide, sigma)
    return (
        relative(single.score(x, sigma), score),
        relative(single.flow(x, sigma, SIGMAS[-1]), flow),
        float(off.abs().max()),
    )


def main() -> None:
    """Prints the tables."""
    record = Record(parser(__doc__).parse_args())
    torch.set_num_threads(record.options.threads)
    against = "mpmath, 50 digits"

    found = {dtype: over_conditions(dtype) for dtype in DTYPES}
    pairs = list(product(found["float64"][1.0], DTYPES))
    record.text("Largest errors over noise levels and ranks, by condition number:\n")
    record.table(
        ["of", "dtype", *(f"{condition:.0e}" for condition in CONDITIONS)],
        (
            [name, dtype, *(f"{found[dtype][condition][name]:.0e}" for condition in CONDITIONS)]
            for name, dtype in pairs
        ),
    )
    for name, dtype in pairs:
        worst = max(errors[name] for errors in found[dtype].values())
        record.number(f"{name}, {dtype}", worst, f"<= {bound(name, dtype):g}", against)
    for dtype in DTYPES:
        for name, value in gate_errors(dtype).items():
            record.number(f"{name}, {dtype}", value, f"<= {bound(name, dtype):g}", against)

    steps = {step: weight_errors(step) for step in STEPS}
    record.text("Weights of a step, by its length in the log of the noise level:\n")
    record.table(
        ["of", *(f"{step:.0e}" for step in STEPS)],
        ([name, *(f"{steps[step][name]:.0e}" for step in STEPS)] for name in steps[1.0]),
    )
    for name in steps[1.0]:
        worst = max(errors[name] for errors in steps.values())
        record.number(f"{name}, float64", worst, f"<= {bound(name):g}", against)

    record.text(f"float32 against the float64 law whose buffers it rounds, at sigma {SIGMAS[0]:g}:\n")
    record.table(
        ["rank", "condition", "score", "flow up", "log density, nats"],
        (
            [rank, f"{condition:.0e}", *(f"{value:.0e}" for value in stored_errors(condition, rank))]
            for rank, condition in product(RANKS, CONDITIONS)
        ),
    )
    record.close()


if __name__ == "__main__":
    main()
