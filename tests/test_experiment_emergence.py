"""Features, critical levels, rotations and gains: closed forms, and the Gaussian as its own model."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DTYPES, denoiser, tiny_unet
from torch import Tensor

from gaussnet import Covariance, EDMPrecond, GaussianDenoiser, karras_sigmas, open_images
from gaussnet.experiments import Setting, defaults, feature_emergence, run
from gaussnet.experiments.running import SUFFIXES
from gaussnet.flow import GaussianFlow
from gaussnet.plots.emergence import feature_emergence as draw
from gaussnet.plots.style import pyplot
from gaussnet.probes.emergence import (
    CRITICAL_SHARES,
    Features,
    emergence,
    emergence_level,
    feature_course,
    measured_course,
    perturbation_gains,
    predicted_emergence_level,
    select_features,
)
from gaussnet.probes.geometry import (
    gaussian_states,
    plane_coordinates,
    principal_shares,
    rotation_bounds,
    rotation_error,
    trajectory_rows,
    variance_preserving,
)
from gaussnet.probes.trajectories import Trajectory, solver_trajectory
from gaussnet.schedules import VPSchedule

EVENT = (2, 3, 4)
DIM = math.prod(EVENT)
GRID = karras_sigmas(128)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def gaussian(dtype: torch.dtype = torch.float64, rank: int = DIM) -> GaussianDenoiser:
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator, dtype=torch.float64))[0]
    order = torch.randperm(rank, generator=generator)
    eigvals = torch.logspace(1, -2, DIM, dtype=torch.float64)[:rank][order]  # not sorted
    mean = torch.randn(EVENT, generator=generator, dtype=torch.float64)
    tail = 0.005 if rank < DIM else 0.0
    return GaussianDenoiser(mean.to(dtype), Covariance(basis[:, :rank].to(dtype), eigvals.to(dtype), tail))


def first_states(count: int = 5, dtype: torch.dtype = torch.float64, level: float = 80.0) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return (level * torch.randn(count, *EVENT, generator=generator, dtype=torch.float64)).to(dtype)


# Features and their course ------------------------------------------------------------------------------


def test_features_are_eigenvectors_by_rank() -> None:
    base = gaussian()
    features = select_features(base, 4, 0.002)
    assert isinstance(base.covariance, Covariance)
    ordered = base.covariance.eigvals.sort(descending=True).values
    assert features.ranks[0] == 1
    assert features.ranks[-1] == DIM
    assert features.ranks == sorted(set(features.ranks))
    torch.testing.assert_close(features.eigvals, ordered[[rank - 1 for rank in features.ranks]])
    dense = base.covariance.eigvecs @ base.covariance.eigvals.diag() @ base.covariance.eigvecs.mT
    torch.testing.assert_close(dense @ features.eigvecs, features.eigvecs * features.eigvals)
    image = base.mean + 2.5 * features.directions(EVENT)[1]
    projected = features.project(image[None, None])[0, 0]
    torch.testing.assert_close(projected, 2.5 * torch.eye(len(features.ranks)).double()[1])


def test_features_lie_within_the_levels() -> None:
    assert float(select_features(gaussian(), 4, 0.02).eigvals.sqrt().min()) >= 0.2
    with pytest.raises(ValueError, match=r"at least two eigenvalues >= \(10 sigma_min\)\^2 = 25, got 0"):
        select_features(gaussian(), 4, 0.5)
    with pytest.raises(ValueError, match="at least 2 features, got 1"):
        select_features(gaussian(), 1, 0.002)


def test_course_is_that_of_the_flow() -> None:
    base, vp = gaussian(), VPSchedule()
    features, levels = select_features(base, 4, 0.002), GRID[:-1][::16]
    course = feature_course(features.eigvals, levels, 80.0)
    flow, start = GaussianFlow(base, vp), vp.time(80.0)
    x = first_states(1) * float(vp.alpha(start))
    mean = base.mean.flatten()
    c = (x.flatten(1) - vp.alpha(start) * mean) @ features.eigvecs
    for place, level in enumerate(levels.tolist()):
        t = vp.time(level)
        state = (flow.state(x, start, t).flatten(1) - vp.alpha(t) * mean) @ features.eigvecs
        denoised = (flow.denoised(x, start, t).flatten(1) - mean) @ features.eigvecs
        torch.testing.assert_close(course.psi[place] * c, state, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(course.xi[place] * c, denoised, rtol=1e-8, atol=1e-10)
    step = 1e-5
    shifted = [feature_course(features.eigvals, levels * math.exp(sign * step), 80.0).xi for sign in (1, -1)]
    torch.testing.assert_close(course.rate, (shifted[1] - shifted[0]) / (2 * step), rtol=1e-6, atol=1e-9)
    expected = (features.eigvals / (features.eigvals + levels[:, None] ** 2)).sqrt()
    torch.testing.assert_close(course.gain, expected)


def test_a_feature_emerges_fastest_at_its_critical_level() -> None:
    levels = torch.logspace(2, -3, 4001, dtype=torch.float64)
    lam = torch.tensor([4.0, 0.04], dtype=torch.float64)
    rate = feature_course(lam, levels, 1000.0).rate
    torch.testing.assert_close(levels[rate.argmax(0)], (2 * lam).sqrt(), rtol=5e-3, atol=0)
    centre = predicted_emergence_level(lam, CRITICAL_SHARES[1], torch.tensor([1000.0, 0.0]))
    torch.testing.assert_close(centre, lam.sqrt())


# Measured on trajectories -------------------------------------------------------------------------------


@dtypes
def test_the_gaussian_follows_its_closed_form(dtype: torch.dtype) -> None:
    base = gaussian(dtype)
    features = select_features(base, 5, 0.002)
    path = solver_trajectory(base, first_states(dtype=dtype), GRID)
    assert path.x.shape == (129, 5, *EVENT)
    assert path.denoised.shape == (128, 5, *EVENT)
    assert path.levels.equal(GRID)
    course, levels = feature_course(features.eigvals, GRID[:-1], 80.0), GRID[:-1]
    psi, xi = measured_course(path, features)
    torch.testing.assert_close(psi, course.psi, rtol=5e-3, atol=0)
    torch.testing.assert_close(xi, course.xi, rtol=5e-3, atol=0)
    shares = emergence(path, features)
    for share in CRITICAL_SHARES:
        found = emergence_level(shares, levels, share)
        expected = predicted_emergence_level(features.eigvals, share, levels).expand_as(found)
        torch.testing.assert_close(found, expected, rtol=5e-3, atol=0, msg=f"share {share}")


def test_solver_errors_are_of_second_order() -> None:
    base = gaussian()
    features, errors = select_features(base, 5, 0.002), list[float]()
    for steps in (64, 128):
        grid = karras_sigmas(steps)
        psi, _ = measured_course(solver_trajectory(base, first_states(), grid), features)
        exact = feature_course(features.eigvals, grid[:-1], 80.0).psi
        errors.append(float((psi / exact - 1).abs().max()))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.15)


def test_course_is_a_least_squares_fit() -> None:
    features = Features([1], torch.ones(1).double(), torch.eye(2).double()[:, :1], torch.zeros(2).double())
    start = torch.tensor([[1.0, 9.0], [3.0, 9.0]]).double().reshape(2, 1, 2)
    denoised = torch.tensor([[2.0, 5.0], [1.0, 5.0]]).double().reshape(2, 1, 2)
    levels = torch.tensor([2.0, 0.0], dtype=torch.float64)
    path = Trajectory(levels, torch.stack([start, denoised]), denoised[None])
    psi, xi = measured_course(path, features)
    assert psi.item() == pytest.approx(1)
    assert xi.item() == pytest.approx((1 * 2 + 3 * 1) / (1 + 9) * math.sqrt(1 + 2**2))


def test_emergence_level_by_hand() -> None:
    levels = torch.tensor([100.0, 10.0, 1.0, 0.1], dtype=torch.float64)
    shares = torch.tensor(
        [[0.0, 0.3, 0.8, 1.0], [0.6, 0.2, 0.4, 1.0], [-2.0, -1.0, 0.5, 1.0], [0.0, 1.5, 0.2, 1.0]]
    ).double()
    found = emergence_level(shares.T, levels, 0.5)
    # between 10 and 1: 0.2 of 0.5; at once; at the level itself; on the way up to 1.5
    expected = torch.tensor([10**0.6, 100.0, 1.0, 10 ** (2 - 1 / 3)], dtype=torch.float64)
    torch.testing.assert_close(found, expected)
    assert emergence_level(shares.T, levels, 1.0)[0].item() == pytest.approx(0.1)
    never = emergence_level(torch.tensor([0.0, 0.2, 0.3, 0.4]).double(), levels, 0.5)
    assert never.item() == pytest.approx(0.1), "at the last level at the latest"
    falls = emergence_level(torch.tensor([0.5, 0.2]).double(), levels[:2], 0.75)
    assert falls.item() == pytest.approx(10), "also if it falls"
    for share in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"a share in \(0, 1\], got"):
            emergence_level(shares.T, levels, share)


def test_emergence_is_a_share_of_the_last_projection() -> None:
    features = Features([2], torch.ones(1).double(), torch.eye(2).double()[:, 1:], torch.ones(2).double())
    denoised = torch.tensor([[9.0, 0.0], [9.0, 3.0], [9.0, 5.0]]).double().reshape(3, 1, 1, 2)
    path = Trajectory(torch.tensor([3.0, 2.0, 1.0, 0.0]), torch.zeros(4, 1, 1, 2), denoised)
    assert emergence(path, features).flatten().tolist() == [-0.25, 0.5, 1.0]


def test_a_feature_that_the_sample_lacks() -> None:
    features = Features([1], torch.ones(1).double(), torch.eye(2).double()[:, :1], torch.zeros(2).double())
    path = Trajectory(torch.tensor([2.0, 1.0, 0.0]), torch.zeros(3, 1, 1, 2), torch.zeros(2, 1, 1, 2))
    assert emergence(path, features).eq(1).all()


def test_predicted_levels_stay_on_the_grid() -> None:
    levels = torch.tensor([3.0, 0.5], dtype=torch.float64)
    found = predicted_emergence_level(torch.tensor([100.0, 1.0]).double(), 0.25, levels)
    assert found.tolist() == [3.0, 3.0]
    assert predicted_emergence_level(torch.tensor([1.0]).double(), 1.0, levels).tolist() == [0.5]
    (middle,) = predicted_emergence_level(torch.tensor([1.0]).double(), 0.8, levels).tolist()
    assert math.sqrt((1 + 0.5**2) / (1 + middle**2)) == pytest.approx(0.8)


# Perturbations ------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("batch_size", [None, 7])
def test_gains_of_the_gaussian(dtype: torch.dtype, batch_size: int | None) -> None:
    """Eq. 23."""
    base = gaussian(dtype)
    features = select_features(base, 5, 0.002)
    for place in (20, 70):
        grid, x = GRID[place:], first_states(3, dtype, float(GRID[place]))
        gains, across = perturbation_gains(base, x, grid, features, batch_size=batch_size)
        assert gains.shape == across.shape == (len(features.ranks), 3)
        lam = features.eigvals[:, None]
        expected = (lam / (lam + float(grid[0]) ** 2)).sqrt().expand_as(gains)
        torch.testing.assert_close(gains, expected, rtol=5e-3, atol=0)
        assert float(across.max()) < (1e-10 if dtype == torch.float64 else 2e-4)


class Turned(torch.nn.Module):
    """D = M x for a fixed matrix."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, x: Tensor, sigma: Any, class_labels: Any = None) -> Tensor:
        return (x.flatten(1) @ self.matrix.T).reshape(x.shape)


