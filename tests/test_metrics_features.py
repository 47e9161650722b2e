"""Extractors: each kind, what each says where something is missing; and the classifier of digits."""

import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import digits, randn
from safetensors.torch import save_file
from torch import Tensor, nn

from gaussnet import GaussianDenoiser
from gaussnet.metrics import (
    FeatureStatistics,
    SmallClassifier,
    extract_features,
    features,
    load_extractor,
    to_uint8,
)

FIXTURE = Path(__file__).parent / "fixtures" / "mnist_features"


def images(count: int = 5, channels: int = 1, size: int = 28, seed: int = 0) -> Tensor:
    return randn(count, channels, size, size, seed=seed, dtype=torch.float32).clip(-1, 1)


def test_pixels_are_those_of_edm() -> None:
    levels = torch.arange(256)
    assert to_uint8(levels / 127.5 - 1).equal(levels.to(torch.uint8)), "stored pixels come back"
    x = torch.tensor([-1.1, -1.0, -0.999, -1e-6, 0.0, 0.5, 0.996, 1.0, 3.0])
    expected = np.clip(x.numpy() * np.float32(127.5) + np.float32(128), 0, 255).astype(np.uint8)
    assert to_uint8(x).tolist() == expected.tolist() == [0, 0, 0, 127, 128, 191, 254, 255, 255]
    with pytest.raises(TypeError, match=r"floating images in \[-1, 1\], got torch.uint8"):
        to_uint8(levels.byte())
    assert to_uint8(torch.tensor([-math.inf, math.inf])).tolist() == [0, 255]
    for function in (to_uint8, features.rounded):
        with pytest.raises(ValueError, match="expected images without NaN, got NaN"):
            function(torch.tensor([0.0, math.nan]))


# Extraction ---------------------------------------------------------------------------------------


