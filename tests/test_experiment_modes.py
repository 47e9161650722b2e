"""Modes and ranks: truncation against dense matrices, shares against their definition, summaries by hand."""

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gaussnet import Covariance, GaussianDenoiser, GaussianMixtureDenoiser, open_images
from gaussnet.experiments import Setting, defaults, modes_ranks, run
from gaussnet.plots.modes import mode_panels
from gaussnet.probes import unexplained_variance
from gaussnet.probes.modes import FULL, equal_error, minimal_ranks, modes_and_ranks, truncated

DTYPES = [torch.float64, torch.float32]


def digits(count: int = 120, dtype: torch.dtype = torch.float64) -> Tensor:
    data = open_images("digits")
    return data.to_float(data.raw(range(count)))[..., 2:6, 2:6].to(dtype)  # (N, 1, 4, 4)


def setting(model: str = "mixture-3", **changed: Any) -> Setting:
    data = open_images("digits").subset(range(160))
    return Setting(model, data, **{"shrinkage": "none", "batch": 64, **changed})


def dense(covariance: Covariance) -> Tensor:
    return covariance.apply(lambda lam: lam, torch.eye(covariance.dim, dtype=covariance.eigvals.dtype))


@pytest.mark.parametrize("tail", ["mean", "zero"])
@pytest.mark.parametrize("rank", [1, 5, 15])
def test_truncation_against_the_dense_matrix(rank: int, tail: str) -> None:
    data = digits()
    full = GaussianDenoiser.fit(data, shrinkage="none")
    eigvals, eigvecs = torch.linalg.eigh(torch.cov(data.flatten(1).T, correction=0))
    rest = float(eigvals[:-rank].mean()) if tail == "mean" else 0.0
    kept = eigvecs[:, -rank:]
    expected = kept @ torch.diag(eigvals[-rank:]) @ kept.mT + rest * (torch.eye(16).double() - kept @ kept.mT)
    cut = truncated(full, rank, tail)
    assert isinstance(cut, GaussianDenoiser)
    assert torch.allclose(dense(cut.covariance), expected, atol=1e-12)
    if tail == "mean":
        assert float(cut.variance) == pytest.approx(float(full.variance)), "the trace is kept"


def test_truncation_sorts() -> None:
    covariance = Covariance(torch.eye(4)[:, :3], torch.tensor([1.0, 5.0, 3.0]), tail=2.0)
    cut = truncated(GaussianDenoiser(torch.zeros(4), covariance), 1)
    assert isinstance(cut, GaussianDenoiser)
    assert torch.allclose(dense(cut.covariance), torch.diag(torch.tensor([2.0, 5.0, 2.0, 2.0])))


