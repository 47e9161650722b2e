"""`gaussnet fid`: the distances that it prints, the counts that it checks, and processes that share it."""

import argparse
import json
import os
import re
import shutil
import socket
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from cases import digits
from PIL import Image
from scipy.linalg import sqrtm
from torch import multiprocessing

from gaussnet import cli_fid
from gaussnet.cli_fid import add_fid
from gaussnet.metrics import (
    FeatureStatistics,
    SmallClassifier,
    frechet_infinity,
    kernel_distance,
    memorisation,
    precision_recall,
)
from gaussnet.metrics.features import INCEPTION_FILE, INCEPTION_URL

COUNT = 61  # so that of two processes one has an image more


def fid(*arguments: Any) -> None:
    parser = argparse.ArgumentParser(prog="gaussnet fid")
    add_fid(parser)
    options = parser.parse_args([str(argument) for argument in arguments])
    options.run(options)


def pixels(start: int, count: int) -> np.ndarray:
    """Digits as stored images (count, 8, 8), uint8."""
    return (digits()[0][start : start + count, 0] * 127.5 + 127.5).round().byte().numpy()


def features(images: np.ndarray, folder: Path) -> torch.Tensor:
    model = SmallClassifier.from_pretrained(folder / "net").eval()
    with torch.no_grad():
        return model.features(torch.from_numpy(images).float()[:, None] / 127.5 - 1).double()


def brute_force(x: torch.Tensor, y: torch.Tensor) -> float:
    (a, b), (p, q) = ((part.mean(0).numpy(), np.cov(part.numpy().T)) for part in (x, y))
    root: Any = sqrtm(b @ q)
    return float(((a - p) ** 2).sum() + np.trace(b + q - 2 * root.real))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images as npz and as files named by seeds, data, a small extractor, and the data's statistics."""
    place = tmp_path_factory.mktemp("fid")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        SmallClassifier(10, 1, 8, (6, 5)).save_pretrained(place / "net")
    np.savez(place / "images.npz", images=pixels(0, COUNT))
    np.savez(place / "data.npz", images=pixels(COUNT, 200))
    (place / "seeds").mkdir()
    for seed, image in enumerate(pixels(0, COUNT)):
        Image.fromarray(image).save(place / "seeds" / f"{seed:06d}.png")
    fid("--make-ref", place / "data.npz", "--out", place / "ref.npz", "--features", place / "net")
    return place


def options(folder: Path, *others: Any) -> list[Any]:
    return ["--features", folder / "net", "--num", COUNT, "--batch", 16, *others]


def results(folder: Path, tmp_path: Path, images: str, *others: Any) -> dict[str, Any]:
    fid(folder / images, *options(folder, *others), "--out", tmp_path / "out.json")
    return json.loads((tmp_path / "out.json").read_text())