class Means(nn.Module):
    """Features that tell what it was given: the mean of each channel; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        return self.drop(x).mean((2, 3)).double()


def test_features_come_in_batches() -> None:
    x = images(10, channels=3).double()
    for source in (x, x.numpy(), iter(x.split(7)), [(part, "label") for part in x.split(4)]):
        extractor = Means()
        parts = list(extract_features(extractor, source, batch_size=4))
        assert max(extractor.sizes) <= 4
        found = torch.cat(parts)
        assert found.dtype == torch.float32
        assert torch.allclose(found, x.mean((2, 3)).float(), atol=1e-6), (
            "dropout was on, or the order is wrong"
        )
        assert extractor.training
        assert extractor.drop.training
    statistics = FeatureStatistics.fit(extract_features(Means(), x))
    assert torch.allclose(statistics.mean, x.mean((0, 2, 3)), atol=1e-6)


def test_modes_and_gradients_are_left_alone() -> None:
    extractor = nn.Sequential(nn.Flatten(), nn.Linear(784, 3))
    extractor[1].eval()
    (found,) = extract_features(extractor, images().double())
    assert not found.requires_grad
    assert extractor.training
    assert not extractor[1].training


def test_what_has_no_features() -> None:
    with pytest.raises(TypeError, match=r"floating images in \[-1, 1\], got torch.uint8"):
        list(extract_features(Means(), to_uint8(images())))
    with pytest.raises(ValueError, match=r"images \(N, C, H, W\), got \(5, 28, 28\)"):
        list(extract_features(Means(), images()[:, 0]))
    with pytest.raises(ValueError, match=r"Identity: expected features \(5, F\), got \(5, 1, 28, 28\)"):
        list(extract_features(nn.Identity(), images()))
    with pytest.raises(ValueError, match=r"Flatten: expected features \(5, F\), got \(3920,\)"):
        list(extract_features(nn.Flatten(0), images()))
    with pytest.raises(ValueError, match="batch_size >= 1, got 0"):
        list(extract_features(Means(), images(), batch_size=0))


def test_a_module_is_its_own_extractor() -> None:
    module = Means()
    assert load_extractor(module) is module
    assert module.training
    with pytest.raises(ValueError, match="no weights for a module"):
        load_extractor(module, weights="file.pth")


# The classifier -----------------------------------------------------------------------------------


def test_the_classifier_is_small() -> None:
    model = SmallClassifier()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters < 250_000
    assert 64 <= model.num_features <= 128
    assert model(images(3)).shape == (3, 10)


def test_the_classifier_is_its_formulas() -> None:
    model = SmallClassifier(num_classes=4, in_channels=2, img_resolution=8, widths=(3, 5, 6)).double()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                nn.init.uniform_(tensor, 0.5, 2)  # pyright: ignore[reportArgumentType]
    model.eval()
    state, x = model.state_dict(), randn(3, 2, 5, 8)
    h = F.pad(x, (0, 0, 1, 2), value=-1.0) + 1
    for i, stride in enumerate((2, 1, 2)):
        weight = state[f"body.{3 * i}.weight"]
        h = F.conv2d(h, weight, stride=stride, padding=weight.shape[-1] // 2)
        mean, var, scale, shift = (
            state[f"body.{3 * i + 1}.{name}"][:, None, None]
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        h = ((h - mean) / (var + 1e-5).sqrt() * scale + shift).clamp_min(0)
    assert h.shape == (3, 6, 2, 2)
    expected = h.mean((2, 3))
    assert torch.allclose(model.features(x), expected, rtol=1e-9)
    assert torch.allclose(model(x), expected @ state["head.weight"].mT + state["head.bias"], rtol=1e-9)


@pytest.mark.parametrize("size", [(28, 28), (32, 32), (31, 20), (40, 64), (1, 1)], ids=str)
def test_images_of_any_size(size: tuple[int, int]) -> None:
    model = SmallClassifier().eval()
    assert model.features(randn(2, 1, *size, dtype=torch.float32)).shape == (2, 96)


def test_saved_and_loaded_as_an_extractor(tmp_path: Path) -> None:
    model = SmallClassifier(widths=(4, 8))
    model(images(20))  # moves the statistics of its norms
    model.eval()
    model.save_pretrained(tmp_path)
    assert "8 penultimate features" in (tmp_path / "README.md").read_text()
    assert SmallClassifier.from_pretrained(tmp_path)(images()).equal(model(images()))
    extractor = load_extractor(tmp_path)
    assert not extractor.training
    assert not any(parameter.requires_grad for parameter in extractor.parameters())
    (found,) = extract_features(extractor, images())
    assert found.equal(model.features(images()))


def test_classifiers_that_cannot_be() -> None:
    wrong: list[dict[str, Any]] = [{name: 0} for name in ("num_classes", "in_channels", "img_resolution")]
    wrong.append({"widths": (4, 0)})
    for arguments in wrong:
        with pytest.raises(ValueError, match=rf"{next(iter(arguments))}: got .*, expected at least 1"):
            SmallClassifier(**arguments)
    with pytest.raises(ValueError, match=r"widths: got \[\], expected at least 1"):
        SmallClassifier(widths=())
    with pytest.raises(ValueError, match=r"x: got shape \(5, 3, 28, 28\), expected \(B, 1, H, W\)"):
        SmallClassifier()(images(channels=3))


def test_the_committed_classifier_knows_digits() -> None:
    """It never saw scikit-learn's digits, whose 8 x 8 pixels are enlarged to MNIST's 20 x 20 here."""
    model: Any = SmallClassifier.from_pretrained(FIXTURE)
    assert (FIXTURE / "model.safetensors").stat().st_size < 1_000_000
    assert model.provenance["data"]["test accuracy"] > 0.985
    small, labels = digits()
    large = F.interpolate(small[:600].float(), (20, 20), mode="bicubic").clip(-1, 1)
    at_28 = F.pad(large, (4,) * 4, value=-1.0)
    accuracy = float((model(at_28).argmax(1) == labels[:600]).double().mean())
    assert accuracy > 0.9, accuracy
    at_32 = F.pad(at_28, (2,) * 4, value=-1.0)
    extractor = load_extractor(str(FIXTURE))
    (features28,), (features32,) = (list(extract_features(extractor, x, 1000)) for x in (at_28, at_32))
    assert features28.shape == (600, 96)
    assert torch.allclose(features28, features32, atol=1e-6)


def test_folders_without_a_classifier(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no folder nowhere with config.json, and not inception or timm"
    ):
        load_extractor("nowhere")
    GaussianDenoiser.isotropic(torch.zeros(1, 2, 2), 1.0).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected a model with features, .*, got GaussianDenoiser"):
        load_extractor(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no file missing.pth"):
        load_extractor(tmp_path, weights="missing.pth")
    (tmp_path / "weights.pth").touch()
    with pytest.raises(ValueError, match="no weights for"):
        load_extractor(tmp_path, weights=tmp_path / "weights.pth")


# Inception, by a stand-in of torch-fidelity -------------------------------------------------------


class Inception(nn.Module):
    """What torch-fidelity's FeatureExtractorInceptionV3 takes and gives."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str) -> None:
        super().__init__()
        assert features_list == ["2048"]
        self.scale = nn.Parameter(torch.zeros(()))
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        assert x.dtype == torch.uint8
        assert x.shape[1] == 3
        return (self.scale * x.double().mean((2, 3)).float().repeat(1, 683)[:, :2048],)


@pytest.fixture
def fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Inception
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)


