"""Forward processes: their tables, their inverses, and Table 7 of arXiv 2412.09726."""

import pytest
import torch

from gaussnet.schedules import DiscreteSchedule, EDMSchedule, Schedule, VPSchedule, derivative

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)  # DDPM's
SCHEDULES: dict[str, Schedule] = {
    "EDM": EDMSchedule(),
    "VP": VPSchedule(),
    "DDPM": DiscreteSchedule.from_betas(BETAS),
}
TIMES = {"EDM": [0.01, 1.0, 80.0], "VP": [1e-4, 0.3, 1.0], "DDPM": [0.0, 1.0, 10.5, 500.0, 999.0]}
schedules = pytest.mark.parametrize("name", SCHEDULES)


@schedules
def test_time_inverts_the_noise_level(name: str) -> None:
    schedule, t = SCHEDULES[name], torch.tensor(TIMES[name], dtype=torch.float64)
    level = schedule.sigma(t) / schedule.alpha(t)
    assert bool((level.diff() > 0).all())
    torch.testing.assert_close(schedule.time(level), t, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["VP", "DDPM"])
def test_variance_is_preserved(name: str) -> None:
    schedule, t = SCHEDULES[name], torch.tensor(TIMES[name], dtype=torch.float64)
    torch.testing.assert_close(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones_like(t))


def test_vp_solves_its_sde() -> None:
    """Table 7: dA/dt = -C A with C = beta/2, and dB/dt = -2 C B + D^2 with D^2 = beta."""
    vp, t = VPSchedule(), torch.linspace(0.05, 1, 20, dtype=torch.float64)
    alpha, alpha_dot = derivative(vp.alpha, t)
    variance, variance_dot = derivative(lambda time: vp.sigma(time) ** 2, t)
    torch.testing.assert_close(alpha_dot, -vp.beta(t) / 2 * alpha)
    torch.testing.assert_close(variance_dot, -vp.beta(t) * variance + vp.beta(t))
    assert float(vp.sigma(0.0)) == 0


def test_discrete_table_is_alphas_cumprod_of_the_steps() -> None:
    schedule = DiscreteSchedule.from_betas(BETAS)
    t = torch.arange(1000)
    torch.testing.assert_close(schedule.alpha(t) ** 2, torch.cumprod(1 - BETAS, 0))
    for step in (1, 10, 500, 999):
        drift, diffusion = schedule.step(step)  # DDPM's row and DDIM's row of Table 7 agree
        assert drift == pytest.approx(1 - (1 - BETAS[step]).sqrt().item(), rel=1e-9)
        assert diffusion == pytest.approx(BETAS[step].sqrt().item(), rel=1e-9)


def test_discrete_interpolates_in_the_logarithm_of_the_noise_level() -> None:
    schedule = DiscreteSchedule.from_betas(BETAS)
    levels = (
        schedule.sigma(torch.tensor([4.0, 4.5, 5.0])) / schedule.alpha(torch.tensor([4.0, 4.5, 5.0]))
    ).log()
    assert levels[1].item() == pytest.approx(levels[[0, 2]].mean().item(), rel=1e-12)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (torch.tensor([0.9]), r"n >= 2, got \(1,\)"),
        (torch.tensor([0.5, 0.9]), r"decrease within \(0, 1\), got a table from 0.5 to 0.9"),
        (torch.tensor([1.0, 0.9]), "decrease"),
        (torch.tensor([0.9, 0.0]), "decrease"),
        (torch.tensor([0.9, float("nan")]), "decrease"),
    ],
)
def test_malformed_tables(table: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiscreteSchedule(table)


def test_impossible_rates() -> None:
    with pytest.raises(ValueError, match=r"beta_d > 0, got 0\.1 and 0"):
        VPSchedule(beta_d=0)
