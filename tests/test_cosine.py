"""The cosine basis: a covariance like any other, fitted by dividing frequencies, not by eigenvectors."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    DTYPES,
    SIGMAS,
    held_out_digits,
    noised,
    normal_logpdf,
    orthogonal,
    randn,
    relative_error,
    tiny_unet,
    train_digits,
)
from scipy.fft import dctn
from torch import Tensor

from gaussnet import (
    BypassPrecond,
    Covariance,
    FarFieldDenoiser,
    GaussianDenoiser,
    GaussianFlow,
    GaussianMixtureDenoiser,
    from_pretrained,
)
from gaussnet.covariance import CosineCovariance, cosine_matrix
from gaussnet.fit import cosine, fit_covariance

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
sigmas = pytest.mark.parametrize("sigma", SIGMAS)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6}
SHAPE = (3, 4, 5)

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda lam: lam,
    "root": torch.sqrt,
    "denoise": lambda lam: lam / (lam + 0.3**2),
    "score": lambda lam: -1 / (lam + 0.3**2),
    "constant": lambda lam: torch.full_like(lam, 2.5),
}
functions = pytest.mark.parametrize("function", FUNCTIONS)


def covariance(dtype: torch.dtype = torch.float64, shape: tuple[int, int, int] = SHAPE) -> CosineCovariance:
    eigvals = torch.logspace(0.6, -2, math.prod(shape), dtype=torch.float64)
    shuffled = eigvals[torch.randperm(len(eigvals), generator=torch.Generator().manual_seed(0))]
    return CosineCovariance(shuffled.reshape(shape).to(dtype), orthogonal(shape[0]).to(dtype))


def transform(array: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """The orthonormal DCT-II, by scipy."""
    scipy_dctn: Any = dctn
    return scipy_dctn(array, type=2, norm="ortho", axes=axes)


def written_out(cov: CosineCovariance) -> Covariance:
    """The same covariance with its eigenvectors, built from scipy's transform and the rotation."""
    channels, height, width = cov.image_shape
    basis = np.zeros((cov.dim, channels, height, width))
    for i, image in enumerate(np.eye(cov.dim).reshape(-1, channels, height, width)):
        spectrum = transform(image, (1, 2))
        basis[i] = np.einsum("ec,chw->ehw", cov.rotation.double().numpy(), spectrum)
    return Covariance(torch.from_numpy(basis).reshape(cov.dim, cov.dim), cov.eigvals.double())


# The covariance -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 8), (3, 4, 5), (2, 7, 1), (4, 1, 6)], ids=str)
@dtypes
def test_the_basis_is_scipys_transform_of_rotated_channels(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    cov, u = covariance(dtype, shape), randn(2, 3, math.prod(shape), dtype=dtype)
    image = np.einsum("ec,...chw->...ehw", cov.rotation.numpy(), u.reshape(2, 3, *shape).numpy())
    expected = torch.from_numpy(transform(image, (-2, -1))).reshape(u.shape)
    coefficients = cov.to_basis(u)
    assert coefficients.dtype == dtype
    assert relative_error(coefficients, expected) < TOLERANCE[dtype]
    assert relative_error(cov.from_basis(coefficients), u) < TOLERANCE[dtype], "not an inverse"
    assert relative_error(coefficients.norm(dim=-1), u.norm(dim=-1)) < TOLERANCE[dtype], "not orthogonal"
    assert (cov.dim, cov.rank, float(cov.tail)) == (math.prod(shape), math.prod(shape), 0.0)


@dtypes
def test_eigvecs_are_the_basis_written_out(dtype: torch.dtype) -> None:
    cov = covariance(dtype)
    assert cov.eigvecs.dtype == dtype
    assert relative_error(cov.eigvecs, written_out(cov).eigvecs) < TOLERANCE[dtype]


@functions
@dtypes
def test_functions_are_those_of_the_basis_written_out(function: str, dtype: torch.dtype) -> None:
    cov, f = covariance(dtype), FUNCTIONS[function]
    expected = written_out(covariance())
    u = randn(5, 2, cov.dim, dtype=dtype)
    for name, actual, reference in (
        ("apply", cov.apply(f, u), expected.apply(f, u.double())),
        ("one vector", cov.apply(f, u[0, 0]), expected.apply(f, u[0, 0].double())),
        ("trace", cov.trace(f), expected.trace(f)),
        ("diagonal", cov.diagonal(f), expected.diagonal(f)),
        ("dense", cov.dense(), expected.dense()),
        ("logdet", cov.logdet(0.5), expected.logdet(0.5)),
    ):
        assert actual.dtype == dtype, name
        assert actual.shape == reference.shape, name
        assert relative_error(actual, reference) < TOLERANCE[dtype], name
    assert cov.diagonal(f, torch.float64).dtype == cov.trace(f, torch.float64).dtype == torch.float64


def test_one_sigma_per_sample() -> None:
    cov, expected = covariance(), written_out(covariance())
    sigma, u = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64), randn(3, 60)

    def shrink(lam: Tensor) -> Tensor:
        return lam / (lam + sigma[:, None] ** 2)

    for name, actual, reference in (
        ("apply", cov.apply(shrink, u), expected.apply(shrink, u)),
        ("trace", cov.trace(shrink), expected.trace(shrink)),
        ("diagonal", cov.diagonal(shrink), expected.diagonal(shrink)),
        ("logdet", cov.logdet(sigma), expected.logdet(sigma)),
    ):
        assert actual.shape == reference.shape, name
        for i in range(3):
            assert relative_error(actual[i], reference[i]) < 1e-12, f"{name} {i}"


