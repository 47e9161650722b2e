"""The Gaussian's trajectory against a numerical ODE, and the paper's statements about it."""

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from gaussnet.covariance import Covariance
from gaussnet.denoisers import GaussianDenoiser
from gaussnet.flow import GaussianFlow
from gaussnet.schedules import DiscreteSchedule, EDMSchedule, Schedule, VPSchedule

DIM = 6
SCHEDULES: dict[str, tuple[Schedule, float, float]] = {  # schedule, start, end
    "EDM": (EDMSchedule(), 20.0, 0.05),
    "VP": (VPSchedule(), 1.0, 0.02),
    "DDPM": (DiscreteSchedule.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)), 990.0, 20.0),
}
# Between two nodes a table is smooth; an integrator that steps over its kinks crawls.
TABLE = DiscreteSchedule(torch.tensor([0.99, 0.9, 0.6, 0.2, 0.01]))
schedules = pytest.mark.parametrize("name", SCHEDULES)
ranks = pytest.mark.parametrize("rank", [DIM, 3, 0])


def gaussian(rank: int) -> GaussianDenoiser:
    generator = torch.Generator().manual_seed(rank)
    basis = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator, dtype=torch.float64))[0]
    eigvals = torch.tensor([9.0, 4.0, 1.0, 0.3, 0.1, 0.01], dtype=torch.float64)[:rank]
    mean = torch.randn(1, 2, 3, generator=generator, dtype=torch.float64)
    return GaussianDenoiser(mean, Covariance(basis[:, :rank].contiguous(), eigvals, tail=0.05))


