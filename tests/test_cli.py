"""The command line: what it fits is what the library fits, and errors leave nothing behind."""

import json
import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import digits, relative_error

from gaussnet import (
    DeltaDenoiser,
    Denoiser,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    MarginalDenoiser,
    cli_fit,
    from_pretrained,
)
from gaussnet.cli import main
from gaussnet.processes import Processes


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """The digits as an .npz of uint8 images (8 grey levels to one) with labels."""
    path = tmp_path / "digits.npz"
    data, classes = digits()
    np.savez(path, images=((data + 1) * 127.5).round().byte().numpy(), labels=classes.numpy())
    return path


def loaded(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    with np.load(path) as arrays:
        return torch.from_numpy(arrays["images"]).float() / 127.5 - 1, torch.from_numpy(arrays["labels"])


def test_fit_is_the_library_s(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gaussian"
    assert main(["fit", str(images), "--out", str(out), "--rank", "20", "--mirror"]) == 0
    fitted, x = from_pretrained(out), loaded(images)[0]
    expected = GaussianDenoiser.fit(x, rank=20, mirror=True)
    assert relative_error(fitted(x[:8], 0.5), expected(x[:8], 0.5)) < 1e-6
    printed = capsys.readouterr().out
    assert "| class | GaussianDenoiser |" in printed
    assert "| event shape | (1, 8, 8) |" in printed
    assert "| rank | 20 of 64 |" in printed
    assert f"(sigma_data) | {float(expected.variance) ** 0.5:.4f} |" in printed
    assert f"| 0.5 | {float(expected.bayes_error(0.5)):.3g} |" in printed
    facts = json.loads((out / "config.json").read_text())["provenance"]
    assert facts["data"] == {
        "name": str(images),
        "scaling": "uint8 / 127.5 - 1",
        "size": 1797,
        "event_shape": [1, 8, 8],
        "skipped": 0,
    }
    assert facts["arguments"]["rank"] == 20
    assert len(facts["arguments_sha256"]) == 64
    assert main(["info", str(out)]) == 0
    again = capsys.readouterr().out
    assert "| rank | 20 of 64 |" in again
    assert facts["arguments_sha256"] in again


def test_every_kind(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, labels = loaded(images)
    command = ["fit", str(images), "--rank", "5", "--shrinkage", "none"]
    assert main([*command, "--classes", "--prior", "20", "--out", str(tmp_path / "classes")]) == 0
    by_class, queries = from_pretrained(tmp_path / "classes"), x[:8] + 0.3
    expected = GaussianMixtureDenoiser.fit(x, labels=labels, rank=5, shrinkage="none", prior=20)
    ten = torch.arange(8)
    assert relative_error(by_class(queries, 0.5, ten), expected(queries, 0.5, ten)) < 1e-6
    assert capsys.readouterr().out.count("\n| ") >= 12, "a row for each class"
    em = ["--components", "3", "--em-steps", "2", "--seed", "4", "--out", str(tmp_path / "em")]
    assert main([*command, *em]) == 0
    clusters = from_pretrained(tmp_path / "em")
    expected = GaussianMixtureDenoiser.fit(x, 3, 5, seed=4, shrinkage="none", em_steps=2)
    assert relative_error(clusters(queries, 0.5), expected(queries, 0.5)) < 1e-6
    assert "log_likelihood" in clusters.provenance
    assert main(["fit", str(images), "--delta", "--out", str(tmp_path / "delta")]) == 0
    delta = from_pretrained(tmp_path / "delta")
    assert isinstance(delta, DeltaDenoiser)
    assert relative_error(delta(queries, 0.5, ten), DeltaDenoiser(x, labels)(queries, 0.5, ten)) < 1e-6
    assert main(["fit", str(images), "--basis", "cosine", "--out", str(tmp_path / "cosine")]) == 0
    cosine = from_pretrained(tmp_path / "cosine")
    assert relative_error(cosine(queries, 0.5), GaussianDenoiser.fit(x, basis="cosine")(queries, 0.5)) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "prior"),
    [
        ([], None),
        (["--mirror"], None),
        (["--classes"], 32.0),
        (["--classes", "--prior", "0"], 0.0),
        (["--components", "3"], 32.0),
        (["--components", "3", "--em-steps", "1"], 0.0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_marginals_are_those_of_the_library(
    arguments: list[str],
    prior: float | None,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    x, labels = loaded(images)
    command = ["fit", str(images), *arguments, "--marginals", "--seed", "4", "--out", str(tmp_path / "out")]
    assert main(command) == 0, capsys.readouterr().err
    fitted, mirror, classes = (
        from_pretrained(tmp_path / "out"),
        "--mirror" in arguments,
        "--classes" in arguments,
    )
    assert isinstance(fitted, MarginalDenoiser)
    gaussian = None
    if prior is not None:
        gaussian = GaussianMixtureDenoiser.fit(
            x,
            None if classes else 3,
            seed=4,
            labels=labels if classes else None,
            em_steps="--em-steps" in arguments,
            prior=prior,
        )
    own = labels if classes else None
    expected = MarginalDenoiser.fit(x, gaussian, labels=own, mirror=mirror)
    queries, told = x[:8] + 0.3, labels[:8] if classes else None
    assert relative_error(fitted(queries, 0.5, told), expected(queries, 0.5, told)) < 1e-6
    assert fitted.provenance["marginals"] == {"mirror": mirror}
    assert fitted.provenance["data"]["name"] == str(images)
    printed = capsys.readouterr().out
    assert "| class | MarginalDenoiser |" in printed
    assert ("| component | class |" if prior is not None else "| spectrum |  |") in printed


def test_rank_by_share_groups_and_selection(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x, labels = loaded(images)
    np.save(tmp_path / "groups.npy", labels.numpy())
    command = ["fit", str(images), "--groups", str(tmp_path / "groups.npy")]
    assert main([*command, "--rank", "0.9", "--out", str(tmp_path / "share")]) == 0
    share = from_pretrained(tmp_path / "share")
    assert isinstance(share, GaussianDenoiser)
    expected = GaussianDenoiser.fit(x, 0.9, groups=labels)
    assert share.covariance.rank == expected.covariance.rank
    torch.testing.assert_close(share.covariance.eigvals, expected.covariance.eigvals)
    capsys.readouterr()
    assert main([*command, "--select", "heldout", "--out", str(tmp_path / "selected")]) == 0
    assert "| rank | shrinkage | 0.02 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.zip"], "no file or folder missing.zip"),
        (["digits", "--rank", "99"], r"1 <= rank <= min(N - 1, D) = 64 for 1797 samples"),
        (["digits", "--rank", "1.5"], "rank to be an integer >= 1 or a share in (0, 1), got 1.5"),
        (["digits", "--components", "5000"], "1 <= n_components <= N = 1797, got 5000"),
        (["digits", "--components", "3", "--solver", "gram"], "--solver is an option of one Gaussian"),
        (["digits", "--components", "0"], "1 <= n_components <= N = 1797, got 0"),
        (["digits", "--delta", "--mirror"], "--mirror is an option of fits: --delta keeps the data"),
        (["digits", "--delta", "--marginals"], "--marginals is an option of fits: --delta keeps the data"),
        (["digits", "--delta", "--rank", "3"], "--rank is an option of fits"),
        (["digits", "--delta", "--groups", "missing.npy"], "--groups is an option of fits"),
        (
            ["digits", "--prior", "3"],
            "--prior is an option of mixtures: expected --components or --classes\n",
        ),
        (
            ["digits", "--classes", "--prior", "-1"],
            "expected a finite prior >= 0, a number of samples, got -1.0\n",
        ),
        (["digits", "--em-steps", "3"], "--em-steps is an option of clusters: expected --components\n"),
        (
            ["digits", "--em-steps", "3", "--classes"],
            "expected --components, got --classes, whose components",
        ),
        (["digits", "--groups", "missing.npy"], "missing.npy"),
        (["digits", "--unscaled", "--scaling", "0", "1"], "either --scaling or --unscaled, got both"),
        (["digits", "--split", "test"], "split"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_line_and_leave_nothing(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["fit", *arguments, "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("gaussnet fit: ")
    assert captured.err.count("\n") == 1
    assert not out.exists()


def test_classes_need_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "x.npy", np.zeros((9, 4, 4), np.uint8))
    assert main(["fit", str(tmp_path / "x.npy"), "--classes", "--out", str(tmp_path / "out")]) == 2
    assert "has no class labels" in capsys.readouterr().err


def test_a_model_is_not_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["fit", "digits", "--out", str(tmp_path / "model")]
    assert main(command) == 0
    before = (tmp_path / "model" / "config.json").read_bytes()
    assert main([*command, "--rank", "3"]) == 2
    assert "holds a GaussianDenoiser: choose another folder, or say --overwrite" in capsys.readouterr().err
    assert (tmp_path / "model" / "config.json").read_bytes() == before
    assert main([*command, "--rank", "3", "--overwrite"]) == 0
    (tmp_path / "file").write_text("")
    assert main(["fit", "digits", "--out", str(tmp_path / "file")]) == 2
    assert "to be a folder, got a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["fit"], ["fit", "digits"], ["fit", "digits", "--out", "x", "--rank", "many"]]
)
def test_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert "usage: gaussnet" in capsys.readouterr().err


def test_info_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tmp_path)]) == 2
    assert "no config.json" in capsys.readouterr().err


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A training run's folder that has a row of metrics."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("train: {steps: 80, batch: 5}\n")
    (folder / "metrics.jsonl").write_text('{"step": 20, "loss": 0.125, "images_per_second": 50}\n')
    return folder


def test_watch(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(run), "--once"]) == 0
    printed = capsys.readouterr().out
    assert "run: at step 20 of 80" in printed
    assert "] 25.0%" in printed
    assert "0.125, mean of the last 5 rows 0.125" in printed
    assert "50 images/s" in printed
    assert "about 6 s of training" in printed
    assert not (run / "report.html").exists()


def test_report(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert "run: at step 20 of 80" in (run / "report.html").read_text()
    assert opened == []
    other = run.parent / "other.html"
    assert main(["report", str(run), "--out", str(other), "--open"]) == 0
    assert opened == [other.resolve().as_uri()]
    assert other.is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["watch", "RUN/.."], "expected the folder of a run, with a config.yaml or metrics.jsonl, got "),
        (["report", "missing"], "expected the folder of a run, got missing, which is none"),
        (["watch", "RUN", "--every", "0"], "expected seconds > 0, got 0"),
        (["report", "RUN", "--out", "RUN/report.md"], "expected a file FILE.html for the page, got"),
    ],
)
def test_errors_of_runs(
    arguments: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(run.iterdir())
    places = [argument.replace("RUN", str(run)) for argument in arguments]
    assert main(places) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"gaussnet {arguments[0]}: {message}")
    assert captured.err.count("\n") == 1
    assert sorted(run.iterdir()) == before