def test_the_state_holds_no_basis() -> None:
    cov = covariance()
    assert set(cov.state_dict()) == {"eigvals", "rotation", "tail"}
    assert list(cov.parameters()) == []
    assert repr(cov) == "CosineCovariance(image_shape=(3, 4, 5))"
    assert all(buffer.dtype == torch.float32 for buffer in cov.float().buffers())
    seen: list[str] = []
    assert cov.apply(lambda module: seen.append(type(module).__name__)) is cov
    assert seen == ["CosineCovariance"]


@pytest.mark.parametrize("assign", [False, True])
def test_a_loaded_basis_has_the_digits_of_what_is_loaded(assign: bool) -> None:
    """The cosines are not saved: they must not keep the rounding of the module that is loaded into."""
    cov, u = covariance(), randn(4, 60)
    other = CosineCovariance(torch.ones(SHAPE), torch.eye(3))
    other = other if assign else other.double()
    other.load_state_dict(cov.state_dict(), assign=assign)
    assert relative_error(other.to_basis(u), cov.to_basis(u)) < 1e-14


def test_gradients_and_vmap_pass_through() -> None:
    cov, u = covariance(), randn(4, 60)
    batched = torch.func.vmap(lambda row: cov.apply(torch.sqrt, row))(u)
    assert relative_error(batched, cov.apply(torch.sqrt, u)) < 1e-14
    jacobian = torch.func.jacrev(lambda row: cov.apply(torch.sqrt, row))(u[0])
    assert relative_error(jacobian, cov.apply(torch.sqrt, torch.eye(60, dtype=torch.float64))) < 1e-12


