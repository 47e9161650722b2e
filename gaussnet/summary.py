"""Models told in words: tables of spectra, and what a saved model is."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gaussnet.denoisers import Denoiser, GaussianDenoiser, GaussianMixtureDenoiser, MarginalDenoiser
from gaussnet.model_card import tell
from gaussnet.precond import BypassPrecond

SIGMAS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
SHARES = (0.5, 0.9, 0.95, 0.99)


def summarise(model: Denoiser) -> str:
    """What a denoiser is, in Markdown: class, shape, size, spectrum, and what it was made from."""
    lines = [_table(("what", ""), list(model.facts().items()))]
    gaussian = model.gaussian if isinstance(model, BypassPrecond | MarginalDenoiser) else model
    if isinstance(gaussian, GaussianDenoiser):
        lines += ["", spectrum_table(gaussian), "", error_table(gaussian)]
    if isinstance(gaussian, GaussianMixtureDenoiser):
        lines += ["", component_table(gaussian)]
    for key, value in model.provenance.items():
        lines += ["", f"{key}:", "", tell(value)]
    return "\n".join(lines)


def spectrum_table(gaussian: GaussianDenoiser) -> str:
    """Variance, tail, leading eigenvalues, and the ranks that explain given shares of the variance."""
    covariance = gaussian.covariance
    eigvals = covariance.eigvals.double().sort(descending=True).values
    outside = covariance.dim - covariance.rank
    total = eigvals.sum() + outside * covariance.tail.double()
    square = eigvals.square().sum() + outside * covariance.tail.double() ** 2
    rows = [
        ("rank", f"{covariance.rank} of {covariance.dim}"),
        ("standard deviation per dimension (sigma_data)", f"{float(total / covariance.dim) ** 0.5:.4f}"),
        ("standard deviation along the first axes", _list(eigvals[:6].sqrt())),
        ("standard deviation along the last axes", _list(eigvals[-3:].sqrt())),
        (
            "standard deviation outside of the axes",
            f"{float(covariance.tail) ** 0.5:.4g}" if outside else "-",
        ),
        ("effective dimensions, (tr S)^2 / tr S^2", f"{float(total**2 / square):.1f}"),
    ]
    rows += [(f"axes for {share:.0%} of the variance", _axes_for(eigvals, total, share)) for share in SHARES]
    return _table(("spectrum", ""), rows)


def error_table(gaussian: GaussianDenoiser) -> str:
    """The error per dimension that the Gaussian predicts of itself at some noise levels."""
    rows = [
        (f"{sigma:g}", f"{error:.3g}", f"{error / most:.3f}" if most > 0 else "-")
        for sigma in SIGMAS
        for error, most in [(float(gaussian.bayes_error(sigma)), min(sigma**2, float(gaussian.variance)))]
    ]
    return _table(("sigma", "mean squared error", "of min(sigma^2, variance)"), rows)


def component_table(mixture: GaussianMixtureDenoiser) -> str:
    """Weight, rank and spectrum of each component, the heaviest first."""
    rows: list[tuple[str, ...]] = []
    dim = mixture.event_shape.numel()
    for k in mixture.weights.argsort(descending=True).tolist():
        rank = int(mixture.ranks[k])
        eigvals = mixture.eigvals[k, :rank].double()
        total = float(eigvals.sum()) + (dim - rank) * float(mixture.tails[k])
        label = "-" if mixture.component_labels is None else str(int(mixture.component_labels[k]))
        tail = f"{float(mixture.tails[k]) ** 0.5:.4g}" if rank < dim else "-"
        rows.append(
            (str(k), label, f"{float(mixture.weights[k]):.4f}", str(rank), f"{(total / dim) ** 0.5:.4f}",
             _list(eigvals[:3].sqrt()), tail)
        )  # fmt: skip
    head = (
        "component",
        "class",
        "weight",
        "rank",
        "std per dimension",
        "std along the first axes",
        "outside",
    )
    return _table(head, rows)


def _axes_for(eigvals: Tensor, total: Tensor, share: float) -> str:
    explained = eigvals.cumsum(0) / total
    if not len(eigvals) or float(explained[-1]) < share:
        return f"more than {len(eigvals)}"
    return str(int((explained < share).sum()) + 1)


def _list(values: Tensor) -> str:
    return ", ".join(f"{float(value):.4g}" for value in values) or "-"


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [" | ".join(head), " | ".join("---" for _ in head), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)