def test_gain_and_what_changes_across() -> None:
    matrix = torch.tensor([[0.25, 0.0], [-0.5, 1.0]], dtype=torch.float64)
    features = Features([1, 2], torch.ones(2).double(), torch.eye(2).double(), torch.zeros(2).double())
    grid = torch.tensor([2.0, 0.0], dtype=torch.float64)  # one step, to D
    gains, across = perturbation_gains(
        Turned(matrix), torch.ones(3, 1, 1, 2, dtype=torch.float64), grid, features
    )
    torch.testing.assert_close(gains, torch.tensor([[0.25] * 3, [1.0] * 3]).double())
    torch.testing.assert_close(across, torch.tensor([[0.5] * 3, [0.0] * 3]).double())
    asked: list[Tensor] = []
    spy = Turned(matrix)
    spy.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0].flatten(1)))
    perturbation_gains(spy, torch.zeros(1, 1, 1, 2).double(), grid, features, 0.1)
    size = 0.1 * math.sqrt(1 + 2**2)  # lam = 1, s = 2
    torch.testing.assert_close(asked[0], size * torch.cat([torch.eye(2), -torch.eye(2)]).double())
    with pytest.raises(ValueError, match="size > 0, got 0"):
        perturbation_gains(Turned(matrix), torch.ones(1, 1, 1, 2).double(), grid, features, 0.0)