def test_the_statistics_are_those_of_the_data(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = features(pixels(COUNT, 200), folder)
    with np.load(folder / "ref.npz") as file:
        assert int(file["count"]) == 200
        np.testing.assert_allclose(file["mu"], expected.mean(0), rtol=1e-5)
        np.testing.assert_allclose(file["sigma"], np.cov(expected.numpy().T), rtol=1e-4, atol=1e-9)
    out = folder / "again.npz"
    fid("--make-ref", folder / "data.npz", "--out", out, "--features", folder / "net", "--num", 50)
    assert FeatureStatistics.load(out).count == 50, "the first of them"
    assert "again.npz: 5 " in capsys.readouterr().out


@pytest.mark.parametrize("images", ["images.npz", "seeds"])
def test_fid(images: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = results(folder, tmp_path, images, "--ref", folder / "ref.npz")
    expected = brute_force(features(pixels(0, COUNT), folder), features(pixels(COUNT, 200), folder))
    assert found["fid"] == pytest.approx(expected, rel=1e-3)
    assert found["count"] == COUNT
    assert "kid" not in found
    shown = re.search(r"\nFrechet distance +(\S+)\n", capsys.readouterr().out)
    assert shown is not None
    assert float(shown[1]) == pytest.approx(found["fid"], rel=1e-4)


def test_references_of_edm_have_no_count(folder: Path, tmp_path: Path) -> None:
    ours = FeatureStatistics.load(folder / "ref.npz")
    np.savez(tmp_path / "edm.npz", mu=ours.mean.numpy(), sigma=ours.cov.numpy())
    found = [
        results(folder, tmp_path, "seeds", "--ref", ref) for ref in (tmp_path / "edm.npz", folder / "ref.npz")
    ]
    assert found[0]["fid"] == found[1]["fid"]


def test_images_have_no_distance_to_themselves(folder: Path, tmp_path: Path) -> None:
    found = results(folder, tmp_path, "seeds", "--data", folder / "images.npz")
    assert found["fid"] < 1e-7
    assert (found["precision"], found["recall"], found["memorised"]) == (1, 1, 1)
    np.savez(tmp_path / "more.npz", images=pixels(0, 3 * COUNT))
    found = results(folder, tmp_path, "seeds", "--data", tmp_path / "more.npz")
    assert (found["precision"], found["memorised"]) == (1, 1)
    assert found["recall"] < 1


def test_images_tell_more_than_statistics(folder: Path, tmp_path: Path) -> None:
    found = results(folder, tmp_path, "seeds", "--data", folder / "data.npz")
    x, y = features(pixels(0, COUNT), folder), features(pixels(COUNT, 200), folder)
    assert found["fid"] == pytest.approx(brute_force(x, y), rel=1e-3)
    limit = frechet_infinity(x, y, generator=torch.Generator().manual_seed(0))
    assert found["fid_infinity"] == pytest.approx(limit.value, rel=1e-2)
    kernel = kernel_distance(x, y, subset_size=COUNT, generator=torch.Generator().manual_seed(0))
    assert found["kid"] == pytest.approx(kernel.mean, rel=1e-3)
    assert found["kid_std"] == pytest.approx(kernel.std, rel=1e-3)
    manifold = precision_recall(y, x)
    assert (found["precision"], found["recall"]) == pytest.approx(tuple(manifold), abs=0.02)
    assert manifold.precision != manifold.recall
    flat = [torch.from_numpy(part).double() / 127.5 - 1 for part in (pixels(0, COUNT), pixels(COUNT, 200))]
    assert found["memorised"] == memorisation(*flat).share
    both = results(folder, tmp_path, "seeds", "--data", folder / "images.npz", "--ref", folder / "ref.npz")
    assert both["fid"] == pytest.approx(found["fid"], rel=1e-6)
    assert both["memorised"] == 1


def test_floats_are_rounded_as_a_file_would_hold_them(folder: Path, tmp_path: Path) -> None:
    exact = torch.from_numpy(pixels(0, COUNT)).float() / 127.5 - 1
    np.savez(
        tmp_path / "floats.npz", images=(exact + 0.4 / 127.5 * torch.rand_like(exact)).clamp(-1, 1).numpy()
    )
    ours = results(
        tmp_path, tmp_path, "floats.npz", "--ref", folder / "ref.npz", "--features", folder / "net"
    )
    assert ours["fid"] == results(folder, tmp_path, "seeds", "--ref", folder / "ref.npz")["fid"]


def test_data_get_the_frame_of_samples(folder: Path, tmp_path: Path) -> None:
    framed = np.pad(pixels(0, COUNT), ((0, 0), (2, 2), (2, 2)))
    np.savez(tmp_path / "framed.npz", images=framed)
    found = results(
        tmp_path, tmp_path, "framed.npz", "--data", folder / "images.npz", "--features", folder / "net"
    )
    assert found["fid"] < 1e-7
    assert found["memorised"] == 1


def test_counts_are_checked(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected 50000 images, got 61 in .*; --num 61 takes these"):
        fid(folder / "images.npz", "--ref", folder / "ref.npz", "--features", folder / "net")
    with pytest.raises(ValueError, match=r"expected 62 images, got 61 in .*seeds, which has no seed 61$"):
        fid(folder / "seeds", *options(folder, "--ref", folder / "ref.npz", "--num", 62))
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted((folder / "seeds").iterdir())[:40]:
        (few / path.name).write_bytes(path.read_bytes())
    ref = ["--ref", folder / "ref.npz", "--num", 40, "--features", folder / "net"]
    first = results(folder, tmp_path, "seeds", *ref)["fid"]
    assert first == pytest.approx(results(tmp_path, tmp_path, "few", *ref)["fid"], rel=1e-6)
    (few / "000017.png").unlink()
    with pytest.raises(ValueError, match=r"expected 40 images, got 39 in .*few, which has no seed 17$"):
        fid(few, *options(folder, "--ref", folder / "ref.npz", "--num", 40))


def test_too_few_images_for_recall_are_refused_before_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, count in (("many", 5), ("three", 3)):
        np.savez(tmp_path / f"{name}.npz", images=pixels(0, count))
    monkeypatch.delattr(cli_fid, "load_extractor")  # not asked for
    with pytest.raises(
        ValueError, match="--data: expected at least 4 images of both for recall, got 5 and 3"
    ):
        fid(tmp_path / "many.npz", "--data", tmp_path / "three.npz", "--num", 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.npz"], "expected --ref STATS.npz or --data DATA to compare with, got neither"),
        ([], "expected either IMAGES or --make-ref DATA"),
        (["a.npz", "--make-ref", "b.npz"], "expected either IMAGES or --make-ref DATA"),
        (["--make-ref", "b.npz"], "--make-ref: expected --out STATS.npz, got None"),
        (["--make-ref", "b.npz", "--out", "b.json"], "--make-ref: expected --out STATS.npz, got b.json"),
        (
            ["--make-ref", "b.npz", "--out", "c.npz", "--ref", "d.npz"],
            "--make-ref: expected no --ref, got d.npz",
        ),
        (["a.npz", "--ref", "b.npz", "--num", "1"], "expected --num >= 2, got 1"),
        (["a.npz", "--ref", "b.npz", "--batch", "0"], "expected --batch >= 1, got 0"),
        (
            ["a.npz", "--ref", "b.npz", "--split", "test"],
            "expected --split with --data or --make-ref, got test",
        ),
    ],
)
def test_options_that_do_not_go_together(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fid(*arguments)


def test_what_is_missing_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.npz"):
        fid(folder / "seeds", "--ref", tmp_path / "none.npz")
    np.savez(tmp_path / "rgb.npz", images=np.zeros((COUNT, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"one shape, got \(3, 8, 8\) and \(1, 8, 8\)"):
        fid(folder / "seeds", *options(folder, "--data", tmp_path / "rgb.npz"))
    np.savez(tmp_path / "other.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match="expected means of one length, got 5 and 3"):
        fid(folder / "seeds", *options(folder, "--ref", tmp_path / "other.npz"))
    # Inception without weights and without a network to get them from.
    fake: Any = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    fake.FeatureExtractorInceptionV3 = None
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def offline(*_: Any, **__: Any) -> None:
        raise URLError("offline")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(FileNotFoundError, match=f"Get it from {INCEPTION_URL}") as caught:
        fid(folder / "seeds", "--ref", folder / "ref.npz", "--num", COUNT)
    assert INCEPTION_FILE in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"inception: no file .*w\.pth"):
        fid(folder / "seeds", "--ref", folder / "ref.npz", "--num", COUNT, "--weights", tmp_path / "w.pth")


def calls(folder: Path) -> dict[str, list[Any]]:
    """What writes --out, but for that option."""
    return {
        "r.json": [folder / "seeds", *options(folder, "--ref", folder / "ref.npz")],
        "data.json": [folder / "seeds", *options(folder, "--data", folder / "data.npz")],
        "ref.npz": ["--make-ref", folder / "data.npz", "--features", folder / "net"],
    }


NAMES = ("r.json", "data.json", "ref.npz")


@pytest.mark.parametrize("name", NAMES)
def test_folders_of_outputs_are_made_before_features(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, share, made = tmp_path / "new" / "deep" / name, cli_fid._share, []  # pyright: ignore[reportPrivateUsage]

    def spy(*arguments: Any) -> torch.Tensor:
        made.append(out.parent.is_dir())
        return share(*arguments)

    monkeypatch.setattr(cli_fid, "_share", spy)
    call = calls(folder)[name]
    with pytest.raises(ValueError, match="expected 99999 images, got"):
        fid(*call, "--out", out, "--num", 99_999)
    with pytest.raises(FileNotFoundError, match="absent"):
        fid(*call, "--out", out, "--features", tmp_path / "absent")
    assert list(tmp_path.iterdir()) == [], "nothing is made for what cannot be measured"
    fid(*call, "--out", out)
    assert made
    assert all(made)
    assert [path.name for path in out.parent.iterdir()] == [name]


@pytest.mark.parametrize("name", NAMES)
def test_an_out_that_cannot_be_written_is_refused_before_features(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_fid, "_share", None)
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=rf"expected --out to be a file, got the folder .*{name}$"):
        fid(*calls(folder)[name], "--out", tmp_path / name)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        fid(*calls(folder)[name], "--out", tmp_path / "file" / name)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", NAMES)
def test_an_old_output_stays_until_the_new_is_whole(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / name
    out.write_text("old")

    def full(where: Path, *_: Any) -> None:
        where.write_bytes(b"half")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(FeatureStatistics, "save", lambda _, path: full(Path(path)))
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="no space left"):
            fid(*calls(folder)[name], "--out", out)
    assert out.read_text() == "old"
    fid(*calls(folder)[name], "--out", out)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    whole = json.loads(out.read_text()) if out.suffix == ".json" else vars(FeatureStatistics.load(out))
    assert whole["count"] == (COUNT if out.suffix == ".json" else 200)


def test_samples_are_measured_without_their_settings(folder: Path, tmp_path: Path) -> None:
    alone = results(folder, tmp_path, "seeds", "--ref", folder / "ref.npz")
    shutil.copytree(folder / "seeds", tmp_path / "seeds")
    (tmp_path / "seeds" / "sample.json").write_text("{}")
    ref = ["--ref", folder / "ref.npz", "--features", folder / "net"]
    assert results(tmp_path, tmp_path, "seeds", *ref)["fid"] == alone["fid"]


def share(rank: int, folder: str, out: str, ports: list[int]) -> None:
    torch.set_num_threads(1)
    place = Path(folder)
    calls = [
        [place / "seeds", *options(place, "--ref", place / "ref.npz", "--out", f"{out}/ref.json")],
        [place / "seeds", *options(place, "--data", place / "data.npz", "--out", f"{out}/data.json")],
        ["--make-ref", place / "data.npz", "--out", f"{out}/ref.npz", "--features", place / "net"],
    ]
    for port, call in zip(ports, calls, strict=True):
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
        }
        fid(*call)


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("localhost", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.mark.slow
def test_two_processes_find_what_one_does(folder: Path, tmp_path: Path) -> None:
    multiprocessing.spawn(share, (str(folder), str(tmp_path), free_ports(3)), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    for name, against in (("ref", folder / "ref.npz"), ("data", folder / "data.npz")):
        expected = results(folder, tmp_path, "seeds", f"--{name}", against)
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert found[key] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), key
    one, two = (FeatureStatistics.load(at / "ref.npz") for at in (folder, tmp_path))
    assert two.count == one.count == 200
    torch.testing.assert_close(two.mean, one.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(two.cov, one.cov, rtol=1e-4, atol=1e-7)


def test_without_out_it_only_prints(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(folder.iterdir())
    fid(folder / "images.npz", *options(folder, "--ref", folder / "ref.npz"))
    shown = re.search(r"\nFrechet distance +(\S+)\n", capsys.readouterr().out)
    assert shown is not None
    expected = results(folder, tmp_path, "images.npz", "--ref", folder / "ref.npz")["fid"]
    assert float(shown[1]) == pytest.approx(expected, rel=1e-4)
    assert sorted(folder.iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"], "of the second call alone"
