"""Closed forms of folds: each image is denoised by the one that has not seen it."""

import pytest
import torch
from torch import Tensor

from gaussnet import (
    BypassPrecond,
    CrossFit,
    Denoiser,
    Gate,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    MarginalDenoiser,
    Marginals,
    MeasuredError,
    SongUNet,
)

COUNT = 60


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    rows = torch.randn(COUNT, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (rows.cumsum(-1) / 4).tanh().to(dtype)


def marginal(kept: Tensor) -> MarginalDenoiser:
    return MarginalDenoiser.fit(images()[kept])


def noisy(index: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Noised images, and a level for each."""
    generator = torch.Generator().manual_seed(1)
    sigma = torch.linspace(0.1, 3, len(index), dtype=dtype)
    noise = torch.randn(len(index), 1, 4, 4, generator=generator, dtype=torch.float64).to(dtype)
    return images(dtype)[index] + sigma[:, None, None, None] * noise, sigma


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_image_is_denoised_by_the_fit_without_its_fold(dtype: torch.dtype) -> None:
    cross = CrossFit.fit(marginal, COUNT, 4).to(dtype)
    index = torch.tensor([7, 0, 31, 58, 3, 4, 12])  # no fold in order, one of them never
    assert set((index % 4).tolist()) == {0, 2, 3}
    assert f"images={COUNT}" in repr(cross)
    x, sigma = noisy(index, dtype)
    gaussian, refined = cross(x, sigma, index)
    assert refined.dtype == dtype
    for i, own in enumerate(index.tolist()):
        alone = MarginalDenoiser.fit(images()[torch.arange(COUNT) % 4 != own % 4]).to(dtype)
        torch.testing.assert_close(refined[i : i + 1], alone(x[i : i + 1], sigma[i : i + 1]))
        torch.testing.assert_close(gaussian[i : i + 1], alone.gaussian(x[i : i + 1], sigma[i : i + 1]))


def test_groups_are_left_out_together() -> None:
    seen: list[Tensor] = []

    def fit(kept: Tensor) -> Denoiser:
        seen.append(kept)
        return GaussianDenoiser.fit(images()[kept])

    groups = torch.arange(COUNT) // 7
    cross = CrossFit.fit(fit, COUNT, 3, groups)
    for fold, kept in enumerate(seen):
        out = torch.ones(COUNT, dtype=torch.bool).index_fill(0, kept, False)
        assert not set(groups[out].tolist()) & set(groups[kept].tolist()), fold
        assert torch.equal(out, cross.folds == fold)
    assert (cross.folds >= 0).all()


def test_mixtures_are_told_the_class() -> None:
    labels = torch.arange(COUNT) // 5 % 3

    def fit(kept: Tensor) -> Denoiser:
        return GaussianMixtureDenoiser.fit(images()[kept], labels=labels[kept])

    index = torch.arange(0, COUNT, 7)
    x, sigma = noisy(index)
    cross = CrossFit.fit(fit, COUNT, 2)
    (told,), (untold,) = cross(x, sigma, index, labels[index]), cross(x, sigma, index)
    alone = fit((torch.arange(COUNT) % 2 != 0).nonzero()[:, 0])
    torch.testing.assert_close(told[::2], alone(x[::2], sigma[::2], labels[index][::2]))
    assert not torch.allclose(told, untold)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_level_for_all_is_one_for_each(dtype: torch.dtype) -> None:
    cross, index = CrossFit.fit(marginal, COUNT, 3).to(dtype), torch.arange(5)
    x, _ = noisy(index, dtype)
    each = cross(x, torch.full((5,), 0.7, dtype=dtype), index)
    for level in (0.7, torch.tensor(0.7, dtype=dtype)):
        for one, other in zip(cross(x, level, index), each, strict=True):
            assert torch.equal(one, other)


def test_by_default_image_i_is_in_fold_i_of_five() -> None:
    cross = CrossFit.fit(marginal, COUNT)
    assert len(cross.denoisers) == 5
    assert torch.equal(cross.folds, torch.arange(COUNT) % 5)


def test_unlike_one_fit_to_all_it_errs_no_less_on_training_images() -> None:
    """Why it exists: the leak of a denoiser that has seen what it denoises."""
    generator, deviation = torch.Generator().manual_seed(2), torch.logspace(0, -1, 64)
    train, fresh = (deviation * torch.randn(n, 64, generator=generator) for n in (40, 4000))
    index = torch.arange(40).repeat(50)
    seen = train[index]
    seen_noisy, fresh_noisy = (x + 0.5 * torch.randn(x.shape, generator=generator) for x in (seen, fresh))
    whole = GaussianDenoiser.fit(train)
    cross = CrossFit.fit(lambda kept: GaussianDenoiser.fit(train[kept]), 40, 10)

    expected = (whole(fresh_noisy, 0.5) - fresh).square().mean().item()
    leaking = (whole(seen_noisy, 0.5) - seen).square().mean().item()
    honest = (cross(seen_noisy, 0.5, index)[0] - seen).square().mean().item()
    assert leaking < 0.8 * expected
    assert honest == pytest.approx(expected, rel=0.03)


def setting(marginals: bool) -> tuple[BypassPrecond, Tensor, Tensor]:
    channels = 3 if marginals else 2
    network = SongUNet(4, in_channels=channels, out_channels=1, model_channels=16, channel_mult=[1])
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():  # the last layer, too, which is zero at first
        torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    whole = marginal(torch.arange(COUNT))
    if marginals:
        error = MeasuredError.fit(whole.gaussian, images(), other=whole)
        model = BypassPrecond(
            network, whole.gaussian, base="marginal", marginals=whole.marginals, error=error
        )
    else:
        model = BypassPrecond(network, whole.gaussian)
    x, sigma = noisy(torch.arange(6))
    return model.eval(), x, sigma


@pytest.mark.parametrize("marginals", [True, False], ids=["marginal", "blend"])
def test_a_bypass_takes_closed_forms_in_place_of_its_own(marginals: bool) -> None:
    model, x, sigma = setting(marginals)
    gaussian = model.gaussian(x, sigma)
    own: tuple[Tensor, ...] = (gaussian,)
    if marginals:
        assert model.marginals is not None
        assert isinstance(model.gaussian, GaussianDenoiser)
        assert isinstance(model.marginals, Marginals)
        own = (gaussian, model.marginals.refine(model.gaussian, gaussian, sigma))
    torch.testing.assert_close(model(x, sigma, closed_forms=own), model(x, sigma), rtol=0, atol=0)
    for k in range(len(own)):  # it sees, and adds to, each of them
        others = tuple(form + 0.1 * (i == k) for i, form in enumerate(own))
        assert not torch.allclose(model(x, sigma, closed_forms=others), model(x, sigma)), k


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("level", [0.5, 2.0], ids=["open", "closed"])
def test_closed_forms_of_any_dtype_become_that_of_the_result(dtype: torch.dtype, level: float) -> None:
    model, x, _ = setting(marginals=True)
    model.gate = Gate.step(1.0)
    forms = tuple(torch.rand(2, *x.shape, generator=torch.Generator().manual_seed(3)).to(dtype))
    expected = model(x, level, closed_forms=tuple(form.float() for form in forms))
    torch.testing.assert_close(model(x, level, closed_forms=forms), expected, rtol=0, atol=0)
    assert expected.equal(forms[0].float()) == (level > 1), "where the gate is closed, D_gauss"


@pytest.mark.parametrize("marginals", [True, False], ids=["marginal", "blend"])
def test_closed_forms_that_do_not_fit_are_refused(marginals: bool) -> None:
    model, x, sigma = setting(marginals)
    form, names = torch.zeros_like(x), "D_gauss, D_m" if marginals else "D_gauss"
    for wrong in ((), (form, form, form), (form,) if marginals else (form, form), (form, form[:3])):
        with pytest.raises(
            ValueError, match=rf"closed_forms of {names}, each of shape \(6, 1, 4, 4\), got shapes \["
        ):
            model(x, sigma, closed_forms=wrong)


def test_what_makes_no_folds_is_refused() -> None:
    one = GaussianDenoiser.fit(images())
    with pytest.raises(ValueError, match="at least 2 denoisers, got 1"):
        CrossFit([one], torch.zeros(COUNT).long())
    with pytest.raises(ValueError, match=r"folds 0 to 1, each with images, got \[0, 2\]"):
        CrossFit([one, one], torch.tensor([0, 2]))
    for folds in (torch.tensor([0.0, 1.0]), torch.tensor([[0, 1], [1, 0]]), torch.tensor([False, True])):
        with pytest.raises(ValueError, match=r"integer folds of shape \(N,\), got torch"):
            CrossFit([one, one], folds)
    with pytest.raises(TypeError, match="of one kind, got marginal ones and others"):
        CrossFit([one, marginal(torch.arange(COUNT))], torch.arange(COUNT) % 2)
    for folds, groups in ((0, None), (1, None), (4, torch.arange(COUNT) % 3), (COUNT + 1, None)):
        with pytest.raises(ValueError, match=f"as many images or groups, got {folds} folds and"):
            CrossFit.fit(marginal, COUNT, folds, groups)
    cross, (x, sigma) = CrossFit.fit(marginal, COUNT, 2), noisy(torch.arange(5))
    with pytest.raises(ValueError, match=r"index for each of 5 images, got indices of shape \(4,\)"):
        cross(x, sigma, torch.arange(4))


def test_no_images_have_no_closed_forms() -> None:
    cross, x = CrossFit.fit(marginal, COUNT, 2), torch.zeros(0, 1, 4, 4)
    for form in cross(x, 1.0, torch.zeros(0).long()):
        assert form.shape == x.shape