# Geometry -----------------------------------------------------------------------------------------------


def test_principal_shares_by_hand() -> None:
    generator = torch.Generator().manual_seed(1)
    scales = torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    coefficients = torch.linalg.qr(torch.randn(9, 4, generator=generator, dtype=torch.float64))[0]
    coefficients = torch.linalg.qr(coefficients - coefficients.mean(0))[0] * scales  # centred, orthogonal
    basis = torch.linalg.qr(torch.randn(6, 4, generator=generator, dtype=torch.float64))[0]
    moving = coefficients @ basis.T + 5
    states = torch.stack([moving, torch.full_like(moving, 2.0)], 1).reshape(9, 2, 1, 2, 3)
    shares = principal_shares(states, [1, 2, 3])
    torch.testing.assert_close(shares[0], torch.tensor([9 / 14, 13 / 14, 1.0]).double())
    assert shares[1].tolist() == [1.0, 1.0, 1.0], "a point"
    assert principal_shares(states.float()).dtype == torch.float64
    for bad, counts in ((states[:1], [2]), (states, [0])):
        with pytest.raises(ValueError, match="two states or more and counts >= 1"):
            principal_shares(bad, counts)


def test_plane_coordinates_keep_lengths_and_angles() -> None:
    states = torch.tensor([[2.0, 0.0, 0.0], [1.0, 1.0, 2.0], [0.0, 0.0, 0.0], [1.0, -3.0, 0.0]])[:, None]
    coordinates, outside = plane_coordinates(states)
    expected = torch.tensor([[2.0, 0.0], [1.0, -1.0], [0.0, 0.0], [1.0, 3.0]]).double()
    torch.testing.assert_close(coordinates[:, 0], expected)
    torch.testing.assert_close(outside[:, 0], torch.tensor([0.0, 4 / 6, 0.0, 0.0]).double())


