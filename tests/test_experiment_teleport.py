"""What teleport saves and costs: the paper's arithmetic, closed forms, and the experiment's files."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import EVENT, denoiser, orthogonal, randn, relative_error, tiny_unet
from torch import Tensor

from gaussnet import (
    SOLVERS,
    BypassPrecond,
    Gate,
    GaussianDenoiser,
    heun,
    karras_sigmas,
    open_images,
    teleport,
)
from gaussnet.data import ImageData
from gaussnet.experiments import Setting, defaults, run, teleport_quality
from gaussnet.experiments.running import SUFFIXES
from gaussnet.experiments.teleport_quality import furthest
from gaussnet.metrics import (
    SmallClassifier,
    frechet_distance,
    kernel_distance,
    load_extractor,
    memorisation,
    to_uint8,
)
from gaussnet.plots.teleport import teleport_quality as teleport_panels
from gaussnet.probes import quality
from gaussnet.probes.quality import distances, features_of, skipped_run
from gaussnet.sampling import noise_of

# (steps, skip, NFE, noise scale, FID) of Tables 6 (CIFAR-10), 4 (FFHQ-64) and 5 (AFHQv2-64)
TABLE_6 = [
    (18, 0, 35, 80.0, 1.958),
    (18, 1, 33, 57.6, 1.955),
    (18, 5, 25, 12.9, 1.934),
    (18, 6, 23, 8.4, 1.963),
    (18, 7, 21, 5.3, 2.123),
    (18, 12, 11, 0.3, 109.178),
]
TABLE_4 = [
    (40, 0, 79, 80.0, 2.464),
    (40, 4, 71, 44.6, 2.523),
    (40, 6, 67, 32.7, 2.561),
    (40, 12, 55, 11.7, 2.841),
]
TABLE_5 = [
    (40, 0, 79, 80.0, 2.043),
    (40, 10, 59, 16.8, 2.026),
    (40, 12, 55, 11.7, 2.102),
    (40, 14, 51, 8.0, 2.359),
]
SMALL: dict[str, Any] = {"steps": 6, "skips": [1, 3], "samples": 40, "draws": 3}


@pytest.fixture(autouse=True)
def few_subsets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "SUBSETS", 2)


def digits(model: str = "gaussian", **options: Any) -> Setting:
    return Setting(model, open_images("digits").subset(range(300)), **options)


def rows_of(setting: Setting, **options: Any) -> list[dict[str, Any]]:
    told = defaults(teleport_quality, **{**SMALL, **options})
    units = teleport_quality.units(setting, told)
    return [row for unit in units for row in teleport_quality.measure(setting, told, unit)]


# Evaluations --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "skip", "nfe", "level", "_"), [*TABLE_6, *TABLE_4, *TABLE_5])
def test_evaluations_and_levels_are_those_of_the_paper(
    steps: int, skip: int, nfe: int, level: float, _: float
) -> None:
    gaussian = GaussianDenoiser.isotropic(torch.zeros(1, 2, 2), 0.25)
    ran = skipped_run(gaussian, gaussian, range(3), karras_sigmas(steps), skip, batch_size=2)
    assert (ran.calls, ran.evaluations) == (nfe, nfe)
    assert round(ran.sigma_skip, 1) == level


def gated() -> BypassPrecond:
    gate = Gate(torch.tensor([0.5, 4.0, 16.0]), torch.tensor([1.0, 0.2, 0.001]))
    return BypassPrecond(tiny_unet(in_channels=2), denoiser("gaussian-full", torch.float32), gate).eval()


@pytest.mark.parametrize("skip", [0, 2, 4])
def test_a_gate_spares_the_network_but_not_the_calls(skip: int) -> None:
    net, grid = gated(), karras_sigmas(18)
    called = [*grid[skip:-1].tolist(), *grid[skip + 1 : -1].tolist()]
    ran = skipped_run(net, denoiser("gaussian-full", torch.float32), range(2), grid, skip)
    assert ran.calls == 35 - 2 * skip
    assert ran.evaluations == sum(level < net.sigma_gate for level in called) < ran.calls


def test_the_history_of_a_jump_is_not_counted() -> None:
    gaussian = denoiser("gaussian-full", torch.float32)
    ran = skipped_run(gaussian, gaussian, range(2), karras_sigmas(8), 3, solver="unipc")
    assert (ran.calls, ran.evaluations) == (5, 5)


@pytest.mark.parametrize("solver", ["heun", "unipc"])
@pytest.mark.parametrize("regrid", [False, True])
def test_a_run_is_teleport_and_the_solver(solver: str, regrid: bool) -> None:
    net, grid = gated(), karras_sigmas(8)
    jump = denoiser("gaussian-rank-10", torch.float32)
    ran = skipped_run(net, jump, [3, 7, 1], grid, 3, solver=solver, regrid=regrid, batch_size=2)
    x, rest, history = teleport(
        jump, 80 * noise_of([3, 7, 1], EVENT), grid, skip=3, steps=8 if regrid else None, return_history=True
    )
    method: Any = SOLVERS[solver]
    expected = method(net, x, rest, **({"history": history} if solver == "unipc" else {}))
    assert relative_error(ran.images, expected) < 1e-5
    assert ran.calls == {"heun": 15 if regrid else 9, "unipc": 8 if regrid else 5}[solver]
    assert ran.sigma_skip == float(grid[3])


@pytest.mark.parametrize("skip", [-1, 8])
def test_impossible_skips(skip: int) -> None:
    with pytest.raises(ValueError, match=f"expected 0 <= skip < 8, the number of steps, got {skip}"):
        skipped_run(gated(), denoiser("gaussian-full"), [0], karras_sigmas(8), skip)
    with pytest.raises(ValueError, match="expected at least one seed, got none"):
        skipped_run(gated(), denoiser("gaussian-full"), [], karras_sigmas(8), 3)


# Closed forms -------------------------------------------------------------------------------------


def test_for_the_gaussian_itself_every_skip_is_free() -> None:
    exact = rows_of(digits(), solvers=["dop853"], steps=18, skips=[1, 5, 12])
    assert exact[0]["rms"] == 0
    for row in exact[1:]:
        assert 0 < row["rms"] < 2e-4, row
        assert row["frechet"] == pytest.approx(exact[0]["frechet"], rel=1e-3), row
    coarse, fine = (rows_of(digits(), steps=steps, skips=[steps // 3])[1]["rms"] for steps in (18, 54))
    assert fine < coarse / 6, "what is left of order 2 in the steps"
    other = rows_of(digits("isotropic"), solvers=["dop853"], steps=18, skips=[12])
    assert other[1]["rms"] > 0.05, "another model's samples are not free"


@pytest.mark.parametrize("skips", [[0, 6, 8], [10, 11, 14]])
def test_frechet_distances_follow_the_closed_form(skips: list[int]) -> None:
    eigvals = torch.tensor([1.0, 0.3, 0.1, 0.02], dtype=torch.float64)
    data = 0.4 + (randn(4000, 4) * eigvals.sqrt()) @ orthogonal(4).mT
    images = ImageData(data.float().reshape(-1, 1, 2, 2), name="four", scaling="none")
    setting = Setting("isotropic", images, shrinkage="none", batch=10_000)
    rows = rows_of(setting, solvers=["dop853"], steps=18, skips=skips, samples=10_000, draws=10)
    covariance = setting.gaussian.covariance
    lam, axes, var = covariance.eigvals.double(), covariance.eigvecs.double(), setting.gaussian.variance
    mean = axes.mT @ setting.gaussian.mean.double().flatten()
    for row in rows:
        level = row["sigma_skip"]
        # The flow of the Gaussian from 80 to the level (Eq. 15), then that of the isotropic one to 0.
        gain = ((lam + level**2) / (lam + 6400) * var / (var + level**2)).sqrt()
        expected = float(((gain * mean) ** 2 + (80 * gain - lam.sqrt()) ** 2).sum())
        assert row["frechet"] == pytest.approx(expected, rel=0.03, abs=2e-3), row
        assert row["low"] <= row["frechet"] <= row["high"]
        assert row["NFE"] == row["evaluations"] > 10


@pytest.mark.parametrize("skip", [0, 4])
def test_samples_of_the_images_themselves_are_memorised(skip: int) -> None:
    setting = digits("delta")
    run_of = skipped_run(setting.model, setting.gaussian, range(32), karras_sigmas(18), skip)
    assert memorisation(run_of.images, setting.fitted[0]).share == 1
    others = skipped_run(setting.gaussian, setting.gaussian, range(32), karras_sigmas(18), skip)
    assert memorisation(others.images, setting.fitted[0]).share < 0.1


# Distances ----------------------------------------------------------------------------------------


def test_distances_are_those_of_the_metrics() -> None:
    x, y = randn(60, 5), randn(90, 5, seed=1) * 1.5 + 0.3
    found = distances(x, y, draws=4, generator=torch.Generator().manual_seed(0))
    expected = frechet_distance(x.mean(0), x.mT.cov(), y.mean(0), y.mT.cov())
    assert found["frechet"] == pytest.approx(expected, rel=1e-9)
    assert found["low"] < found["frechet"] < found["high"]
    whole = kernel_distance(x, y, subsets=50, subset_size=60, generator=torch.Generator().manual_seed(3))
    assert abs(found["kernel"] - whole.mean) < 3 * max(whole.std, found["kernel_std"]) > 0
    again = distances(x, y, draws=4, generator=torch.Generator().manual_seed(0))
    assert again == found
    assert distances(x, y, draws=4, generator=torch.Generator().manual_seed(1))["low"] != found["low"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SmallClassifier(10, 1, 8, (6, 5))
    folder = tmp_path_factory.mktemp("classifier")
    model.save_pretrained(folder)
    return str(folder)


def test_extractors_get_images_as_a_file_holds_them(classifier: str) -> None:
    images = 1.2 * randn(7, *EVENT, dtype=torch.float32)
    rounded = to_uint8(images).float() / 127.5 - 1
    extractor: Any = load_extractor(classifier)
    found = features_of(extractor, images, batch_size=3)
    assert relative_error(found, extractor(rounded)) < 1e-6
    assert relative_error(found, extractor(images)) > 1e-3
    assert features_of(None, images).equal(images.flatten(1))


def test_features_of_a_classifier(classifier: str) -> None:
    setting = digits("isotropic")
    (row, *_) = rows_of(setting, features=classifier, skips=[0])
    x = heun(setting.model, 80 * noise_of(range(40), EVENT), karras_sigmas(6))
    extractor: Any = load_extractor(classifier)
    ours, data = (
        extractor(images).double() for images in (to_uint8(x).float() / 127.5 - 1, setting.fitted[0])
    )
    expected = frechet_distance(ours.mean(0), ours.mT.cov(), data.mean(0), data.mT.cov())
    assert row["frechet"] == pytest.approx(expected, rel=1e-2)


# The experiment -----------------------------------------------------------------------------------


def table(entries: list[Any]) -> list[dict[str, Any]]:
    return [{"solver": "heun", "skip": skip, "frechet": fid} for _, skip, _, _, fid in entries]


@pytest.mark.parametrize(("entries", "skip"), [(TABLE_6, 6), (TABLE_4, 4), (TABLE_5, 12)])
def test_the_furthest_skip_within_3_percent(entries: list[Any], skip: int) -> None:
    rows = table(entries)
    assert furthest(rows[::-1], "heun")["skip"] == skip
    assert furthest([rows[0], {**rows[1], "frechet": 9.0}], "heun")["skip"] == 0
    assert furthest([rows[0], {**rows[1], "frechet": 9.0}, rows[2]], "heun")["skip"] == 0, "what comes after"


def test_units() -> None:
    def units(**options: Any) -> list[str]:
        return teleport_quality.units(digits(), defaults(teleport_quality, **options))

    assert units(skips=[3, 1], solvers=["heun", "dpmpp_2m", "heun"]) == [
        f"{solver}-skip={skip}" for solver in ("heun", "dpmpp_2m") for skip in (0, 1, 3)
    ]
    assert units()[-1] == "heun-skip=12"
    assert units(steps=5) == [f"heun-skip={skip}" for skip in range(5)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solvers": ["fast"]}, "solvers among euler, .*got fast"),
        ({"solvers": ["dpm_v3"]}, "dpm_v3: expected --statistics FILE"),
        ({"statistics": "heun.safetensors"}, "no --statistics without dpm_v3, got heun.safetensors"),
        ({"weights": "inception.pth"}, "pixels: expected no --weights, got inception.pth"),
        ({"skips": [2, 18]}, r"skips from 0 to 17, got \[18\]"),
        ({"samples": 1}, "samples >= 2, got 1"),
    ],
)
def test_errors_come_before_any_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        teleport_quality.units(digits(), defaults(teleport_quality, **options))


def test_pixels_of_large_images_are_refused() -> None:
    large = Setting("isotropic", ImageData(torch.zeros(3, 3, 33, 32).byte()))
    with pytest.raises(ValueError, match="pixels: expected images of at most 3072 numbers, got 3168"):
        teleport_quality.units(large, defaults(teleport_quality))


def test_files_and_resumption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = defaults(teleport_quality, **SMALL, solvers=["heun", "unipc"])
    setting = digits("isotropic", cache=tmp_path / "parts")
    reading = run("teleport", teleport_quality, setting, options, tmp_path)
    assert {path.suffix for path in tmp_path.iterdir() if path.is_file()} == set(SUFFIXES)
    assert "heun: no skip takes 11 NFE" in reading.text
    assert [(row["solver"], row["skip"], row["NFE"]) for row in reading.table[:4]] == [
        ("heun", 0, 11), ("heun", 1, 9), ("heun", 3, 5), ("unipc", 0, 6)]  # fmt: skip
    kept = {path.name.rsplit("-", 1)[0]: np.load(path) for path in (tmp_path / "parts").glob("*.npy")}
    assert set(kept) == {"features", "samples-heun", "samples-unipc"}
    x = 80 * noise_of(range(40), EVENT)
    assert (
        relative_error(torch.from_numpy(kept["samples-heun"]), heun(setting.model, x, karras_sigmas(6)))
        < 1e-5
    )

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(teleport_quality, "skipped_run", never)
    assert run("teleport", teleport_quality, setting, options, tmp_path) == reading
    with pytest.raises(AssertionError, match="measured again"):
        run("teleport", teleport_quality, setting, defaults(teleport_quality, **SMALL, regrid=True), tmp_path)


def test_rms_is_to_the_same_noise_and_does_not_need_the_cache(tmp_path: Path) -> None:
    without, within = (rows_of(digits("isotropic", cache=cache)) for cache in (None, tmp_path))
    assert without == within
    setting = digits("isotropic")
    x = 80 * noise_of(range(40), EVENT)
    whole = heun(setting.model, x, karras_sigmas(6))
    ours = heun(setting.model, *teleport(setting.gaussian, x, karras_sigmas(6), skip=3))
    rms = float((ours - whole).double().square().mean().sqrt())
    assert [row["skip"] for row in without] == [0, 1, 3]
    assert without[2]["rms"] == pytest.approx(rms, rel=1e-5)
    assert rows_of(digits("isotropic", seed=1))[0]["frechet"] != without[0]["frechet"]


def test_the_reading_tells_of_the_gate_and_of_no_skip() -> None:
    row = {
        "sigma_skip": 80.0,
        "evaluations": 24,
        "low": 0.5,
        "high": 2.0,
        "bias": 0.1,
        "kernel": 0.0,
        "rms": 0.0,
    }
    rows = [{**row, "solver": "heun", "skip": skip, "NFE": 35 - 2 * skip, "frechet": fid} for skip, fid in
            ((0, 1.0), (1, 1.2))]  # fmt: skip
    options = Namespace(solvers=["heun"], samples=10, features="pixels", regrid=False)
    text = teleport_quality.read(rows, options).text
    assert "no skip stays within 3%" in text
    assert "24 of 35" in text


@pytest.mark.parametrize(("worst", "scale"), [(4.0, "linear"), (6.0, "log")])
def test_figure(worst: float, scale: str) -> None:
    rows = [
        {"solver": "heun", "skip": skip, "sigma_skip": 80.0 - skip, "NFE": 35 - 2 * skip, "frechet": fid,
         "low": fid - 0.5, "high": fid + 1, "rms": 0.1 * skip}
        for skip, fid in ((2, worst), (0, 1.0), (1, 1.02))
    ]  # fmt: skip
    left, right = teleport_panels(rows, chosen={"heun": 1}).axes
    assert (left.get_yscale(), right.get_yscale()) == (scale, "log")
    line, _, bound, mark = left.get_lines()[:1] + left.get_lines()[-3:]
    assert line.get_ydata() == pytest.approx([1.0, 1.02, worst])
    assert bound.get_ydata() == pytest.approx([1.03, 1.03])
    assert mark.get_xydata().tolist() == [[1, 1.02]]
    assert right.get_lines()[0].get_xydata() == pytest.approx(np.array([[1, 0.1], [2, 0.2]]))
    (_, still) = teleport_panels(rows[1:2]).axes
    assert still.get_yscale() == "linear", "nothing has moved"
    with pytest.raises(ValueError, match="expected rows of skips, got none"):
        teleport_panels([])


def test_dpm_v3_takes_statistics_from_a_file(tmp_path: Path) -> None:
    from gaussnet.samplers import ModelStatistics, dpm_v3, log_snr_sigmas

    sigmas = log_snr_sigmas(20)[:-1].flip(0)
    one: Tensor = torch.ones(20, 1, 1, 1, dtype=torch.float64)
    statistics = ModelStatistics(sigmas, one, 0 * one, 0 * one)
    statistics.save(tmp_path / "s.safetensors")
    setting = digits("isotropic")
    found = rows_of(setting, solvers=["dpm_v3"], statistics=str(tmp_path / "s.safetensors"), skips=[2])
    x = 80 * noise_of(range(40), EVENT)
    whole = dpm_v3(setting.model, x, karras_sigmas(6), statistics=statistics)
    moved, rest, history = teleport(setting.gaussian, x, karras_sigmas(6), skip=2, return_history=True)
    known = [entry for entry in history if entry[0] <= 80]
    ours = dpm_v3(setting.model, moved, rest, statistics=statistics, history=known)
    assert [row["NFE"] for row in found] == [6, 4]
    kept = [digits("isotropic", cache=tmp_path / "parts") for _ in range(2)]
    few = {"solvers": ["dpm_v3"], "statistics": str(tmp_path / "s.safetensors"), "skips": []}
    rows_of(kept[0], **few)
    ModelStatistics(sigmas, 0.9 * one, 0 * one, 0 * one).save(tmp_path / "s.safetensors")
    assert rows_of(kept[1], **few)[0]["rms"] == 0, "other statistics in the same file are other samples"
    rms = float((ours - whole).double().square().mean().sqrt())
    assert found[1]["rms"] == pytest.approx(rms, rel=1e-4)
