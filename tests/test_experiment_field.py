"""Score fields on a plane: its geometry, closed forms of its scores, and the experiment."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gaussnet import Covariance, DeltaDenoiser, GaussianDenoiser, GaussianMixtureDenoiser, open_images
from gaussnet.experiments import Setting, defaults, run, score_field
from gaussnet.plots.planes import field_panels
from gaussnet.probes.planes import Plane
from gaussnet.probes.planes import score_field as field_of

DTYPES = [torch.float64, torch.float32]


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 2, 3, 4, generator=torch.Generator().manual_seed(5), dtype=dtype)


def columns(rows: list[dict[str, Any]], *names: str) -> Tensor:
    return torch.tensor([[row[name] for name in names] for row in rows], dtype=torch.float64)


def setting(model: str = "gaussian", **changed: Any) -> Setting:
    return Setting(model, open_images("digits").subset(range(100)), **{"shrinkage": "none", **changed})


SMALL: dict[str, Any] = {"references": ["gaussian", "delta"], "sigmas": [0.05, 2.0], "grid": 6}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plane(dtype: torch.dtype) -> None:
    three = images(dtype)
    plane, tol = Plane.through(three), 1e-12 if dtype == torch.float64 else 1e-5
    axes = plane.axes.flatten(1)
    assert plane.axes.dtype == dtype
    assert torch.allclose(axes @ axes.mT, torch.eye(2, dtype=dtype), atol=tol), "orthonormal"
    assert torch.allclose(plane.points(plane.anchors), three, atol=tol), "through the images"
    assert torch.allclose(torch.cdist(plane.anchors, plane.anchors).to(dtype), torch.cdist(
        three.flatten(1), three.flatten(1)), atol=10 * tol), "in units of distance"  # fmt: skip
    assert plane.anchors[1, 1].abs() < tol, "the second image lies on the u axis"
    assert plane.anchors[2, 1] > 0
    uv = torch.randn(7, 2, dtype=torch.float64)
    assert torch.allclose(plane.project(plane.points(uv) - three[0]), uv, atol=10 * tol)
    across = torch.randn(7, *three.shape[1:], dtype=dtype)
    flat = across.flatten(1)
    across = (flat - flat @ axes.mT @ axes).reshape(across.shape)
    assert plane.project(across).abs().max() < 10 * tol, "what is orthogonal to the plane is not seen"


@pytest.mark.parametrize("count", [2, 4])
def test_plane_refuses_another_number_of_images(count: int) -> None:
    with pytest.raises(ValueError, match="expected three images"):
        Plane.through(torch.randn(count, 1, 2, 2))
    with pytest.raises(TypeError, match=r"images to be floating-point, got torch.uint8"):
        Plane.through(torch.eye(3, 4).byte())


@pytest.mark.parametrize("line", [(0.0, 1.0, 3.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)], ids=str)
def test_plane_refuses_a_line(line: tuple[float, float, float]) -> None:
    start, along = images()[:2]
    with pytest.raises(ValueError, match="images on one line"):
        Plane.through(torch.stack([start + t * along for t in line]))


def test_grid() -> None:
    plane = Plane(
        torch.zeros(3), torch.eye(3)[:2], torch.tensor([[0.0, 0.0], [4.0, 0.0], [1.0, 2.0]]).double()
    )
    uv = plane.grid(5, margin=0.25)  # 4 wide, 2 high: a square of 6 about (2, 1)
    assert uv.shape == (25, 2)
    assert uv[0].tolist() == [-1, -2]
    assert uv[1].tolist() == [0.5, -2], "u is the inner coordinate"
    assert uv[-1].tolist() == [5, 4]
    assert uv[12].tolist() == [2, 1]
    for size, margin in ((1, 0.1), (4, -0.1)):
        with pytest.raises(ValueError, match="expected size >= 2 and margin >= 0"):
            plane.grid(size, margin)


def test_inside() -> None:
    plane = Plane.through(images())
    shares = torch.rand(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1e-3
    weights = shares / shares.sum(1, keepdim=True)
    assert plane.inside(weights @ plane.anchors).all()
    for corner in range(3):  # beyond the opposite side
        flipped = weights.clone()
        flipped[:, corner] *= -1
        flipped = flipped / flipped.sum(1, keepdim=True)
        assert not plane.inside(flipped @ plane.anchors).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_field_of_an_isotropic_gaussian(dtype: torch.dtype) -> None:
    """The score is (mu - x)/(var + sigma^2): in the plane, towards the foot of the mean."""
    plane = Plane.through(images(dtype))
    mean = torch.randn(2, 3, 4, dtype=dtype)
    uv = plane.grid(6)
    rows = field_of(GaussianDenoiser.isotropic(mean, 0.5), plane, uv, 0.7, batch_size=7)
    total = 0.5 + 0.7**2
    foot = plane.project((mean - plane.origin)[None])
    height2 = float((mean - plane.origin).double().square().sum() - foot.square().sum())
    tol = 1e-11 if dtype == torch.float64 else 1e-4
    assert torch.equal(columns(rows, "u", "v"), uv)
    assert torch.allclose(columns(rows, "score_u", "score_v"), (foot - uv) / total, atol=tol)
    distance2 = (foot - uv).square().sum(1)
    assert torch.allclose(columns(rows, "norm_in_plane")[:, 0], distance2.sqrt() / total, atol=tol)
    assert torch.allclose(columns(rows, "norm")[:, 0], (distance2 + height2).sqrt() / total, atol=tol)
    assert torch.equal(columns(rows, "inside")[:, 0].bool(), plane.inside(uv))


def test_field_of_a_gaussian_by_a_dense_solve() -> None:
    plane, generator = Plane.through(images()), torch.Generator().manual_seed(2)
    eigvecs, _ = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64, generator=generator))
    lam = torch.rand(24, dtype=torch.float64, generator=generator)
    gaussian = GaussianDenoiser(torch.zeros(2, 3, 4).double(), Covariance(eigvecs, lam))
    uv = plane.grid(4)
    x = plane.origin.flatten() + uv @ plane.axes.flatten(1)
    noised = eigvecs @ torch.diag(lam) @ eigvecs.mT + 0.3**2 * torch.eye(24).double()
    scores = -torch.linalg.solve(noised, x.mT).mT
    rows = field_of(gaussian, plane, uv, 0.3)
    assert torch.allclose(columns(rows, "score_u", "score_v"), scores @ plane.axes.flatten(1).mT, atol=1e-9)
    assert torch.allclose(columns(rows, "norm")[:, 0], scores.norm(dim=1), atol=1e-9)


def test_delta_moves_to_the_nearest_image() -> None:
    three = images()
    plane, sigma = Plane.through(three), 0.02
    uv = plane.grid(8)
    rows = field_of(DeltaDenoiser(three), plane, uv, sigma)
    nearest = plane.anchors[torch.cdist(uv, plane.anchors).argmin(1)]
    assert torch.allclose(sigma**2 * columns(rows, "score_u", "score_v"), nearest - uv, atol=1e-6)
    assert torch.allclose(columns(rows, "norm"), columns(rows, "norm_in_plane"), atol=1e-6)


def test_class_labels() -> None:
    three = images()
    mixture = GaussianMixtureDenoiser.equal_isotropic(three, 0.1, torch.arange(3))
    plane = Plane.through(three)
    uv = plane.grid(5)
    rows = field_of(mixture, plane, uv, 0.4, torch.tensor(1), batch_size=4)
    expected = (plane.anchors[1] - uv) / (0.1 + 0.4**2)
    assert torch.allclose(columns(rows, "score_u", "score_v"), expected, atol=1e-10)
    one_hot = field_of(mixture, plane, uv, 0.4, torch.tensor([0.0, 1.0, 0.0]), batch_size=4)
    assert one_hot == rows


def test_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = defaults(score_field, **SMALL)
    one = setting()
    names = [
        "plane",
        *(f"{name} sigma={sigma}" for name in ("model", "gaussian", "delta") for sigma in (2.0, 0.05)),
    ]
    assert score_field.units(one, options) == names
    reading = run("field", score_field, one, options, tmp_path)
    for suffix in ("csv", "png", "pdf", "md"):
        assert (tmp_path / f"field.{suffix}").stat().st_size > 100, suffix
    assert len((tmp_path / "field.csv").read_text().splitlines()) == 1 + 3 + 6 * 36
    table = {(row["denoiser"], row["sigma"]): row for row in reading.table}
    assert len(table) == 6
    for sigma in (0.05, 2.0):  # the model is the Gaussian
        assert table["gaussian", sigma] == {**table["model", sigma], "denoiser": "gaussian"}
        assert table["model", sigma]["unexplained"] == 0
        assert table["delta", sigma]["unexplained"] > 0
        assert table["delta", sigma]["moved"] >= table["delta", sigma]["moved in plane"] > 0
    monkeypatch.setattr(score_field, "score_field", pytest.fail)
    assert run("field", score_field, one, options, tmp_path) == reading


def test_the_images_by_their_indices() -> None:
    one, options = setting(), defaults(score_field, **SMALL, images=[7, 3, 90])
    rows = score_field.measure(one, options, "plane")
    assert one.data is not None
    three = one.data.to_float(one.data.raw([7, 3, 90])).flatten(1).double()
    sides = [float((three[i] - three[0]).norm()) for i in (1, 2)]
    points = [(row["u"], row["v"]) for row in rows]
    assert [row["anchor"] for row in rows] == [0, 1, 2]
    assert [math.hypot(*point) for point in points] == pytest.approx([0, *sides])
    other = score_field.measure(one, defaults(score_field, **SMALL), "plane")
    assert other != rows, "at random by default"
    assert other == score_field.measure(setting(), defaults(score_field, **SMALL), "plane")


def test_the_reading_in_closed_form() -> None:
    """A right triangle of the anchors (0, 0), (4, 0), (0, 4), and a model that pulls to (1, 0) at rate 2."""
    anchors = [{"anchor": i, "u": u, "v": v} for i, (u, v) in enumerate([(0.0, 0.0), (4.0, 0.0), (0.0, 4.0)])]
    rows = [
        {"denoiser": name, "sigma": 0.5, "u": u, "v": v, "score_u": rate * (1 - u), "score_v": -rate * v,
         "norm": 2 * rate * math.hypot(1 - u, v), "norm_in_plane": rate * math.hypot(1 - u, v),
         "inside": u + v <= 4}
        for name, rate in (("model", 2.0), ("half", 1.0))
        for u in (1.0, 3.0)
        for v in (1.0, 3.0)
    ]  # fmt: skip
    reading = score_field.read([*anchors, *rows], defaults(score_field))
    inside = math.sqrt((1 + 9 + 5) / 3)  # distances from (1, 0) of (1, 1), (1, 3), (3, 1)
    model, half = reading.table
    assert (model["denoiser"], half["denoiser"]) == ("model", "half")
    assert model["moved in plane"] == pytest.approx(0.25 * 2 * inside)
    assert model["moved"] == pytest.approx(0.25 * 4 * inside)
    assert half["moved in plane"] == pytest.approx(0.25 * inside)
    assert (model["unexplained"], half["unexplained"]) == pytest.approx((0, 0.25))
    assert "The sides of the triangle are 4, 5.66, 4." in reading.text


def test_further_models(tmp_path: Path) -> None:
    path = tmp_path / "step-1"
    GaussianDenoiser.isotropic(torch.zeros(1, 8, 8), 1.0).save_pretrained(path)
    options = defaults(score_field, **{**SMALL, "references": [], "sigmas": [1.0], "models": [str(path)]})
    one = setting()
    _, further, model = before = score_field.units(one, options)
    assert further.startswith(f"{path}@")
    assert model == "model sigma=1.0", "checkpoints stand before the model"
    rows = score_field.measure(one, options, further)
    assert {row["denoiser"] for row in rows} == {str(path)}
    plane = score_field.measure(one, options, "plane")
    assert max(row["norm"] for row in rows) > 0
    GaussianDenoiser.isotropic(torch.zeros(1, 8, 8), 3.0).save_pretrained(path)
    after = score_field.units(one, options)
    assert after != before, "a checkpoint that was written anew is measured anew"
    assert score_field.measure(one, options, "plane") == plane
    for weak, strong in zip(score_field.measure(one, options, after[1]), rows, strict=True):
        assert weak["norm"] == pytest.approx(strong["norm"] / 2)  # 3 + 1 in place of 1 + 1


def test_figure() -> None:
    rows = [
        {"denoiser": name, "sigma": sigma, "u": u, "v": v, "score_u": -u, "score_v": 2.0,
         "norm": 9.0, "norm_in_plane": math.hypot(u, 2.0)}
        for name in ("a/long/path/step-1", "model")
        for sigma in (0.1, 2.0)
        for u in (1.0, 0.0, 2.0)
        for v in (3.0, 4.0, 5.0)
    ]  # fmt: skip
    anchors = [{"anchor": i, "u": float(i), "v": 4.0} for i in range(3)]
    figure = score_field.draw([*anchors, *rows], defaults(score_field))
    panels = [axis for axis in figure.axes if axis.get_label() != "<colorbar>"]
    assert len(panels) == 4
    assert [panel.get_title() for panel in panels] == ["$\\sigma$ = 2", "$\\sigma$ = 0.1", "", ""]
    assert [panels[i].get_ylabel() for i in (0, 2)] == ["path/step-1\nv", "model\nv"]
    for panel in panels:
        mesh, arrows = panel.collections
        lengths = np.hypot([[0.0, 1.0, 2.0]] * 3, 2.0)
        assert np.asarray(mesh.get_array()).reshape(3, 3) == pytest.approx(lengths)
        longest = math.hypot(2, 2)
        assert np.hypot(arrows.U, arrows.V) == pytest.approx(np.sqrt(lengths / longest).flatten())
        slopes = arrows.U / arrows.V
        assert slopes == pytest.approx(np.array([0.0, -0.5, -1.0] * 3))
        assert panel.get_lines()[0].get_xydata().tolist() == [[0, 4], [1, 4], [2, 4]]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sigmas": [-1.0]}, "expected sigmas > 0, grid >= 2 and margin >= 0"),
        ({"grid": 1}, "expected sigmas > 0, grid >= 2 and margin >= 0"),
        ({"images": [0, 1, 100]}, r"expected indices of 100 images, got \[0, 1, 100\]"),
        ({"images": [4, 1, 4]}, "images on one line"),
        ({"models": ["model"]}, "expected --models other than 'model'"),
    ],
    ids=str,
)
def test_experiment_refuses(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_field.units(setting(), defaults(score_field, **changed))


def test_indices_need_images(tmp_path: Path) -> None:
    GaussianDenoiser.isotropic(torch.zeros(1, 8, 8), 1.0).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected images \(--data\), got none"):
        score_field.units(Setting(str(tmp_path)), defaults(score_field, images=[0, 1, 2], references=[]))


def test_no_field_to_draw() -> None:
    with pytest.raises(ValueError, match="expected at least one row, got none"):
        field_panels([], [(0.0, 0.0)])
