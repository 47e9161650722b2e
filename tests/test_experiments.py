"""The frame of all experiments: settings, units that are kept, processes that share them, files."""

import csv
import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from gaussnet import GaussianDenoiser, GaussianMixtureDenoiser, MarginalDenoiser, open_images
from gaussnet.cli import main
from gaussnet.experiments import (
    EXPERIMENTS,
    Setting,
    defaults,
    run,
    running,
    sample_similarity,
    score_deviation,
    score_field,
    trajectory_deviation,
)
from gaussnet.experiments.running import SUFFIXES, Reading, Row, markdown
from gaussnet.experiments.score_deviation import level_from
from gaussnet.experiments.setting import fitting, load_model

SMALL: dict[str, Any] = {
    "queries": 8,
    "sigmas": [0.1, 1.0, 10.0],
    "references": ["isotropic", "gaussian", "delta"],
}


def setting(model: str = "gaussian", **options: Any) -> Setting:
    return Setting(model, open_images("digits").subset(range(300)), **options)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_model_deviates_from_itself_by_nothing(tmp_path: Path) -> None:
    run("score-deviation", score_deviation, setting(), defaults(score_deviation, **SMALL), tmp_path)
    for row in rows_of(tmp_path / "score-deviation.csv"):
        itself = row["reference"] == "gaussian"
        assert (float(row["mean"]) == 0) == itself, row