@pytest.mark.parametrize("size", [1, 2, 3, 8, 513])
def test_cosine_matrix(size: int) -> None:
    matrix = cosine_matrix(size)
    eye = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, eye, rtol=0, atol=1e-13)
    expected = torch.from_numpy(transform(np.eye(size), (0,)))
    torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("eigvals", "rotation", "message"),
    [
        (torch.ones(4, 4), torch.eye(4), r"eigvals of shape \(C, H, W\).*got \(4, 4\) and \(4, 4\)"),
        (torch.ones(3, 4, 4), torch.eye(4), r"rotation of shape \(C, C\), got \(3, 4, 4\) and \(4, 4\)"),
        (torch.ones(3, 4, 4), torch.ones(3), r"got \(3, 4, 4\) and \(3,\)"),
        (torch.arange(8.0).reshape(1, 2, 4) - 0.5, torch.eye(1), r">= 0, got a range of \[-0.5, 6.5\]"),
        (torch.full((1, 2, 2), math.inf), torch.eye(1), "finite eigenvalues >= 0"),
        (torch.full((1, 2, 2), math.nan), torch.eye(1), "finite eigenvalues >= 0"),
    ],
)
def test_impossible_covariances(eigvals: Tensor, rotation: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CosineCovariance(eigvals, rotation)


# The fit ------------------------------------------------------------------------------------------


def colour_images(count: int = 60, dtype: torch.dtype = torch.float64) -> Tensor:
    """Smooth images, of channels that depend on each other, brighter to the right."""
    smooth = randn(count, *SHAPE).cumsum(-1).cumsum(-2)
    mixed = torch.einsum("ec,nchw->nehw", randn(3, 3, seed=4), smooth)
    return (mixed + torch.linspace(0, 3, SHAPE[-1]) + torch.tensor([1.0, -2.0, 0.5])[:, None, None]).to(dtype)


def check_fit(mean: Tensor, cov: Covariance, data: Tensor, tolerance: float) -> None:
    """The variances are those along the basis, and the rotation makes the mean of the colours diagonal."""
    assert isinstance(cov, CosineCovariance)
    flat = data.double().flatten(1)
    assert relative_error(mean.flatten(), flat.mean(0)) < tolerance
    sample = torch.cov(flat.T, correction=0)
    exact = CosineCovariance(cov.eigvals.double().reshape(data.shape[1:]), cov.rotation.double())
    basis = written_out(exact).eigvecs
    assert relative_error(cov.eigvals, (basis.T @ sample @ basis).diagonal()) < tolerance
    assert relative_error(cov.trace(lambda lam: lam), sample.trace()) < tolerance
    # Without the rotation: channel by channel, averaged over pixels, which is the same as over frequencies.
    pixels = data.double() - data.double().mean(0)
    colours = torch.einsum("nchw,nehw->ce", pixels, pixels) / (len(data) * data[0, 0].numel())
    turned = cov.rotation.double() @ colours @ cov.rotation.double().T
    off_diagonal = turned - turned.diagonal().diag()
    assert float(off_diagonal.abs().max()) < tolerance * float(colours.trace())
    assert bool((turned.diagonal().diff() <= 0).all()), "colours in decreasing order"
    eye = torch.eye(len(colours), dtype=torch.float64)
    assert relative_error(cov.rotation @ cov.rotation.T, eye) < tolerance


@dtypes
@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("kind", ["tensor", "array", "batches", "tuples", "parts"])
def test_variances_are_those_along_the_basis(
    kind: str, mirror: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = colour_images(dtype=dtype)
    before = data.clone()
    if kind == "parts":
        monkeypatch.setattr(cosine, "_PART", 5 * 60)
    given: Any = {
        "tensor": data,
        "parts": data,
        "array": data.numpy(),
        "batches": iter([data[:0], *data.split(7)]),
        "tuples": ((part, "label") for part in data.split(11)),
    }[kind]
    mean, cov, count = cosine.fit_cosine(given, mirror=mirror)
    assert (mean.dtype, mean.shape, count) == (dtype, SHAPE, 60)
    assert cov.eigvals.dtype == cov.rotation.dtype == dtype
    seen = torch.cat([data, data.flip(-1)]) if mirror else data
    check_fit(mean, cov, seen, TOLERANCE[dtype])
    assert torch.equal(data, before)


def test_grey_images() -> None:
    data = train_digits()
    mean, cov, _ = cosine.fit_cosine(data)
    check_fit(mean, cov, data, 1e-12)
    spectrum = transform(data.numpy(), (2, 3))
    np.testing.assert_allclose(cov.eigvals.numpy(), spectrum.var(0).ravel(), rtol=1e-10, atol=1e-14)
    assert cov.rotation.abs().item() == 1.0


@pytest.mark.parametrize("kind", [torch.uint8, torch.bool, torch.float16, torch.bfloat16], ids=str)
def test_numbers_of_few_bits(kind: torch.dtype) -> None:
    data = (colour_images() * 3 + 100).to(kind) if kind != torch.bool else colour_images() > 0
    mean, cov, _ = cosine.fit_cosine(data)
    assert mean.dtype == cov.eigvals.dtype == torch.float32
    check_fit(mean, cov, data.double(), 3e-6)


@dtypes
@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("offset", [1e4, -1e6])
def test_a_large_common_mean_costs_no_digits(offset: float, mirror: bool, dtype: torch.dtype) -> None:
    data = (colour_images() + offset).to(dtype)
    mean, cov, _ = cosine.fit_cosine(iter(data.split(7)), mirror=mirror)
    seen = torch.cat([data, data.flip(-1)]) if mirror else data
    assert relative_error(mean, seen.double().mean(0)) < TOLERANCE[dtype]
    expected = cosine.fit_cosine(data.double() - offset, mirror=mirror)[1].eigvals  # an exact difference
    torch.testing.assert_close(cov.eigvals.double(), expected, rtol=TOLERANCE[dtype], atol=0)


def test_data_that_the_basis_suits_are_fitted_exactly() -> None:
    """Images of independent coefficients: the covariance in the cosine basis is that of the samples."""
    truth = covariance()
    roots = truth.eigvals.sqrt()
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    hadamard = signs
    for _ in range(5):
        hadamard = torch.kron(hadamard, signs)  # (64, 64) of orthogonal columns, the first one constant
    data = truth.from_basis(hadamard[:, 1:61] * roots).reshape(64, *SHAPE) + 0.7
    exact = fit_covariance(data, shrinkage="none", solver="dense").covariance
    assert relative_error(exact.dense(), truth.dense()) < 1e-10
    # Distinct frequencies see distinct colours; the fit has one rotation for all, here the true one.
    found = CosineCovariance(truth.eigvals.reshape(SHAPE), truth.rotation)
    mean, cov, _ = cosine.fit_cosine(data)
    assert relative_error(mean, torch.full_like(mean, 0.7)) < 1e-12
    turned = cov.rotation @ found.rotation.T
    variances = turned.abs().round(decimals=10)
    assert set(variances.flatten().tolist()) == {0.0, 1.0}, "the true colours, in some order"
    assert relative_error(cov.dense(), truth.dense()) < 1e-10


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (randn(9, 4), ValueError, r"images of shape \(N, C, H, W\), got \(9, 4\)"),
        ([randn(3, 4, 5)], ValueError, r"images of shape \(N, C, H, W\), got \(3, 4, 5\)"),
        (randn(9), ValueError, r"data of shape \(N, \*event_shape\), got \(9,\)"),
        ([randn(2, 1, 4, 4), randn(2, 1, 4, 5)], ValueError, r"one shape, got \(1, 4, 4\) and \(1, 4, 5\)"),
        (randn(0, 1, 4, 4), ValueError, "at least one sample, got none"),
        ([], ValueError, "at least one sample, got none"),
        ([randn(0, 1, 4, 4)], ValueError, "at least one sample, got none"),
        (randn(1, 1, 4, 4), ValueError, "at least 2 samples to fit a covariance, got 1"),
        (["image"], TypeError, "batches to be tensors or arrays.*got str"),
        (randn(3, 1, 4, 4) + 0j, TypeError, "expected real numbers"),
    ],
)
def test_impossible_data(data: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cosine.fit_cosine(data)


@dtypes
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 255.0, 1e6])
@pytest.mark.parametrize("mirror", [False, True])
def test_equal_images_are_noticed(value: float, mirror: bool, dtype: torch.dtype) -> None:
    image = torch.full((3, 16, 16), value, dtype=dtype)
    for batch in (1, 7, 100):
        with pytest.raises(ValueError, match=r"expected data that vary, got \d+ samples"):
            cosine.fit_cosine(iter(image.expand(100, -1, -1, -1).split(batch)), mirror=mirror)