def test_variance_preserving_coordinates() -> None:
    levels = torch.tensor([3.0, 0.0], dtype=torch.float64)
    x = torch.ones(2, 1, 2, 2)
    assert variance_preserving(x, levels).flatten(1)[:, 0].tolist() == pytest.approx([1 / math.sqrt(10), 1.0])


@pytest.mark.parametrize("rank", [DIM, 7])
def test_the_gaussians_rotation(rank: int) -> None:
    """Eq. 103: the chord is the rotation formula, and the bound holds."""
    base, vp = gaussian(rank=rank), VPSchedule()
    x, flow = first_states(), GaussianFlow(base, vp)
    states = gaussian_states(base, x, GRID)
    error = rotation_error(states, GRID)
    start = vp.time(80.0)
    for place in (10, 60, 100, 128):
        t = vp.time(float(GRID[place]))
        state = flow.state(x * vp.alpha(start), start, t)
        turned = flow.rotation(x * vp.alpha(start), start, t)
        torch.testing.assert_close(variance_preserving(states, GRID)[place], state, rtol=1e-8, atol=1e-10)
        expected = (state - turned).flatten(1).norm(dim=1) / state.flatten(1).norm(dim=1)
        torch.testing.assert_close(error[place], expected, rtol=1e-7, atol=1e-12)
    bounds = rotation_bounds(base, states, GRID)
    assert (error <= bounds).all()
    assert float(error.max()) > 0.5 * float(bounds.max()), "not an empty bound"
    place = int((GRID - 0.3).abs().argmin())
    level = float(GRID[place])
    expected = base.covariance.apply(
        lambda lam: torch.minimum(lam.sqrt(), torch.tensor(level).double()) / (lam + 6400).sqrt(),
        x.flatten(1) - base.mean.flatten(),
    ).norm(dim=1)
    torch.testing.assert_close(bounds[place] * states[place].flatten(1).norm(dim=1), expected)


