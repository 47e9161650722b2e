"""The solvers and grids against those of diffusers and k-diffusion, where these are installed."""

from functools import partial
from typing import Any

import pytest
import torch
from cases import denoiser, k_diffusion_sampling, randn
from torch import Tensor

from gaussnet import karras_sigmas
from gaussnet.samplers import (
    deis,
    dpmpp_2m,
    dpmpp_2s,
    dpmpp_3m,
    edm_stochastic,
    euler,
    heun,
    ipndm,
    log_snr_sigmas,
    pndm,
    unipc,
    vp_sigmas,
)

TOLERANCE = 1e-4  # of images in [-1, 1]; these packages compute in float32 in places
GRID = karras_sigmas(12)


def model() -> Any:
    return denoiser("mixture-kmeans")


def noise(grid: Tensor) -> Tensor:
    return float(grid[0]) * randn(4, 1, 8, 8)


def last_state(solver: Any, x: Tensor, grid: Tensor) -> Tensor:
    """The state at the last level above 0: others differ in the step to 0."""
    seen: list[dict[str, Any]] = []
    solver(model(), x, grid, callback=seen.append)
    return seen[-1]["x"]


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference; nan, which passes no comparison, if there is one."""
    return float((a - b).abs().max())


# diffusers ----------------------------------------------------------------------------------------


def run_scheduler(scheduler: Any, x: Tensor, grid: Tensor) -> Tensor:
    """Steps through the whole grid; the scheduler's states are x / sqrt(1 + sigma^2)."""
    m, scale = model(), torch.rsqrt(1 + grid**2)
    state = scale[0] * x
    for i, t in enumerate(scheduler.timesteps):
        state = scheduler.step(m(state / scale[i], float(grid[i])), t, state).prev_sample.double()
    return state / scale[len(scheduler.timesteps)]


def on_grid(scheduler: Any, grid: Tensor) -> Any:
    scheduler.set_timesteps(len(grid) - 1)
    scheduler.sigmas = grid.float()
    return scheduler


MULTISTEP = [
    ("DPMSolverMultistepScheduler", {"solver_order": 2}, dpmpp_2m),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}, dpmpp_3m),
    *(("UniPCMultistepScheduler", {"solver_order": p}, partial(unipc, order=p)) for p in (1, 2, 3)),
]


@pytest.mark.parametrize(
    ("name", "options", "solver"), MULTISTEP, ids=lambda case: str(case) if isinstance(case, dict) else None
)
@pytest.mark.parametrize("grid", [GRID, log_snr_sigmas(9), karras_sigmas(2)], ids=["karras", "log", "two"])
def test_multistep_solvers_of_diffusers(
    name: str, options: dict[str, Any], solver: Any, grid: Tensor
) -> None:
    diffusers = pytest.importorskip("diffusers")
    final = {"final_sigmas_type": "zero"} if "DPM" in name else {}
    scheduler = getattr(diffusers, name)(prediction_type="sample", **options, **final)
    x = noise(grid)
    theirs = run_scheduler(on_grid(scheduler, grid), x, grid)
    assert difference(theirs, solver(model(), x, grid)) < TOLERANCE


@pytest.mark.parametrize("p", [1, 2, 3])
def test_unipc_bh1_of_diffusers(p: int) -> None:
    diffusers = pytest.importorskip("diffusers")  # nan in its step to 0, where B(h) = h is infinite
    scheduler = diffusers.UniPCMultistepScheduler(
        solver_order=p, solver_type="bh1", prediction_type="sample", lower_order_final=False
    )
    x = noise(GRID)
    theirs = run_scheduler(on_grid(scheduler, GRID[:-1]), x, GRID[:-1])
    ours = last_state(partial(unipc, order=p, variant="bh1", lower_order_final=False), x, GRID)
    assert difference(theirs, ours) < TOLERANCE


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_of_diffusers(order: int) -> None:
    diffusers = pytest.importorskip("diffusers")  # its last step to 0 is nan: stop before
    scheduler = diffusers.DEISMultistepScheduler(
        solver_order=order, prediction_type="sample", lower_order_final=False
    )
    x = noise(GRID)
    theirs = run_scheduler(on_grid(scheduler, GRID[:-1]), x, GRID[:-1])
    assert difference(theirs, last_state(partial(deis, order=order), x, GRID)) < TOLERANCE


def test_singlestep_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverSinglestepScheduler(
        solver_order=2, prediction_type="sample", lower_order_final=True, final_sigmas_type="zero"
    )
    halves = torch.sqrt(GRID[:-2] * GRID[1:-1])  # a step there is two of its grid
    fine = torch.cat([torch.stack([GRID[:-2], halves], 1).flatten(), GRID[-2:]])
    x = noise(GRID)
    ours = dpmpp_2s(model(), x, GRID)
    assert difference(run_scheduler(on_grid(scheduler, fine), x, fine), ours) < TOLERANCE


def test_edm_dpmsolver_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    scheduler.set_timesteps(12)
    torch.testing.assert_close(scheduler.sigmas.double(), GRID, rtol=1e-5, atol=1e-7)
    m, x = model(), noise(GRID)
    state = x
    for sigma, t in zip(GRID.tolist(), scheduler.timesteps, strict=False):
        root = (sigma**2 + 0.25) ** 0.5  # it preconditions a raw output: c_skip x + c_out F
        raw = (m(state, sigma) - 0.25 / root**2 * state) / (sigma * 0.5 / root)
        state = scheduler.step(raw, t, state).prev_sample.double()
    assert difference(state, dpmpp_2m(m, x, GRID)) < TOLERANCE


