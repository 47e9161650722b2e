"""Samples by seeds: the same image in any batch and process; and the command that writes them."""

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
    EDMPrecond,
    Gate,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    count_nfe,
    heun,
    karras_sigmas,
    teleport,
)
from gaussnet.cli import main
from gaussnet.sampling import Jump, choose_jump, noise_of, one_hot, parse_seeds, sample_seeds

GRID = karras_sigmas(6)
GATE = Gate(torch.tensor([0.5, 4.0, 16.0]), torch.tensor([1.0, 0.2, 0.001]))


def model(**changes: Any) -> BypassPrecond:
    gaussian = denoiser("gaussian-full", torch.float32)
    return BypassPrecond(tiny_unet(in_channels=2, **changes), gaussian, GATE).eval()


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


@pytest.mark.parametrize("solver", ["heun", "dpmpp_2m", "unipc"])
def test_a_seed_is_an_image_whatever_the_batch(solver: str) -> None:
    options = {"solver": solver, "jump": choose_jump(model())}
    whole = drawn(model(), range(7), **options)
    for batch_size in (1, 3):
        parts = drawn(model(), range(7), batch_size=batch_size, **options)
        assert relative_error(parts, whole) < 1e-5
    assert relative_error(drawn(model(), [5, 2], **options), whole[[5, 2]]) < 1e-5
    assert whole.shape == (7, *EVENT)


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
    files = sorted(out.iterdir())
    assert [path.name for path in files] == [f"{seed:06d}.png" for seed in range(6)]
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


def test_two_processes_share_the_seeds(saved: Path, tmp_path: Path, monkeypatch: Any) -> None:
    out, whole = tmp_path / "shared", tmp_path / "whole"
    assert main(arguments(saved, whole)) == 0
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert main(arguments(saved, out)) == 0
        assert len(list(out.iterdir())) == 3 * (rank + 1)
    for path in whole.iterdir():
        assert np.abs(np.array(Image.open(path), int) - np.array(Image.open(out / path.name))).max() <= 1
    assert main(arguments(saved, tmp_path / "all.npz")) == 2


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (["--seeds", "5-2"], "ranges of seeds to increase"),
        (["--teleport", "far"], "--teleport none, auto or a level, got 'far'"),
        (["--classes", "9"], "classes in [0, 4)"),
        (["--guidance", "2"], "class_labels for guidance=2"),
        (["--steps", "0"], "--steps >= 1, got 0"),
    ],
)
def test_errors_are_one_line(
    saved: Path, tmp_path: Path, capsys: Any, others: list[str], message: str
) -> None:
    assert main(arguments(saved, tmp_path / "out", *others)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error


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
