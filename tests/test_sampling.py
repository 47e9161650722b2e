"""Samples by seeds: the same image in any batch and process; and the command that writes them."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import EVENT, denoiser, relative_error, tiny_unet, train_digits
from PIL import Image

from gaussnet import (
    BypassPrecond,
    Denoiser,
    EDMPrecond,
    Gate,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    MeasuredError,
    VEPrecond,
    cli_sample,
    count_nfe,
    from_pretrained,
    heun,
    iDDPMPrecond,
    karras_sigmas,
    open_images,
    rounded_sigmas,
    teleport,
)
from gaussnet.cli import main
from gaussnet.numerics import as_level
from gaussnet.samplers import ModelStatistics, compute_ems, dpm_v3, edm_stochastic, log_snr_sigmas
from gaussnet.sampling import Jump, choose_jump, noise_of, one_hot, parse_seeds, sample_seeds

GRID = karras_sigmas(6)
GATE = Gate(torch.tensor([0.5, 4.0, 16.0]), torch.tensor([1.0, 0.2, 0.001]))


def model(awake: bool = True, **changes: Any) -> BypassPrecond:
    gaussian = denoiser("gaussian-full", torch.float32)
    return BypassPrecond(tiny_unet(awake, in_channels=2, **changes), gaussian, GATE).eval()


def drawn(denoiser: Any, seeds: Any, **options: Any) -> torch.Tensor:
    return torch.cat([images for _, images in sample_seeds(denoiser, seeds, GRID, **options)])


@pytest.mark.parametrize(
    ("text", "seeds"), [("0-3", [0, 1, 2, 3]), ("5", [5]), ("7,1-2", [7, 1, 2]), ("10-10", [10])]
)
def test_seeds(text: str, seeds: list[int]) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "3-", "-3", "5-2", "1,1", "1.5", "0-3-5"])
def test_impossible_seeds(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_seeds(text)


@pytest.mark.parametrize("solver", ["heun", "dpmpp_2m", "unipc", "edm_stochastic"])
def test_a_seed_is_an_image_whatever_the_batch(solver: str) -> None:
    options = {"solver": solver, "jump": choose_jump(model())}
    whole = drawn(model(), range(7), **options)
    for batch_size in (1, 3):
        parts = drawn(model(), range(7), batch_size=batch_size, **options)
        assert relative_error(parts, whole) < 1e-5
    assert relative_error(drawn(model(), [5, 2], **options), whole[[5, 2]]) < 1e-5
    assert whole.shape == (7, *EVENT)


def test_stochastic_solvers_go_on_with_the_generator_of_the_seed() -> None:
    generator = torch.Generator().manual_seed(3)
    x = 80 * torch.randn(1, *EVENT, generator=generator)
    expected = edm_stochastic(model(), x, GRID, generator=generator)
    assert relative_error(drawn(model(), [5, 3], solver="edm_stochastic")[1:], expected) < 1e-6


def test_without_a_jump_it_is_the_solver() -> None:
    x = 80 * noise_of([3, 4], EVENT)
    assert torch.equal(drawn(model(), [3, 4]), heun(model(), x, GRID))


@pytest.mark.parametrize("regrid", [True, False])
def test_a_jump_is_teleport(regrid: bool) -> None:
    net = model()
    jump = Jump(denoiser("gaussian-full", torch.float32), 6.0)
    x = 80 * noise_of([3, 4], EVENT)
    expected = heun(net, *teleport(jump.gaussian, x, GRID, sigma_skip=6.0, steps=6 if regrid else None))
    with count_nfe(net) as nfe:
        assert torch.equal(drawn(net, [3, 4], jump=jump, regrid=regrid), expected)
    assert nfe() == (11 if regrid else 2 * int((GRID[:-1] < 6).sum()) + 1)


def statistics(top: float = 80.0) -> ModelStatistics:
    sigmas = log_snr_sigmas(12, 0.002, top)[:-1].flip(0)
    shape = (12, 1, 1, 1)
    l, s, b = (torch.linspace(*ends, 12, dtype=torch.float64).reshape(shape) for ends in ENDS)  # noqa: E741
    return ModelStatistics(sigmas, l, s, b)


ENDS = ((1.0, 0.5), (-0.1, 0.2), (0.0, 0.1))


def test_dpm_v3_gets_its_statistics() -> None:
    x = 80 * noise_of([3, 4], EVENT)
    found = drawn(model(), [3, 4], solver="dpm_v3", statistics=statistics())
    assert torch.equal(found, dpm_v3(model(), x, GRID, statistics=statistics()))
    assert not torch.equal(found, drawn(model(), [3, 4], solver="dpmpp_2m"))
    with pytest.raises(ValueError, match="expected statistics of the denoiser"):
        drawn(model(), [3], solver="dpm_v3")
    with pytest.raises(ValueError, match="statistics for dpm_v3 alone, got some for heun"):
        drawn(model(), [3], statistics=statistics())


@pytest.mark.parametrize("level", [3.0, 30.0])
def test_a_history_reaches_as_far_as_the_statistics(level: float) -> None:
    jump = Jump(denoiser("gaussian-full", torch.float32), level)
    x = 80 * noise_of([3, 4], EVENT)
    moved, grid, history = teleport(
        jump.gaussian, x, GRID, sigma_skip=level, steps=len(GRID) - 1, return_history=True
    )
    known = [entry for entry in history if entry[0] <= 80]
    assert 0 < len(known) < len(history) or level < 10
    expected = dpm_v3(model(), moved, grid, statistics=statistics(), history=known)
    assert torch.equal(drawn(model(), [3, 4], solver="dpm_v3", statistics=statistics(), jump=jump), expected)
    whole = drawn(model(), [3, 4], solver="dpm_v3", statistics=statistics(level), jump=jump)
    sliced = dpm_v3(model(), moved, grid, statistics=statistics(level))
    assert torch.equal(whole, sliced), "statistics that end at the level of the jump serve, without history"


def test_the_jump_is_chosen_by_the_gate_or_the_model() -> None:
    net = model()
    jump = choose_jump(net)
    assert jump.gaussian is net.gaussian
    assert jump.sigma_skip == pytest.approx(GATE.closes(0.1))
    assert choose_jump(net, sigma_skip=3.0).sigma_skip == 3.0
    gaussian = GaussianDenoiser.isotropic(torch.zeros(EVENT), 0.25)
    untrained = EDMPrecond(tiny_unet(False))  # is this Gaussian at every level
    assert choose_jump(untrained, gaussian, sigmas=GRID).sigma_skip == float(GRID[-2])
    with pytest.raises(ValueError, match="a EDMPrecond has none of its own"):
        choose_jump(untrained)
    with pytest.raises(ValueError, match="stands in for this model nowhere"):
        choose_jump(EDMPrecond(tiny_unet()), GaussianDenoiser.isotropic(torch.ones(EVENT), 4.0))


def test_a_gate_that_is_closed_everywhere_jumps_to_the_last_level() -> None:
    shut = Gate(torch.tensor([0.5, 16.0]), torch.tensor([0.05, 0.0]))
    net = BypassPrecond(tiny_unet(), model().gaussian, shut, show_gaussian=False).eval()
    jump = choose_jump(net, sigmas=GRID)
    assert jump.sigma_skip == float(GRID[-2])
    ((_, images),) = sample_seeds(net, range(2), GRID, jump=jump, regrid=False)
    assert images.isfinite().all()


@pytest.mark.parametrize("level", [float(GRID[-2]), 0.001])
def test_from_the_last_level_a_single_step_is_left(level: float) -> None:
    jump = Jump(denoiser("gaussian-full", torch.float32), level)
    moved, grid = teleport(jump.gaussian, 80 * noise_of([3], EVENT), GRID, sigma_skip=level)
    assert grid.tolist() == [level, 0.0]
    assert torch.equal(drawn(model(), [3], jump=jump), heun(model(), moved, grid))


def test_a_gate_that_stays_open_leaves_the_jump_to_the_model() -> None:
    gaussian, ajar = (
        denoiser("gaussian-full", torch.float32),
        Gate(torch.tensor([0.5, 16.0]), torch.tensor([1.0, 0.2])),
    )
    net = BypassPrecond(tiny_unet(False, in_channels=2), gaussian, ajar, base="gaussian").eval()
    assert choose_jump(net, sigmas=GRID).sigma_skip == float(GRID[-2]), "untrained, it is its Gaussian"
    with pytest.raises(ValueError, match="stands in for this model nowhere"):
        choose_jump(net, GaussianDenoiser.isotropic(torch.ones(EVENT), 4.0), sigmas=GRID)


class Apart(Denoiser):
    """A Gaussian denoiser that labels move by a_k e(s) / s, the share (a_k / s)^2 of e(s)^2."""

    def __init__(self, gaussian: GaussianDenoiser, *amounts: float) -> None:
        super().__init__()
        self.gaussian, self.amounts = gaussian, torch.tensor(amounts)

    @property
    def event_shape(self) -> torch.Size:
        return self.gaussian.event_shape

    def forward(self, x: torch.Tensor, sigma: Any, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        level = float(as_level(sigma).flatten()[0])
        moved = 0.0 if class_labels is None else self.amounts[class_labels].reshape(-1, 1, 1, 1)
        return self.gaussian(x, sigma) + moved * float(self.gaussian.bayes_error(level)) ** 0.5 / level


@pytest.mark.parametrize(
    ("labels", "guidance", "lowest"),
    [
        (None, 1.0, 0.0),
        ([0], 1.0, 1.0),
        ([1], 1.0, 4.0),
        ([0], 3.0, 3.0),
        ([1], 0.5, 2.0),
        ([0, 1], 1.0, (0.5 * (1 + 16)) ** 0.5),
        ([0, 1], 2.0, 2 * (0.5 * (1 + 16)) ** 0.5),
    ],
    ids=str,
)
def test_the_jump_is_measured_on_what_is_sampled(labels: Any, guidance: float, lowest: float) -> None:
    gaussian, grid = denoiser("gaussian-full", torch.float32), karras_sigmas(40)
    told = None if labels is None else torch.tensor(labels * (16 // len(labels)))
    net = Apart(gaussian, 0.1, 0.4)  # the Gaussian stands in for it from 10 a_k w up
    jump = choose_jump(net, gaussian, sigmas=grid, class_labels=told, guidance=guidance)
    assert jump.sigma_skip == float(grid[:-1][grid[:-1] > lowest].min())
    assert jump.gaussian is gaussian


def test_labels_of_the_jump_are_one_a_state() -> None:
    gaussian = denoiser("gaussian-full", torch.float32)
    net = Apart(gaussian, 0.1)
    with pytest.raises(ValueError, match="expected 16 class_labels, one a seed, got 2"):
        choose_jump(net, gaussian, class_labels=torch.tensor([0, 0]))
    with pytest.raises(ValueError, match=r"expected class_labels for guidance=2.0, got None"):
        choose_jump(net, gaussian, guidance=2.0)
    few = choose_jump(net, gaussian, seeds=[5, 7], class_labels=torch.tensor([0, 0]), sigmas=GRID)
    assert few.sigma_skip == float(GRID[:-1][GRID[:-1] > 1].min())


def test_the_gate_of_a_mixture_says_nothing_of_a_gaussian() -> None:
    images, labels = train_digits(), torch.arange(len(train_digits())) % 2
    images = images + 0.5 * (2 * labels - 1)[:, None, None, None]
    mixture = GaussianMixtureDenoiser.fit(images, labels=labels, rank=10)
    error = MeasuredError.fit(mixture, images[:100], labels=labels[:100])
    unet = tiny_unet(False, in_channels=2, label_dim=2)
    net = BypassPrecond(unet, mixture, GATE, error=error).eval()
    with pytest.raises(ValueError, match="stands in for this model nowhere"):
        choose_jump(net, GaussianDenoiser.fit(images), class_labels=torch.eye(2)[torch.arange(16) % 2])


def test_classes_and_guidance() -> None:
    net = EDMPrecond(tiny_unet(label_dim=4)).eval()
    labels = one_hot(net, [0, 1, 2])
    plain = drawn(net, range(3))
    conditional = drawn(net, range(3), class_labels=labels)
    guided = drawn(net, range(3), class_labels=labels, guidance=3.0)
    assert relative_error(conditional, plain) > 1e-6
    assert relative_error(guided, conditional) > 1e-6
    assert relative_error(drawn(net, [2], class_labels=labels[2:]), conditional[2:]) < 1e-5
    with pytest.raises(ValueError, match=r"classes in \[0, 4\).*got \[4\]"):
        one_hot(net, [4])
    mixture = GaussianMixtureDenoiser.fit(train_digits(), 3)
    assert one_hot(mixture, [7, 2]).tolist() == [7, 2]


def test_images_that_are_not_finite_are_an_error() -> None:
    wild = GaussianDenoiser.isotropic(torch.zeros(EVENT), 1.0)
    wild.mean.fill_(float("inf"))
    with pytest.raises(ValueError, match="finite images, got NaN or infinite values by heun for seed 5"):
        drawn(wild, [5, 2])


def test_impossible_arguments() -> None:
    with pytest.raises(ValueError, match=r"solver to be one of euler, .*got 'fast'"):
        drawn(model(), [0], solver="fast")
    with pytest.raises(ValueError, match="2 class_labels, one a seed, got 1"):
        drawn(model(), [0, 1], class_labels=torch.tensor([1]))
    with pytest.raises(ValueError, match="class_labels for guidance=2, got None"):
        drawn(model(), [0], guidance=2)


# Command ------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model(label_dim=4).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def arguments(saved: Path, out: Path, *others: str) -> list[str]:
    return ["sample", str(saved), "--steps", "4", "--seeds", "0-5", "--out", str(out), *others]


def test_it_writes_what_is_missing(saved: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "images"
    assert main(arguments(saved, out, "--grid", str(tmp_path / "grid.png"), "--batch", "4")) == 0
    files = sorted(out.glob("*.png"))
    assert [path.name for path in files] == [f"{seed:06d}.png" for seed in range(6)]
    assert sorted(out.iterdir()) == [*files, out / "sample.json"]
    pictures = [np.array(Image.open(path)) for path in files]
    assert all(picture.shape == (8, 8) for picture in pictures)
    assert Image.open(tmp_path / "grid.png").size == (48, 8)
    times = [path.stat().st_mtime_ns for path in files]
    files[2].unlink()
    assert main(arguments(saved, out)) == 0
    assert "1 images of 6 seeds by heun in 4 steps" in capsys.readouterr().out
    assert np.array_equal(np.array(Image.open(files[2])), pictures[2])
    assert [p.stat().st_mtime_ns for i, p in enumerate(files) if i != 2] == times[:2] + times[3:]
    assert main(arguments(saved, tmp_path / "all.npz", "--batch", "1")) == 0
    archive = np.load(tmp_path / "all.npz")
    assert archive["seeds"].tolist() == list(range(6))
    assert np.abs(archive["images"].astype(int) - np.stack(pictures)).max() <= 1


def test_teleport_classes_and_guidance_reach_the_sampler(saved: Path, tmp_path: Path, capsys: Any) -> None:
    options = ["--solver", "unipc", "--teleport", "auto", "--classes", "0-3", "--guidance", "2"]
    assert main(arguments(saved, tmp_path / "a.npz", *options)) == 0
    assert "by unipc in 4 steps, after a jump to sigma" in capsys.readouterr().out
    assert main(arguments(saved, tmp_path / "b.npz", *options[:4], "--classes", "0-3")) == 0
    assert main(arguments(saved, tmp_path / "c.npz", "--solver", "unipc", "--teleport", "2.5")) == 0
    images = [np.load(tmp_path / f"{name}.npz")["images"] for name in "abc"]
    assert not np.array_equal(images[0], images[1])
    assert not np.array_equal(images[1], images[2])


def test_folders_of_outputs_are_made(saved: Path, tmp_path: Path) -> None:
    out, grid = tmp_path / "new" / "samples.npz", tmp_path / "other" / "grid.png"
    assert main(arguments(saved, out, "--grid", str(grid))) == 0
    with np.load(out) as arrays:
        assert len(arrays["images"]) == 6
    assert grid.is_file()


def test_without_a_jump_it_says_so(saved: Path, tmp_path: Path, capsys: Any, caplog: Any) -> None:
    low = ["--sigma-max", "0.5", "--grid", str(tmp_path / "grid.png")]
    assert main(arguments(saved, tmp_path / "plain", *low)) == 0
    assert main(arguments(saved, tmp_path / "auto", *low, "--teleport", "auto")) == 0
    assert "no jump: the Gaussian stands in for the model from sigma" in caplog.text
    assert "after a jump" not in capsys.readouterr().out
    for path in (tmp_path / "plain").iterdir():
        assert path.read_bytes() == (tmp_path / "auto" / path.name).read_bytes()


def test_a_grid_of_some_images_is_told(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(arguments(saved, tmp_path / "out", "--grid", str(tmp_path / "grid.png"))) == 0
    assert "grid.png shows 3 of 6 images: other processes are not done" in caplog.text


def test_two_processes_share_the_seeds(saved: Path, tmp_path: Path, monkeypatch: Any) -> None:
    out, whole = tmp_path / "shared", tmp_path / "whole"
    assert main(arguments(saved, whole)) == 0
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert main(arguments(saved, out)) == 0
        assert len(list(out.glob("*.png"))) == 3 * (rank + 1)
    assert (out / "sample.json").read_bytes() == (whole / "sample.json").read_bytes()
    for path in whole.glob("*.png"):
        assert np.abs(np.array(Image.open(path), int) - np.array(Image.open(out / path.name))).max() <= 1
    assert main(arguments(saved, tmp_path / "all.npz")) == 2


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics at fewer levels, of fewer samples."""
    monkeypatch.setattr(cli_sample, "STATISTICS_LEVELS", 12)
    monkeypatch.setattr(cli_sample, "STATISTICS_SAMPLES", 24)


