"""The block Krylov solver against eigh of all the data."""

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import orthogonal, randn, train_digits
from torch import Tensor

from gaussnet import Covariance, GaussianDenoiser
from gaussnet.fit import fit_covariance, krylov, solvers
from gaussnet.fit.krylov import Rows, krylov_axes

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
SHAPES = pytest.mark.parametrize("shape", [(300, 500), (500, 300)], ids=["wide", "tall"])
# Of eigenvalues: in float32, what a sum of 300 products is rounded by.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-6}


@pytest.fixture(autouse=True)
def iterated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Problems of any size are iterated, and restarted, as only large ones are otherwise."""
    monkeypatch.setattr(krylov, "_SMALL", 0, raising=False)


def decaying(count: int, dim: int, power: float = 0.5, dtype: torch.dtype = torch.float64) -> Tensor:
    """Data of variances k^(-2 power) in a random basis, about a mean."""
    scales = torch.arange(1, dim + 1, dtype=torch.float64) ** -power
    return ((randn(count, dim) * scales) @ orthogonal(dim, seed=3) + 2.0).to(dtype)


def spectrum(data: Tensor) -> tuple[Tensor, Tensor]:
    """All eigenvalues, decreasing, and the samples about their mean, in float64."""
    centred = data.double().flatten(1) - data.double().flatten(1).mean(0)
    singular = torch.linalg.svdvals(centred)
    return singular**2 / len(data), centred


def check(rows: Rows, data: Tensor, rank: int, name: str, tolerance: float) -> None:
    """The axes are those of `data`: eigenvalues, orthonormality, and the variance that they capture."""
    expected, centred = spectrum(data)
    eigvals, axes = krylov_axes(rows, rank)
    assert eigvals.dtype == axes.dtype == torch.float64, name
    assert (eigvals.shape, axes.shape) == ((rank,), (centred.shape[1], rank)), name
    eye = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(axes.T @ axes, eye, rtol=0, atol=1e-13, msg=f"orthonormality, {name}")
    off = float((eigvals / expected[:rank] - 1).abs().max())
    assert off < tolerance, f"eigenvalues, {name}: {off}"
    assert bool((eigvals.diff() <= 0).all()), f"order, {name}"
    captured = float((centred @ axes).square().sum() / len(data) / expected[:rank].sum())
    # Of second order in the error of the axes, and so nearly exact in float32, too.
    assert 1 - 1e-7 < captured < 1 + 1e-12, f"captured variance, {name}: {captured}"
    along = (centred @ axes).square().mean(0)
    off = float((eigvals / along - 1).abs().max())
    assert off < tolerance, f"eigenvalues against the variance along the axes, {name}: {off}"


# Axes ---------------------------------------------------------------------------------------------


@DTYPES
@SHAPES
@pytest.mark.parametrize("power", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("rank", [1, 2, 5, 40])
def test_axes_are_those_of_eigh(shape: tuple[int, int], rank: int, power: float, dtype: torch.dtype) -> None:
    data = decaying(*shape, power, dtype)
    check(Rows(data), data, rank, f"{shape}, {rank}, {power}", TOLERANCE[dtype])


@DTYPES
@SHAPES
def test_all_axes_but_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    data = decaying(*(n // 5 for n in shape), dtype=dtype)
    most = min(len(data) - 1, data.shape[1])
    for rank in (most - 1, most):
        check(Rows(data), data, rank, f"{shape}, {rank} of {most}", TOLERANCE[dtype])


@DTYPES
@SHAPES
def test_projector(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Where the eigenvalues have a gap, the space of the axes is determined, to the rounding of the data."""
    data, rank = decaying(*shape, dtype=dtype), 12
    basis = orthogonal(shape[1], seed=3)[:rank].to(dtype)
    data = data + 3 * (data - data.mean(0)) @ basis.T @ basis
    _, centred = spectrum(data)
    expected = torch.linalg.svd(centred, full_matrices=False).Vh[:rank]
    _, axes = krylov_axes(Rows(data), rank)
    # To the residual that the iteration stops at.
    torch.testing.assert_close(axes @ axes.T, expected.T @ expected, rtol=0, atol=1e-4)