def test_groups_are_those_of_the_whole_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["fit", "digits", "--groups", str(tmp_path / "groups.npy"), "--out", str(tmp_path / "out")]
    for groups, got in (
        (np.arange(900), r"int64 of shape (900,)"),
        (np.zeros((1797, 2), int), r"int64 of shape (1797, 2)"),
        (np.array(7), "int64 of shape ()"),
        (np.zeros(1797), r"float64 of shape (1797,)"),
    ):
        np.save(tmp_path / "groups.npy", groups)
        assert main(command) == 2
        assert f"expected 1797 integers, one an image, got torch.{got}\n" in capsys.readouterr().err


def test_groups_of_streamed_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_fit, "IN_MEMORY", 1000)
    groups = torch.arange(1797) // 60
    np.save(tmp_path / "groups.npy", groups.numpy())
    command = ["fit", "digits", "--groups", str(tmp_path / "groups.npy"), "--out", str(tmp_path / "out")]
    assert main(command) == 0, capsys.readouterr().err
    fitted, x = from_pretrained(tmp_path / "out"), digits()[0].float()
    expected = GaussianDenoiser.fit(x, groups=groups)
    assert relative_error(fitted(x[:8], 0.2), expected(x[:8], 0.2)) < 1e-6
    assert main([*command, "--overwrite", "--rank", "5", "--solver", "krylov"]) == 2
    assert 'solver="krylov" needs a tensor or array of all samples' in capsys.readouterr().err


