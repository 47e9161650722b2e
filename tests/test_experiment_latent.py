"""Latent pipelines: a Gaussian as the UNet, tiny random ones from folders, and models of pixels by name."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gaussnet import Covariance, GaussianDenoiser, ImageData, unexplained_variance
from gaussnet.experiments import Setting, defaults, latent, run
from gaussnet.experiments.latent import Latents, encoded, latent_rows, load_latents, predictor, scheduler_of
from gaussnet.experiments.running import SUFFIXES
from gaussnet.experiments.setting import load_model
from gaussnet.plots.latent import latent as draw
from gaussnet.plots.style import pyplot

diffusers = pytest.importorskip("diffusers")

from gaussnet.integrations.diffusers import GaussnetUNet, scheduler_levels  # noqa: E402

EVENT = (2, 4, 4)
TABLE: dict[str, Any] = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
SCALE = 0.5
SMALL: dict[str, Any] = {"seeds": 10, "steps": 12, "skips": [0, 2, 6]}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian() -> GaussianDenoiser:
    basis = torch.linalg.qr(randn(32, 32, seed=3))[0]
    return GaussianDenoiser(
        0.3 * randn(*EVENT, seed=4), Covariance(basis, torch.logspace(0.5, -2, 32, dtype=torch.float64))
    )


def tiny_unet(channels: int = 2, **config: Any) -> Any:
    torch.manual_seed(1)
    unet = diffusers.UNet2DModel(
        sample_size=4,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(4, 4),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=2,
        **config,
    )
    return unet.eval()


def tiny_vae(kind: str = "vq") -> Any:
    torch.manual_seed(2)
    config: dict[str, Any] = {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (4, 4),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 2,
        "norm_num_groups": 2,
        "sample_size": 8,
        "scaling_factor": SCALE,
    }
    if kind == "vq":
        return diffusers.VQModel(**config, num_vq_embeddings=8).eval()
    return diffusers.AutoencoderKL(**config, shift_factor=0.25).eval()


def tiny_pipeline(**parts: Any) -> Any:
    kept = {"vqvae": tiny_vae(), "unet": tiny_unet(), "scheduler": diffusers.DDPMScheduler(**TABLE)}
    return diffusers.LDMPipeline(**{**kept, **parts})


def images(count: int = 40, channels: int = 3) -> ImageData:
    return ImageData(randn(count, channels, 8, 8, seed=6).float().tanh(), scaling="none")


def setting(model: str, **options: Any) -> Setting:
    return Setting(model, None, **options)


def rows_of(path: Path, kind: str) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["kind"] == kind]


# The Gaussian as the UNet -------------------------------------------------------------------------------


def gaussian_rows(name: str, steps: int = 200, skips: tuple[int, ...] = (0, 40)) -> list[dict[str, Any]]:
    own = diffusers.DDPMScheduler(**TABLE)
    base = gaussian()
    pipeline = diffusers.DDPMPipeline(GaussnetUNet(base, own), own)
    scheduler = scheduler_of(pipeline, name)
    work = Latents(predictor(pipeline, None, 1.0, 3), scheduler, base)
    return latent_rows(work, randn(5, *EVENT), steps, skips, range(5))


@pytest.mark.parametrize("name", ["ddim", "dpm", "unipc", "euler"])
def test_the_gaussian_as_the_network(name: str) -> None:
    rows = gaussian_rows(name)
    geometry, states, jumps = (
        [row for row in rows if row["kind"] == kind] for kind in ("geometry", "state", "teleport")
    )
    assert len(geometry) == 5
    assert len(states) == 5 * 201
    for row in geometry:
        assert row["pc2"] == pytest.approx(row["gaussian_pc2"], abs=2e-3)
        assert row["rotation_error"] < 1.02 * row["rotation_bound"]
        assert row["rotation_error"] > 0.1
    # the first step of a scheduler of second order is of first order
    assert max(row["deviation"] for row in states) < 0.03
    highest = max(row["sigma"] for row in states)
    assert max(row["deviation"] for row in states if row["sigma"] == highest) < 1e-6
    for row in jumps:
        assert row["evaluations"] == 200 - row["skip"]
        assert row["rms"] == 0 if row["skip"] == 0 else 0 < row["rms"] < 0.01, row


def test_ddim_converges_to_the_closed_form() -> None:
    errors = [
        max(row["deviation"] for row in gaussian_rows("ddim", steps) if row["kind"] == "state")
        for steps in (100, 200)
    ]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.2), "of first order"


def test_rows_have_the_schedulers_levels() -> None:
    rows = gaussian_rows("ddim", 20, (5,))
    scheduler = diffusers.DDIMScheduler(**TABLE)
    scheduler.set_timesteps(20)
    level = scheduler_levels(scheduler)[1]
    found = sorted({row["sigma"] for row in rows if row["kind"] == "state"}, reverse=True)
    assert found[:-1] == pytest.approx(level.tolist())
    assert found[-1] == 0  # set_alpha_to_one
    assert {row["sigma"] for row in rows if row["kind"] == "teleport"} == {float(level[5])}


def test_a_scheduler_that_ends_above_0() -> None:
    base = gaussian()
    scheduler = diffusers.DDIMScheduler(**TABLE, set_alpha_to_one=False, clip_sample=False)
    pipeline = diffusers.DDPMPipeline(GaussnetUNet(base, scheduler), scheduler)
    work = Latents(predictor(pipeline, None, 1.0, 8), scheduler, base)
    rows = [row for row in latent_rows(work, randn(2, *EVENT), 300, [], range(2)) if row["kind"] == "state"]
    assert min(row["sigma"] for row in rows) == pytest.approx((1e-4 / (1 - 1e-4)) ** 0.5, rel=1e-3)
    assert max(row["deviation"] for row in rows) < 0.02


def test_the_last_state_of_a_scheduler() -> None:
    scheduler = diffusers.DDIMScheduler(beta_start=0.2, beta_end=0.3, set_alpha_to_one=False)
    assert latent._last(scheduler, 0.1) == pytest.approx((0.8**0.5, 0.5))
    exploding = diffusers.EulerDiscreteScheduler(**TABLE, final_sigmas_type="sigma_min")
    exploding.set_timesteps(5)
    alpha, level = latent._last(exploding, 1.0)
    assert alpha == 1
    assert level > 0


def test_a_scheduler_that_repeats_timesteps() -> None:
    scheduler = diffusers.PNDMScheduler(**TABLE, skip_prk_steps=True)
    work = Latents(lambda x, t: x, scheduler, gaussian())
    with pytest.raises(ValueError, match="visits each timestep once, got PNDMScheduler"):
        latent_rows(work, randn(1, *EVENT), 10, [2], range(1))


def test_schedulers_of_another_process() -> None:
    scheduler = diffusers.EDMEulerScheduler()
    pipeline = diffusers.DDPMPipeline(tiny_unet(), scheduler)
    assert scheduler_of(pipeline, "own") is scheduler
    with pytest.raises(ValueError, match="--scheduler own for a pipeline with EDMEulerScheduler, got 'ddim'"):
        scheduler_of(pipeline, "ddim")
    clipped = diffusers.DDPMPipeline(tiny_unet(), diffusers.DDPMScheduler(**TABLE, clip_sample=True))
    assert scheduler_of(clipped, "ddim").config["clip_sample"] is False


# Networks -----------------------------------------------------------------------------------------------


class Conditional(torch.nn.Module):
    """A network whose output is the mean of its condition, and a learned variance beside it."""

    def forward(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor) -> Any:
        told = encoder_hidden_states.mean((1, 2)).reshape(-1, 1, 1, 1) * torch.ones_like(x)
        return diffusers.models.unets.unet_2d.UNet2DOutput(sample=torch.cat([told + x * 0, 7 * x], 1))


class Prompted:
    """As much of a conditional pipeline as prompts need."""

    device = torch.device("cpu")
    unet = Conditional()

    def __init__(self, parts: int = 2) -> None:
        self.parts, self.told = parts, []

    def encode_prompt(self, prompt: str, device: Any, images: int, guided: bool) -> tuple[Any, ...]:
        self.told.append((prompt, guided))
        empty = torch.full((1, 3, 5), 1.0) if guided else None
        return (torch.full((1, 3, 5), float(len(prompt))), empty, None, None)[: self.parts]


def test_prompts_and_guidance() -> None:
    pipeline, x, t = Prompted(), randn(5, *EVENT).float(), torch.tensor(3)
    plain = predictor(pipeline, "four", 1.0, 2)(x, t)
    torch.testing.assert_close(plain, torch.full_like(x, 4.0))
    guided = predictor(pipeline, "four", 2.5, 2)(x, t)
    torch.testing.assert_close(guided, torch.full_like(x, 1 + 2.5 * (4 - 1)))
    assert predictor(pipeline, None, 1.0, 8)(x, t).eq(0).all()
    assert pipeline.told == [("four", False), ("four", True), ("", False)]
    with pytest.raises(ValueError, match="one embedding, got Prompted"):
        predictor(Prompted(4), "four", 1.0, 2)
    for prompt, guidance in (("four", 1.0), (None, 2.0)):
        with pytest.raises(ValueError, match="no prompt and no guidance for a LDMPipeline"):
            predictor(tiny_pipeline(), prompt, guidance, 2)


@torch.no_grad()
def test_images_are_encoded_and_scaled() -> None:
    data = Setting("gaussian", images(), batch=7)
    pixels = data.fitted[0]
    vq = tiny_pipeline()
    expected = vq.vqvae.encode(pixels).latents * SCALE
    torch.testing.assert_close(encoded(vq, data), expected)

    class Kl:
        vae = tiny_vae("kl")

    posterior = Kl.vae.encode(pixels).latent_dist
    latents = encoded(Kl, data)
    assert latents.equal(encoded(Kl, data)), "the same draws every time"
    normal = (latents / SCALE + 0.25 - posterior.mean) / posterior.std  # of the posterior
    assert float(normal.mean()) == pytest.approx(0, abs=0.1)
    assert float(normal.std()) == pytest.approx(1, abs=0.1)
    with pytest.raises(ValueError, match=r"images of 3 channels, those of the VAE, got shape \(1, 8, 8\)"):
        encoded(vq, Setting("gaussian", images(channels=1)))


def test_files_of_latents(tmp_path: Path) -> None:
    path = tmp_path / "latents.npy"
    latents = randn(6, *EVENT)
    np.save(path, latents.numpy())
    torch.testing.assert_close(load_latents(path), latents.float())
    np.save(path, np.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"floats \(N, C, H, W\), got float64 \(3, 4\)"):
        load_latents(path)
    with pytest.raises(FileNotFoundError):
        load_latents(tmp_path / "none.npy")


@pytest.mark.parametrize("kind", ["archive", "empty", "text"])
def test_files_that_hold_no_array(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "latents.npy"
    if kind == "archive":
        with path.open("wb") as file:
            np.savez(file, latents=randn(6, *EVENT).numpy())
    else:
        path.write_text("" if kind == "empty" else "latents")
    with pytest.raises(ValueError, match=r"latents\.npy: expected a \.npy array of numbers"):
        load_latents(path)


# The experiment -----------------------------------------------------------------------------------------


def saved(folder: Path, **parts: Any) -> str:
    tiny_pipeline(**parts).save_pretrained(folder)
    return str(folder)


def test_a_pipeline_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = defaults(latent, **SMALL, pipeline=saved(tmp_path / "pipeline"))
    data = Setting("gaussian", images(), shrinkage="none")
    reading = run("latent", latent, data, options, tmp_path / "out")
    out = tmp_path / "out"
    assert {path.suffix for path in out.iterdir() if path.is_file()} == set(SUFFIXES)
    assert (out / "latent.png").read_bytes().startswith(b"\x89PNG")
    assert [row["skip"] for row in reading.table] == [0, 2, 6]
    assert [row["evaluations"] for row in reading.table] == [12, 10, 6]
    rms = [row["RMS to plain"] for row in reading.table]
    assert rms[0] == 0 < rms[1] < rms[2]
    assert {int(row["seed"]) for row in rows_of(out / "latent.csv", "geometry")} == set(range(10))
    monkeypatch.setattr(latent, "measure", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(latent, "draw", lambda *_: pyplot().figure())
    assert run("latent", latent, data, options, out) == reading


@torch.no_grad()
def test_plain_trajectories_are_the_pipelines(tmp_path: Path) -> None:
    """The last states are those that LDMPipeline decodes, for the same first noise."""
    path = saved(tmp_path / "pipeline", scheduler=diffusers.DDIMScheduler(**TABLE, clip_sample=False))
    pipeline = latent.open_pipeline(path)
    pipeline.set_progress_bar_config(disable=True)
    ends = list[Tensor]()

    def decode(latents: Tensor) -> Any:
        ends.append(latents)
        return diffusers.models.unets.unet_2d.UNet2DOutput(sample=torch.zeros(1, 3, 8, 8))

    pipeline.vqvae.decode = decode
    pipeline(
        batch_size=3, num_inference_steps=9, generator=torch.Generator().manual_seed(5), output_type="np"
    )
    noise = torch.randn(3, *EVENT, generator=torch.Generator().manual_seed(5))
    scheduler = scheduler_of(pipeline, "ddim")
    work = Latents(predictor(pipeline, None, 1.0, 2), scheduler, gaussian().float())
    scheduler.set_timesteps(9)
    states = latent.scheduler_states(work.predict, scheduler, noise, scheduler.timesteps)
    assert len(states) == 10
    # Nine float32 evaluations in batches of two and one, which some processors round otherwise than of three.
    torch.testing.assert_close(states[-1] / SCALE, ends[0], rtol=1e-5, atol=5e-5)


def test_the_model_may_be_the_pipeline(tmp_path: Path) -> None:
    path = saved(tmp_path / "pipeline")
    np.save(tmp_path / "latents.npy", randn(50, *EVENT).numpy())
    few = {"seeds": 1, "steps": 6, "skips": [3], "latents": str(tmp_path / "latents.npy")}
    named, given = (
        latent.measure(setting(model), defaults(latent, **few, pipeline=pipeline), "seeds=0-0")
        for model, pipeline in ((f"diffusers:{path}", None), ("gaussian", path))
    )
    assert named == given
    np.save(tmp_path / "latents.npy", randn(50, 3, 4, 4).numpy())
    latent._kept.clear()
    with pytest.raises(ValueError, match=r"latents of 2 channels, got shape \(50, 3, 4, 4\)"):
        latent.measure(setting("gaussian"), defaults(latent, **few, pipeline=path), "seeds=0-0")


def test_a_pipeline_without_a_vae(tmp_path: Path) -> None:
    diffusers.DDPMPipeline(tiny_unet(), diffusers.DDPMScheduler(**TABLE)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"with a VAE and a UNet, .* got DDPMPipeline in"):
        latent.open_pipeline(str(tmp_path))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seeds": 0}, "seeds >= 1 and steps >= 2, got 0 and 50"),
        ({"steps": 1}, "seeds >= 1 and steps >= 2, got 32 and 1"),
        ({"skips": [50]}, r"skips from 0 to 49, got \[50\]"),
        ({"skips": [-1, 3]}, r"skips from 0 to 49, got \[-1, 3\]"),
        ({"latents": None}, r"images to encode \(--data\) or a file of latents"),
        ({"pipeline": None}, "--pipeline PATH or --model diffusers:PATH, got --model gaussian"),
    ],
)
def test_impossible_options(changed: dict[str, Any], message: str) -> None:
    options = defaults(latent, **{"latents": "latents.npy", "pipeline": "somewhere", **changed})
    with pytest.raises(ValueError, match=message):
        latent.units(setting("gaussian"), options)


def test_images_beside_a_file_of_latents() -> None:
    options = defaults(latent, latents="latents.npy", pipeline="somewhere")
    with pytest.raises(ValueError, match=r"\(--latents\), got .* and latents\.npy"):
        latent.units(Setting("gaussian", images()), options)


def test_a_figure_needs_all_kinds() -> None:
    with pytest.raises(ValueError, match="rows of the kind 'geometry', got none"):
        draw([{"kind": "teleport"}])


# Pixels -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_pipeline_of_pixels_as_a_model(tmp_path: Path) -> None:
    unet, scheduler = tiny_unet(3), diffusers.DDPMScheduler(**TABLE)
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(tmp_path)
    model = load_model(f"diffusers:{tmp_path}")
    assert tuple(model.event_shape) == (3, 4, 4)
    scheduler.set_timesteps(20)
    alpha, level = scheduler_levels(scheduler)
    x = randn(2, 3, 4, 4).float() * 2
    t = scheduler.timesteps[10]
    noise = unet(float(alpha[10]) * x, t).sample
    assert float(unexplained_variance(x - float(level[10]) * noise, model(x, float(level[10]))).max()) < 1e-6
    used = Setting(f"diffusers:{tmp_path}", ImageData(randn(9, 3, 4, 4).float().tanh(), scaling="none"))
    assert used.model(x, 1.0).shape == x.shape
    assert used.event_shape == (3, 4, 4)


def test_pipelines_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=rf"expected a pipeline of diffusers, got no model_index.json in {tmp_path}"
    ):
        load_model(f"diffusers:{tmp_path}")
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=1,
        attention_head_dim=4,
        in_channels=2,
        num_layers=1,
        norm_num_groups=2,
        sample_size=4,
        num_embeds_ada_norm=3,
    )
    scheduler = diffusers.DDIMScheduler(**TABLE)
    diffusers.DiTPipeline(transformer, tiny_vae("kl"), scheduler).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"expected a pipeline with a unet, got DiTPipeline in {tmp_path}"):
        load_model(f"diffusers:{tmp_path}")
