"""Marginals of the components of a mixture, against those of one Gaussian and sums over components."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import (
    DTYPES,
    SIGMAS,
    denoiser,
    digits,
    held_out_digits,
    mixture,
    noised,
    randn,
    relative_error,
    split,
    tiny_unet,
    train_digits,
)
from torch import Tensor

from gaussnet import (
    BypassPrecond,
    ComponentMarginals,
    Covariance,
    CrossFit,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    MarginalDenoiser,
    Marginals,
    MeasuredError,
    from_pretrained,
)

sigmas = pytest.mark.parametrize("sigma", SIGMAS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def train_labels() -> Tensor:
    return digits()[1][split()[0]]


def held_out_labels(count: int = 16) -> Tensor:
    return digits()[1][split()[1]][:count]


def of_components(base: GaussianMixtureDenoiser, x: Tensor, sigma: float, own: ComponentMarginals) -> Tensor:
    """D_m of each component, (K, *x.shape)."""
    parts = [MarginalDenoiser(base.component(k), own.component(k)) for k in range(base.n_components)]
    return torch.stack([part(x, sigma) for part in parts])


def random_marginals(count: int, event_shape: tuple[int, ...] = (1, 2, 3)) -> ComponentMarginals:
    shares = torch.log_softmax(randn(count, *event_shape, 3), -1)
    levels, widths = torch.tensor([[-1.0, 0.1, 0.9], [0.0, 0.2, 0.05]], dtype=torch.float64)
    return ComponentMarginals(levels, widths, shares)


# The denoiser -------------------------------------------------------------------------------------


@sigmas
@dtypes
def test_of_one_component_it_is_that_of_the_gaussian(sigma: float, dtype: torch.dtype) -> None:
    one = denoiser("marginal", dtype)
    gaussian, own = one.gaussian, one.marginals
    base = GaussianMixtureDenoiser(gaussian.mean.new_ones(1), gaussian.mean[None], [gaussian.covariance])
    parts = ComponentMarginals(own.levels, own.widths, own.log_weights[None])
    x = noised(sigma, dtype=dtype)
    error = relative_error(MarginalDenoiser(base, parts)(x, sigma), one(x, sigma))
    assert error < (1e-9 if dtype == torch.float64 else 2e-5)


@sigmas
def test_it_is_the_sum_over_components(sigma: float) -> None:
    base = mixture()
    own, x = random_marginals(4), base.mean + (0.6 + sigma) * randn(20, 1, 2, 3, seed=5)
    weights = base.responsibilities(x, sigma)
    expected = torch.einsum("nk,kn...->n...", weights, of_components(base, x, sigma, own))
    assert relative_error(MarginalDenoiser(base, own)(x, sigma), expected) < 1e-9


@sigmas
def test_a_label_leaves_its_class(sigma: float) -> None:
    refined, x, labels = denoiser("marginal-classes"), noised(sigma), held_out_labels()
    every = of_components(refined.gaussian, x, sigma, refined.marginals)
    expected = every[labels, torch.arange(len(x))]
    assert relative_error(refined(x, sigma, labels), expected) < 1e-9


def test_labelled_and_unlabelled_rows_are_what_they_are_alone() -> None:
    refined, x = denoiser("marginal-classes"), noised(0.5)
    rows = torch.nn.functional.one_hot(held_out_labels(), 10).double()
    rows[::3] = 0  # no class, as label dropout leaves it
    level = torch.linspace(0.1, 3, len(x), dtype=torch.float64)
    together = refined(x, level, rows)
    for i in range(len(x)):
        alone = refined(x[i : i + 1], level[i], rows[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, msg=f"row {i}")
    torch.testing.assert_close(together[::3], refined(x[::3], level[::3]))


def test_refine_wants_a_weight_of_each_component() -> None:
    base, x = mixture(), randn(6, 1, 2, 3, seed=2)
    denoised, weights = base.with_weights(x, 0.7)
    message = r"expected weights of shape \(6, 4\), got \(6, 3\)"
    with pytest.raises(ValueError, match=message):
        random_marginals(4).refine(base, denoised, x, 0.7, weights[:, 1:])


def test_a_class_of_several_components_is_shared_by_their_responsibilities() -> None:
    base = mixture()
    parts = [base.component(k).covariance for k in range(4)]
    classes = torch.tensor([0, 1, 1, 0])
    labelled = GaussianMixtureDenoiser(base.weights, base.means, parts, classes)
    own, x, labels = random_marginals(4), randn(6, 1, 2, 3, seed=2), torch.tensor([0, 1, 0, 1, 0, 1])
    weights = labelled.responsibilities(x, 0.7, labels)
    expected = torch.einsum("nk,kn...->n...", weights, of_components(labelled, x, 0.7, own))
    assert relative_error(MarginalDenoiser(labelled, own)(x, 0.7, labels), expected) < 1e-9


@pytest.mark.parametrize("name", ["marginal-kmeans", "marginal-classes"])
def test_under_vmap_it_is_the_same(name: str) -> None:
    refined, x = denoiser(name), noised(0.5, 4)
    mapped = torch.func.vmap(lambda row: refined(row[None], 0.5)[0])(x)
    torch.testing.assert_close(mapped, refined(x, 0.5))


def test_it_has_gradients() -> None:
    refined, x = MarginalDenoiser(mixture(), random_marginals(4)), randn(2, 1, 2, 3)
    assert torch.autograd.gradcheck(lambda z: refined(z, 0.7), x.requires_grad_())


def test_no_samples_are_denoised_to_none() -> None:
    refined = denoiser("marginal-classes")
    assert refined(torch.zeros(0, 1, 8, 8), 1.0, torch.zeros(0, dtype=torch.long)).shape == (0, 1, 8, 8)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0])
def test_held_out_digits_are_denoised_better_than_by_one_gaussian(sigma: float) -> None:
    clean, labels = held_out_digits(), held_out_labels(360)
    x = clean + sigma * randn(*clean.shape, seed=3)

    def error(name: str, labels: Tensor | None = None) -> float:
        return float((denoiser(name)(x, sigma, labels) - clean).square().mean())

    assert error("marginal-classes", labels) < 0.97 * error("marginal")
    assert error("marginal-classes", labels) < 0.97 * error("mixture-classes", labels)


# Fits ---------------------------------------------------------------------------------------------


def test_shares_are_those_of_the_class_and_the_prior_those_of_all() -> None:
    data = torch.tensor([[-1.0], [-1.0], [1.0], [-1.0], [1.0], [1.0]])
    labels = torch.tensor([3, 3, 3, 7, 7, 7])
    base = GaussianMixtureDenoiser.fit(data, labels=labels)
    none = ComponentMarginals.fit(data, base, labels, prior=0.0)
    torch.testing.assert_close(none.log_weights.exp()[:, 0], torch.tensor([[2 / 3, 1 / 3], [1 / 3, 2 / 3]]))
    some = ComponentMarginals.fit(data, base, labels, prior=3.0)
    torch.testing.assert_close(
        some.log_weights.exp()[:, 0], torch.tensor([[3.5 / 6, 2.5 / 6], [2.5 / 6, 3.5 / 6]])
    )
    assert none.levels.tolist() == [-1.0, 1.0]


def test_a_component_without_samples_has_the_shares_of_all() -> None:
    data = torch.tensor([[-1.0], [-1.1], [1.0], [1.1]])
    far = torch.tensor([[-1.0], [1.0], [90.0]])
    own = ComponentMarginals.fit(data, GaussianMixtureDenoiser.equal_isotropic(far, 1.0), prior=0.0)
    every = Marginals.fit(data, prior=0.0)
    torch.testing.assert_close(own.log_weights[2], every.log_weights)
    assert torch.isfinite(MarginalDenoiser.fit(data, GaussianDenoiser.fit(data))(data, 0.5)).all()


def test_clusters_have_the_samples_that_are_nearest() -> None:
    data = torch.tensor([[-5.0], [-4.0], [4.0], [5.0], [6.0]])
    base = GaussianMixtureDenoiser.equal_isotropic(torch.tensor([[-4.5], [5.0]]), 1.0)
    own = ComponentMarginals.fit(data, base, prior=0.0)
    below = own.levels < 0
    assert own.log_weights[0, 0, below].exp().sum() == 1
    assert own.log_weights[1, 0, below].exp().sum() == 0


def test_a_stream_of_classes_gives_what_the_array_gives() -> None:
    data, labels = train_digits()[:300], train_labels()[:300]
    base = GaussianMixtureDenoiser.fit(data, labels=labels)
    expected = ComponentMarginals.fit(data, base, labels, mirror=True)
    batches = list(zip(data.split(64), labels.split(64), strict=True))
    images = [batch for batch, _ in batches]
    for found in (
        ComponentMarginals.fit(batches, base, mirror=True),
        ComponentMarginals.fit(images, base, labels, mirror=True),
        ComponentMarginals.fit(data.numpy(), base, labels, mirror=True),
    ):
        torch.testing.assert_close(found.state_dict(), expected.state_dict())
    mirrored = ComponentMarginals.fit(data, base, labels, prior=0.0, mirror=True)
    both = ComponentMarginals.fit(torch.cat([data, data.flip(-1)]), base, labels.repeat(2), prior=0.0)
    torch.testing.assert_close(mirrored.log_weights.exp(), both.log_weights.exp())


def test_what_does_not_fit_is_refused() -> None:
    data, labels = train_digits()[:200], train_labels()[:200]
    base = GaussianMixtureDenoiser.fit(data, labels=labels)
    own, one = ComponentMarginals.fit(data, base, labels), Marginals.fit(data)
    with pytest.raises(ValueError, match="expected labels with a mixture of classes, got none"):
        ComponentMarginals.fit(data, base)
    with pytest.raises(ValueError, match=r"expected class_labels among \[0, .*\], got \[42\]"):
        ComponentMarginals.fit(data, base, labels + 42 * (labels == 9) - 9 * (labels == 9))
    with pytest.raises(ValueError, match="200"):
        ComponentMarginals.fit(data, base, labels[:7])
    with pytest.raises(ValueError, match="expected a label for each of 200 samples, got 207"):
        ComponentMarginals.fit([data], base, torch.cat([labels, labels[:7]]))
    with pytest.raises(ValueError, match="expected a mixture of classes with labels, got a GaussianDenoiser"):
        MarginalDenoiser.fit(data, GaussianDenoiser.fit(data), labels=labels)
    with pytest.raises(TypeError, match="got a GaussianMixtureDenoiser with Marginals"):
        MarginalDenoiser(base, one)
    with pytest.raises(TypeError, match="got a GaussianDenoiser with ComponentMarginals"):
        MarginalDenoiser(GaussianDenoiser.fit(data), own)
    few = ComponentMarginals(own.levels, own.widths, own.log_weights[:4])
    with pytest.raises(ValueError, match="expected marginals of 10 components, got those of 4"):
        MarginalDenoiser(base, few)
    with pytest.raises(ValueError, match=r"\(n_components, \*event_shape, K\), got"):
        ComponentMarginals(own.levels, own.widths, own.log_weights[0, 0, 0])


# In models ----------------------------------------------------------------------------------------


def model() -> tuple[BypassPrecond, Any]:
    refined = denoiser("marginal-classes")
    error = MeasuredError.fit(
        refined.gaussian,
        held_out_digits(),
        n_queries=360,
        labels=held_out_labels(360),
        other=refined,
        generator=torch.Generator().manual_seed(0),
    )
    network = tiny_unet(in_channels=3, label_dim=10)
    return BypassPrecond(
        network, refined.gaussian, base="marginal", marginals=refined.marginals, error=error
    ), refined


def test_a_bypass_around_it_sees_what_it_finds_for_the_class() -> None:
    bypass, refined = model()
    x, labels = noised(0.7), held_out_labels()
    gaussian, marginal = refined.closed_forms(x, 0.7, labels)
    assert bypass.error is not None
    share = bypass.error.best_share(torch.tensor(0.7, dtype=torch.float64))
    torch.testing.assert_close(bypass.untrained(x, 0.7, labels), torch.lerp(gaussian, marginal, share))
    torch.testing.assert_close(
        bypass(x, 0.7, labels), bypass(x, 0.7, labels, closed_forms=(gaussian, marginal))
    )
    assert relative_error(bypass(x, 0.7, labels), bypass(x, 0.7, labels.flip(0))) > 1e-2


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    bypass, refined = model()
    x, labels = noised(0.7), held_out_labels()
    for name, saved in (("bypass", bypass), ("denoiser", refined)):
        saved.save_pretrained(tmp_path / name)
        loaded = from_pretrained(tmp_path / name)
        torch.testing.assert_close(loaded(x, 0.7, labels), saved(x, 0.7, labels), msg=name)


def test_a_cross_fit_tells_the_class() -> None:
    data, labels = train_digits()[:400], train_labels()[:400]

    def fit(kept: Tensor) -> MarginalDenoiser:
        base = GaussianMixtureDenoiser.fit(data[kept], labels=labels[kept], prior=64)
        return MarginalDenoiser.fit(data[kept], base, labels=labels[kept])

    cross = CrossFit.fit(fit, len(data), 2)
    index = torch.arange(8)
    x = data[index] + 0.5 * randn(8, 1, 8, 8)
    gaussian, marginal = cross(x, 0.5, index, labels[index])
    expected = fit(torch.arange(1, 400, 2)).closed_forms(x[::2], 0.5, labels[index][::2])  # of fold 0
    torch.testing.assert_close((gaussian[::2], marginal[::2]), expected)


# Components ---------------------------------------------------------------------------------------


@sigmas
def test_a_component_is_its_gaussian(sigma: float) -> None:
    base, x = mixture(), randn(5, 1, 2, 3)
    for k in range(4):
        part = base.component(k)
        alone = GaussianMixtureDenoiser(torch.ones(1).double(), base.means[k : k + 1], [part.covariance])
        assert relative_error(part(x, sigma), alone(x, sigma)) < 1e-9, k
        assert isinstance(part.covariance, Covariance)
        assert part.covariance.rank == int(base.ranks[k])
    with pytest.raises(IndexError, match="from 0 to 3, got 4"):
        base.component(4)


@pytest.mark.parametrize("sigma", [0.1, 1.0])
def test_the_posterior_variance_of_a_mixture_of_equal_components_is_that_of_one(sigma: float) -> None:
    one = mixture().component(1)
    base = GaussianMixtureDenoiser(
        torch.ones(3).double(), one.mean.expand(3, *one.mean.shape), [one.covariance] * 3
    )
    x = randn(5, 1, 2, 3)
    torch.testing.assert_close(base.posterior_variance(x, sigma), one.posterior_variance(x, sigma))
    assert math.isfinite(float(base.variance))