def test_mirror_images_vary() -> None:
    """Equal images, and their mirror images: they differ by their odd part alone."""
    image = randn(1, *SHAPE).expand(4, -1, -1, -1)
    for count in (1, 4):
        mean, cov, _ = cosine.fit_cosine(image[:count], mirror=True)
        check_fit(mean, cov, torch.cat([image[:1], image[:1].flip(-1)]), 1e-12)


def test_coefficients_that_do_not_vary_have_no_negative_variance() -> None:
    """One pattern of one colour, more and less of it: everything else is what rounding leaves."""
    pattern = torch.einsum("c,hw->chw", randn(3), randn(4, 5, seed=1))
    data = 5 + pattern * randn(40, 1, 1, 1, seed=2)
    for batch in (3, 40):
        mean, cov, _ = cosine.fit_cosine(iter(data.split(batch)))
        check_fit(mean, cov, data, 1e-12)
        assert float(cov.eigvals.min()) >= 0


@pytest.mark.parametrize("index", [0, 6, 7, 41])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_samples_are_named(index: int, bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    data = colour_images()
    data[index:, 1, 2, 3] = bad
    for part in (2**22, 5 * 60):
        monkeypatch.setattr(cosine, "_PART", part)
        for given in (data, data.numpy(), data.split(7), [data[:0], *data.split(11)]):
            with pytest.raises(ValueError, match=rf"NaN or infinite values in sample {index}$"):
                cosine.fit_cosine(given)


def test_all_processes_need_torch_distributed() -> None:
    with pytest.raises(RuntimeError, match=r"initialised torch\.distributed"):
        cosine.fit_cosine(colour_images(), all_processes=True)


# The denoiser -------------------------------------------------------------------------------------


def pair(dtype: torch.dtype = torch.float64) -> tuple[GaussianDenoiser, GaussianDenoiser]:
    """The Gaussian of colour images in the cosine basis, and the same with its eigenvectors in float64."""
    fitted = GaussianDenoiser.fit(colour_images(), basis="cosine")
    cov = fitted.covariance
    assert isinstance(cov, CosineCovariance)
    return fitted.to(dtype), GaussianDenoiser(fitted.mean.double(), written_out(cov).double())


def queries(sigma: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return (colour_images()[:6] + sigma * randn(6, *SHAPE, seed=8)).to(dtype)


@sigmas
@dtypes
def test_every_method_of_the_denoiser(sigma: float, dtype: torch.dtype) -> None:
    _, reference = pair()
    fitted, _ = pair(dtype)
    x = queries(sigma, dtype)
    wide = x.double()
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for name, actual, expected in (
        ("denoiser", fitted(x, sigma), reference(wide, sigma)),
        ("score", fitted.score(x, sigma), reference.score(wide, sigma)),
        ("log_prob", fitted.log_prob(x, sigma), reference.log_prob(wide, sigma)),
        ("flow down", fitted.flow(x, sigma, 0.0), reference.flow(wide, sigma, 0.0)),
        ("flow up", fitted.flow(x, sigma, 2 * sigma), reference.flow(wide, sigma, 2 * sigma)),
        ("bayes_error", fitted.bayes_error(sigma), reference.bayes_error(sigma)),
        ("variance", fitted.posterior_variance(x, sigma), reference.posterior_variance(wide, sigma)),
        ("data variance", fitted.variance, reference.variance),
    ):
        assert actual.dtype == dtype, name
        assert actual.shape == expected.shape, name
        assert relative_error(actual, expected) < tolerance, f"{name}: {relative_error(actual, expected)}"


def test_log_prob_is_that_of_scipy() -> None:
    fitted, reference = pair()
    x = queries(0.5)
    cov = reference.covariance.dense() + 0.25 * torch.eye(60, dtype=torch.float64)
    assert relative_error(fitted.log_prob(x, 0.5), normal_logpdf(x, fitted.mean, cov)) < 1e-10


def test_samples_have_the_moments_of_the_fit() -> None:
    fitted, reference = pair()
    draws = fitted.sample(20_000, 0.3, generator=torch.Generator().manual_seed(0)).flatten(1)
    expected = reference.covariance.dense() + 0.09 * torch.eye(60, dtype=torch.float64)
    assert relative_error(torch.cov(draws.T), expected) < 0.05
    assert (
        float((draws.mean(0) - fitted.mean.flatten()).abs().max()) < 5 * float(expected.max() / 20_000) ** 0.5
    )


def test_one_sigma_per_image() -> None:
    fitted, _ = pair()
    sigma = torch.tensor(SIGMAS, dtype=torch.float64)
    x = queries(0.5)
    for name, method in (("denoiser", fitted), ("variance", fitted.posterior_variance)):
        together = method(x, sigma)
        for i in range(6):
            assert relative_error(together[i], method(x[i : i + 1], SIGMAS[i])[0]) < 1e-12, f"{name} {i}"


@pytest.mark.parametrize("sigma", [0.1, 0.3, 1.0])
def test_held_out_error_lies_between_isotropic_and_full(sigma: float) -> None:
    data = train_digits()
    mean = data.mean(0)
    errors = {
        name: float((gaussian(noised(sigma, 360), sigma) - held_out_digits()).square().mean())
        for name, gaussian in {
            "isotropic": GaussianDenoiser.isotropic(mean, (data - mean).square().mean()),
            "cosine": GaussianDenoiser.fit(data, basis="cosine"),
            "full": GaussianDenoiser.fit(data),
        }.items()
    }
    assert errors["full"] < 0.95 * errors["cosine"] < 0.93 * errors["isotropic"], errors
    predicted = float(GaussianDenoiser.fit(data, basis="cosine").bayes_error(sigma))
    assert errors["cosine"] == pytest.approx(predicted, rel=0.05), "the fit predicts its own error"


@dtypes
def test_round_trip(dtype: torch.dtype, tmp_path: Path) -> None:
    fitted, _ = pair(dtype)
    fitted.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["arguments"] == {"event_shape": [3, 4, 5], "rank": 60, "basis": "cosine"}
    assert config["provenance"]["arguments"]["basis"] == "cosine"
    loaded = from_pretrained(tmp_path)
    assert isinstance(loaded, GaussianDenoiser)
    assert isinstance(loaded.covariance, CosineCovariance)
    x = queries(0.5, dtype)
    assert torch.equal(loaded(x, 0.5), fitted(x, 0.5))
    assert torch.equal(loaded.score(x, 0.002), fitted.score(x, 0.002))


def test_inside_of_the_bypass(tmp_path: Path) -> None:
    cosine_fit = GaussianDenoiser.fit(train_digits(), basis="cosine")
    covs = cosine_fit.covariance
    assert isinstance(covs, CosineCovariance)
    reference = BypassPrecond(
        tiny_unet(in_channels=2).double(), GaussianDenoiser(cosine_fit.mean, written_out(covs))
    )
    model = BypassPrecond(tiny_unet(in_channels=2).double(), cosine_fit)
    x, sigma = noised(0.5), torch.full((16,), 0.5, dtype=torch.float64)
    assert relative_error(model(x, sigma), reference(x, sigma)) < 1e-10
    assert relative_error(model.untrained(x, 0.5), reference.untrained(x, 0.5)) < 1e-12
    assert relative_error(model.c_out(sigma), reference.c_out(sigma)) < 1e-12
    model.save_pretrained(tmp_path)
    assert torch.equal(from_pretrained(tmp_path)(x, sigma), model(x, sigma))


@pytest.mark.parametrize("order", [1, 3])
def test_inside_of_the_far_field(order: int, tmp_path: Path) -> None:
    fitted, reference = pair()
    x = queries(200.0)
    model, expected = FarFieldDenoiser(fitted, order), FarFieldDenoiser(reference, order)
    assert relative_error(model(x, 200.0), expected(x, 200.0)) < 1e-12
    assert relative_error(model.score(x, 200.0), expected.score(x, 200.0)) < 1e-12
    model.save_pretrained(tmp_path)
    assert torch.equal(from_pretrained(tmp_path)(x, 200.0), model(x, 200.0))


def test_inside_of_the_flow() -> None:
    fitted, reference = pair()
    flow, expected = GaussianFlow(fitted), GaussianFlow(reference)
    x = queries(20.0)
    for name, actual, wanted in (
        ("state", flow.state(x, 20.0, 0.5), expected.state(x, 20.0, 0.5)),
        ("denoised", flow.denoised(x, 20.0, 0.5), expected.denoised(x, 20.0, 0.5)),
        ("velocity", flow.velocity(x, 20.0), expected.velocity(x, 20.0)),
        ("propagate", flow.propagate(x, 20.0), expected.propagate(x, 20.0)),
    ):
        assert relative_error(actual, wanted) < 1e-10, name


def test_as_a_component_of_a_mixture() -> None:
    fitted, reference = pair()
    other = GaussianDenoiser.fit(colour_images(), rank=4)
    means = torch.stack([fitted.mean, other.mean + 0.5])
    weights = torch.tensor([0.4, 0.6], dtype=torch.float64)
    mixture, expected = (
        GaussianMixtureDenoiser(weights, means, [first.covariance, other.covariance])
        for first in (fitted, reference)
    )
    x = queries(0.5)
    assert mixture.ranks.tolist() == [60, 4]
    assert relative_error(mixture(x, 0.5), expected(x, 0.5)) < 1e-10
    assert relative_error(mixture.log_prob(x, 0.5), expected.log_prob(x, 0.5)) < 1e-10
    alone = GaussianMixtureDenoiser(weights[:1], means[:1], [fitted.covariance])
    assert relative_error(alone(x, 0.5), fitted(x, 0.5)) < 1e-10


# Memory -------------------------------------------------------------------------------------------

LARGE = """
import resource
import sys
import torch
from gaussnet import GaussianDenoiser

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
shape = (8, 3, 512, 512)
if sys.argv[1] == "uint8":
    batches = (torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8) for _ in range(4))
else:
    batches = (torch.randn(shape, generator=generator) for _ in range(4))
gaussian = GaussianDenoiser.fit(batches, basis="cosine", mirror=True)
x = gaussian.sample(2, 1.0, generator=generator)
denoised = gaussian(x, 1.0)
assert denoised.shape == x.shape and bool(torch.isfinite(denoised).all())
assert bool(torch.isfinite(gaussian.score(x, 1.0)).all())
unit = 1 if sys.platform == "darwin" else 2**10
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_large_images_take_little_memory(kind: str) -> None:
    """3 x 512 x 512: a covariance matrix would take 2.5 TB."""
    command = [sys.executable, "-c", LARGE, kind]
    result = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 2, "GB at the peak"
