"""The schedulers, pipelines and UNets of diffusers as references: coordinates, conversions, and ends."""

import math
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gaussnet import Covariance, EDMPrecond, GaussianDenoiser, SongUNet

diffusers = pytest.importorskip("diffusers")

from gaussnet.integrations.diffusers import (  # noqa: E402
    DiffusersDenoiser,
    GaussnetUNet,
    scheduler_levels,
    teleport_pipeline,
    teleport_scheduler,
)

EVENT = (2, 4, 4)
TABLE: dict[str, Any] = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
FREE: dict[str, Any] = {**TABLE, "clip_sample": False}
PNDM: dict[str, Any] = {**TABLE, "set_alpha_to_one": True}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", FREE),
    "ddim-v": ("DDIMScheduler", {**FREE, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
    "ddim-sample": ("DDIMScheduler", {**FREE, "prediction_type": "sample", "timestep_spacing": "linspace"}),
    "pndm": ("PNDMScheduler", {**PNDM, "skip_prk_steps": True}),
    "pndm-prk": ("PNDMScheduler", PNDM),
    "dpm": ("DPMSolverMultistepScheduler", TABLE),
    "dpm-3-karras": ("DPMSolverMultistepScheduler", {**TABLE, "solver_order": 3, "use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", TABLE),
    "euler": ("EulerDiscreteScheduler", TABLE),
    "euler-karras": ("EulerDiscreteScheduler", {**TABLE, "use_karras_sigmas": True}),
    "euler-continuous": (
        "EulerDiscreteScheduler",
        {**TABLE, "prediction_type": "v_prediction", "timestep_type": "continuous"},
    ),
    "edm-euler": ("EDMEulerScheduler", {}),
    "edm-dpm": ("EDMDPMSolverMultistepScheduler", {}),
    "edm-dpm-v": ("EDMDPMSolverMultistepScheduler", {"solver_order": 3, "prediction_type": "v_prediction"}),
}
# After the same jump, how far the end may lie from that of the whole run, with 100 steps.
TOLERANCE = {"ddim": 3e-3, "euler": 3e-3, "edm-euler": 3e-3}
every_scheduler = pytest.mark.parametrize("name", SCHEDULERS)


def scheduler_of(name: str, steps: int | None = None, **config: Any) -> Any:
    cls, defaults = SCHEDULERS[name]
    scheduler = getattr(diffusers, cls)(**{**defaults, **config})
    if steps is not None:
        scheduler.set_timesteps(steps)
    return scheduler


@cache
def gaussian() -> GaussianDenoiser:
    dim = math.prod(EVENT)
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]
    eigvals = torch.logspace(0.5, -2, dim, dtype=torch.float64)
    mean = 0.3 * torch.randn(EVENT, generator=generator, dtype=torch.float64)
    return GaussianDenoiser(mean, Covariance(basis, eigvals))


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def first_state(scheduler: Any) -> Tensor:
    return randn(6, *EVENT) * scheduler.init_noise_sigma


def run(scheduler: Any, unet: Any, x: Tensor, timesteps: Tensor) -> Tensor:
    for t in timesteps:
        x = scheduler.step(unet(scheduler.scale_model_input(x, t), t).sample, t, x).prev_sample
    return x


def relative_error(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


@every_scheduler
def test_after_a_jump_the_scheduler_ends_where_the_whole_run_does(name: str) -> None:
    scheduler = scheduler_of(name, 100)
    unet, x = GaussnetUNet(gaussian(), scheduler), first_state(scheduler)
    alpha, level = scheduler_levels(scheduler)
    exact = gaussian().flow(x / alpha[0], float(level[0]), 0.0)
    whole = run(scheduler, unet, x, scheduler.timesteps)
    moved, timesteps = teleport_scheduler(scheduler, gaussian(), x, 100, skip=40)
    assert relative_error(moved / alpha[40], gaussian().flow(x / alpha[0], level[0], level[40])) < 1e-12
    end = run(scheduler, unet, moved, timesteps)
    assert relative_error(end, whole) < TOLERANCE.get(name.split("-")[0], TOLERANCE.get(name, 3e-4))
    errors = relative_error(end, exact), relative_error(whole, exact)
    assert errors[0] < errors[1] < 0.03, "fewer steps leave less error"


@every_scheduler
def test_calls_drop_by_the_steps_skipped(name: str) -> None:
    scheduler = scheduler_of(name, 30)
    before, x = len(scheduler.timesteps), first_state(scheduler)
    _, timesteps = teleport_scheduler(scheduler, gaussian(), x, skip=12)
    assert len(timesteps) == before - 12
    assert before == {"pndm": 31, "pndm-prk": 39}.get(name, 30)
    if hasattr(scheduler, "set_begin_index"):
        assert scheduler.begin_index == 12
        assert timesteps.equal(scheduler.timesteps[12:])
        assert len(scheduler.timesteps) == before


@every_scheduler
def test_no_skip_changes_nothing(name: str) -> None:
    scheduler = scheduler_of(name, 20)
    unet, x = GaussnetUNet(gaussian(), scheduler), first_state(scheduler)
    before = scheduler.timesteps.clone()
    whole = run(scheduler, unet, x, before)
    same, timesteps = teleport_scheduler(scheduler_of(name), gaussian(), x, 20, skip=0)
    assert same.equal(x)
    assert timesteps.equal(before)
    # Without num_inference_steps: a scheduler that has run begins again, without its old history.
    same, timesteps = teleport_scheduler(scheduler, gaussian(), x, skip=0)
    assert same.equal(x)
    assert timesteps.equal(before)
    assert run(scheduler, unet, same, timesteps).equal(whole)


@every_scheduler
def test_a_used_scheduler_begins_as_a_new_one(name: str) -> None:
    used, new = scheduler_of(name, 20), scheduler_of(name, 20)
    unet, x = GaussnetUNet(gaussian(), used), first_state(new)
    run(used, unet, x, used.timesteps[:7])  # leaves a history, and PNDM in the middle of a step
    starts = [teleport_scheduler(scheduler, gaussian(), x, skip=7) for scheduler in (used, new)]
    ends = [run(scheduler, unet, *start) for scheduler, start in zip((used, new), starts, strict=True)]
    assert ends[0].equal(ends[1])


@pytest.mark.parametrize("prk", [False, True])
def test_pndm_restarts_on_the_rest_of_its_grid(prk: bool) -> None:
    # With steps of 50 from 1000, the last 12 of 20 steps are those of a process of 600 timesteps.
    scheduler = scheduler_of("pndm", 20, skip_prk_steps=not prk)
    short = scheduler_of("pndm", 12, skip_prk_steps=not prk, num_train_timesteps=600)
    _, timesteps = teleport_scheduler(scheduler, gaussian(), first_state(scheduler), skip=8)
    for attribute in ("timesteps", "prk_timesteps", "plms_timesteps"):
        assert list(getattr(scheduler, attribute)) == list(getattr(short, attribute)), attribute
    assert timesteps.equal(short.timesteps)
    _, timesteps = teleport_scheduler(scheduler, gaussian(), first_state(scheduler), skip=8)
    assert len(timesteps) == (13 if prk else 5), "a second jump starts from the end of the first"


def test_pndm_to_its_last_step() -> None:
    _, timesteps = teleport_scheduler(scheduler_of("pndm"), gaussian(), randn(2, *EVENT), 10, skip=9)
    assert timesteps.tolist() == [0]


def test_unipc_begins_its_own_predictor_too() -> None:
    predictor = scheduler_of("dpm")
    scheduler = scheduler_of("unipc", 20, solver_p=predictor)
    unet, x = GaussnetUNet(gaussian(), scheduler), first_state(scheduler)
    whole = run(scheduler, unet, x, scheduler.timesteps)
    moved, timesteps = teleport_scheduler(scheduler, gaussian(), x, skip=5)
    assert predictor.begin_index == 5
    assert relative_error(run(scheduler, unet, moved, timesteps), whole) < 1e-3


@pytest.mark.parametrize("name", [*SCHEDULERS, "ddpm", "dpm-flow", "unipc-flow"])
def test_levels_are_those_of_add_noise(name: str) -> None:
    if name == "ddpm":
        scheduler = diffusers.DDPMScheduler(**TABLE)
        scheduler.set_timesteps(20)
    elif name.endswith("flow"):
        kind = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        scheduler = scheduler_of(name.split("-")[0], 20, **kind)
    else:
        scheduler = scheduler_of(name, 20)
    alpha, level = scheduler_levels(scheduler)
    steps = scheduler.timesteps if "pndm" not in name else scheduler_of("ddim", 20).timesteps
    if "karras" in name:  # of which the timesteps are rounded, and need not differ
        steps = steps[:10]
    one, zero = (torch.full((len(steps), 1), value, dtype=torch.float64) for value in (1.0, 0.0))
    data, noise = scheduler.add_noise(one, zero, steps), scheduler.add_noise(zero, one, steps)
    torch.testing.assert_close(alpha[: len(steps)], data.flatten().double(), rtol=1e-4, atol=1e-6)
    noise = noise.flatten().double() / data.flatten()
    torch.testing.assert_close(level[: len(steps)], noise, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["ddim", "pndm", "pndm-prk", "dpm", "euler-karras", "edm-dpm"])
def test_sigma_skip_is_the_last_level_not_below(name: str) -> None:
    scheduler = scheduler_of(name, 20)
    x, level = first_state(scheduler), scheduler_levels(scheduler)[1].tolist()
    between = math.sqrt(level[7] * level[8])
    for sigma_skip, skip in ((level[0], 0), (level[7], 7), (between, 7), (0.99 * level[7], 7), (1e-9, 19)):
        if name == "pndm-prk" and skip > 16:
            continue
        moved, timesteps = teleport_scheduler(scheduler, gaussian(), x, 20, sigma_skip=sigma_skip)
        expected, rest = teleport_scheduler(scheduler, gaussian(), x, 20, skip=skip)
        assert moved.equal(expected)
        assert timesteps.equal(rest)


@pytest.mark.parametrize("name", ["ddim", "euler", "edm-euler"])
def test_without_latents_it_draws_the_pipelines(name: str) -> None:
    scheduler = scheduler_of(name)
    x, _ = teleport_scheduler(
        scheduler, gaussian(), None, 10, skip=0, batch_size=3, generator=torch.Generator().manual_seed(5)
    )
    expected = randn(3, *EVENT, seed=5) * scheduler.init_noise_sigma
    assert x.dtype == torch.float64
    assert x.equal(expected)


@pytest.mark.parametrize("given", [True, False], ids=["latents", "drawn"])
def test_the_device_may_be_said(given: bool) -> None:
    latents = randn(1, *EVENT) if given else None
    x, timesteps = teleport_scheduler(
        scheduler_of("ddim"),
        gaussian(),
        latents,
        10,
        skip=4,
        device="cpu",
        generator=torch.Generator().manual_seed(5),
    )
    expected, rest = teleport_scheduler(
        scheduler_of("ddim"), gaussian(), latents, 10, skip=4, generator=torch.Generator().manual_seed(5)
    )
    assert x.equal(expected)
    assert timesteps.equal(rest)
    with pytest.raises(RuntimeError, match="meta"):  # it is heeded: of a device without numbers
        teleport_scheduler(scheduler_of("ddim"), gaussian(), latents, 10, skip=4, device="meta")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_latents_keep_their_dtype(dtype: torch.dtype) -> None:
    scheduler = scheduler_of("ddim", 20)
    x = randn(2, *EVENT)
    exact, _ = teleport_scheduler(scheduler, gaussian(), x, skip=8)
    moved, _ = teleport_scheduler(scheduler, gaussian(), x.to(dtype).requires_grad_(), skip=8)
    assert moved.dtype == dtype
    assert not moved.requires_grad
    assert relative_error(moved.double(), exact) < 3 * torch.finfo(dtype).eps


@every_scheduler
def test_the_view_predicts_what_the_scheduler_expects(name: str) -> None:
    # The scheduler's own conversion back to a clean image is the reference.
    scheduler = scheduler_of(name, 20)
    unet, (alpha, level) = GaussnetUNet(gaussian(), scheduler), scheduler_levels(scheduler)
    assert unet.config["prediction_type"] == scheduler.config["prediction_type"]
    for index in (0, 10, 19):
        x = alpha[index] * (gaussian().mean + math.hypot(1, level[index]) * randn(3, *EVENT, seed=index))
        t = scheduler_of("ddim", 20).timesteps[index] if "pndm" in name else scheduler.timesteps[index]
        scheduler._step_index, scheduler._begin_index = None, index
        output = unet(scheduler.scale_model_input(x, t), t).sample
        if hasattr(scheduler, "precondition_outputs"):
            denoised = scheduler.precondition_outputs(x, output, scheduler.sigmas[index])
        elif hasattr(scheduler, "convert_model_output"):
            scheduler._step_index = index
            denoised = scheduler.convert_model_output(output, sample=x)
        elif "pndm" in name:  # has none; it expects epsilon
            denoised = (x - alpha[index] * level[index] * output) / alpha[index]
        else:
            denoised = scheduler.step(output, t, x).pred_original_sample
        tolerance = 0.03 if "karras" in name else 1e-4  # Karras timesteps are rounded, not so the levels
        assert relative_error(denoised, gaussian()(x / alpha[index], float(level[index]))) < tolerance


PREDICTIONS = [
    *(("VP", kind) for kind in ("epsilon", "v_prediction", "sample")),
    *(("EDM", kind) for kind in ("epsilon", "v_prediction")),
]


@pytest.mark.parametrize(("process", "prediction_type"), PREDICTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_there_and_back(process: str, prediction_type: str, dtype: torch.dtype) -> None:
    source: Any = scheduler_of("ddim").alphas_cumprod if process == "VP" else 0.5
    unet = GaussnetUNet(gaussian(), source, prediction_type)
    model = DiffusersDenoiser(unet, source, prediction_type)
    sigma = torch.tensor([0.011, 0.3, 2.0, 70.0], dtype=dtype)  # between entries of the table
    x = (gaussian().mean + sigma.reshape(-1, 1, 1, 1) * randn(4, *EVENT)).to(dtype)
    denoised = model(x, sigma)
    assert denoised.dtype == dtype
    assert model.event_shape == EVENT
    assert relative_error(denoised, gaussian()(x, sigma)) < (1e-6 if dtype == torch.float64 else 1e-4)
    assert unet(x.half(), 0.5).sample.dtype == torch.float16


@cache
def tiny_unet(channels: int = 2, out_channels: int | None = None, **config: Any) -> Any:
    torch.manual_seed(1)
    unet = diffusers.UNet2DModel(
        sample_size=4,
        in_channels=channels,
        out_channels=out_channels or channels,
        block_out_channels=(4, 4),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=2,
        **config,
    )
    return unet.eval()


@pytest.mark.parametrize("name", ["ddim", "ddim-v", "ddim-sample", "euler", "euler-continuous", "edm-euler"])
@torch.no_grad()
def test_denoiser_of_a_unet(name: str) -> None:
    scheduler = scheduler_of(name, 20)
    (alpha, level), unet = scheduler_levels(scheduler), tiny_unet()
    model = DiffusersDenoiser(unet, scheduler)
    for index in (0, 10, 19):
        x, t = randn(3, *EVENT, dtype=torch.float32) * math.hypot(1, level[index]), scheduler.timesteps[index]
        scheduler._step_index, scheduler._begin_index = None, index
        x_t = float(alpha[index]) * x
        output = unet(scheduler.scale_model_input(x_t, t), t).sample
        expected = scheduler.step(output, t, x_t).pred_original_sample
        assert relative_error(model(x, float(level[index])), expected) < 1e-3
        assert model(x.double(), float(level[index])).dtype == torch.float64
    expected_range = (0.002, 80.0) if name == "edm-euler" else scheduler_levels(scheduler_of("ddim", 1000))[1]
    assert model.sigma_min == pytest.approx(float(min(expected_range)))
    assert model.sigma_max == pytest.approx(float(max(expected_range)))


class Told(torch.nn.Module):
    """Remembers the label that it was called with."""

    config: Any = {"in_channels": 2, "sample_size": (4, 4)}  # noqa: RUF012

    def forward(self, x: Tensor, timestep: Tensor) -> Any:
        self.label = timestep
        return diffusers.models.unets.unet_2d.UNet2DOutput(sample=x)


def test_labels_interpolate_the_table() -> None:
    told, scheduler = Told(), scheduler_of("ddim", 1000)
    levels = scheduler_levels(scheduler)[1].flip(0)
    sigma = torch.stack([levels[300], (levels[300] * levels[301]).sqrt(), levels[999] * 3, levels[0] / 3])
    x = randn(4, *EVENT)
    DiffusersDenoiser(told, scheduler)(x, sigma)
    torch.testing.assert_close(told.label, torch.tensor([300, 300.5, 999, 0], dtype=torch.float64))
    rounded = DiffusersDenoiser(told, scheduler, round_timesteps=True)
    rounded(x, sigma * 1.0001)
    assert told.label.tolist() == [300, 301, 999, 0]
    assert told.label.dtype == torch.int64
    grid = rounded.round_sigma(torch.cat([sigma * 1.0001, torch.zeros(1).double()]))
    torch.testing.assert_close(grid, torch.stack([*levels[[300, 301, 999, 0]], torch.zeros(()).double()]))
    edm = DiffusersDenoiser(told, 0.5, round_timesteps=True)  # has no whole timesteps
    edm(x, sigma)
    torch.testing.assert_close(told.label, sigma.log() / 4)
    assert edm.round_sigma(sigma).equal(sigma)
    DiffusersDenoiser(told, scheduler_of("euler-continuous"), round_timesteps=True)(x, sigma)
    torch.testing.assert_close(told.label, sigma.log() / 4)
    DiffusersDenoiser(told, scheduler_of("euler-continuous", prediction_type="epsilon"))(x, sigma)
    assert told.label[2].item() == 999, "of Euler, v_prediction alone has continuous labels"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_networks_in_half_precision_are_told_the_whole_timestep(dtype: torch.dtype) -> None:
    unet, scheduler = tiny_unet().to(dtype), scheduler_of("ddim", 1000)
    told: list[Tensor] = []
    unet.time_proj.register_forward_pre_hook(lambda _, arguments: told.append(arguments[0]))
    times = torch.tensor([301, 513, 998])  # bfloat16 would make them 302, 512 and 1000
    sigma = scheduler_levels(scheduler)[1].flip(0)[times]
    x = randn(3, *EVENT, dtype=torch.float32)
    for model in (DiffusersDenoiser(unet, scheduler), DiffusersDenoiser(unet, scheduler.alphas_cumprod)):
        model(x, sigma)
        torch.testing.assert_close(told[-1].double(), times.double(), rtol=0, atol=1e-3)
    DiffusersDenoiser(unet, 0.5)(x, sigma)
    torch.testing.assert_close(told[-1], (sigma.log() / 4).float())


@torch.no_grad()
def test_learned_variances_and_classes() -> None:
    scheduler, x = scheduler_of("ddim"), randn(3, *EVENT, dtype=torch.float32)
    learned = tiny_unet(out_channels=4)
    noise = learned(x / math.sqrt(5), scheduler_level_time(scheduler, 2.0)).sample[:, :2]
    torch.testing.assert_close(DiffusersDenoiser(learned, scheduler)(x, 2.0), x - 2 * noise)
    labels = torch.tensor([2, 0, 1])
    model = DiffusersDenoiser(tiny_unet(num_class_embeds=3), scheduler)
    assert model(x, 2.0, labels).equal(model(x, 2.0, torch.eye(3)[labels]))
    assert not model(x, 2.0, labels).equal(model(x, 2.0, labels.flip(0)))
    for rows in (torch.zeros(3, 3), torch.ones(3, 3)):  # no class, and several
        with pytest.raises(ValueError, match="expected one class in each row of class_labels"):
            model(x, 2.0, rows)
    plain = DiffusersDenoiser(tiny_unet(), scheduler)
    assert plain(x, 2.0, labels).equal(plain(x, 2.0))


def scheduler_level_time(scheduler: Any, level: float) -> Tensor:
    """By brute force: where the table, interpolated in log level, passes the level."""
    log = 0.5 * ((1 - scheduler.alphas_cumprod.double()) / scheduler.alphas_cumprod.double()).log()
    right = int((log < math.log(level)).sum())
    return right - 1 + (math.log(level) - log[right - 1]) / (log[right] - log[right - 1])


@torch.no_grad()
def test_conditional_unet() -> None:
    torch.manual_seed(2)
    unet = diffusers.UNet2DConditionModel(
        sample_size=4,
        in_channels=2,
        out_channels=2,
        block_out_channels=(4, 4),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=2,
        cross_attention_dim=5,
        attention_head_dim=2,
    ).eval()
    states, x = randn(7, 5, dtype=torch.float32), randn(3, *EVENT, dtype=torch.float32)
    model = DiffusersDenoiser(unet, scheduler_of("ddim"), encoder_hidden_states=states)
    t = float(scheduler_level_time(scheduler_of("ddim"), 2.0))
    noise = unet(x / math.sqrt(5), t, encoder_hidden_states=states.expand(3, 7, 5)).sample
    torch.testing.assert_close(model(x, 2.0), x - 2 * noise)
    batched = DiffusersDenoiser(unet, scheduler_of("ddim"), encoder_hidden_states=states[None])
    assert batched(x, 2.0).equal(model(x, 2.0))
    assert not any("encoder_hidden_states" in name for name in model.state_dict())


PIPELINES = {
    "ddim": lambda unet: diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler(**TABLE)),
    "ddpm": lambda unet: diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(**TABLE)),
    "ddpm-pndm": lambda unet: diffusers.DDPMPipeline(unet, diffusers.PNDMScheduler(**TABLE)),
}


def pipeline_of(name: str, unet: Any) -> Any:
    pipeline = PIPELINES[name](unet)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("name", [*PIPELINES])
@pytest.mark.parametrize("output_type", ["np", "pt", "pil"])
def test_pipeline_without_a_skip_is_the_pipeline(name: str, output_type: str) -> None:
    channels = 3 if output_type == "pil" else 2
    pipeline = pipeline_of(name, tiny_unet(channels))
    base = GaussianDenoiser.isotropic(torch.zeros(channels, 4, 4), 0.25)
    call: dict[str, Any] = {"batch_size": 2, "num_inference_steps": 6, "output_type": output_type}
    if name == "ddpm-pndm":  # whose step takes no generator, which DDPMPipeline always gives
        before, pipeline.scheduler.step = pipeline.scheduler.step, None
        step = lambda output, t, x, generator: before(output, t, x)  # noqa: E731
        pipeline.scheduler.step = step
    expected = pipeline(generator=torch.Generator().manual_seed(4), **call).images
    if name == "ddpm-pndm":
        del pipeline.scheduler.step
    images = teleport_pipeline(
        pipeline, base, generator=torch.Generator().manual_seed(4), skip=0, **call
    ).images
    if output_type == "pil":
        assert [image.tobytes() for image in images] == [image.tobytes() for image in expected]
    else:
        assert images.shape == ((2, 4, 4, channels) if output_type == "np" else (2, channels, 4, 4))
        assert (images == expected).all()


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_pipeline_skips_evaluations(name: str) -> None:
    unet, base = tiny_unet(), GaussianDenoiser.isotropic(torch.zeros(EVENT), 0.25)
    pipeline, calls = pipeline_of(name, unet), []
    hook = unet.register_forward_hook(lambda *_: calls.append(1))
    images = teleport_pipeline(pipeline, base, 2, 10, skip=4, output_type="pt").images
    hook.remove()
    assert len(calls) == 6
    assert images.shape == (2, *EVENT)
    level = scheduler_levels(pipeline.scheduler)[1]
    wheres: tuple[dict[str, Any], ...] = ({"skip": 4}, {"sigma_skip": float(level[4])})
    draws = [
        teleport_pipeline(
            pipeline, base, 2, 10, output_type="pt", generator=torch.Generator().manual_seed(0), **where
        ).images
        for where in wheres
    ]
    assert draws[0].equal(draws[1])


@pytest.mark.parametrize("name", ["ddim", "pndm", "dpm", "unipc", "euler", "edm-euler", "edm-dpm"])
def test_pipeline_of_a_gaussian_ends_where_the_whole_one_does(name: str) -> None:
    scheduler = scheduler_of(name)
    base = GaussianDenoiser(0.3 * gaussian().mean, Covariance(*spectrum(0.05)))
    pipeline = diffusers.DDPMPipeline(GaussnetUNet(base, scheduler), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.unet.config["sample_size"] == 4
    assert pipeline.unet.config["in_channels"] == 2
    whole, skipped = (
        teleport_pipeline(
            pipeline, base, 3, 60, skip=skip, generator=torch.Generator().manual_seed(0), output_type="pt"
        ).images
        for skip in (0, 20)
    )
    assert 0 < relative_error(2 * skipped - 1, 2 * whole - 1) < 3e-3
    level = scheduler_levels(scheduler_of(name, 60))[1]
    x = first_state(scheduler_of(name, 60))[:3]
    exact = base.flow(x / scheduler_levels(scheduler_of(name, 60))[0][0], float(level[0]), 0.0)
    assert relative_error(2 * skipped - 1, exact) < 0.15, "what 60 steps of the scheduler miss, or more"


LATENT = (4, 4, 4)


@cache
def decoder() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return diffusers.AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=8,
        ).eval()


class WithVae(diffusers.DiffusionPipeline):
    """A pipeline of latents whose decoder has the name that most have."""

    def __init__(self, vae: Any, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler)
        self.set_progress_bar_config(disable=True)


@pytest.mark.parametrize("output_type", ["np", "pil"])
def test_pipeline_of_latents(output_type: str) -> None:
    generator = torch.Generator().manual_seed(5)
    axes = torch.linalg.qr(torch.randn(64, 8, generator=generator))[0]
    base = GaussianDenoiser(torch.zeros(LATENT), Covariance(axes, torch.logspace(0.5, -1, 8), tail=0.05))
    scheduler = scheduler_of("ddim")
    pipeline = diffusers.LDMPipeline(decoder(), GaussnetUNet(base, scheduler), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"batch_size": 2, "num_inference_steps": 40, "output_type": output_type}
    expected = pipeline(generator=torch.Generator().manual_seed(4), **call).images
    whole, skipped = (
        teleport_pipeline(
            pipeline, base, generator=torch.Generator().manual_seed(4), skip=skip, **call
        ).images
        for skip in (0, 12)
    )
    if output_type == "pil":
        assert [image.tobytes() for image in whole] == [image.tobytes() for image in expected]
    else:
        assert (whole == expected).all()
        assert whole.shape == (2, 8, 8, 3)
        assert 0 < abs(skipped - whole).max() < 0.01 < whole.std()
    other = teleport_pipeline(
        WithVae(decoder(), pipeline.unet, scheduler),
        base,
        generator=torch.Generator().manual_seed(4),
        skip=0,
        **call,
    )
    if output_type == "np":
        assert (other.images == whole).all()


@pytest.mark.parametrize("name", ["dpm", "euler"])
def test_a_pipeline_that_sets_the_timesteps_goes_on(name: str) -> None:
    scheduler = scheduler_of(name)
    unet = GaussnetUNet(gaussian(), scheduler)
    x, timesteps = teleport_scheduler(scheduler, gaussian(), None, 20, skip=7, batch_size=3)
    expected = run(scheduler, unet, x, timesteps)
    scheduler.set_timesteps(timesteps=timesteps.tolist())
    latents = x / scheduler.init_noise_sigma
    other = scheduler_of(name)  # what StableDiffusionPipeline does with latents and timesteps
    other.set_timesteps(timesteps=timesteps.tolist())
    assert (
        relative_error(run(other, unet, latents * other.init_noise_sigma, other.timesteps), expected) < 1e-9
    )


def spectrum(scale: float) -> tuple[Tensor, Tensor]:
    covariance = gaussian().covariance
    assert isinstance(covariance, Covariance)
    return covariance.eigvecs, scale * covariance.eigvals


@torch.no_grad()
def test_a_network_of_gaussnet_in_diffusers(tmp_path: Path) -> None:
    network = SongUNet(
        img_resolution=8, in_channels=1, out_channels=1, model_channels=4, channel_mult=[1], num_blocks=1,
        attn_resolutions=[],
    )  # fmt: skip
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model = EDMPrecond(network, sigma_data=0.5).eval()
    unet = GaussnetUNet(model, scheduler_of("edm-euler")).eval()
    x, sigma = randn(2, 1, 8, 8, dtype=torch.float32), 3.0
    c_in = 1 / math.hypot(sigma, 0.5)
    labels = torch.full((2,), math.log(sigma) / 4)
    raw = network(c_in * x, labels, None)
    # EDM's schedulers precondition what EDM's network puts out: the view is the network itself.
    assert relative_error(unet(c_in * x, torch.tensor(math.log(sigma) / 4)).sample, raw) < 1e-4
    (pair,) = unet(c_in * x, labels, return_dict=False)
    assert pair.equal(unet(c_in * x, labels[0]).sample)
    unet.save_pretrained(tmp_path)
    loaded = GaussnetUNet.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert loaded(c_in * x, labels).sample.equal(unet(c_in * x, labels).sample)


@pytest.mark.parametrize(("name", "step"), [("ddim-v", 400.0), ("euler-continuous", 0.5), ("edm-dpm-v", 0.5)])
def test_a_saved_gaussian_and_its_process(name: str, step: float, tmp_path: Path) -> None:
    base = GaussianDenoiser(gaussian().mean.float(), Covariance(*(part.float() for part in spectrum(1))))
    unet = GaussnetUNet(base, scheduler_of(name))
    unet.save_pretrained(tmp_path)
    loaded = GaussnetUNet.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    saved, found = unet.state_dict(), loaded.state_dict()
    assert saved.keys() == found.keys()
    for key, value in saved.items():
        assert found[key].equal(value), f"{key} is not bit for bit what was saved"
    x = randn(2, *EVENT, dtype=torch.float32)
    # Rounding may differ with where in memory loaded tensors begin: products take another path there.
    torch.testing.assert_close(loaded(x, step).sample, unet(x, step).sample, rtol=1e-5, atol=1e-6)
    assert loaded.config["prediction_type"] == "v_prediction"


def test_other_schedulers_are_named() -> None:
    base = GaussianDenoiser.isotropic(torch.zeros(EVENT), 0.25)
    heun = diffusers.HeunDiscreteScheduler()
    message = "one of DDIMScheduler, .*, EDMDPMSolverMultistepScheduler, got HeunDiscreteScheduler"
    with pytest.raises(TypeError, match=message):
        teleport_scheduler(heun, base, randn(2, *EVENT), 10, skip=3)
    pipeline = diffusers.DDPMPipeline(tiny_unet(), heun)
    with pytest.raises(TypeError, match=message):
        teleport_pipeline(pipeline, base, skip=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either skip or sigma_skip, got skip=None and sigma_skip=None"),
        ({"skip": 1, "sigma_skip": 2.0}, "either skip or sigma_skip, got skip=1 and sigma_skip=2.0"),
        ({"skip": -1}, "0 <= skip < 10, the number of steps, got -1"),
        ({"skip": 10}, "0 <= skip < 10, the number of steps, got 10"),
        ({"sigma_skip": 1e4}, "0 < sigma_skip <= .*, the first level, got 10000"),
        ({"sigma_skip": 0.0}, "0 < sigma_skip <= .* got 0.0"),
        ({"sigma_skip": math.nan}, "0 < sigma_skip <= .* got nan"),
        ({"skip": 1, "num_inference_steps": None}, "num_inference_steps, or a .* whose timesteps are set"),
        ({"skip": 1, "latents": torch.zeros(2, 1, 4, 4)}, r"expected x of shape \(\*batch, 2, 4, 4\)"),
    ],
)
@pytest.mark.parametrize("name", ["ddim", "pndm", "dpm", "edm-euler"])
def test_impossible_jumps(name: str, arguments: dict[str, Any], message: str) -> None:
    call = {"latents": randn(2, *EVENT), "num_inference_steps": 10, **arguments}
    with pytest.raises(ValueError, match=message):
        teleport_scheduler(scheduler_of(name), gaussian(), **call)


