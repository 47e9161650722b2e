"""Guidance: a line through two denoisers."""

import pytest
import torch
from cases import SIGMAS, denoiser, digits, gaussian, noised, relative_error

from gaussnet import GuidedDenoiser


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