@pytest.fixture
def smooth(tmp_path: Path) -> Path:
    """A model whose network is not trained yet: with statistics that few levels resolve."""
    model(awake=False, label_dim=4).save_pretrained(tmp_path / "smooth")
    return tmp_path / "smooth"


@pytest.mark.usefixtures("few")
def test_statistics_are_computed_once(smooth: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    file = tmp_path / "new" / "s.safetensors"
    options = ["--solver", "dpm_v3", "--teleport", "6", "--statistics", str(file), "--device", "cpu"]
    assert main(arguments(smooth, tmp_path / "a.npz", *options)) == 2
    assert "s.safetensors: --statistics-from DATA computes and writes it" in capsys.readouterr().err
    made: list[Any] = []

    def spy(*arguments: Any, **others: Any) -> ModelStatistics:
        made.append((arguments, others, compute_ems(*arguments, **others)))
        return made[-1][2]

    monkeypatch.setattr(cli_sample, "compute_ems", spy)
    assert main(arguments(smooth, tmp_path / "a.npz", *options, "--statistics-from", "digits")) == 0
    assert "by dpm_v3 in 4 steps, after a jump to sigma 6" in capsys.readouterr().out
    assert [path.name for path in file.parent.iterdir()] == ["s.safetensors"]
    net, found = model(awake=False, label_dim=4), ModelStatistics.load(file)
    ((given, data, sigmas), others, expected) = made[0]
    assert relative_error(given(data, 1.0), net(data, 1.0)) < 1e-6
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))[:24]
    assert data.equal(open_images("digits").tensor()[order])
    assert sigmas.equal(log_snr_sigmas(12))
    assert (others["n"], others["class_labels"]) == (24, None)
    for name in ("sigmas", "l", "s", "b"):
        assert getattr(found, name).equal(getattr(expected, name)), name
    monkeypatch.setattr(cli_sample, "compute_ems", None)
    assert main(arguments(smooth, tmp_path / "b.npz", *options, "--statistics-from", "digits")) == 0
    assert main(arguments(smooth, tmp_path / "c.npz", *options)) == 0
    images = [np.load(tmp_path / f"{name}.npz")["images"] for name in "abc"]
    assert np.array_equal(images[0], images[1])
    assert np.array_equal(images[0], images[2])
    with torch.no_grad():
        jump = choose_jump(net, sigma_skip=6.0)
        whole = sample_seeds(net, range(6), karras_sigmas(4), solver="dpm_v3", jump=jump, statistics=found)
        pixels = cli_sample.to_pixels(torch.cat([part for _, part in whole]))
    assert np.abs(images[0].astype(int) - np.stack(pixels)).max() <= 1


