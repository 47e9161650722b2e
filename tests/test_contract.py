"""What every denoiser promises, checked on all of them."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import (
    ANALYTIC,
    DENOISERS,
    DTYPES,
    EVENT,
    LABELLED,
    NETWORKS,
    SIGMAS,
    denoiser,
    noised,
    randn,
    relative_error,
)
from torch import Tensor

from gaussnet import (
    CosineCovariance,
    Covariance,
    DeltaDenoiser,
    Denoiser,
    Gate,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    PatchDenoiser,
    from_pretrained,
)

every = pytest.mark.parametrize("name", DENOISERS)
analytic = pytest.mark.parametrize("name", ANALYTIC)
sigmas = pytest.mark.parametrize("sigma", SIGMAS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

F32, F64 = torch.float32, torch.float64

QUANTITIES: dict[str, Callable[[Any, Tensor, float], Tensor]] = {
    "denoised": lambda d, x, sigma: d(x, sigma),
    "score": lambda d, x, sigma: d.score(x, sigma),
    "log_prob gradient": lambda d, x, sigma: torch.func.grad(lambda x: d.log_prob(x, sigma).sum())(x),
}


# Identities ---------------------------------------------------------------------------------------


@every
@sigmas
def test_score_and_denoiser_are_tweedie(name: str, sigma: float) -> None:
    d, x = denoiser(name), noised(sigma)
    # D - x cancels: what float64 leaves of it, relative to the score, is eps |x| / (sigma^2 |score|).
    assert relative_error(d.score(x, sigma), (d(x, sigma) - x) / sigma**2) < 1e-8


labelled_methods = pytest.mark.parametrize(
    ("method", "name"),
    [
        (method, name)
        for name in LABELLED
        for method in ("forward", "score", "log_prob")
        if hasattr(denoiser(name), method)
    ],
)


@analytic
@sigmas
def test_score_is_the_gradient_of_log_prob(name: str, sigma: float) -> None:
    d, x = denoiser(name), noised(sigma)
    assert d.log_prob(x, sigma).shape == (16,)
    assert relative_error(QUANTITIES["log_prob gradient"](d, x, sigma), d.score(x, sigma)) < 1e-9


@analytic
@sigmas
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_float32_equals_float64(name: str, sigma: float, quantity: str) -> None:
    single, double = denoiser(name, F32), denoiser(name, F32).double()
    x = noised(sigma, dtype=F32)
    actual = QUANTITIES[quantity](single, x, sigma)
    assert actual.dtype == F32
    assert relative_error(actual, QUANTITIES[quantity](double, x.double(), sigma)) < 1e-5


@analytic
@pytest.mark.parametrize("sigma", [0.05, 1.0, 20.0])
def test_the_jacobian_is_a_covariance(name: str, sigma: float) -> None:
    # sigma^2 dD/dx = Cov[x_0 | x]: symmetric and positive semi-definite.
    d, x = denoiser(name), noised(sigma, 1)[0]
    jacobian = torch.func.jacrev(lambda x: d(x, sigma))(x).reshape(64, 64)
    assert relative_error(jacobian, jacobian.T) < 1e-7
    assert torch.linalg.eigvalsh(jacobian).min() > -1e-7 * jacobian.norm()


# Noise levels and shapes --------------------------------------------------------------------------


@every
@dtypes
@pytest.mark.parametrize("method", ["forward", "score"])
def test_sigma_in_every_form(name: str, dtype: torch.dtype, method: str) -> None:
    d, x = denoiser(name, dtype), noised(0.5, 4, dtype)
    call = d if method == "forward" else d.score
    by_float = call(x, 0.5)
    forms = {
        "0-d": torch.tensor(0.5, dtype=dtype),
        "(B,)": torch.full((4,), 0.5, dtype=dtype),
        "(B,) float64": torch.full((4,), 0.5, dtype=F64),
    }
    bound = 1e-13 if dtype == F64 else 1e-6
    for form, sigma in forms.items():
        assert relative_error(call(x, sigma), by_float) < bound, form
    assert relative_error(call(x, 1), call(x, torch.tensor([1, 1, 1, 1]))) < bound, "integers"


@every
def test_each_sample_has_its_sigma(name: str) -> None:
    d, x = denoiser(name), noised(0.5, 6)
    sigma = torch.tensor(SIGMAS, dtype=F64)
    together, scores = d(x, sigma), d.score(x, sigma)
    for i, level in enumerate(SIGMAS):
        one = x[i : i + 1]
        assert relative_error(together[i : i + 1], d(one, level)) < 1e-10, f"denoised at {level}"
        assert relative_error(scores[i : i + 1], d.score(one, level)) < 1e-8, f"score at {level}"


@analytic
@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (0,)], ids=str)
def test_batch_axes(name: str, batch: tuple[int, ...]) -> None:
    d = denoiser(name)
    x = randn(*batch, *EVENT)
    assert d(x, 0.5).shape == d.score(x, 0.5).shape == x.shape
    assert d.log_prob(x, 0.5).shape == batch
    sigma = torch.full(batch, 0.5)
    torch.testing.assert_close(d(x, sigma), d(x.reshape(-1, *EVENT), 0.5).reshape(x.shape))


@every
@pytest.mark.parametrize("method", ["forward", "score"])
@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf], ids=str)
def test_impossible_sigma(name: str, method: str, sigma: float) -> None:
    d, x = denoiser(name), noised(0.5, 2)
    for wrapped in (sigma, torch.tensor(sigma), torch.tensor([1.0, sigma])):
        with pytest.raises(ValueError, match=rf"expected sigma to be finite and > 0, got {sigma}"):
            getattr(d, method)(x, wrapped)


@every
@pytest.mark.parametrize("method", ["forward", "score"])
@pytest.mark.parametrize("shape", [(3,), (2, 1), (1,), (2, 1, 1, 1)], ids=str)
def test_impossible_sigma_shape(name: str, method: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected sigma to be .* shape \(2,\).*, got shape") as error:
        getattr(denoiser(name), method)(noised(0.5, 2), torch.ones(shape))
    assert str(shape) in str(error.value)


@every
@pytest.mark.parametrize("method", ["forward", "score"])
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 1, 8, 7), ValueError, r"x of shape \(\*batch, 1, 8, 8\), got \(2, 1, 8, 7\)"),
        (torch.zeros(2, 64), ValueError, r"expected x of shape .*, got \(2, 64\)"),
        (torch.zeros(8, 8), ValueError, r"expected x of shape .*, got \(8, 8\)"),
        (torch.zeros(2, *EVENT, dtype=torch.long), TypeError, r"expected x .* floating.*, got torch.int64"),
    ],
    ids=["event", "flat", "ndim", "integer"],
)
def test_impossible_x(name: str, method: str, x: Tensor, error: type[Exception], message: str) -> None:
    d = denoiser(name)
    with pytest.raises(error, match=message) as caught:
        getattr(d, method)(x, 1.0)
    assert type(d).__name__ in str(caught.value)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_take_one_batch_axis(name: str) -> None:
    with pytest.raises(ValueError, match=r"expected x of shape \(B, 1, 8, 8\), got \(2, 3, 1, 8, 8\)"):
        denoiser(name)(torch.zeros(2, 3, *EVENT), 1.0)


# Classes ------------------------------------------------------------------------------------------


@labelled_methods
def test_integer_and_one_hot_classes_agree(name: str, method: str) -> None:
    d, x = denoiser(name), noised(0.5, 10)
    call, labels = getattr(d, method), torch.arange(10)
    by_integer = call(x, 0.5, labels)
    for one_hot in (torch.eye(10), torch.eye(10).double(), torch.eye(10).long()):
        assert call(x, 0.5, one_hot).equal(by_integer), one_hot.dtype
    assert call(x, 0.5, labels.int()).equal(by_integer)
    assert relative_error(call(x, 0.5), by_integer) > 1e-3, "classes matter"


@labelled_methods
def test_rows_of_zeros_are_of_no_class(name: str, method: str) -> None:
    call, x = getattr(denoiser(name), method), noised(0.5, 4)
    labels = torch.eye(10, dtype=torch.float64)[[3, 1, 4, 1]]
    labels[2] = 0
    out = call(x, 0.5, labels)
    torch.testing.assert_close(out[2], call(x, 0.5)[2])
    for i in (0, 1, 3):
        torch.testing.assert_close(out[i], call(x, 0.5, torch.tensor([3, 1, 4, 1]))[i])


@labelled_methods
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([1, 10]), r"expected class_labels among \[0, 1, .*9\], got \[10\]"),
        (torch.tensor([-1, 3]), r"got \[-1\]"),
        (torch.eye(12)[[3, 11]], r"got \[11\]"),
        (torch.tensor([1]), r"integers of shape \(2,\) or one-hot rows .*, got torch.int64 of shape \(1,\)"),
        (torch.tensor([1.0, 2.0]), r"got torch.float32 of shape \(2,\)"),
        (torch.eye(10)[:3], r"got torch.float32 of shape \(3, 10\)"),
        (torch.zeros(2, 1, 10), r"of shape \(2, 1, 10\)"),
    ],
    ids=["unknown", "negative", "one-hot-unknown", "length", "float", "one-hot-length", "ndim"],
)
def test_impossible_classes(name: str, method: str, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(denoiser(name), method)(noised(0.5, 2), 0.5, labels)


@pytest.mark.parametrize("name", LABELLED)
def test_rows_of_flags_are_classes(name: str) -> None:
    labels, x = torch.tensor([1, 3]), noised(0.5, 2)
    expected = denoiser(name)(x, 0.5, labels)
    for kind in (torch.bool, torch.uint8, torch.float16):
        assert denoiser(name)(x, 0.5, torch.eye(10)[labels].to(kind)).equal(expected), str(kind)


LABELS = torch.arange(12) % 3
MAKERS: dict[str, Callable[[Tensor, Tensor], Denoiser]] = {
    "delta": DeltaDenoiser,
    "patch": lambda data, labels: PatchDenoiser(data, 3, class_labels=labels),
    "mixture": lambda data, labels: GaussianMixtureDenoiser.equal_isotropic(data, 1.0, labels),
}


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_labels_of_any_integers_are_saved(name: str, kind: torch.dtype, tmp_path: Path) -> None:
    model, x = MAKERS[name](randn(12, 1, 4, 4), LABELS.to(kind)), randn(2, 1, 4, 4)
    model.save_pretrained(tmp_path)
    for labels in (torch.tensor([0, 2]), torch.tensor([0, 2], dtype=kind)):
        assert from_pretrained(tmp_path)(x, 0.5, labels).equal(model(x, 0.5, labels))


@pytest.mark.parametrize("name", MAKERS)
def test_classes_below_0_or_of_no_integers_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected labels >= 0, got -1"):
        MAKERS[name](randn(12, 1, 4, 4), LABELS - 1)
    for labels in (LABELS.float(), LABELS > 0):
        with pytest.raises(ValueError, match=f"one integer label for each of 12 samples, got {labels.dtype}"):
            MAKERS[name](randn(12, 1, 4, 4), labels)


@pytest.mark.parametrize("name", MAKERS)
def test_integer_data_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match=r"expected \w+ to be floating-point, got torch.uint8"):
        MAKERS[name](torch.ones(12, 1, 4, 4, dtype=torch.uint8), LABELS)
    with pytest.raises(TypeError, match=r"expected means to be floating-point, got torch\.int64"):
        GaussianMixtureDenoiser(
            torch.ones(1), torch.ones(1, 2).long(), [Covariance(torch.eye(2), torch.ones(2))]
        )


def test_integer_moments_are_refused() -> None:
    """In which a variance of 0.5 would be 0."""
    one = torch.ones(2, dtype=torch.int64)
    for make, name in (
        (lambda: GaussianDenoiser.isotropic(0 * one, 0.5), "mean"),
        (lambda: Covariance(torch.eye(2), one, 0.5), "eigvals"),
        (lambda: Covariance(torch.eye(2).long(), one.float()), "eigvecs"),
        (lambda: CosineCovariance(one.reshape(1, 2, 1), torch.ones(1, 1)), "eigvals"),
        (lambda: Gate(torch.tensor([1.0, 2.0]), one), "values"),
    ):
        with pytest.raises(TypeError, match=f"expected {name} to be floating-point, got torch.int64"):
            make()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", DENOISERS)
def test_in_half_precision_it_is_nearly_itself(name: str, kind: torch.dtype) -> None:
    d, x = denoiser(name, torch.float32), noised(2.0, 4).float()
    near = copy.deepcopy(d).to(kind)(x, 2.0)
    assert near.dtype == torch.float32
    assert relative_error(near, d(x, 2.0)) < 0.05


@pytest.mark.parametrize("name", [name for name in DENOISERS if name not in LABELLED])
@pytest.mark.parametrize("labels", [torch.arange(4), torch.eye(4)], ids=["integer", "one-hot"])
def test_denoisers_without_classes_ignore_them(name: str, labels: Tensor) -> None:
    d, x = denoiser(name), noised(0.5, 4)
    assert d(x, 0.5, labels).equal(d(x, 0.5))
    assert d(x, 0.5, class_labels=labels).equal(d(x, 0.5))
    assert d.score(x, 0.5, labels).equal(d.score(x, 0.5))