@pytest.mark.parametrize("grouped", [pytest.param(False, marks=pytest.mark.slow), True])
def test_two_processes_share_a_fit(tmp_path: Path, grouped: bool) -> None:
    groups = torch.arange(1797) // 60 if grouped else None
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "gaussnet.cli", "fit", "digits", "--out", str(tmp_path / "two")]
    if groups is not None:
        np.save(tmp_path / "groups.npy", groups.numpy())
        command += ["--groups", str(tmp_path / "groups.npy"), "--marginals"]
    environment = {**os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    running = [
        subprocess.Popen(
            command, env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    assert b"saved to" in outputs[0][0]
    assert outputs[1][0] == b"", "only the first process prints"
    two = from_pretrained(tmp_path / "two")
    x = digits()[0].float()
    expected: Denoiser = GaussianDenoiser.fit(x, groups=groups)
    if isinstance(two, MarginalDenoiser):
        assert grouped
        expected = MarginalDenoiser.fit(x, GaussianDenoiser.fit(x, groups=groups))
        ungrouped = MarginalDenoiser.fit(x)(x[:8], 0.2)
        assert (two(x[:8], 0.2) - ungrouped).abs().max() > 1e-4
    assert relative_error(two(x[:8], 0.2), expected(x[:8], 0.2)) < 1e-6


@pytest.mark.parametrize("kind", [["--components", "3"], ["--classes"], ["--delta"]], ids=" ".join)
def test_other_models_are_fitted_by_one_process(
    kind: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_fit, "joined_processes", lambda: nullcontext(Processes(rank=0, world=2)))
    assert main(["fit", "digits", *kind, "--out", str(tmp_path / "out")]) == 2
    message = "several processes share the fit of one Gaussian only: start one for a mixture"
    assert capsys.readouterr().err == f"gaussnet fit: {message}\n"
    assert not (tmp_path / "out").exists()


def test_processes_of_a_node_have_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert Processes(rank=7, world=8).device("cuda") == torch.device("cuda", 3)
    assert Processes(rank=7, world=8).device("cuda:1") == torch.device("cuda", 1), "as it was asked for"
    assert Processes(rank=7, world=8).device("cpu") == torch.device("cpu")
    assert Processes().device("cuda") == torch.device("cuda")


def test_info_of_a_point(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    GaussianDenoiser.isotropic(torch.zeros(1, 2, 2), 0.0).save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    assert "| 1 | 0 | - |" in capsys.readouterr().out, "nothing can be said of shares of no variance"
