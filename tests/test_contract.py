"""What every denoiser promises, checked on all of them."""

import math
from collections.abc import Callable
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


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("method", ["forward", "score", "log_prob"])
def test_integer_and_one_hot_classes_agree(name: str, method: str) -> None:
    d, x = denoiser(name), noised(0.5, 10)
    call, labels = getattr(d, method), torch.arange(10)
    by_integer = call(x, 0.5, labels)
    for one_hot in (torch.eye(10), torch.eye(10).double(), torch.eye(10).long()):
        assert call(x, 0.5, one_hot).equal(by_integer), one_hot.dtype
    assert call(x, 0.5, labels.int()).equal(by_integer)
    assert relative_error(call(x, 0.5), by_integer) > 1e-3, "classes matter"


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("method", ["forward", "score", "log_prob"])
def test_rows_of_zeros_are_of_no_class(name: str, method: str) -> None:
    call, x = getattr(denoiser(name), method), noised(0.5, 4)
    labels = torch.eye(10, dtype=torch.float64)[[3, 1, 4, 1]]
    labels[2] = 0
    out = call(x, 0.5, labels)
    torch.testing.assert_close(out[2], call(x, 0.5)[2])
    for i in (0, 1, 3):
        torch.testing.assert_close(out[i], call(x, 0.5, torch.tensor([3, 1, 4, 1]))[i])


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("method", ["forward", "score", "log_prob"])
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


@pytest.mark.parametrize("name", [name for name in DENOISERS if name not in LABELLED])
@pytest.mark.parametrize("labels", [torch.arange(4), torch.eye(4)], ids=["integer", "one-hot"])
def test_denoisers_without_classes_ignore_them(name: str, labels: Tensor) -> None:
    d, x = denoiser(name), noised(0.5, 4)
    assert d(x, 0.5, labels).equal(d(x, 0.5))
    assert d(x, 0.5, class_labels=labels).equal(d(x, 0.5))
    assert d.score(x, 0.5, labels).equal(d.score(x, 0.5))