def test_a_trajectory_that_ends_above_0_stays_within_the_bound() -> None:
    base, levels = gaussian(), GRID[:90]
    states = gaussian_states(base, first_states(), levels)
    error = rotation_error(states, levels)
    assert (error <= rotation_bounds(base, states, levels)).all()
    assert error[[0, -1]].eq(0).all()


def test_a_straight_trajectory_rotates_exactly() -> None:
    ends = first_states(2)
    levels = torch.tensor([5.0, 3.0, 1.0, 0.5], dtype=torch.float64)
    along = ((levels - 0.5) / 4.5).reshape(-1, 1, 1, 1, 1)
    x = along * ends + (1 - along) * ends.flip(0)
    assert float(rotation_error(x, levels).max()) < 1e-14
    torch.testing.assert_close(plane_coordinates(x)[1], torch.zeros(4, 2).double())


@dtypes
def test_closed_form_states(dtype: torch.dtype) -> None:
    base, x = gaussian(dtype), first_states(dtype=dtype)
    states = gaussian_states(base, x, GRID[::32])
    assert states.dtype == torch.float64
    assert states[0].equal(x.double())
    for state, level in zip(states[1:], GRID[::32].tolist()[1:], strict=True):
        torch.testing.assert_close(state, base.flow(x.double(), 80.0, level))


def test_rows_of_the_closed_form_deviate_by_nothing() -> None:
    base = gaussian()
    path = gaussian_states(base, first_states(), GRID)
    rows = trajectory_rows(base, path, GRID, range(10, 15))
    geometry = [row for row in rows if row["kind"] == "geometry"]
    states = [row for row in rows if row["kind"] == "state"]
    assert [row["seed"] for row in geometry] == [10, 11, 12, 13, 14]
    assert len(states) == 5 * 129
    for row in geometry:
        assert (row["pc2"], row["pc3"]) == pytest.approx((row["gaussian_pc2"], row["gaussian_pc3"]))
        assert 0.9 < row["pc2"] < row["pc3"] < 1
        assert row["within_bound"]
        own = [state for state in states if state["seed"] == row["seed"]]
        assert row["rotation_error"] == max(state["rotation_error"] for state in own)
        assert row["rotation_bound"] == max(state["rotation_bound"] for state in own)
    assert max(row["deviation"] for row in states) < 1e-12
    moved = trajectory_rows(base, path + (GRID < 1).double().reshape(-1, 1, 1, 1, 1), GRID, range(5))
    deviation = {row["sigma"]: row["deviation"] for row in moved if row["kind"] == "state"}
    for level in (float(GRID[70]), float(GRID[120]), 0.0):
        expected = 0 if level >= 1 else 1 / math.sqrt(1 + level**2)
        assert deviation[level] == pytest.approx(expected, abs=1e-12), level


# The experiment -----------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"seeds": 18, "steps": 48, "features": 3, "gain_sigmas": [10.0, 1.0], "gain_seeds": 2}


def setting(**options: Any) -> Setting:
    return Setting("gaussian", open_images("digits").subset(range(300)), **options)


def rows_of(path: Path, kind: str) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["kind"] == kind]


