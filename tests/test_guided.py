"""Guidance: a line through two denoisers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import (
    DTYPES,
    SIGMAS,
    denoiser,
    digits,
    gaussian,
    noised,
    orthogonal,
    randn,
    relative_error,
)

from gaussnet import (
    Covariance,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    GuidedDenoiser,
    count_nfe,
    from_pretrained,
    karras_sigmas,
    teleport,
)
from gaussnet.samplers import dop853, flow_of, runge_kutta
from gaussnet.samplers.guided_flow import few_dimensions, guided_flow


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("w", [0.0, 1.0, 3.0])
def test_guidance_is_linear_between_its_denoisers(sigma: float, w: float) -> None:
    cond, uncond, x = denoiser("mixture-classes"), denoiser("gaussian-full"), noised(sigma)
    labels = digits()[1][: len(x)]
    guided = GuidedDenoiser(cond, uncond, w)
    expected = (1 - w) * uncond(x, sigma) + w * cond(x, sigma, labels)
    assert relative_error(guided(x, sigma, labels), expected) < 1e-12
    expected = (1 - w) * uncond.score(x, sigma) + w * cond.score(x, sigma, labels)
    assert relative_error(guided.score(x, sigma, labels), expected) < 1e-12


def test_one_denoiser_may_be_both() -> None:
    mixture, x = denoiser("mixture-classes"), noised(0.5)
    labels = digits()[1][: len(x)]
    guided = GuidedDenoiser(mixture, mixture, 2.0)
    expected = 2 * mixture(x, 0.5, labels) - mixture(x, 0.5)
    assert relative_error(guided(x, 0.5, labels), expected) < 1e-12
    assert relative_error(guided(x, 0.5), mixture(x, 0.5)) < 1e-12, (
        "without labels there is nothing to guide to"
    )


def test_misfits_are_errors() -> None:
    with pytest.raises(ValueError, match=r"one event shape, got \(1, 2, 3\) and \(4, 1, 1\)"):
        GuidedDenoiser(gaussian(), gaussian(event_shape=(4, 1, 1)), 1.0)
    with pytest.raises(ValueError, match="finite guidance scale w, got nan"):
        GuidedDenoiser(gaussian(), gaussian(), float("nan"))


def test_gradient_reaches_both() -> None:
    guided = GuidedDenoiser(denoiser("edm"), denoiser("bypass"), 1.5)
    guided(noised(0.5), 0.5).square().mean().backward()
    for name, part in (("cond", guided.cond), ("uncond", guided.uncond)):
        assert any(p.grad is not None and bool(torch.any(p.grad != 0)) for p in part.parameters()), name


# The flow -----------------------------------------------------------------------------------------

EVENT = (1, 4, 5)
RANKS_AND_TAILS = {"thin": (4, 0.05), "other": (6, 0.2), "no tail": (3, 0.0), "isotropic": (0, 0.6)}


def thin(name: str, seed: int) -> GaussianDenoiser:
    """A Gaussian in 20 dimensions with few axes of its own."""
    rank, tail = RANKS_AND_TAILS[name]
    eigvals = torch.logspace(0.6, -1.5, rank, dtype=torch.float64)
    return GaussianDenoiser(
        randn(*EVENT, seed=seed), Covariance(orthogonal(20, seed)[:, :rank], eigvals, tail)
    )


PAIRS = [("thin", "other"), ("other", "no tail"), ("no tail", "isotropic"), ("isotropic", "thin")]


@pytest.mark.parametrize(("cond", "uncond"), PAIRS)
@pytest.mark.parametrize("w", [-0.5, 4.0])
def test_flow_between_thin_gaussians(cond: str, uncond: str, w: float) -> None:
    guided = GuidedDenoiser(thin(cond, 1), thin(uncond, 2), w)
    x = 20 * randn(5, *EVENT)
    flow: Any = flow_of(guided)
    with count_nfe(guided) as nfe:
        moved = flow(x, 20.0, 0.7)
    assert nfe() == 0
    fine = runge_kutta(guided, x, 20.0, 0.7, steps=300)
    assert relative_error(moved, fine) < 1e-7
    assert relative_error(flow(flow(x, 20.0, 3.0), 3.0, 0.7), moved) < 1e-7
    assert relative_error(flow(moved, 0.7, 20.0), x) < 1e-6
    assert relative_error(flow(x, 20.0, 20.0), x) < 1e-14
    single = flow(x[2:3], 20.0, 0.7)
    assert relative_error(single, moved[2:3]) < 1e-12


@pytest.mark.parametrize(("cond", "uncond"), PAIRS)
def test_flow_at_the_ends_of_the_line(cond: str, uncond: str) -> None:
    x = 20 * randn(5, *EVENT)
    parts = thin(cond, 1), thin(uncond, 2)
    for w, part in ((1.0, parts[0]), (0.0, parts[1])):
        assert relative_error(guided_flow(*parts, w)(x, 20.0, 0.5), part.flow(x, 20.0, 0.5)) < 1e-7


def test_flow_between_equal_gaussians() -> None:
    one, x = thin("thin", 1), 20 * randn(5, *EVENT)  # all columns of the joint basis depend on each other
    assert relative_error(guided_flow(one, one, 3.0)(x, 20.0, 0.5), one.flow(x, 20.0, 0.5)) < 1e-7


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_flow_in_other_dtypes(dtype: torch.dtype) -> None:
    parts = thin("thin", 1).float(), thin("other", 2).float()
    x = 20 * randn(5, *EVENT)
    moved, _ = teleport(GuidedDenoiser(*parts, 2.0), x.to(dtype), karras_sigmas(8, 0.1, 20.0), sigma_skip=2.0)
    exact = guided_flow(thin("thin", 1), thin("other", 2), 2.0)(x, 20.0, 2.0)
    assert moved.dtype == torch.promote_types(dtype, torch.float32)
    assert relative_error(moved, exact) < (1e-2 if dtype == torch.float16 else 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flow_is_as_exact_as_its_gaussians_allow(dtype: torch.dtype) -> None:
    parts = [thin("thin", 1).float(), thin("other", 2).float()]
    x = (20 * randn(5, *EVENT)).to(dtype)
    moved = guided_flow(parts[0], parts[1], 2.0)(x, 20.0, 2.0)
    exact = guided_flow(parts[0].double(), parts[1].double(), 2.0)(x.double(), 20.0, 2.0)
    assert moved.dtype == dtype
    assert relative_error(moved, exact) < (1e-12 if dtype == torch.float64 else 1e-7)


def test_flow_of_each_class() -> None:
    covariances = [thin(name, seed).covariance for seed, name in enumerate(("thin", "other", "thin"))]
    means, labels = randn(3, *EVENT, seed=8), torch.tensor([5, 7, 9])
    mixture = GaussianMixtureDenoiser(torch.ones(3).double(), means, covariances, labels)
    guided = GuidedDenoiser(mixture, thin("other", 4), 1.7)
    x, rows = 20 * randn(4, *EVENT), torch.zeros(4, 10)
    rows[[0, 1, 3], [7, 5, 7]] = 1  # the third is of no class
    moved = flow_of(guided, rows)(x, 20.0, 0.7)
    assert relative_error(moved, runge_kutta(guided, x, 20.0, 0.7, rows, steps=150)) < 1e-5
    known = torch.tensor([0, 1, 3])
    with count_nfe(guided) as nfe:
        moved = flow_of(guided, rows[known])(x[known], 20.0, 0.7)
    assert nfe() == 0
    fine = runge_kutta(guided, x[known], 20.0, 0.7, rows[known], steps=150)
    assert relative_error(moved, fine) < 1e-7


@pytest.mark.parametrize("labels", [[5, 7, 5], None], ids=["two of a class", "no classes"])
def test_flow_of_classes_that_are_no_gaussian(labels: list[int] | None) -> None:
    covariances = [thin(name, seed).covariance for seed, name in enumerate(("thin", "other", "thin"))]
    known = None if labels is None else torch.tensor(labels)
    mixture = GaussianMixtureDenoiser(torch.ones(3).double(), randn(3, *EVENT, seed=8), covariances, known)
    x, given = 20 * randn(3, *EVENT), torch.tensor([5, 7, 5])
    with count_nfe(mixture) as nfe:
        moved = flow_of(mixture, given)(x, 20.0, 0.7)
    assert nfe() > 0, "by the Runge-Kutta method"
    seen: list[dict[str, Any]] = []
    grid = torch.tensor([20.0, 0.7, 0.0])
    dop853(mixture, x, grid, class_labels=given, callback=seen.append, rtol=1e-10, atol=1e-10)
    assert relative_error(moved, seen[-1]["x"]) < 1e-4


def test_flow_without_spare_dimensions() -> None:
    full, x = gaussian("full"), 20 * randn(5, 1, 2, 3)
    for cond, uncond in ((full, gaussian("low-rank", seed=1)), (full, full)):
        guided = GuidedDenoiser(cond, uncond, 1.5)
        with count_nfe(guided) as nfe:
            moved = flow_of(guided)(x, 20.0, 0.7)
        assert nfe() > 0, "by the Runge-Kutta method"
        assert relative_error(moved, runge_kutta(guided, x, 20.0, 0.7, steps=300)) < 1e-5
    with pytest.raises(ValueError, match=r"ranks that add to less than 6 - 2, got 6 \+ 3"):
        guided_flow(full, gaussian("low-rank"), 1.5)
    flow = guided_flow(thin("thin", 1), thin("other", 2), 1.5)
    inf, nan = float("inf"), float("nan")
    for levels in ((20.0, 0.0), (0.0, 2.0), (-1.0, 2.0), (nan, 2.0), (inf, 2.0), (20.0, inf)):
        with pytest.raises(ValueError, match="expected finite levels > 0, got"):
            flow(20 * randn(5, *EVENT), *levels)
    with pytest.raises(ValueError, match=r"guided_flow: expected x of shape \(\*batch, 1, 4, 5\)"):
        flow(x, 20.0, 1.0)


def test_ranks_have_to_leave_three_dimensions_over() -> None:
    six, eleven, twelve = (
        GaussianDenoiser(randn(*EVENT), Covariance(orthogonal(20)[:, :rank], torch.ones(rank).double(), 0.1))
        for rank in (6, 11, 12)
    )
    assert few_dimensions(six, eleven)
    assert not few_dimensions(six, twelve)
    with pytest.raises(ValueError, match=r"ranks that add to less than 20 - 2, got 6 \+ 12"):
        guided_flow(six, twelve, 1.5)


def test_a_batch_of_none_is_moved() -> None:
    flow = guided_flow(thin("thin", 1), thin("other", 2), 1.5)
    assert flow(torch.zeros(0, *EVENT), 20.0, 1.0).shape == (0, *EVENT)


def test_one_denoiser_that_is_both_is_saved(tmp_path: Path) -> None:
    one, x = thin("thin", 1), randn(3, *EVENT)
    GuidedDenoiser(one, one, 1.5).save_pretrained(tmp_path)
    torch.testing.assert_close(from_pretrained(tmp_path)(x, 2.0), GuidedDenoiser(one, one, 1.5)(x, 2.0))