def test_schedulers_that_cannot_begin_there() -> None:
    with pytest.raises(ValueError, match=r"at least 4 steps left of a PNDMScheduler, .* got 3"):
        teleport_scheduler(scheduler_of("pndm-prk"), gaussian(), randn(2, *EVENT), 10, skip=7)
    silent = scheduler_of("ddim", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(ValueError, match=r"decrease within \(0, 1\)"):
        teleport_scheduler(silent, gaussian(), randn(2, *EVENT), 10, skip=2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scheduler": "ddim"}, TypeError, "expected a diffusers scheduler .* got str"),
        ({"scheduler": None}, TypeError, "expected a diffusers scheduler .* got NoneType"),
        ({"scheduler": -0.5}, ValueError, "finite sigma_data > 0, got -0.5"),
        ({"scheduler": [0.1, 0.9]}, ValueError, "alphas_cumprod to decrease"),
        ({"scheduler": 0.5, "prediction_type": "sample"}, ValueError, "for EDM .* got 'sample'"),
        ({"scheduler": [0.9, 0.1], "prediction_type": "x0"}, ValueError, "for VP .* sample, got 'x0'"),
        ({"scheduler": 0.5, "unet": torch.nn.Identity()}, ValueError, "event_shape for Identity"),
    ],
)
def test_impossible_models(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DiffusersDenoiser(**{"unet": tiny_unet(), **arguments})


def test_unknown_output_type() -> None:
    with pytest.raises(ValueError, match="output_type to be one of pil, np, pt, got 'latent'"):
        teleport_pipeline(pipeline_of("ddim", tiny_unet()), gaussian(), skip=1, output_type="latent")


def test_the_event_shape_of_a_network_without_a_config() -> None:
    class Plain(torch.nn.Module):
        def forward(self, x: Tensor, timestep: Tensor) -> Any:
            return diffusers.models.unets.unet_2d.UNet2DOutput(sample=torch.zeros_like(x))

    model, x = DiffusersDenoiser(Plain(), 0.5, event_shape=EVENT), randn(2, *EVENT)
    assert model.event_shape == EVENT
    torch.testing.assert_close(model(x, 2.0), x * 0.25 / (4 + 0.25))  # c_skip x, as the network says 0
    with pytest.raises(ValueError, match=r"\(B, 2, 4, 4\)|shape .*2, 4, 4"):
        model(x[:, :1], 2.0)


def test_without_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "gaussnet.integrations.diffusers_models"
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    message = r"^gaussnet\.integrations\.diffusers needs: pip install 'gaussnet\[diffusers\]'$"
    with pytest.raises(ImportError, match=message):
        import_module(name)