def test_the_gaussian_as_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = defaults(feature_emergence, **SMALL)
    reading = run("feature-emergence", feature_emergence, setting(), options, tmp_path)
    assert {path.suffix for path in tmp_path.iterdir() if path.is_file()} == set(SUFFIXES)
    assert (tmp_path / "feature-emergence.png").read_bytes().startswith(b"\x89PNG")
    table = tmp_path / "feature-emergence.csv"
    exact = {(row["feature"], row["sigma"]): row for row in rows_of(table, "closed form")}
    courses = rows_of(table, "course")
    assert len(courses) == 2 * len(exact)  # in two units
    for row in courses:
        for name in ("psi", "xi"):
            found, expected = float(row[name]), float(exact[row["feature"], row["sigma"]][name])
            assert found == pytest.approx(expected, rel=0.05), (name, row)
    critical, gains = rows_of(table, "critical"), rows_of(table, "gain")
    assert len(critical) == 18 * 3 * 3
    assert len(gains) == 2 * 3 * 2
    for row in critical:
        assert float(row["level"]) == pytest.approx(float(row["predicted"]), rel=0.04), row
    for row in gains:
        assert float(row["gain"]) == pytest.approx(float(row["predicted"]), rel=0.04), row
    assert sorted({float(row["sigma"]) for row in gains}) == pytest.approx([1, 10], rel=0.15)
    assert {int(row["seed"]) for row in rows_of(table, "geometry")} == set(range(18))
    assert reading.table[0]["eigenvector"] == 1
    assert reading.table[0]["gain off by"] < 0.01
    assert "emerge in the order" in reading.text
    assert "18 of 18 trajectories stay within" in reading.text
    monkeypatch.setattr(feature_emergence, "measure", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(feature_emergence, "draw", lambda *_: pyplot().figure())
    assert run("feature-emergence", feature_emergence, setting(), options, tmp_path) == reading


@pytest.mark.parametrize("name", ["edm", "iddpm"])
def test_levels_are_those_of_the_network(name: str, tmp_path: Path) -> None:
    edm = EDMPrecond(tiny_unet(), sigma_min=0.01, sigma_max=50.0)
    model: Any = edm if name == "edm" else denoiser("iddpm", torch.float32)
    model.save_pretrained(tmp_path)
    data = open_images("digits").subset(range(300))
    rows = feature_emergence.measure(
        Setting(str(tmp_path), data), defaults(feature_emergence, **SMALL), "psi"
    )
    found = torch.tensor(sorted({row["sigma"] for row in rows}, reverse=True)).double()
    if name == "edm":
        torch.testing.assert_close(found, karras_sigmas(48, 0.01, 50.0)[:-1], rtol=1e-6, atol=0)
        return
    table = model.u[: model.M].double()
    gaps = (found[:, None] - table).abs().amin(1) / found
    assert float(gaps.max()) < 1e-6, "levels that it was trained at"
    assert 0.5 * 48 < len(found) <= 48
    assert float(found[0]) == pytest.approx(float(table[(table - 80).abs().argmin()]), rel=1e-6)


def test_a_level_of_the_grid_is_measured_once() -> None:
    changed = {"steps": 5, "gain_sigmas": [10.0, 9.99, 1.23456789, 0.5]}
    options = defaults(feature_emergence, **{**SMALL, **changed})
    units = feature_emergence.units(setting(), options)
    gains = [unit for unit in units if unit.startswith("gain")]
    assert gains == ["gain sigma=9.99", "gain sigma=1.23456789", "gain sigma=0.5"]
    rows = [row for unit in gains for row in feature_emergence.measure(setting(), options, unit)]
    assert len({(row["feature"], row["sigma"], row["seed"]) for row in rows}) == len(rows)


def test_a_seed_is_the_same_in_every_unit() -> None:
    options = defaults(feature_emergence, **{**SMALL, "steps": 12})
    few, one = (
        [
            {name: value for name, value in row.items() if name != "kind"}
            for row in feature_emergence.measure(setting(batch=2), options, f"trajectory seeds={where}")
            if row.get("seed") == 3 and row["kind"] == "state"
        ]
        for where in ("0-4", "3-3")
    )
    assert len(few) == 13
    for a, b in zip(few, one, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seeds": 0}, "seeds >= 1, got 0"),
        ({"gain_seeds": 0}, "gain_seeds >= 1, got 0"),
        ({"steps": 1}, "steps >= 2, got 1"),
        ({"features": 1}, "features >= 2, got 1"),
        ({"sigma_min": 0.0}, "0 < sigma_min < sigma_max, got 0.0 and 80"),
        ({"gain_sigmas": [100.0, 1.0]}, r"gain_sigmas within \[0.002, 80\], got \[100.0, 1.0\]"),
        ({"perturbation": 0.0}, "perturbation > 0, got 0"),
    ],
)
def test_impossible_options(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        feature_emergence.units(setting(), defaults(feature_emergence, **changed))


def test_a_figure_needs_all_kinds() -> None:
    with pytest.raises(ValueError, match="rows of the kind 'closed form', got none"):
        draw([{"kind": "gain"}])