@pytest.mark.parametrize("tail", ["mean", "zero"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_truncation_of_a_mixture_is_its_fit_of_that_rank(tail: str, dtype: torch.dtype) -> None:
    data = digits(dtype=dtype)
    full = GaussianMixtureDenoiser.fit(data, 4, shrinkage="none")
    x = data[:9] + 0.5 * torch.randn(9, *data.shape[1:], dtype=dtype)
    for rank in (2, 12):
        fitted = GaussianMixtureDenoiser.fit(data, 4, rank, shrinkage="none", tail=tail)
        cut = truncated(full, rank, tail)
        assert isinstance(cut, GaussianMixtureDenoiser)
        assert torch.equal(cut.ranks, fitted.ranks)
        assert torch.allclose(cut(x, 0.5), fitted(x, 0.5), atol=1e-10 if dtype == torch.float64 else 1e-4)


def test_full_rank_and_more_change_nothing() -> None:
    data = digits(40)
    labels = torch.arange(40) % 3
    full = GaussianMixtureDenoiser.fit(data, labels=labels, shrinkage="none")
    assert int(full.ranks.max()) < 16
    assert truncated(full, FULL, "zero") is full
    x = data + 0.3 * torch.randn_like(data)
    assert torch.allclose(truncated(full, 16)(x, 0.3, labels), full(x, 0.3, labels), atol=1e-12)


@pytest.mark.parametrize("rank", [0, "most", 1.5])
def test_truncation_refuses(rank: Any) -> None:
    full = GaussianDenoiser.isotropic(torch.zeros(3), 1.0)
    with pytest.raises(ValueError, match="expected rank >= 1 or 'full'"):
        truncated(full, rank)
    with pytest.raises(ValueError, match="expected tail to be one of mean, zero"):
        truncated(full, 1, "median")


@pytest.mark.parametrize("kind", ["noised", "noise"])
def test_shares_are_those_of_the_model(kind: str) -> None:
    data = digits()
    model = GaussianMixtureDenoiser.fit(data, 5, shrinkage="none")
    mixture = GaussianMixtureDenoiser.fit(data, 2, shrinkage="none")
    clean, sigmas, ranks = data[:20], (0.2, 1.0), (3, FULL)
    rows = modes_and_ranks(
        model, mixture, ranks, clean, sigmas, torch.Generator().manual_seed(3), kind=kind, batch_size=7
    )
    assert [(row["rank"], row["sigma"]) for row in rows] == [(3, 0.2), (3, 1.0), (FULL, 0.2), (FULL, 1.0)]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(3), dtype=clean.dtype)
    for row in rows:
        sigma, approx = row["sigma"], truncated(mixture, row["rank"])
        x = sigma * noise + (clean if kind == "noised" else 0)
        shares = unexplained_variance(model.score(x, sigma), approx.score(x, sigma))
        assert row["mean"] == pytest.approx(float(shares.mean()), rel=1e-9), row
        assert row["std"] == pytest.approx(float(shares.std(correction=0)), rel=1e-7), row
        assert (row["components"], row["count"], row["queries"]) == (2, 20, kind)
        assert row["axes"] == (3 if row["rank"] == 3 else 16)


def test_a_gaussian_explains_itself() -> None:
    """What is left at rank R is what the dropped axes make of the score, in closed form."""
    data = digits()
    model = GaussianDenoiser.fit(data, shrinkage="none")
    lam, eigvecs = model.covariance.eigvals, model.covariance.eigvecs
    rows = modes_and_ranks(
        model, model, (4, FULL), data[:30], (0.5,), torch.Generator().manual_seed(1), tail="zero"
    )
    noise = torch.randn(30, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u = (data[:30] + 0.5 * noise - model.mean).flatten(1) @ eigvecs
    score = u / (lam + 0.25)
    wrong = (u / 0.25 - score)[:, 4:]  # eigenvalues of 0 in place of lam
    shares = wrong.square().sum(1) / score.square().sum(1)
    assert rows[0]["mean"] == pytest.approx(float(shares.mean()), rel=1e-9)
    assert rows[1]["mean"] == 0


def made_up_rows() -> list[dict[str, Any]]:
    """The share is 8/(modes axes), at sigma = 2 with nothing gained beyond 8 axes."""
    return [
        {"modes": modes, "rank": rank, "axes": axes, "sigma": sigma, "mean": 8 / (modes * seen), "count": 5}
        for sigma in (1.0, 2.0)
        for modes in (4, 1, 2)
        for rank, axes in ((FULL, 32), (2, 2), (8, 8))
        for seen in (axes if sigma == 1 else min(axes, 7.9),)
    ]


def test_minimal_ranks() -> None:
    found = {
        (row["sigma"], row["modes"]): (row["rank"], row["axes"]) for row in minimal_ranks(made_up_rows())
    }
    assert found == {
        **{(1.0, modes): (FULL, 32) for modes in (1, 2, 4)},
        **{(2.0, modes): (8, 8) for modes in (1, 2, 4)},
    }
    loose = minimal_ranks(made_up_rows(), tol=3.0)  # four times full rank's share: a quarter of the axes
    assert {row["rank"] for row in loose if row["sigma"] == 1} == {8}
    assert next(row["mean"] for row in loose if (row["sigma"], row["modes"]) == (1, 2)) == 0.5
    with pytest.raises(ValueError, match="expected rows of full rank, got none for 4 modes at sigma = 1"):
        minimal_ranks([row for row in made_up_rows() if row["rank"] != FULL])
    with pytest.raises(ValueError, match=r"expected shares that are numbers, got nan for \d+ modes at sigma"):
        minimal_ranks([{**row, "mean": math.nan} for row in made_up_rows()])


def test_equal_error() -> None:
    points = equal_error(made_up_rows(), 1.0, 0.4)  # modes * axes = 20, linear in logarithms
    assert [point["modes"] for point in points] == [1, 2, 4]
    assert [point["axes"] for point in points] == pytest.approx([20, 10, 5])
    points = equal_error(made_up_rows(), 1.0, 0.2)  # 40, of which one mode has 32 at most
    assert [point["modes"] for point in points] == [2, 4]
    assert [point["axes"] for point in points] == pytest.approx([20, 10])
    points = equal_error(made_up_rows(), 1.0, 2.0)  # 4: the fewest axes measured are enough from two modes on
    assert [point["axes"] for point in points] == pytest.approx([4, 2, 2])


def test_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options = defaults(
        modes_ranks, modes=[1, 3, 100], ranks=[4, 64, 300], sigmas=[0.3, 2.0], queries=16, contour_sigma=0.4
    )
    one = setting(cache=tmp_path / "parts")
    assert modes_ranks.units(one, options) == ["modes=1", "modes=3"]
    assert "160 images hold at most 80 modes" in caplog.text
    assert "ranks of 64 or more" in caplog.text
    reading = run("modes-ranks", modes_ranks, one, options, tmp_path)
    for suffix in ("csv", "png", "pdf", "md"):
        assert (tmp_path / f"modes-ranks.{suffix}").stat().st_size > 100, suffix
    lines = (tmp_path / "modes-ranks.csv").read_text().splitlines()
    assert lines[0] == "modes,components,rank,axes,sigma,queries,mean,std,count"
    assert len(lines) == 1 + 2 * 2 * 2  # modes, ranks (4 and full), levels
    assert "Left out, too few images: modes 100." in reading.text
    assert "Left out, no fewer than the dimensions: rank 64, 300." in reading.text
    # The model is the mixture of three: they explain it all, at full rank alone.
    for row in reading.table:
        assert (row["best modes"], row["its share"]) == (3, 0)
        assert row["modes 1"] > 0
        assert row["minimal rank, best modes"] == FULL
    assert "is reached by modes (axes of each, at most): 3 (" in reading.text
    monkeypatch.setattr(modes_ranks, "modes_and_ranks", pytest.fail)
    assert run("modes-ranks", modes_ranks, one, options, tmp_path) == reading


def test_nothing_is_left_out_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    options = defaults(modes_ranks, modes=[2, 1], ranks=[8, FULL])
    assert modes_ranks.units(setting(), options) == ["modes=1", "modes=2"]
    assert not caplog.records
    rows = [{**row, "queries": "noised"} for row in made_up_rows()]
    text = modes_ranks.read(rows, defaults(modes_ranks, modes=[1, 2, 4], ranks=[2, 8])).text
    assert "Left out" not in text


def test_where_more_modes_do_worse() -> None:
    rows = [{**row, "mean": row["mean"] * row["modes"] ** 3} for row in made_up_rows()]
    options = defaults(modes_ranks, modes=[1, 2, 4], ranks=[2, 8], contour_sigma=1.0)
    text = modes_ranks.read(rows, options).text
    assert text.endswith(" At sigma = 1, no other number of modes reaches what modes 1 does at full rank.")
    figure: Any = modes_ranks.draw(rows, options)
    contours = figure.subfigs[1].axes[2]
    assert contours.get_title() == "Equal error, $\\sigma$ = 1"
    assert len(contours.collections) == 2, "the picture and its contours, no line in red"
    better: Any = modes_ranks.draw(made_up_rows(), options)
    assert len(better.subfigs[1].axes[2].collections) == 3


def test_ranks_of_the_command() -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    modes_ranks.add_arguments(parser)
    assert parser.parse_args(["--ranks", "4", FULL, "12"]).ranks == [4, FULL, 12]
    with pytest.raises(argparse.ArgumentError, match="expected a rank >= 1 or full, got 0"):
        parser.parse_args(["--ranks", "0"])
    with pytest.raises(argparse.ArgumentError, match="invalid _rank value: 'most'"):
        parser.parse_args(["--ranks", "most"])


def test_figure_of_one_number_of_modes() -> None:
    """No gain to show, no contours; a panel without a point where the model is explained."""
    rows = [
        {**row, "sigma": sigma, "mean": 0.0 if row["rank"] == 8 else row["mean"]}
        for row in made_up_rows()
        for sigma in ((0.1, 0.2, 0.5, 1.0, 2.0, 5.0) if row["sigma"] == 1 else ())
        if row["modes"] == 1
    ]
    figure: Any = modes_ranks.draw(rows, defaults(modes_ranks, contour_sigma=1.0))
    panels, (gain, _, contours, *_) = figure.subfigs[0].axes, figure.subfigs[1].axes
    assert [len(panel.get_lines()) for panel in panels] == [2] * 6, "no line at 0"
    assert [panel.get_xlabel() for panel in panels] == [""] * 2 + ["modes"] * 4, "below the others alone"
    assert gain.get_legend() is None
    assert len(contours.collections) == 1
    with pytest.raises(ValueError, match="expected at least one row, got none"):
        mode_panels([], 1.0)
    same = [{**row, "mean": 0.5} for row in made_up_rows() if row["sigma"] == 1]
    contours = mode_panels(same, 1.0).subfigs[1].axes[2]
    assert len(contours.collections) == 1, "no lines of equal error where all is equal"


def test_figure() -> None:
    rows = made_up_rows()
    figure: Any = modes_ranks.draw(rows, defaults(modes_ranks, contour_sigma=1.0))
    panels = [axis for part in figure.subfigs for axis in part.axes if axis.get_label() != "<colorbar>"]
    titles = [
        "$\\sigma$ = 1",
        "$\\sigma$ = 2",
        "Modes beyond 1",
        "Minimal rank",
        "Equal error, $\\sigma$ = 1",
    ]
    assert [panel.get_title() for panel in panels] == titles
    assert [text.get_text() for text in figure.subfigs[0].legends[0].get_texts()] == ["2", "8", FULL]
    for line, axes in zip(panels[0].get_lines(), (2, 8, 32), strict=True):
        assert np.asarray(line.get_xydata()) == pytest.approx(
            np.array([(k, 8 / k / axes) for k in (1, 2, 4)])
        )
    gains = [line.get_ydata()[0] for line in panels[2].get_lines()[:2]]
    assert gains == pytest.approx([1 / 8, 3 / 16])  # 1/4 of one mode, less 1/8 and 1/16
    assert list(panels[3].get_lines()[0].get_ydata()) == [32, 8]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"modes": [0, 2]}, "expected modes >= 1, got 0"),
        ({"modes": [99]}, "expected modes <= 80, two images each, got .99."),
        ({"sigmas": [0.0]}, "expected sigmas > 0 and queries >= 1"),
        ({"queries": 0}, "expected sigmas > 0 and queries >= 1"),
    ],
    ids=str,
)
def test_experiment_refuses(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        modes_ranks.units(setting(), defaults(modes_ranks, **changed))


def test_components_of_different_ranks() -> None:
    """A mixture pads the smaller ones: the padding is no axis."""
    small = Covariance(torch.eye(4).double()[:, :1], torch.tensor([2.0]).double(), tail=0.5)
    large = Covariance(torch.eye(4).double()[:, :3], torch.tensor([1.0, 3.0, 2.0]).double(), tail=0.5)
    less = Covariance(torch.eye(4).double()[:, 1:3], torch.tensor([3.0, 2.0]).double(), tail=0.0)
    weights, means = torch.tensor([1.0, 2.0]).double(), torch.eye(4).double()[:2]
    cut = truncated(GaussianMixtureDenoiser(weights, means, [small, large]), 2, "zero")
    bare = Covariance(small.eigvecs, small.eigvals, tail=0.0)
    expected = GaussianMixtureDenoiser(weights, means, [bare, less])
    x = torch.randn(6, 4, dtype=torch.float64)
    assert isinstance(cut, GaussianMixtureDenoiser)
    assert cut.ranks.tolist() == [1, 2]
    assert torch.allclose(cut(x, 0.4), expected(x, 0.4), atol=1e-12)
    assert torch.allclose(cut.responsibilities(x, 0.4), expected.responsibilities(x, 0.4), atol=1e-12)