@pytest.mark.usefixtures("fidelity")
def test_inception_sees_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = tmp_path / "checkpoints" / features.INCEPTION_FILE
    cached.parent.mkdir()
    torch.save({"scale": torch.tensor(2.0)}, cached)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for weights in (cached, None):
        extractor = load_extractor("inception", weights)
        assert not extractor.training
        for channels in (1, 3):
            x = images(4, channels)
            (found,) = extract_features(extractor, x)
            assert found.shape == (4, 2048)
            assert found.dtype == torch.float32
            expected = 2 * to_uint8(x).double().mean((2, 3)).expand(4, 3)
            assert torch.allclose(found[:, :3].double(), expected)
    with pytest.raises(ValueError, match="grey or RGB"):
        list(extract_features(extractor, images(4, 2)))


@pytest.mark.usefixtures("fidelity")
def test_inception_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(url: str, *args: Any, **kwargs: Any) -> None:
        assert url == features.INCEPTION_URL
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(FileNotFoundError) as caught:
        load_extractor("inception")
    for part in (
        features.INCEPTION_FILE,
        features.INCEPTION_URL,
        str(tmp_path),
        "no network",
        "weights=PATH",
    ):
        assert part in str(caught.value)


@pytest.mark.usefixtures("fidelity")
def test_inceptions_weights_are_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(url: str, path: str, progress: bool) -> None:
        asked.append(url)
        torch.save({"scale": torch.tensor(3.0)}, path)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    x = images(4)
    for _ in range(2):
        (found,) = extract_features(load_extractor("inception"), x)
        assert torch.allclose(found[:, :1].double(), 3 * to_uint8(x).double().mean((2, 3)))
    assert asked == [features.INCEPTION_URL]
    assert (tmp_path / "hub" / "checkpoints" / features.INCEPTION_FILE).is_file()


class Harmful:
    """Pickled, it leaves a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.usefixtures("fidelity")
def test_inception_runs_no_code_of_a_file(tmp_path: Path) -> None:
    torch.save({"scale": Harmful(tmp_path / "harm")}, tmp_path / "harmful.pth")
    torch.save({"other": torch.ones(2)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("hello")
    for name in ("harmful.pth", "other.pth", "text.pth"):
        with pytest.raises(ValueError, match=f"{name} does not hold Inception's weights"):
            load_extractor("inception", tmp_path / name)
    assert not (tmp_path / "harm").exists()


def test_inception_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(
        ImportError, match=r"pip install torch-fidelity.*weights-inception.*https://github.com"
    ):
        load_extractor("inception")


# timm ---------------------------------------------------------------------------------------------


def test_a_timm_model_with_a_file_of_weights(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_resnet", pretrained=False).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    extractor = load_extractor("timm:test_resnet", tmp_path / "model.safetensors")
    assert not extractor.training
    config = model.pretrained_cfg
    size, x = config["input_size"][1:], images(3, size=40)
    (found,) = extract_features(extractor, x)
    rgb = F.interpolate(x.expand(-1, 3, -1, -1) / 2 + 0.5, size, mode="bicubic", antialias=True)
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        expected = model.forward_features((rgb - mean) / std).mean((2, 3))
    assert found.shape == (3, model.num_features)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_a_timm_model_with_the_weights_that_timm_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    create, asked = timm.create_model, list[dict[str, Any]]()

    def offline(name: str, **options: Any) -> Any:
        asked.append(options)
        return create(name, **{**options, "pretrained": False})

    monkeypatch.setattr(timm, "create_model", offline)
    extractor: Any = load_extractor("timm:test_resnet")
    assert asked == [{"pretrained": True, "num_classes": 0}]
    x = images(2, 3, size=extractor.size[0])  # of its size: taken as they are
    with torch.no_grad():
        expected = extractor.network((x / 2 + 0.5 - extractor.mean) / extractor.std)
        monkeypatch.setattr(F, "interpolate", None)
        assert torch.allclose(extractor(x), expected, atol=1e-5)


def test_timm_models_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    with pytest.raises(ValueError, match="timm:no_such_net: timm has no such model"):
        load_extractor("timm:no_such_net")
    save_file({"other": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors lacks \d+ of its tensors, such as conv1\."):
        load_extractor("timm:test_resnet", tmp_path / "other.safetensors")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match="timm:test_resnet: cannot load its weights"):
        load_extractor("timm:test_resnet", tmp_path / "text.pth")

    def offline(*args: Any, **kwargs: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(FileNotFoundError, match=r"timm:test_resnet: .* cannot be downloaded \(no network\)"):
        load_extractor("timm:test_resnet")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="timm:test_resnet needs timm: pip install timm"):
        load_extractor("timm:test_resnet")