@SHAPES
def test_the_same_axes_every_time(shape: tuple[int, int]) -> None:
    data = decaying(*shape, dtype=torch.float32)
    first = krylov_axes(Rows(data), 10)
    torch.manual_seed(99)
    for a, b in zip(first, krylov_axes(Rows(data.clone()), 10), strict=True):
        assert torch.equal(a, b)


@DTYPES
def test_few_axes_take_few_passes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 600 dimensions, the iteration sees a fraction: far below the 600 columns of a square matrix."""
    columns: list[int] = []
    original = Rows.square
    monkeypatch.setattr(Rows, "square", lambda self, v: (columns.append(v.shape[1]), original(self, v))[1])
    krylov_axes(Rows(decaying(900, 600, dtype=dtype)), 5)
    assert sum(columns) <= 150, columns


@DTYPES
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("rank", [3, 5, 8, 20])
@pytest.mark.parametrize("size", [60, 300])
def test_data_of_exactly_low_rank(
    size: int, rank: int, wide: bool, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    """The Krylov space is exhausted; axes along which nothing varies are left out, as by the Gram solver."""
    data = (randn(size, 5) @ randn(5, 2 * size, seed=1)).to(dtype)
    data = data if wide else data.T.contiguous()
    expected, _ = spectrum(data)
    found = min(rank, 5)
    eigvals, axes = krylov_axes(Rows(data), rank)
    assert (eigvals.shape, axes.shape) == ((found,), (data.shape[1], found))
    eye = torch.eye(found, dtype=torch.float64)
    torch.testing.assert_close(axes.T @ axes, eye, rtol=0, atol=1e-13)
    torch.testing.assert_close(eigvals, expected[:found], rtol=TOLERANCE[dtype], atol=0)
    assert not caplog.records, "null directions converge, too"


@DTYPES
@pytest.mark.parametrize("rank", [1, 9, 20, 29])
def test_equal_eigenvalues(rank: int, dtype: torch.dtype) -> None:
    """One-hot rows: all eigenvalues but one are equal, and a Krylov space holds one of each a block."""
    data = torch.eye(30, dtype=dtype)
    eigvals, axes = krylov_axes(Rows(data), rank)
    expected = torch.full((rank,), 1 / 30, dtype=torch.float64)
    torch.testing.assert_close(eigvals, expected, rtol=TOLERANCE[dtype], atol=0)
    torch.testing.assert_close(axes.T @ axes, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-13)
    many = torch.eye(30, dtype=dtype).repeat(5, 1)
    torch.testing.assert_close(krylov_axes(Rows(many), rank)[0], expected, rtol=TOLERANCE[dtype], atol=0)


@DTYPES
def test_two_clusters_of_equal_eigenvalues(dtype: torch.dtype) -> None:
    """Twenty large equal ones, more than a block has columns, and many small ones."""
    scales = torch.cat([torch.full((20,), 2.0), torch.full((100,), 1.0)]).double()
    data = (torch.cat([torch.eye(120), -torch.eye(120)]).double() * scales).to(dtype)
    eigvals, axes = krylov_axes(Rows(data), 22)
    expected = torch.tensor([4.0] * 20 + [1.0] * 2, dtype=torch.float64) / 120
    torch.testing.assert_close(eigvals, expected, rtol=TOLERANCE[dtype], atol=0)
    torch.testing.assert_close(axes.T @ axes, torch.eye(22, dtype=torch.float64), rtol=0, atol=1e-13)


def test_a_cut_iteration_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    data = decaying(300, 200, power=0.0)
    krylov_axes(Rows(data), 3)
    assert not caplog.records
    monkeypatch.setattr(krylov, "_RESTARTS", 0)
    eigvals, axes = krylov_axes(Rows(data), 3)
    assert "of 3 axes have not converged: their eigenvalues are too small" in caplog.text
    along = (data - data.mean(0)) @ axes
    torch.testing.assert_close(along.square().mean(0), eigvals)


@DTYPES
@SHAPES
@pytest.mark.parametrize("offset", [1e3, 1e5])
def test_a_large_common_mean(shape: tuple[int, int], offset: float, dtype: torch.dtype) -> None:
    data = (decaying(*shape) + offset).to(dtype)
    rows = Rows(data)
    expected, centred = spectrum(data)
    torch.testing.assert_close(rows.mean, data.double().mean(0), rtol=1e-15, atol=0)
    torch.testing.assert_close(rows.total, centred.square().sum(), rtol=1e-6, atol=0)
    eigvals, _ = krylov_axes(rows, 10)
    torch.testing.assert_close(eigvals, expected[:10], rtol=TOLERANCE[dtype], atol=0)


# Rows ---------------------------------------------------------------------------------------------

EVENT = (2, 3, 4)
ROWS = 41


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    return (randn(ROWS, *EVENT) * torch.linspace(0.5, 2, 4) + 1.0).to(dtype)


@DTYPES
@pytest.mark.parametrize("kind", ["tensor", "array", "memory map", "reversed array"])
@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.filterwarnings("error")
def test_rows_are_the_samples_about_their_mean(
    kind: str,
    chosen: bool,
    mirror: bool,
    on_disk: bool,
    dtype: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, given = images(dtype), images(dtype)
    source: Any = given
    if kind != "tensor":
        source = given.flip(1).numpy()[:, ::-1] if kind == "reversed array" else given.numpy()
    if kind == "memory map":
        np.save(tmp_path / "data.npy", source)
        source = np.load(tmp_path / "data.npy", mmap_mode="r")
    if on_disk:
        monkeypatch.setattr(krylov, "_IN_MEMORY", 0)
        monkeypatch.setattr(krylov, "_CHUNK", 5 * 24)
    index = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))[:23] if chosen else None
    rows = Rows(source, index, mirror=mirror)
    flat = data if index is None else data[index]
    if mirror and not on_disk:
        flat = torch.cat([flat, flat.flip(-1)])
    elif mirror:
        flat = torch.cat([torch.cat([part, part.flip(-1)]) for part in flat.split(5)])
    flat = flat.flatten(1)
    centred = flat.double() - flat.double().mean(0)
    assert (len(rows), rows.in_memory, rows.dtype) == (len(flat), not on_disk, dtype)
    assert len(list(rows)) == (
        1 + mirror if not on_disk else -(-(23 if chosen else ROWS) // 5) * (1 + mirror)
    )
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(rows.mean, flat.double().mean(0), rtol=0, atol=1e-14)
    torch.testing.assert_close(torch.cat(list(rows)).double(), centred, rtol=0, atol=10 * eps)
    assert (next(iter(rows)) is next(iter(rows))) == rows.in_memory, "read once, if memory allows"
    distance2 = centred.square().sum(1)
    torch.testing.assert_close(rows.total, distance2.sum(), rtol=10 * eps, atol=0)
    torch.testing.assert_close(rows.spread, distance2.square().mean(), rtol=10 * eps, atol=0)
    v, z = randn(24, 3, seed=1), randn(len(flat), 3, seed=2)
    for name, actual, expected in (
        ("project", rows.project(v.to(dtype)), centred @ v),
        ("back", rows.back(z.to(dtype)), centred.T @ z),
        ("square", rows.square(v.to(dtype)), centred.T @ (centred @ v)),
    ):
        assert actual.dtype == dtype, name
        atol = 50 * eps * float(expected.abs().max())
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=atol, msg=name)
    assert torch.equal(given, data), "the data have been changed"


def test_rows_about_a_given_mean() -> None:
    data, mean = images(), randn(24, seed=5)
    rows = Rows(data, torch.tensor([3, 1, 7]), mean)
    expected = data.flatten(1)[[3, 1, 7]] - mean
    torch.testing.assert_close(torch.cat(list(rows)), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(rows.total, expected.square().sum())


@pytest.mark.parametrize("kind", ["uint8", "uint16", "int16", "float16"])
def test_rows_of_numbers_of_few_bits(kind: str) -> None:
    numbers = np.random.default_rng(0).integers(0, 200, (ROWS, *EVENT))
    rows = Rows(numbers.astype(kind))
    assert rows.dtype == torch.float32
    flat = torch.from_numpy(numbers).double().flatten(1)
    torch.testing.assert_close(rows.mean, flat.mean(0))
    torch.testing.assert_close(torch.cat(list(rows)).double(), flat - flat.mean(0), rtol=0, atol=2e-5)


@DTYPES
@SHAPES
@pytest.mark.parametrize("mirror", [False, True])
def test_axes_of_data_on_disk(
    shape: tuple[int, int],
    mirror: bool,
    dtype: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = decaying(*shape, dtype=dtype).unflatten(1, (-1, 10))
    np.save(tmp_path / "data.npy", data.numpy())
    monkeypatch.setattr(krylov, "_IN_MEMORY", 1000)
    monkeypatch.setattr(krylov, "_CHUNK", 37 * shape[1])
    rows = Rows(np.load(tmp_path / "data.npy", mmap_mode="r"), mirror=mirror)
    assert not rows.in_memory
    both = torch.cat([data, data.flip(-1)]) if mirror else data
    check(rows, both, 12, f"{shape}, {mirror}", TOLERANCE[dtype])


@DTYPES
def test_axes_of_some_samples(dtype: torch.dtype) -> None:
    data = decaying(400, 150, dtype=dtype)
    index = torch.arange(400)[torch.arange(400) % 3 != 1]
    check(Rows(data, index), data[index], 9, "subset", TOLERANCE[dtype])


@pytest.mark.parametrize("index", [0, 4, 5, 40])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("mirror", [False, True])
def test_bad_samples_are_named(index: int, bad: float, mirror: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    data = images()
    data[index:, 1, 2, 3] = bad
    message = rf"expected finite data, got NaN or infinite values in sample {index}$"
    for chunk in (2**26, 5 * 24):
        monkeypatch.setattr(krylov, "_CHUNK", chunk)
        for source in (data, data.float(), data.numpy()):
            with pytest.raises(ValueError, match=message):
                Rows(source, mirror=mirror)
        with pytest.raises(ValueError, match=message):
            Rows(data, torch.tensor([*range(index), index]), mirror=mirror)
    with pytest.raises(ValueError, match="expected at least one sample, got none"):
        Rows(data, torch.arange(0))


# Fits ---------------------------------------------------------------------------------------------


@pytest.fixture
def converged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits may stop before the last of their axes have settled; here they do not."""
    monkeypatch.setattr(solvers, "_TOLERANCE", krylov.TOLERANCE, raising=False)