@pytest.mark.parametrize("betas", ["linear", "scaled_linear"])
@pytest.mark.parametrize(
    ("spacing", "offset"), [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)]
)
def test_ddim_of_diffusers_and_its_grid(betas: Any, spacing: Any, offset: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    ends = (1e-4, 0.02) if betas == "linear" else (0.00085, 0.012)
    scheduler = diffusers.DDIMScheduler(
        beta_start=ends[0],
        beta_end=ends[1],
        beta_schedule=betas,
        timestep_spacing=spacing,
        steps_offset=offset,
        prediction_type="sample",
        clip_sample=False,
    )
    for n in (7, 10, 50):
        grid = vp_sigmas(n, betas, spacing, offset)
        scheduler.set_timesteps(n)
        alphas_cumprod = scheduler.alphas_cumprod[scheduler.timesteps].double()
        torch.testing.assert_close(
            grid[:-1], ((1 - alphas_cumprod) / alphas_cumprod).sqrt(), rtol=2e-4, atol=0
        )
    if spacing == "linspace":
        return  # the scheduler steps by T // n whatever the spacing
    x, n = noise(grid), 10
    grid = vp_sigmas(n, betas, spacing, offset)
    scheduler.set_timesteps(n)
    assert difference(run_scheduler(scheduler, x, grid), euler(model(), x, grid)) < TOLERANCE


def test_pndm_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    levels = 0.05 * torch.arange(1, 81, dtype=torch.float64)  # of a process that is even in sigma
    alphas_cumprod = 1 / (1 + levels**2)
    betas = 1 - alphas_cumprod / torch.cat([torch.ones(1).double(), alphas_cumprod[:-1]])
    scheduler = diffusers.PNDMScheduler(
        num_train_timesteps=80, trained_betas=betas.numpy(), prediction_type="epsilon"
    )
    scheduler.set_timesteps(8)
    grid = torch.cat([levels[torch.arange(70, -1, -10)], torch.zeros(1).double()])
    m, x = model(), noise(grid)
    state, scale = x * torch.rsqrt(1 + grid[0] ** 2), torch.rsqrt(1 + levels**2)
    for t in scheduler.timesteps[:-1]:  # the last steps to 0
        sigma = float(levels[t])
        predicted = (state / scale[t] - m(state / scale[t], sigma)) / sigma
        state = scheduler.step(predicted, t, state).prev_sample
    assert len(scheduler.timesteps) == 8 + 9
    assert difference(state / scale[0], last_state(pndm, x, grid)) < TOLERANCE


def test_ipndm_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    scale = torch.rsqrt(1 + GRID**2)
    scheduler = diffusers.IPNDMScheduler(trained_betas=(scale * GRID).tolist())
    scheduler.set_timesteps(12)
    scheduler.betas, scheduler.alphas = scale * GRID, scale  # float32 has no digits for alpha at 80
    m, x = model(), noise(GRID)
    state = scale[0] * x
    for i, t in enumerate(scheduler.timesteps[:-1]):
        sigma = float(GRID[i])
        predicted = (state / scale[i] - m(state / scale[i], sigma)) / sigma
        state = scheduler.step((predicted - scale[i] * sigma * state) / scale[i], t, state).prev_sample
    assert difference(state / scale[11], last_state(ipndm, x, GRID)) < TOLERANCE


# k-diffusion --------------------------------------------------------------------------------------


def sampling() -> Any:
    return k_diffusion_sampling()


@pytest.mark.parametrize(
    ("name", "options", "solver"),
    [
        ("sample_euler", {}, euler),
        ("sample_heun", {}, heun),
        ("sample_dpmpp_2m", {}, dpmpp_2m),
        ("sample_dpmpp_2s_ancestral", {"eta": 0.0}, dpmpp_2s),
    ],
)
def test_samplers_of_k_diffusion(name: str, options: dict[str, Any], solver: Any) -> None:
    m, x = model(), noise(GRID)
    theirs = getattr(sampling(), name)(m, x, GRID, disable=True, **options)
    assert difference(theirs, solver(m, x, GRID)) < 1e-9


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_deis_is_the_lms_of_k_diffusion(order: int) -> None:
    states: list[dict[str, Any]] = []
    k_sampling, m, x = sampling(), model(), noise(GRID)
    k_sampling.sample_lms(m, x, GRID, disable=True, order=order, callback=states.append)
    ours = last_state(partial(deis, order=order, variant="tab"), x, GRID)
    assert difference(states[-1]["x"], ours) < TOLERANCE


def test_stochastic_sampler_of_k_diffusion() -> None:
    k_sampling, m, x = sampling(), model(), noise(GRID)
    torch.manual_seed(3)
    churn = {"s_churn": 4.0, "s_tmin": 0.0, "s_tmax": float("inf"), "s_noise": 1.01}
    theirs = k_sampling.sample_heun(m, x, GRID, disable=True, **churn)
    generator = torch.Generator().manual_seed(3)
    ours = edm_stochastic(
        m, x, GRID, generator=generator, S_churn=4.0, S_min=0.0, S_max=float("inf"), S_noise=1.01
    )
    assert difference(theirs, ours) < 1e-9
    assert difference(ours, heun(m, x, GRID)) > 0.01