@pytest.mark.usefixtures("few")
def test_statistics_are_those_of_the_guided_model(smooth: Path, tmp_path: Path, monkeypatch: Any) -> None:
    seen: list[Any] = []

    def spy(denoiser: Any, data: torch.Tensor, sigmas: torch.Tensor, **options: Any) -> ModelStatistics:
        seen.append((type(denoiser).__name__, options["class_labels"]))
        assert len(data) == 24
        return statistics()

    monkeypatch.setattr(cli_sample, "compute_ems", spy)
    labels, images = np.arange(30) % 4, (train_digits()[:30, 0] * 127.5 + 127.5).byte().numpy()
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    options = ["--solver", "dpm_v3", "--classes", "0-3", "--guidance", "2"]
    options += ["--statistics-from", str(tmp_path / "data.npz")]
    for name, others in (("guided", options), ("plain", [*options, "--guidance", "1"])):
        file = ["--statistics", str(tmp_path / f"{name}.safetensors")]
        assert main(arguments(smooth, tmp_path / f"{name}.npz", *others, *file)) == 0
    assert [name for name, _ in seen] == ["GuidedDenoiser", "BypassPrecond"]
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))[:24]
    assert seen[0][1].argmax(1).tolist() == labels[order.numpy()].tolist()
    np.savez(tmp_path / "bare.npz", images=images)
    bare = ["--statistics-from", str(tmp_path / "bare.npz"), "--statistics", str(tmp_path / "x.safetensors")]
    assert main(arguments(smooth, tmp_path / "x.npz", *options, *bare)) == 2


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (["--solver", "dpm_v3"], "dpm_v3: expected --statistics FILE.safetensors, got none"),
        (["--statistics", "s.safetensors"], "expected --statistics with dpm_v3 alone, got it with heun"),
        (["--statistics-from", "digits"], "to keep what --statistics-from makes, got none"),
        (["--solver", "dpm_v3", "--statistics", "s.npz"], "--statistics FILE.safetensors, got s.npz"),
        (["--seeds", "5-2"], "ranges of seeds to increase"),
        (["--teleport", "100"], "level of --teleport above 0 and below the first level, 80, got 100"),
        (["--teleport", "nan"], "below the first level, 80, got nan"),
        (["--plain-skip"], "--plain-skip is an option of jumps: expected --teleport auto or a level"),
        (["--gaussian", "absent"], "--gaussian is an option of jumps: expected --teleport auto or a level"),
        (["--teleport", "far"], "--teleport none, auto or a level, got 'far'"),
        (["--classes", "9"], "classes in [0, 4)"),
        (["--guidance", "2"], "expected --classes with --guidance 2, got none"),
        (["--steps", "0"], "--steps >= 1, got 0"),
    ],
)
def test_errors_are_one_line(
    saved: Path, tmp_path: Path, capsys: Any, others: list[str], message: str
) -> None:
    assert main(arguments(saved, tmp_path / "out", *others)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert main(arguments(saved, tmp_path / "new" / "out", *others)) == 2
    assert not (tmp_path / "new").exists(), "nothing is made for what cannot be drawn"


def test_from_a_shell(saved: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; from gaussnet.cli import main; sys.exit(main())"]
    result = subprocess.run(
        [*command, *arguments(saved, tmp_path / "images")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "images").glob("*.png"))) == 6


def other_gaussian(folder: Path) -> GaussianDenoiser:
    gaussian = GaussianDenoiser.isotropic(torch.full(EVENT, 0.3), 0.25)
    gaussian.save_pretrained(folder)
    return gaussian


def test_a_gaussian_from_a_folder_is_jumped_along(saved: Path, tmp_path: Path, capsys: Any) -> None:
    gaussian = other_gaussian(tmp_path / "gaussian")
    options = ["--teleport", "2.5", "--gaussian", str(tmp_path / "gaussian")]
    assert main(arguments(saved, tmp_path / "a.npz", *options)) == 0
    assert main(arguments(saved, tmp_path / "own.npz", *options[:2])) == 0
    found, own = (np.load(tmp_path / f"{name}.npz")["images"].astype(int) for name in ("a", "own"))
    with torch.no_grad():
        parts = sample_seeds(model(label_dim=4), range(6), karras_sigmas(4), jump=Jump(gaussian, 2.5))
        pixels = cli_sample.to_pixels(torch.cat([part for _, part in parts]))
    assert np.abs(found - np.stack(pixels)).max() <= 1
    assert not np.array_equal(found, own)
    capsys.readouterr()
    assert main(arguments(saved, tmp_path / "b.npz", *options[:3], str(saved))) == 2
    assert "expected --gaussian to be a GaussianDenoiser, got a BypassPrecond" in capsys.readouterr().err
    assert not (tmp_path / "b.npz").exists()


@pytest.mark.parametrize("name", ["images", "images.npz"])
def test_an_out_of_the_other_kind_is_an_error(name: str, saved: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / name
    out.mkdir() if out.suffix else out.write_text("mine")
    assert main(arguments(saved, out)) == 2
    assert f"expected --out to be a folder or NAME.npz, got {out}" in capsys.readouterr().err
    assert out.is_dir() or out.read_text() == "mine"


@pytest.mark.parametrize("shape", [(2, 8, 8), (3, 8)], ids=str)
def test_what_is_no_image_is_not_sampled(shape: tuple[int, ...], tmp_path: Path, capsys: Any) -> None:
    GaussianDenoiser.isotropic(torch.zeros(shape), 1.0).save_pretrained(tmp_path / "model")
    assert main(arguments(tmp_path / "model", tmp_path / "out")) == 2
    assert f"expected a model of images of 1 or 3 channels, got one of {shape}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_measures_the_jump_with_the_classes(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def spy(*arguments: Any, **others: Any) -> Jump:
        seen.append((arguments[4], others))
        return choose_jump(*arguments, **others)

    monkeypatch.setattr(cli_sample, "choose_jump", spy)
    command = arguments(
        saved, tmp_path / "out", "--teleport", "auto", "--classes", "1,3,0", "--guidance", "2"
    )
    for seeds in ("10-12", "7"):  # of which the jump does not depend
        assert main([*command, "--seeds", seeds]) == 0
        (states, others) = seen.pop()
        assert list(states) == list(range(16))
        assert others["class_labels"].argmax(1).tolist() == ([1, 3, 0] * 6)[:16]
        assert others["guidance"] == 2
    assert main(arguments(saved, tmp_path / "plain", "--teleport", "auto")) == 0
    assert seen.pop()[1] == {"class_labels": None, "guidance": 1.0}


def test_no_jump_along_a_gaussian_of_all_classes_to_one_of_them(tmp_path: Path, capsys: Any) -> None:
    data = open_images("digits")
    GaussianMixtureDenoiser.fit(data.tensor(), labels=data.labels, rank=12).save_pretrained(tmp_path / "m")
    GaussianDenoiser.fit(data.tensor()).save_pretrained(tmp_path / "g")
    options = ["--teleport", "auto", "--gaussian", str(tmp_path / "g")]
    assert main(arguments(tmp_path / "m", tmp_path / "all.npz", *options)) == 0
    assert "after a jump to sigma" in capsys.readouterr().out
    assert main(arguments(tmp_path / "m", tmp_path / "one.npz", *options, "--classes", "1")) == 2
    assert "the Gaussian stands in for this model nowhere" in capsys.readouterr().err
    assert not (tmp_path / "one.npz").exists()


# A folder's settings ------------------------------------------------------------------------------


JUMP = ["--teleport", "2.5"]


def held(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_tells_what_decides_its_images(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(arguments(saved, out, *JUMP, "--classes", "0,2-3", "--guidance", "2", "--plain-skip")) == 0
    told = json.loads((out / "sample.json").read_text())
    assert len(told.pop("model")) == len(told.pop("gaussian")) == 16
    assert told == {
        "solver": "heun",
        "steps": 4,
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        "rho": 7.0,
        "guidance": 2.0,
        "classes": [0, 2, 3],
        "jump": 2.5,
        "plain_skip": True,
        "statistics": None,
    }
    assert main(arguments(saved, tmp_path / "all.npz")) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.npz", "model", "out"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--solver", "euler"], 'got solver "euler", not "heun": use another --out'),
        (["--steps", "5"], "got steps 5, not 4: use"),
        (["--sigma-min", "0.01"], "got sigma_min 0.01, not 0.002: use"),
        (["--sigma-max", "70"], "got sigma_max 70.0, not 80.0: use"),
        (["--rho", "6"], "got rho 6.0, not 7.0: use"),
        (["--guidance", "3"], "got guidance 3.0, not 2.0: use"),
        (["--classes", "1,0"], "got classes [1, 0], not [0, 1]: use"),
        (["--teleport", "2.6"], "got jump 2.6, not 2.5: use"),
        (["--teleport", "none"], "got jump null, not 2.5; gaussian null, not "),
        (["--plain-skip"], "got plain_skip true, not false: use"),
        (["--gaussian", "OTHER"], "got gaussian "),
        (["--steps", "5", "--solver", "euler"], 'got solver "euler", not "heun"; steps 5, not 4: use'),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("rank", [0, 1])
def test_other_settings_are_refused(
    changes: list[str], message: str, rank: int, saved: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    out = tmp_path / "out"
    command = arguments(saved, out, *JUMP, "--classes", "0-1", "--guidance", "2", "--seeds", "0-1")
    assert main(command) == 0
    before = held(out)
    other_gaussian(tmp_path / "other")
    capsys.readouterr()
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    changed = [str(tmp_path / "other") if word == "OTHER" else word for word in changes]
    assert main([*command, *changed, "--seeds", "0-9"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"gaussnet sample: expected the settings of {out / 'sample.json'}, got ")
    assert message in error
    assert error.endswith("use another --out, or those settings")
    assert held(out) == before, "nothing is drawn"


def test_what_does_not_decide_an_image_goes_on(saved: Path, tmp_path: Path, caplog: Any) -> None:
    out = tmp_path / "out"
    command = arguments(saved, out, "--classes", "0-1")
    assert main([*command, "--seeds", "0"]) == 0
    before = (out / "sample.json").read_bytes()
    same = from_pretrained(saved)
    same.provenance = {"data": "told later"}
    same.save_pretrained(tmp_path / "copy")
    command[1] = str(tmp_path / "copy")
    others = ["--seeds", "0-3", "--batch", "1", "--device", "cpu", "--classes", "0,1"]
    assert main([*command, *others, "--grid", str(tmp_path / "grid.png")]) == 0
    assert len(list(out.glob("*.png"))) == 4
    assert (out / "sample.json").read_bytes() == before
    assert not caplog.records


@pytest.mark.parametrize("changed", ["numbers", "arguments"])
def test_another_model_of_the_same_name_is_refused(
    changed: str, saved: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    assert main(arguments(saved, out)) == 0
    before = held(out)
    other = model(label_dim=4)
    if changed == "numbers":
        with torch.no_grad():
            next(other.model.parameters()).view(-1)[-1].add_(1e-3)
    else:
        other.gate_tol = 0.02
    other.save_pretrained(saved)
    capsys.readouterr()
    assert main(arguments(saved, out, "--seeds", "0-9")) == 2
    assert f"{out / 'sample.json'}, got model " in capsys.readouterr().err
    assert held(out) == before


def test_other_statistics_are_refused(saved: Path, tmp_path: Path, capsys: Any) -> None:
    statistics().save(tmp_path / "s.safetensors")
    options = ["--solver", "dpm_v3", "--statistics", str(tmp_path / "s.safetensors")]
    assert main(arguments(saved, tmp_path / "out", *options)) == 0
    assert main(arguments(saved, tmp_path / "out", *options, "--seeds", "7")) == 0
    statistics(81.0).save(tmp_path / "s.safetensors")
    assert main(arguments(saved, tmp_path / "out", *options, "--seeds", "8")) == 2
    assert "got statistics " in capsys.readouterr().err
    assert not (tmp_path / "out" / "000008.png").exists()


@pytest.mark.usefixtures("few")
def test_what_is_refused_gets_no_statistics(
    smooth: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    assert main(arguments(smooth, tmp_path / "out")) == 0
    monkeypatch.setattr(cli_sample, "compute_ems", None)
    file = tmp_path / "s.safetensors"
    options = ["--solver", "dpm_v3", "--statistics", str(file), "--statistics-from", "digits"]
    assert main(arguments(smooth, tmp_path / "out", *options)) == 2
    assert 'got solver "dpm_v3", not "heun": use another --out' in capsys.readouterr().err
    assert not file.exists()


def test_the_rounding_of_a_device_is_no_other_jump(saved: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    command = arguments(saved, out, "--teleport", "auto")
    assert main(command) == 0
    file = out / "sample.json"
    told = json.loads(file.read_text())
    for factor, status in ((1 + 1e-7, 0), (1 - 1e-7, 0), (1.001, 2)):
        file.write_text(json.dumps({**told, "jump": told["jump"] * factor}))
        assert main(command) == status, factor
    del told["jump"]
    file.write_text(json.dumps(told))
    assert main(command) == 0, "what a version did not tell is not known to differ"
    assert json.loads(file.read_text()) == told


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "to be JSON: "), ("[" * 100_000, "to be JSON: "), ("[1]", ": expected an object, got a list")],
    ids=["cut", "deep", "list"],
)
def test_another_sample_json_is_left_alone(
    text: str, message: str, saved: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sample.json").write_text(text)
    assert main(arguments(saved, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "use another --out" in error
    assert held(tmp_path / "out") == {"sample.json": text.encode()}


def test_a_folder_without_settings_goes_on(saved: Path, tmp_path: Path, capsys: Any, caplog: Any) -> None:
    out, classes = tmp_path / "out", ["--classes", "0-3"]
    assert main(arguments(saved, out, *classes)) == 0
    before = held(out)
    (out / "sample.json").unlink()
    (out / "000002.png").unlink()
    assert not caplog.records
    assert main(arguments(saved, out, *classes)) == 0
    assert held(out) == before
    (record,) = caplog.records
    told = f"{out} has images but no sample.json: they are taken to be of this model and these settings"
    assert record.getMessage() == told
    (out / "sample.json").unlink()
    assert main(arguments(saved, out, *classes)) == 0
    assert "0 images of 6 seeds" in capsys.readouterr().out
    assert held(out) == before, "also where no image is missing"


def test_the_first_process_alone_tells(saved: Path, tmp_path: Path, monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, told in (("1", False), ("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        assert main(arguments(saved, tmp_path / "out")) == 0
        assert (tmp_path / "out" / "sample.json").exists() == told
        assert ("no class is told" in caplog.text) == told
    assert "sample.json" not in caplog.text, "the other's images are no older ones"


def test_settings_that_give_no_image_are_not_kept(tmp_path: Path, capsys: Any) -> None:
    wild = GaussianDenoiser.isotropic(torch.zeros(EVENT), 1.0)
    wild.mean.fill_(float("inf"))
    wild.save_pretrained(tmp_path / "wild")
    assert main(arguments(tmp_path / "wild", tmp_path / "out")) == 2
    assert "expected finite images" in capsys.readouterr().err
    assert held(tmp_path / "out") == {}


def test_a_folder_of_samples_is_data(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(arguments(saved, out)) == 0
    data = open_images(out)
    pictures = [np.array(Image.open(out / f"{seed:06d}.png")) for seed in range(6)]
    assert np.array_equal(data.raw(range(6)).squeeze().numpy(), np.stack(pictures))
    assert data.labels is None


def test_a_network_of_classes_that_is_told_none(saved: Path, tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        assert main(arguments(saved, tmp_path / "told.npz", "--classes", "0-3")) == 0
        model().save_pretrained(tmp_path / "plain")
        assert main(arguments(tmp_path / "plain", tmp_path / "plain.npz")) == 0
        other_gaussian(tmp_path / "g")
        assert main(arguments(tmp_path / "g", tmp_path / "g.npz")) == 0
        assert not caplog.records
        assert main(arguments(saved, tmp_path / "none.npz")) == 0
    (record,) = caplog.records
    told = "no class is told to this network of 4 classes: --classes chooses them"
    assert (record.levelname, record.getMessage()) == ("WARNING", told)


def test_the_grid_keeps_to_the_levels_of_the_network(tmp_path: Path, monkeypatch: Any) -> None:
    seen: list[torch.Tensor] = []

    def told(_: Any, seeds: Any, sigmas: torch.Tensor, **options: Any) -> list[Any]:
        seen.append(sigmas)
        return []

    monkeypatch.setattr(cli_sample, "sample_seeds", told)
    options = ["--steps", "5", "--seeds", "0", "--device", "cpu"]
    for net in (VEPrecond(tiny_unet()), iDDPMPrecond(tiny_unet(out_channels=2), M=40)):
        folder = tmp_path / type(net).__name__
        net.save_pretrained(folder)
        assert main(["sample", str(folder), "--out", str(folder / "images"), *options]) == 0
        low, high = max(0.002, net.sigma_min), min(80.0, net.sigma_max)
        assert seen[-1].equal(rounded_sigmas(net, karras_sigmas(5, low, high)))
        assert low > 0.002, "EDM's level lies below those of the network"