@pytest.mark.parametrize("shape", [(400, 700), (700, 400)], ids=str)
@pytest.mark.parametrize("rank", [2, 60])
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_small_problems_are_solved_exactly_at_any_tolerance(
    shape: tuple[int, int], rank: int, power: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    data = decaying(shape[0] // 3, shape[1] // 3, power)
    expected, _ = spectrum(data)
    fitted = fit_covariance(data, rank, "none", solver="krylov").covariance
    torch.testing.assert_close(fitted.eigvals, expected[:rank], rtol=1e-9, atol=0)


@pytest.mark.parametrize("shape", [(400, 700), (700, 400)], ids=str)
@pytest.mark.parametrize("rank", [2, 60])
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_fits_lose_next_to_no_variance(shape: tuple[int, int], rank: int, power: float) -> None:
    """Wherever the iteration stops, the trace is exact, and eigenvalues are near the variances along axes."""
    data = decaying(*shape, power)
    expected, centred = spectrum(data)
    fitted = fit_covariance(data, rank, "none", solver="krylov").covariance
    along = (centred @ fitted.eigvecs).square().mean(0)
    torch.testing.assert_close(fitted.eigvals, along, rtol=0.02, atol=0)
    torch.testing.assert_close(fitted.trace(lambda lam: lam), expected.sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(along.sum(), expected[:rank].sum(), rtol=0.01, atol=0)
    eye = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(fitted.eigvecs.T @ fitted.eigvecs, eye, rtol=0, atol=1e-13)


@pytest.mark.usefixtures("converged")
@pytest.mark.parametrize("shape", [(60, 90), (90, 60)], ids=str)
@pytest.mark.parametrize("rank", [1, 7, 30])
@pytest.mark.parametrize("mirror", [False, True])
def test_fits_are_those_of_the_square_solvers(shape: tuple[int, int], rank: int, mirror: bool) -> None:
    data = decaying(*shape).unflatten(1, (3, -1))
    fits = {
        solver: GaussianDenoiser.fit(data, rank, shrinkage="none", solver=solver, mirror=mirror)
        for solver in ("dense", "gram", "krylov")
    }
    exact, found = fits["dense"].covariance, fits["krylov"].covariance
    torch.testing.assert_close(fits["krylov"].mean, fits["dense"].mean, rtol=0, atol=1e-13)
    torch.testing.assert_close(found.tail, exact.tail, rtol=1e-7, atol=0)
    torch.testing.assert_close(found.eigvals, exact.eigvals, rtol=1e-7, atol=0)
    torch.testing.assert_close(found.trace(lambda lam: lam), exact.trace(lambda lam: lam), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.dense(), exact.dense(), rtol=0, atol=1e-4 * float(exact.eigvals[0]))


@pytest.mark.usefixtures("converged")
def test_the_tail_is_exact_in_float32() -> None:
    data = decaying(200, 300, dtype=torch.float32) + 100
    krylov_fit, dense = (
        fit_covariance(data, 20, "none", solver).covariance for solver in ("krylov", "dense")
    )
    torch.testing.assert_close(krylov_fit.tail, dense.tail, rtol=1e-5, atol=0)


@pytest.mark.usefixtures("converged")
@pytest.mark.parametrize("shape", [(90, 160), (160, 90)], ids=str)
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("mirror", [False, True])
def test_cross_validated_fits(shape: tuple[int, int], grouped: bool, mirror: bool) -> None:
    data = decaying(*shape, power=1.0).unflatten(1, (2, -1))
    groups = torch.arange(len(data)) // 4 if grouped else None
    found, exact = (
        fit_covariance(data, 10, "cv", solver, groups, mirror=mirror) for solver in ("krylov", "gram")
    )
    assert found.count == exact.count == len(data)
    assert_same_cross_validation(found.covariance, exact.covariance)


def assert_same_cross_validation(found: Covariance, exact: Covariance) -> None:
    """But for the last eigenvalues, which isotonic regression pools with those of axes that are not there."""
    torch.testing.assert_close(found.eigvals[:-2], exact.eigvals[:-2], rtol=1e-3, atol=0)
    torch.testing.assert_close(found.eigvals, exact.eigvals, rtol=0.1, atol=0)
    traces = [covariance.trace(lambda lam: lam) for covariance in (found, exact)]
    torch.testing.assert_close(*traces, rtol=1e-5, atol=0)


@pytest.mark.usefixtures("converged")
@pytest.mark.parametrize("mirror", [False, True])
def test_left_out_variances(mirror: bool) -> None:
    """Each fold along the axes of the others, as the Gram matrix has them."""
    data = decaying(80, 120, power=1.0).unflatten(1, (4, -1))
    members = torch.arange(80) // 5 % 3
    found = solvers.krylov_left_out(data, members, 8, mirror)
    both = torch.cat([data, data.flip(-1)]) if mirror else data
    flat = both.flatten(1)
    centred = flat - flat.mean(0)
    gram = centred @ centred.T
    expected = solvers.gram_left_out(gram, members.repeat(2) if mirror else members)
    for k, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.count == b.count, f"fold {k}"
        torch.testing.assert_close(a.total, b.total, rtol=1e-10, atol=0, msg=f"total of fold {k}")
        torch.testing.assert_close(a.variances, b.variances[:8], rtol=1e-3, atol=0, msg=f"fold {k}")


@pytest.mark.usefixtures("converged")
def test_cross_validation_of_digits_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = train_digits(torch.float32)[:300]
    np.save(tmp_path / "digits.npy", data.numpy())
    monkeypatch.setattr(krylov, "_IN_MEMORY", 1000)
    found = fit_covariance(
        np.load(tmp_path / "digits.npy", mmap_mode="r"), 12, solver="krylov", groups=torch.arange(300) // 2
    )
    exact = fit_covariance(data, 12, solver="dense", groups=torch.arange(300) // 2)
    assert_same_cross_validation(found.covariance, exact.covariance)


@pytest.mark.parametrize("shrinkage", ["cv", "none"])
def test_samples_that_hardly_vary(shrinkage: str) -> None:
    data = torch.zeros(12, 20, dtype=torch.float64)
    data[0, 3] = 1.0  # two of three folds see nothing but zeros outside of their own
    covariance = fit_covariance(data, 4, shrinkage, solver="krylov").covariance
    assert covariance.rank <= 1
    assert bool(torch.isfinite(covariance.dense()).all())
    exact = fit_covariance(data, 4, shrinkage, solver="gram").covariance
    torch.testing.assert_close(covariance.dense(), exact.dense())


def test_linear_shrinkage_needs_all_axes() -> None:
    with pytest.raises(ValueError, match='"ledoit-wolf" needs all axes of the data, got the leading 3'):
        fit_covariance(randn(20, 9), 3, "ledoit-wolf", "krylov")
    data = randn(20, 3) @ randn(3, 30, seed=1)  # of which three axes are all
    found, exact = (fit_covariance(data, 3, "ledoit-wolf", s).covariance for s in ("krylov", "gram"))
    torch.testing.assert_close(found.dense(), exact.dense(), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("data", "arguments", "error", "message"),
    [
        (randn(9, 4), {}, ValueError, "leading axes: expected a rank, got None"),
        (randn(9, 4), {"rank": 0.5}, ValueError, "leading axes: expected a rank, got None"),
        (randn(9, 4), {"rank": 5}, ValueError, r"1 <= rank <= min\(N - 1, D\) = 4 .*, got 5"),
        (randn(3, 4), {"rank": 3}, ValueError, r"min\(N - 1, D\) = 2 for 3 samples of 4 dimensions, got 3"),
        (randn(3, 4), {"rank": 0}, ValueError, "got 0"),
        (randn(0, 4), {"rank": 1}, ValueError, "at least one sample, got none"),
        (randn(1, 4), {"rank": 1}, ValueError, "at least 2 samples to fit a covariance, got 1"),
        (randn(4), {"rank": 1}, ValueError, r"data of shape \(N, \*event_shape\), got \(4,\)"),
        (
            torch.full((7, 4), 0.1),
            {"rank": 1},
            ValueError,
            "data that vary, got 7 samples that are all equal",
        ),
        (torch.full((7, 4), 1 / 3).double(), {"rank": 1}, ValueError, "expected data that vary"),
        (torch.full((7, 4), math.nan), {"rank": 1}, ValueError, "NaN or infinite values in sample 0"),
        (randn(9, 4), {"rank": 1, "mirror": True}, ValueError, r"images to mirror.*shape \(4,\)"),
        (randn(9, 4), {"rank": 1, "groups": torch.arange(5)}, ValueError, "groups to be 9 integers"),
        (iter([randn(9, 4)]), {"rank": 1}, TypeError, "needs a tensor or array of all samples, got list_it"),
        (randn(9, 4) + 0j, {"rank": 1}, TypeError, "expected real numbers, got torch.complex128"),
        (1e200 * randn(20, 9), {"rank": 1}, ValueError, "data whose squares are finite in float64"),
        (randn(20, 9), {"rank": 1, "select": "heldout"}, ValueError, 'expected another solver, got "krylov"'),
    ],
)
def test_impossible_fits(data: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fit_covariance(data, solver="krylov", **arguments)


def test_solvers_are_chosen_by_shape_and_rank(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def chosen(count: int, dim: int, rank: int | None, mirror: bool = False) -> str:
        return solvers._choose(np.broadcast_to(np.float32(0), (count, 1, dim)), rank, mirror)

    assert chosen(60_000, 784, 100) == "dense", "too few dimensions for an iteration to pay"
    assert chosen(784, 60_000, None) == "gram"
    assert chosen(3000, 60_000, 100) == chosen(60_000, 3000, 100) == "krylov"
    assert chosen(60_000, 3000, None) == chosen(60_000, 3000, 1000) == "dense"
    assert chosen(3000, 60_000, 1000) == "gram"
    assert chosen(1600, 2000, None) == "gram"
    assert chosen(1600, 2000, None, mirror=True) == "dense", "twice as many samples"
    assert chosen(1600, 60_000, 100) == "gram"
    assert chosen(1600, 60_000, 100, mirror=True) == "krylov"
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert chosen(20_000, 200_000, 6000) == "gram"
    assert "need a square matrix of 3.2 GB" in caplog.text
    assert "ask for a rank below 5000" in caplog.text
    monkeypatch.setattr(solvers, "_LARGE", 20)
    used: list[int] = []
    original = solvers._solve_krylov
    monkeypatch.setattr(solvers, "_solve_krylov", lambda *a: (used.append(a[2]), original(*a))[1])
    fit_covariance(randn(50, 60), 4)
    fit_covariance(randn(50, 60), 20)
    fit_covariance(iter([randn(50, 60)]), 4)
    assert used == [4]