def start_state(flow: GaussianFlow, start: float) -> torch.Tensor:
    noise = torch.randn(4, 1, 2, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return float(flow.schedule.sigma(start)) * noise


@pytest.mark.parametrize("name", ["EDM", "VP", "table"])
@ranks
def test_state_solves_the_ode(name: str, rank: int) -> None:
    schedule, start, end = SCHEDULES.get(name, (TABLE, 3.0, 2.0))
    flow = GaussianFlow(gaussian(rank), schedule)
    x = start_state(flow, start)

    def field(t: float, y: np.ndarray) -> np.ndarray:
        return flow.velocity(torch.from_numpy(y).reshape(x.shape), t).numpy().ravel()

    solution = solve_ivp(field, (start, end), x.numpy().ravel(), method="DOP853", rtol=1e-9, atol=1e-9)
    assert solution.nfev < 3000
    error = (flow.state(x, start, end).numpy().ravel() - solution.y[:, -1]) / np.linalg.norm(
        solution.y[:, -1]
    )
    assert np.linalg.norm(error) < 1e-6


@schedules
@ranks
def test_coefficients_are_those_of_the_trajectory(name: str, rank: int) -> None:
    """Eq. 15-20: along each eigenvector, state and denoised image are psi and xi times the start."""
    schedule, start, end = SCHEDULES[name]
    base = gaussian(rank)
    flow = GaussianFlow(base, schedule)
    x = start_state(flow, start)
    mean = base.mean.flatten()
    c = x.flatten(1) - schedule.alpha(start) * mean
    state = flow.state(x, start, end).flatten(1) - schedule.alpha(end) * mean
    denoised = flow.denoised(x, start, end).flatten(1) - mean
    expected = base.covariance.apply(lambda lam: flow.psi(end, start, lam), c)
    torch.testing.assert_close(state, expected, rtol=1e-9, atol=1e-11)
    expected = base.covariance.apply(lambda lam: flow.xi(end, start, lam), c)
    torch.testing.assert_close(denoised, expected, rtol=1e-9, atol=1e-11)


def test_alpha_one_reduces_to_the_edm_form() -> None:
    flow, lam = GaussianFlow(gaussian(3)), torch.tensor([0.0, 0.5, 4.0], dtype=torch.float64)
    torch.testing.assert_close(flow.psi(2.0, 80.0, lam), torch.sqrt((4 + lam) / (6400 + lam)))
    torch.testing.assert_close(flow.xi(2.0, 80.0, lam), lam / torch.sqrt((4 + lam) * (6400 + lam)))


@schedules
@pytest.mark.parametrize("coefficient", ["psi", "xi"])
def test_rates_are_time_derivatives(name: str, coefficient: str) -> None:
    schedule, start, end = SCHEDULES[name]
    flow, lam = GaussianFlow(gaussian(3), schedule), torch.tensor(0.7, dtype=torch.float64)
    function = getattr(flow, coefficient)
    t, h = 0.5 * (start + end) + 0.25, 1e-5
    numerical = (function(t + h, start, lam) - function(t - h, start, lam)) / (2 * h)
    assert flow.rate(function, t, start, lam).item() == pytest.approx(numerical.item(), rel=1e-6)


def test_sample_is_a_linear_filter_of_the_noise() -> None:
    """Eq. 17, 21."""
    base = gaussian(DIM)
    vp = VPSchedule()
    flow = GaussianFlow(base, vp)
    x = start_state(flow, 1.0)
    covariance = base.covariance
    c = (x.flatten(1) - vp.alpha(1.0) * base.mean.flatten()) @ covariance.eigvecs
    gains = torch.sqrt(covariance.eigvals / (vp.sigma(1.0) ** 2 + covariance.eigvals * vp.alpha(1.0) ** 2))
    expected = base.mean.flatten() + (gains * c) @ covariance.eigvecs.T
    torch.testing.assert_close(flow.state(x, 1.0, 0.0).flatten(1), expected)


@pytest.mark.parametrize("name", ["EDM", "VP"])
def test_features_emerge_in_the_order_of_their_variance(name: str) -> None:
    """The rate of xi peaks where sigma_t = alpha_t sqrt(lam), in units of log(sigma/alpha)."""
    schedule, start, _ = SCHEDULES[name]
    flow = GaussianFlow(gaussian(3), schedule)
    centres: list[float] = []
    for lam in (0.05, 0.5, 5.0):
        centre = flow.critical_time(lam)
        assert (schedule.sigma(centre) / schedule.alpha(centre)).item() == pytest.approx(lam**0.5)
        levels = torch.exp(torch.linspace(-6, 4, 4001, dtype=torch.float64))
        xi = flow.xi(schedule.time(levels), start, lam)
        # xi falls as 1/sqrt(1 + level^2/lam): steepest in log level where level^2 = 2 lam.
        steepest = levels[:-1][xi.diff().argmin()]
        assert steepest.item() == pytest.approx((2 * lam) ** 0.5, rel=0.01)
        centres.append(float(centre))
    assert centres == sorted(centres), "sampling goes down in time: larger variance has to come first"


@schedules
def test_perturbations_reach_the_sample_scaled_by_the_gain(name: str) -> None:
    """Eq. 23, by perturbing a state and following both to the end."""
    schedule, _, _ = SCHEDULES[name]
    t = {"EDM": 3.0, "VP": 0.4, "DDPM": 300.0}[name]
    flow = GaussianFlow(gaussian(3), schedule)
    x = start_state(flow, t)
    delta = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    end = schedule.time(0.0)
    change = flow.state(x + delta, t, end) - flow.state(x, t, end)
    torch.testing.assert_close(change, flow.propagate(delta, t), rtol=1e-8, atol=1e-10)
    covariance = flow.gaussian.covariance
    first = covariance.eigvecs[:, 0].reshape(1, 1, 2, 3)
    gain = flow.gain(t, covariance.eigvals[0])
    torch.testing.assert_close(flow.propagate(first, t), gain * first)


def test_a_vp_process_that_begins_without_noise_begins_at_time_0() -> None:
    schedule = VPSchedule(beta_min=0.0)
    levels = torch.tensor([0.0, 1e-3, 1.0, 100.0], dtype=torch.float64)
    times = schedule.time(levels)
    assert float(times[0]) == 0
    torch.testing.assert_close(schedule.sigma(times) / schedule.alpha(times), levels)
    x = torch.ones(1, 1, 2, 3, dtype=torch.float64)
    assert GaussianFlow(gaussian(3), schedule).rotation(x, 1.0, 0.5).isfinite().all()


def test_rotation_misses_exactly_its_remainder() -> None:
    """Eq. 22, 104, 108, with alpha_T next to 0."""
    base = gaussian(DIM)
    vp = VPSchedule(beta_d=60.0)  # alpha(1) = 3e-7
    flow = GaussianFlow(base, vp)
    x = start_state(flow, 1.0)
    for t in (0.05, 0.2, 0.5):
        alpha, sigma = vp.alpha(t), vp.sigma(t)
        x_0 = flow.state(x, 1.0, 0.0)
        rotated = flow.rotation(x, 1.0, t)
        torch.testing.assert_close(rotated, alpha * x_0 + sigma * x, rtol=0, atol=1e-5)
        missed = (flow.state(x, 1.0, t) - rotated).flatten(1)
        expected = base.covariance.apply(lambda lam, t=t: flow.rotation_remainder(t, lam), x.flatten(1))
        torch.testing.assert_close(missed, expected, rtol=0, atol=1e-5)


def test_rotation_remainder_is_negative_and_bounded() -> None:
    flow, vp = GaussianFlow(gaussian(DIM), VPSchedule()), VPSchedule()
    lams = torch.logspace(-4, 4, 33, dtype=torch.float64)
    t = torch.linspace(1e-4, 1, 2001, dtype=torch.float64)
    for lam in lams:
        remainder = flow.rotation_remainder(t, lam)
        assert bool((remainder <= 0).all())
        assert bool((-remainder <= flow.rotation_bound(t, lam)).all())
        alpha, sigma = vp.alpha(t), vp.sigma(t)
        direct = torch.sqrt(sigma**2 + lam * alpha**2) - alpha * lam.sqrt() - sigma  # Eq. 104
        torch.testing.assert_close(remainder, direct, rtol=0, atol=1e-12)
        # Eq. 106, 107: where sigma = alpha sqrt(lam), J is (2 - sqrt(2)) sigma
        crossing = flow.critical_time(lam)
        expected = -(2 - 2**0.5) * vp.sigma(crossing)
        torch.testing.assert_close(flow.rotation_remainder(crossing, lam), expected)
    # ... which is not its extreme: for large lam, |J| comes near to 1, which no bound of 0.59 allows.
    assert flow.rotation_remainder(t, 1e4).min().item() == pytest.approx(-0.957, abs=2e-3)


@pytest.mark.parametrize("name", ["EDM", "VP"])
def test_without_variance_and_noise_nothing_is_undefined(name: str) -> None:
    thin = GaussianDenoiser(torch.zeros(3).double(), Covariance(torch.eye(3)[:, :1].double(), torch.ones(1)))
    flow, lam = GaussianFlow(thin, SCHEDULES[name][0]), torch.tensor([0.0, 1.0]).double()
    end, start = flow.schedule.time(0.0), flow.schedule.time(2.0)
    assert flow.xi(end, start, lam)[0] == 0
    change = torch.tensor([[1.0, 2.0, -3.0]]).double()
    torch.testing.assert_close(flow.propagate(change, end), change)  # it is the sample's already
    torch.testing.assert_close(flow.gain(end, lam), torch.ones(2).double())
    torch.testing.assert_close(flow.rotation_remainder(end, lam), torch.zeros(2).double())


@schedules
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_only_that_of_the_input(name: str, dtype: torch.dtype) -> None:
    schedule, start, end = SCHEDULES[name]
    flow = GaussianFlow(gaussian(3), schedule)
    x = torch.linspace(-2, 2, 2 * DIM).reshape(2, 1, 2, 3).to(dtype)
    for method in (flow.state, flow.denoised, flow.rotation):
        torch.testing.assert_close(method(x, start, end), method(x.float(), start, end), rtol=0, atol=0)
    torch.testing.assert_close(flow.velocity(x, start), flow.velocity(x.float(), start), rtol=0, atol=0)
