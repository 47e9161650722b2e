"""Inpainting: start states against the dense conditional Gaussian."""

import math
from typing import Any

import pytest
import torch
from cases import (
    COVARIANCES,
    DTYPES,
    denoiser,
    gaussian,
    held_out_digits,
    orthogonal,
    randn,
    relative_error,
)
from torch import Tensor

from gaussnet import CosineCovariance, Covariance, GaussianDenoiser, karras_sigmas
from gaussnet.samplers import inpainting_start, warm_start
from gaussnet.samplers.inpainting import regress

GRID = karras_sigmas(18)
MASKS = {
    "one": [[[True, False, False], [False, False, False]]],
    "some": [[[True, False, True], [False, True, True]]],
    "row": [[True, True, True], [False, False, False]],
    "all": [[[True]]],
    "none": [[[False]]],
}


def conditional(g: GaussianDenoiser, y: Tensor, mask: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of x_0 given its known entries, dense."""
    cov, mean = g.covariance.dense(), g.mean.flatten()
    between = cov[:, mask]
    noisy = cov[mask][:, mask] + eta**2 * torch.eye(int(mask.sum()), dtype=cov.dtype)
    gain = between @ torch.linalg.pinv(noisy, hermitian=True)
    return mean + gain @ (y.flatten()[mask] - mean[mask]), cov - gain @ between.mT


def draws(monkeypatch: pytest.MonkeyPatch, count: int, scale: float) -> None:
    """In place of noise: of `count` numbers that each state draws, row k has `scale` for the k-th, else 0."""
    place = 0

    def randn(*shape: Any, **options: Any) -> Tensor:
        nonlocal place
        batch, size = shape if len(shape) == 2 else shape[0]
        assert options.get("generator") is not None, "all randomness comes from the generator"
        part = scale * torch.eye(count, dtype=options["dtype"])[:batch, place : place + size]
        place += size
        return part

    monkeypatch.setattr(torch, "randn", randn)


@pytest.mark.parametrize("eta", [0.0, 0.3])
@pytest.mark.parametrize("which", MASKS)
@pytest.mark.parametrize("kind", COVARIANCES)
def test_moments_are_those_of_the_conditional_gaussian(
    kind: str, which: str, eta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    g, sigma = gaussian(kind), 2.5
    mask = torch.tensor(MASKS[which])
    at = mask.expand(1, 2, 3).flatten()
    y = g.sample(
        1, generator=torch.Generator().manual_seed(3)
    )  # the Gaussian's own: a zero tail allows no other
    mean, cov = conditional(g, y, at, eta)
    count = 6 + int(at.sum()) + 6  # of the image, its observation, and the level
    known = torch.where(mask, y, torch.nan).expand(count, 1, 2, 3)
    run = {"observation_noise": eta, "generator": torch.Generator()}
    # States are affine in what they draw: without it they are the mean, and unit draws give the root.
    draws(monkeypatch, count, 0.0)
    centre, rest = inpainting_start(g, known, mask, GRID, sigma, **run)
    assert rest.tolist() == [sigma, *(level for level in GRID.tolist() if level < sigma)]
    assert relative_error(centre[0].flatten(), mean) < 1e-9
    draws(monkeypatch, count, 1.0)
    x, _ = inpainting_start(g, known, mask, GRID, sigma, **run)
    root = (x - centre).flatten(1)
    assert relative_error(root.mT @ root, cov + sigma**2 * torch.eye(6)) < 1e-9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["gaussian-full", "gaussian-rank-10"])
def test_digits(name: str, dtype: torch.dtype) -> None:
    g = denoiser(name, dtype)
    clean = held_out_digits(dtype)[:200]
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:, :4] = True
    generator = torch.Generator().manual_seed(0)
    x, rest = inpainting_start(
        g, clean, mask, GRID, 0.01, observation_noise=0.1, steps=5, generator=generator
    )
    assert (x.dtype, x.shape, len(rest)) == (dtype, clean.shape, 6)
    guess = g.sample(200, generator=generator)
    errors = [float((at - clean)[..., 4:].square().mean()) for at in (x, guess)]
    assert errors[0] < 0.8 * errors[1], "the left half tells of the right one"
    exact, _ = inpainting_start(g, clean, mask, GRID, 1e-6, generator=generator)
    assert (exact - clean)[..., :4].abs().max() < 1e-4, "known pixels stay"
    again = torch.Generator().manual_seed(0)
    same, _ = inpainting_start(g, clean, mask, GRID, 0.01, observation_noise=0.1, steps=5, generator=again)
    assert same.equal(x)


def test_constant_pixels_tell_nothing() -> None:
    g = gaussian("full")
    eigvals, eigvecs = g.covariance.eigvals.clone(), torch.eye(6, dtype=torch.float64)
    eigvals[2] = 0  # a pixel that never varies: S is singular
    g = GaussianDenoiser(g.mean, type(g.covariance)(eigvecs, eigvals))
    x, _ = inpainting_start(g, g.mean.expand(9, 1, 2, 3), torch.ones(1, 1, 1).bool(), GRID, 1e-9)
    assert relative_error(x, g.mean.expand(9, 1, 2, 3)) < 1e-8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gap", [0.0, 1e-7])
def test_copies_of_a_pixel_count_as_their_mean(
    gap: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The second pixel is the first, but for rounding; the third shows what that rounding is correlated with.
    root = torch.tensor([[1.0, 0.0], [1.0, gap], [0.5, 1.0]], dtype=torch.float64)
    eigvecs, scales, _ = torch.linalg.svd(root, full_matrices=False)
    covariance = Covariance(eigvecs.to(dtype), scales.square().to(dtype))
    disagree = torch.tensor([[0.3, 0.1], [-1.0, 1.0]], dtype=torch.float64)
    both, one = torch.tensor([True, True, False]), torch.tensor([True, False, False])
    spread = regress(covariance, both, disagree)
    assert relative_error(spread, regress(covariance, one, disagree.mean(1, keepdim=True))) < 1e-6
    assert relative_error(spread, disagree.mean(1, keepdim=True) * root[:, 0]) < 1e-6
    g, known = GaussianDenoiser(torch.zeros(3, dtype=dtype), covariance), torch.zeros(2, 3, dtype=dtype)
    known[:, :2] = disagree
    draws(monkeypatch, 3 + 2 + 3, 0.0)
    x, _ = inpainting_start(g, known, both, GRID, 1.0, generator=torch.Generator())
    assert relative_error(x[:, 2], spread[:, 2]) < 1e-6, "in float64, whatever the dtype"
    assert x[:, :2].equal(known[:, :2]), "what is known exactly stays, at odds with the Gaussian or not"


def test_cosine_basis() -> None:
    covariance = CosineCovariance(torch.logspace(0, -2, 16).reshape(1, 4, 4).double(), torch.eye(1).double())
    g, mask = GaussianDenoiser(torch.zeros(1, 4, 4).double(), covariance), torch.arange(16).reshape(4, 4) < 5
    y = g.sample(4000, generator=torch.Generator().manual_seed(1))[:1].expand(4000, 1, 4, 4)
    x, _ = inpainting_start(g, y, mask, GRID, 0.01, generator=torch.Generator().manual_seed(2))
    mean, cov = conditional(g, y[:1], mask.flatten(), 0.0)
    assert (x.flatten(1).mean(0) - mean).abs().max() < 5 * float(cov.diagonal().max() / 4000) ** 0.5


def test_without_known_pixels_it_is_a_warm_start() -> None:
    g = gaussian("low-rank")
    x, rest = inpainting_start(
        g,
        randn(50_000, 1, 2, 3),
        torch.tensor([False]),
        GRID,
        3.0,
        generator=torch.Generator().manual_seed(0),
    )
    assert rest.equal(warm_start(g, 1, GRID, 3.0)[1])
    flat = (x - g.mean).flatten(1)
    assert relative_error(flat.mT @ flat / len(flat), g.covariance.dense() + 9 * torch.eye(6)) < 0.03


def test_bad_calls() -> None:
    g, mask = gaussian(), torch.ones(1, 2, 3).bool()
    known: Tensor = randn(2, 1, 2, 3)
    bad: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
        ((known, mask.int(), GRID, 3.0), {}, TypeError, "expected a boolean mask, got torch.int32"),
        ((known[0], mask, GRID, 3.0), {}, ValueError, r"known of shape \(B, 1, 2, 3\), got \(1, 2, 3\)"),
        ((known[..., :2], mask, GRID, 3.0), {}, ValueError, r"of shape \(B, 1, 2, 3\), got \(2, 1, 2, 2\)"),
        (
            (known, mask[..., :2], GRID, 3.0),
            {},
            ValueError,
            r"broadcasts to \(1, 2, 3\), got shape \(1, 2, 2\)",
        ),
        ((known / 0, mask, GRID, 3.0), {}, ValueError, "finite known pixels, got 12 others"),
        ((known, mask, GRID, 90.0), {}, ValueError, r"0 < sigma_skip <= sigmas\[0\] = 80, got 90.0"),
        (
            (known, mask, GRID, 3.0),
            {"observation_noise": -1.0},
            ValueError,
            "observation_noise >= 0, got -1.0",
        ),
        (
            (known, mask, GRID, 3.0),
            {"observation_noise": math.inf},
            ValueError,
            "finite observation_noise >= 0, got inf",
        ),
        ((known, mask, GRID, 3.0), {"steps": 0}, ValueError, "expected steps >= 1"),
    ]
    for arguments, options, error, message in bad:
        with pytest.raises(error, match=message):
            inpainting_start(g, *arguments, **options)


@pytest.mark.parametrize("eta", [0.0, 1e-8, 1e-6, 1e-4])
@pytest.mark.parametrize("tail", [0.0, 5e-16])
def test_what_is_outside_of_a_low_rank_gaussian_tells_little(tail: float, eta: float) -> None:
    """With variance along few axes alone, known pixels are explained by least squares, whatever is left."""
    axes = orthogonal(64)[:, :5]
    covariance = Covariance(axes, torch.tensor([9.0, 4.0, 2.0, 1.0, 0.5]).double(), tail=tail)
    mask, known = torch.arange(64) < 40, randn(3, 40)  # at odds with the axes
    expected = torch.linalg.lstsq(axes[mask], known.mT).solution.mT @ axes.mT
    assert relative_error(regress(covariance, mask, known, eta), expected) < max(1e-6, 10 * eta**2)


def test_an_axis_that_known_pixels_do_not_see_is_left_alone() -> None:
    axes = torch.zeros(12, 2).double()
    axes[:8, 0], axes[8:, 1] = 8**-0.5, 4**-0.5  # the second lies in the unknown pixels
    covariance = Covariance(axes, torch.tensor([4.0, 1.0]).double(), tail=1e-16)
    spread = regress(covariance, torch.arange(12) < 8, randn(3, 8))
    assert spread[:, 8:].abs().max() < 1e-9
