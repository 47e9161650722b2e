"""The far-field expansions: their errors fall at the stated orders."""

from pathlib import Path

import pytest
import torch
from cases import COVARIANCES, gaussian, randn, relative_error, train_digits

from gaussnet import DeltaDenoiser, FarFieldDenoiser, GaussianDenoiser, from_pretrained

FAR = (20.0, 40.0, 80.0, 160.0)  # the largest eigenvalue below is 4


def slope(errors: list[float]) -> float:
    """The order at which errors fall with sigma, over the levels of FAR."""
    levels = torch.log(torch.tensor(FAR, dtype=torch.float64))
    logs = torch.log(torch.tensor(errors, dtype=torch.float64))
    return float(
        ((levels - levels.mean()) * (logs - logs.mean())).sum() / (levels - levels.mean()).square().sum()
    )


@pytest.mark.parametrize("kind", COVARIANCES)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_score_error_falls_with_the_order(kind: str, order: int) -> None:
    """Relative to the score, the error is (lam/sigma^2)^order: sigma^(-2 order)."""
    exact = gaussian(kind)
    expansion = FarFieldDenoiser(exact, order)
    errors: list[float] = []
    for sigma in FAR:
        x = exact.mean + sigma * randn(8, 1, 2, 3)
        errors.append(relative_error(expansion.score(x, sigma), exact.score(x, sigma)))
    assert slope(errors) == pytest.approx(-2 * order, abs=0.05), errors


@pytest.mark.parametrize("order", [1, 2, 3])
def test_denoiser_and_score_are_tweedie(order: int) -> None:
    exact, sigma = gaussian(), 5.0
    expansion = FarFieldDenoiser(exact, order)
    x = exact.mean + sigma * randn(8, 1, 2, 3)
    assert relative_error(expansion.score(x, sigma), (expansion(x, sigma) - x) / sigma**2) < 1e-12


def test_first_orders_written_out() -> None:
    exact, sigma = gaussian(), 6.0
    x = exact.mean + sigma * randn(8, 1, 2, 3)
    u = (exact.mean - x).flatten(1)
    first, second = u / sigma**2, u / sigma**2 - u @ exact.covariance.dense() / sigma**4  # Eq. 26
    assert relative_error(FarFieldDenoiser(exact, 1).score(x, sigma).flatten(1), first) < 1e-12
    assert relative_error(FarFieldDenoiser(exact, 2).score(x, sigma).flatten(1), second) < 1e-12
    assert torch.allclose(FarFieldDenoiser(exact, 1)(x, sigma), exact.mean), "order 1 denoises to the mean"


def test_mean_field_expansion_of_the_delta_score() -> None:
    """Eq. 25, 26: the data's own score, to order tr(Sigma)/sigma^2 of the weights.

    Relative to the attraction to the mean, the terms of order 2 are sigma^-2 and what is left out is
    sigma^-3 (the data's third moments).
    """
    data = train_digits()[:200]
    delta = DeltaDenoiser(data)
    exact = GaussianDenoiser.fit(data, shrinkage="none")
    errors: dict[int, list[float]] = {1: [], 2: []}
    for sigma in FAR:
        x = exact.mean + sigma * randn(16, 1, 8, 8)
        for order, found in errors.items():
            found.append(
                relative_error(FarFieldDenoiser(exact, order).score(x, sigma), delta.score(x, sigma))
            )
    assert slope(errors[1]) == pytest.approx(-2, abs=0.1), errors
    assert slope(errors[2]) == pytest.approx(-3, abs=0.2), errors


def test_round_trip_and_errors(tmp_path: Path) -> None:
    expansion = FarFieldDenoiser(gaussian(), 2)
    expansion.save_pretrained(tmp_path)
    x = randn(2, 1, 2, 3)
    assert relative_error(from_pretrained(tmp_path)(x, 5.0), expansion(x, 5.0)) < 1e-14
    with pytest.raises(ValueError, match="expected order >= 1, got 0"):
        FarFieldDenoiser(gaussian(), 0)
    assert "(\n  order=2\n" in repr(expansion)