def test_the_files(tmp_path: Path) -> None:
    options = defaults(score_deviation, **SMALL)
    reading = run("score-deviation", score_deviation, setting(), options, tmp_path)
    assert {path.suffix for path in tmp_path.iterdir() if path.is_file()} == set(SUFFIXES)
    assert (tmp_path / "score-deviation.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "score-deviation.pdf").read_bytes().startswith(b"%PDF")
    text = (tmp_path / "score-deviation.md").read_text()
    assert markdown(reading.table) in text
    assert reading.text in text
    assert [row["sigma"] for row in reading.table] == [0.1, 1.0, 10.0]


class Counted(ModuleType):
    """An experiment that fails after some units, and counts those that it measured."""

    SOURCE, NEEDS_DATA = "", True

    def __init__(self, fail_at: int = 10**9) -> None:
        super().__init__("counted", "Counts.")
        self.measured: list[str] = []
        self.fail_at = fail_at

    def add_arguments(self, parser: ArgumentParser) -> None: ...

    def units(self, setting: Setting, options: Namespace) -> list[str]:
        return ["a/b", "a:b", "c"]

    def measure(self, setting: Setting, options: Namespace, unit: str) -> list[Row]:
        if len(self.measured) == self.fail_at:
            raise RuntimeError("killed")
        self.measured.append(unit)
        return [{"unit": unit, "value": float(setting.noise(1, unit).sum())}]

    def draw(self, rows: Sequence[Row], options: Namespace) -> Any:
        return score_deviation.draw([{**DRAWN}], options)

    def read(self, rows: Sequence[Row], options: Namespace) -> Reading:
        return Reading(list(rows), "read")


DRAWN = {
    "quantity": "score",
    "queries": "noise",
    "reference": "delta",
    "sigma": 1.0,
    "mean": 0.5,
    "marks": "1",
}


def test_it_goes_on_where_it_stopped(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        run("counted", Counted(fail_at=2), setting(), Namespace(), tmp_path)
    assert not (tmp_path / "counted.csv").exists()
    rest = Counted()
    reading = run("counted", rest, setting(), Namespace(), tmp_path)
    assert rest.measured == ["c"]
    whole = Counted()
    assert run("counted", whole, setting(), Namespace(), tmp_path / "other") == reading
    assert whole.measured == ["a/b", "a:b", "c"]


@pytest.mark.parametrize("change", [{"seed": 1}, {"heldout": 5}, {"fit_images": 100}, {"shrinkage": "none"}])
def test_what_results_depend_on_starts_anew(change: dict[str, Any], tmp_path: Path) -> None:
    run("counted", Counted(), setting(), Namespace(), tmp_path)
    again = Counted()
    run("counted", again, setting(**change), Namespace(), tmp_path)
    assert len(again.measured) == 3
    other = Counted()
    run("counted", other, setting(), Namespace(queries=3), tmp_path)
    assert len(other.measured) == 3


def test_the_batch_size_does_not_start_anew(tmp_path: Path) -> None:
    run("counted", Counted(), setting(), Namespace(), tmp_path)
    again = Counted()
    run("counted", again, setting(batch=7), Namespace(), tmp_path)
    assert again.measured == []


def test_a_damaged_unit_is_named(tmp_path: Path) -> None:
    run("counted", Counted(), setting(), Namespace(), tmp_path)
    path = next(tmp_path.glob("parts/*/c.json"))
    path.write_text("[{")
    with pytest.raises(ValueError, match=r"c\.json is not what an experiment wrote: delete it"):
        run("counted", Counted(), setting(), Namespace(), tmp_path)


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    arguments = ["reproduce", "score-deviation", "--model", "gaussian", "--data", "digits", "--queries", "8",
                 "--sigmas", "0.1", "1", "10", "--references", "isotropic", "delta"]  # fmt: skip
    assert main([*arguments, "--out", str(tmp_path / "one")]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--module"]
    command = [*launch, "gaussnet.cli", *arguments, "--out", str(tmp_path / "two")]
    alone = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # there may be one GPU, which two cannot share
    done = subprocess.run(command, env=alone, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("in " + str(tmp_path / "two")) == 1
    one, two = (rows_of(tmp_path / name / "score-deviation.csv") for name in ("one", "two"))
    assert len(one) == len(two) == 3 * 2 * 2 * 2
    for a, b in zip(one, two, strict=True):
        assert a["reference"] == b["reference"]
        assert float(a["mean"]) == pytest.approx(float(b["mean"]), rel=1e-4)


# Settings -------------------------------------------------------------------------------------------


def test_queries_are_held_out_of_fits() -> None:
    held = setting(heldout=50)
    queries, labels = held.queries(80)
    images, _ = held.fitted
    assert len(queries) == 50
    assert labels is not None
    assert len(images) == 250
    assert not (images[:, None] == queries).flatten(2).all(-1).any()
    none = setting()
    assert len(none.queries(80)[0]) == 80
    assert len(none.fitted[0]) == 300


def test_queries_are_a_prefix_of_more_queries() -> None:
    assert torch.equal(setting().queries(5)[0], setting().queries(9)[0][:5])


def test_references() -> None:
    s = setting(fit_images=200)
    images, labels = s.fitted
    assert labels is not None
    expected = {
        "gaussian": GaussianDenoiser.fit(images),
        "isotropic": GaussianDenoiser.isotropic(images.mean(0), GaussianDenoiser.fit(images).variance),
        "marginal": MarginalDenoiser.fit(images),
        "point": GaussianDenoiser.isotropic(images.mean(0), 0.0),
        "classes": GaussianMixtureDenoiser.fit(images, labels=labels),
        "mixture-3": GaussianMixtureDenoiser.fit(images, 3),
        "mixture-3r5": GaussianMixtureDenoiser.fit(images, 3, 5),
    }
    x = images[:4] + torch.randn_like(images[:4])
    for name, denoiser in s.references([*expected]).items():
        torch.testing.assert_close(denoiser(x, 1.0), expected[name](x, 1.0), msg=name, rtol=1e-4, atol=1e-4)
    assert s.reference("gaussian") is s.gaussian
    noised = images[7:8] + 0.01 * torch.randn_like(images[7:8])
    torch.testing.assert_close(s.reference("delta")(noised, 0.01), images[7:8])


def test_mixtures_are_fitted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = setting(cache=tmp_path).reference("mixture-3")
    monkeypatch.setattr(GaussianMixtureDenoiser, "fit", None)
    again = setting(cache=tmp_path).reference("mixture-3")
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(first(x, 0.5), again(x, 0.5))
    with pytest.raises(TypeError):  # another seed is another fit
        setting(cache=tmp_path, seed=1).reference("mixture-3")


def test_another_process_may_be_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its model is taken, and what was fitted meanwhile is thrown away."""
    fit, saved = Setting._fit, list[Path]()

    def slow(self: Setting, name: str) -> Any:
        if not saved:
            saved.append(tmp_path)  # once: the other process is not overtaken itself
            setting(cache=tmp_path).reference(name)
            (weights,) = tmp_path.glob("*/model.safetensors")
            saved.append(weights)
            times.append(weights.stat().st_mtime_ns)
        return fit(self, name)

    times: list[int] = []
    monkeypatch.setattr(Setting, "_fit", slow)
    found = setting(cache=tmp_path).reference("mixture-3")
    assert saved[1].stat().st_mtime_ns == times[0], "the first one stays"
    assert [path.name for path in tmp_path.iterdir()] == [saved[1].parent.name], "nothing partial is left"
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(found(x, 0.5), setting(cache=tmp_path).reference("mixture-3")(x, 0.5))


def test_generators_differ_by_purpose_and_seed() -> None:
    draws = [torch.randn(3, generator=s.generator(*purpose)).tolist()
             for s in (setting(), setting(seed=1)) for purpose in (("a",), ("a", 1), ("b",))]  # fmt: skip
    assert len({tuple(draw) for draw in draws}) == 6
    assert torch.equal(setting().noise(3, "x"), setting().noise(3, "x"))


def test_images_are_framed_to_the_model() -> None:
    data = open_images("digits").subset(range(4))
    framed = fitting(data, (1, 12, 12))
    assert tuple(framed.event_shape) == (1, 12, 12)
    assert float(framed.tensor()[:, :, :2].max()) == -1
    for shape in ((1, 11, 11), (3, 8, 8), (1, 6, 6), (1, 12, 10)):
        with pytest.raises(ValueError, match=rf"expected images of shape \({shape[0]}, .* got \(1, 8, 8\)"):
            fitting(data, shape)


def test_saved_models(tmp_path: Path) -> None:
    setting().gaussian.save_pretrained(tmp_path / "m")
    loaded = setting(str(tmp_path / "m"))
    assert loaded.event_shape == (1, 8, 8)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(loaded.model(x, 1.0), setting().gaussian(x, 1.0))
    with pytest.raises(FileNotFoundError):
        load_model(str(tmp_path / "absent"))
    before = loaded.identity
    (tmp_path / "m" / "config.json").touch()
    assert before != setting(str(tmp_path / "m")).identity


def test_other_images_in_the_same_place_are_other_data(tmp_path: Path) -> None:
    def identity(**arrays: Any) -> dict[str, Any]:
        np.savez(tmp_path / "data.npz", **arrays)
        return Setting("gaussian", open_images(tmp_path / "data.npz")).identity

    images, labels = (
        np.random.default_rng(0).integers(0, 255, (2, 40, 4, 4), dtype=np.uint8),
        np.arange(40) % 4,
    )
    first = identity(images=images[0], labels=labels)
    assert first == identity(images=images[0], labels=labels)
    assert first != identity(images=images[1], labels=labels)
    assert first != identity(images=images[0], labels=labels[::-1])


def test_other_files_of_the_same_name_are_measured_anew(tmp_path: Path) -> None:
    options = Namespace(features=str(tmp_path / "f"), prompt="a cat", steps=3)
    assert running._files(options) == []
    (tmp_path / "f").write_text("one")
    first = running._files(options)
    (tmp_path / "f").write_text("other")
    assert len(first) == 1
    assert running._files(options) != first
    (tmp_path / "f").unlink()
    for name in ("one", "other"):  # folders of models, too
        GaussianDenoiser.isotropic(torch.zeros(len(name)), 1.0).save_pretrained(tmp_path / "f")
        assert running._files(options) not in ([], first), name
        first = running._files(options)


@pytest.mark.parametrize(
    "experiment",
    [score_deviation, score_field, trajectory_deviation, sample_similarity],
    ids=lambda m: m.__name__,
)
def test_references_are_checked_before_anything_is_measured(experiment: Any) -> None:
    unlabelled = setting()
    assert unlabelled.data is not None
    unlabelled.data.labels = None
    with pytest.raises(ValueError, match=r"expected an analytic denoiser among .*, got 'mixtur-10'"):
        experiment.units(setting(), defaults(experiment, references=["gaussian", "mixtur-10"]))
    with pytest.raises(ValueError, match="classes: expected images with class labels, digits has none"):
        experiment.units(unlabelled, defaults(experiment, references=["classes"]))
    assert experiment.units(setting(), defaults(experiment, references=["classes", "mixture-3r2"]))


def test_close_levels_are_measured_each() -> None:
    options = defaults(score_deviation, sigmas=[1.2345678, 1.2345679], queries=2)
    units = score_deviation.units(setting(), options)
    levels = [score_deviation.measure(setting(), options, unit)[0]["sigma"] for unit in units]
    assert levels == [1.2345678, 1.2345679]
    fields = score_field.units(setting(), defaults(score_field, sigmas=[1.2345678, 1.2345679], references=[]))
    assert len(fields) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heldout": 299}, "expected 0 <= heldout <= 298"),
        ({"batch": 0}, "expected batch >= 1, got 0"),
        ({"fit_images": 0}, "expected fit_images >= 1, got 0"),
    ],
)
def test_impossible_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        setting(**options)


def test_what_is_missing_is_told() -> None:
    with pytest.raises(ValueError, match="expected images to fit analytic denoisers to"):
        _ = Setting("gaussian").model
    with pytest.raises(ValueError, match=r"expected an analytic denoiser among isotropic, .* got 'gausian'"):
        setting().reference("gausian")
    unlabelled = open_images("digits")
    unlabelled.labels = None
    with pytest.raises(ValueError, match="classes: expected images with class labels"):
        Setting("classes", unlabelled).reference("classes")
    with pytest.raises(ValueError, match="expected options among"):
        defaults(score_deviation, querys=3)


# Readings -------------------------------------------------------------------------------------------


def test_markdown() -> None:
    assert markdown([{"a": 1, "b": 0.123456}]) == "| a | b |\n| --- | --- |\n| 1 | 0.1235 |"
    assert markdown([]) == ""


def test_level_from() -> None:
    rows = [
        {"sigma": s, "mean": m, "reference": "g"} for s, m in [(1, 0.5), (2, 0.001), (4, 0.02), (8, 0.001)]
    ]
    assert level_from(rows, "g", 0.01) == 8
    assert level_from(rows, "g", 0.1) == 2
    assert level_from(rows, "g", 1e-9) is None


# The command ------------------------------------------------------------------------------------------


def test_every_experiment_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name, experiment in EXPERIMENTS.items():
        with pytest.raises(SystemExit) as stopped:
            main(["reproduce", name, "--help"])
        assert stopped.value.code == 0, name
        assert "--model" in capsys.readouterr().out
        assert experiment.SOURCE, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", "gaussian", "--data", "digits", "--sigmas", "0"],
            "expected sigmas > 0 and queries >= 1",
        ),
        (["--model", "absent", "--data", "digits"], "no folder absent"),
        (["--model", "gaussian", "--data", "absent.npy"], "absent.npy"),
    ],
)
def test_errors_are_a_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", "score-deviation", *arguments, "--out", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("gaussnet reproduce: ")
    assert not (tmp_path / "o").exists()


def test_an_out_that_is_a_file_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.write_text("mine")
    assert (
        main(["reproduce", "score-deviation", "--model", "gaussian", "--data", "digits", "--out", str(out)])
        == 2
    )
    message = f"expected --out to be a folder, got the file {out}"
    assert capsys.readouterr().err == f"gaussnet reproduce: {message}\n"
    assert out.read_text() == "mine"
