r"""Features of images: what the distances between sets of samples are measured in.

An extractor is any module that takes images (B, C, H, W) in [-1, 1] and gives features (B, F). Published FIDs
use the 2048 features before the last layer of TensorFlow's Inception network of 2015, of pixels as uint8.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gaussnet.fit import Data
from gaussnet.fit.streams import batches
from gaussnet.hub import CONFIG_NAME, Pretrained
from gaussnet.metrics.classifier import SmallClassifier
from gaussnet.metrics.samples import as_rgb
from gaussnet.numerics import known_true

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as pixels, uint8, rounded as EDM does: x 127.5 + 128, cut to [0, 255], truncated.

    Args:
        images: floating, of any shape.

    Returns:
        uint8 of the same shape.

    Raises:
        TypeError: if the images are not floating.
        ValueError: if a pixel is NaN.

    Example:
        >>> to_uint8(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([  0, 128, 255], dtype=torch.uint8)
    """
    if not images.is_floating_point():
        raise TypeError(f"expected floating images in [-1, 1], got {images.dtype}")
    if known_true(images.isnan().any()):  # they would become black pixels
        raise ValueError("expected images without NaN, got NaN")
    return (images * 127.5 + 128).clip(0, 255).to(torch.uint8)


def rounded(images: Tensor) -> Tensor:
    """Images in [-1, 1] as a file of 8 bits holds them: through `to_uint8` and back, x / 127.5 - 1.

    Args:
        images: floating, of any shape.

    Returns:
        float32 of the same shape.

    Raises:
        TypeError: if the images are not floating.
        ValueError: if a pixel is NaN.

    Example:
        >>> rounded(torch.tensor([-2.0, 0.0, 1.0]))
        tensor([-1.0000,  0.0039,  1.0000])
    """
    return to_uint8(images).float() / 127.5 - 1


def load_extractor(name_or_module: str | Path | nn.Module, weights: str | Path | None = None) -> nn.Module:
    """An extractor of features.

    | name | what it is |
    |---|---|
    | a module | itself, as it is |
    | `inception` | Inception's 2048 features, as for published FIDs; needs torch-fidelity |
    | `timm:NAME` | a model of timm without its head; needs timm. Images are resized and normalised for it |
    | a folder | a `SmallClassifier` that was saved there, or any `Pretrained` module with `features` |

    Args:
        name_or_module: as above.
        weights: file of the weights of `inception` or of the timm model; by default they are looked for in
            PyTorch's cache, or timm's, and downloaded if they are not there.

    Returns:
        A module in eval mode, without gradients: float images (B, C, H, W) in [-1, 1] to float32 (B, F).

    Raises:
        FileNotFoundError: if there is no such folder, or the weights are missing and cannot be downloaded.
        ImportError: if torch-fidelity or timm is needed and missing.
        ValueError: if the name is unknown, or what is found does not fit it.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = SmallClassifier(widths=[4]).save_pretrained(folder)
        ...     load_extractor(folder)(torch.zeros(2, 1, 32, 32)).shape
        torch.Size([2, 4])
    """
    if isinstance(name_or_module, nn.Module):
        _expect_no_weights("a module", weights)
        return name_or_module
    name = str(name_or_module)
    if weights is not None and not Path(weights).is_file():
        raise FileNotFoundError(f"{name}: no file {weights}")
    if name == "inception":
        extractor: nn.Module = InceptionFeatures(weights)
    elif name.startswith("timm:"):
        extractor = TimmFeatures(name.removeprefix("timm:"), weights)
    else:
        _expect_no_weights(name, weights)
        extractor = ClassifierFeatures(name)
    return extractor.eval().requires_grad_(False)


def extract_features(extractor: nn.Module, images: Data, batch_size: int = 256) -> Iterator[Tensor]:
    """Features of images, batch by batch: for `FeatureStatistics.fit` and the other metrics.

    Args:
        extractor: see `load_extractor`; it runs in eval mode, on the device of its parameters.
        images: (N, C, H, W), floating in [-1, 1], or an iterable of batches, read once.
        batch_size: images a call, at most.

    Yields:
        Features (n, F), float32, on the extractor's device.

    Raises:
        TypeError: if a batch is neither a tensor nor an array, or not floating.
        ValueError: if batch_size < 1, the batches are not images, or the extractor's output is not of
            shape (n, F).

    Example:
        >>> pixels = nn.Flatten()  # any module of images serves
        >>> [features.shape for features in extract_features(pixels, torch.zeros(5, 1, 2, 2), batch_size=3)]
        [torch.Size([3, 4]), torch.Size([2, 4])]
    """
    if batch_size < 1:
        raise ValueError(f"expected batch_size >= 1, got {batch_size}")
    state = next((tensor for part in (extractor.parameters(), extractor.buffers()) for tensor in part), None)
    for group, _ in batches(images):
        if not group.is_floating_point():
            raise TypeError(f"expected floating images in [-1, 1], got {group.dtype}")
        if group.ndim != 4:
            raise ValueError(f"expected images (N, C, H, W), got {tuple(group.shape)}")
        for batch in group.split(batch_size) if len(group) else ():
            yield _evaluate(extractor, batch if state is None else batch.to(state.device))


@torch.no_grad()
def _evaluate(extractor: nn.Module, batch: Tensor) -> Tensor:
    training = [module for module in extractor.modules() if module.training]
    extractor.eval()
    try:
        features = extractor(batch.float())
    finally:
        for module in training:
            module.training = True
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(batch):
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"{type(extractor).__name__}: expected features ({len(batch)}, F), got {got}")
    return features.float()


class ClassifierFeatures(nn.Module):
    """The penultimate features of a saved classifier.

    Args:
        path: folder that its `save_pretrained` wrote.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it does not hold a classifier with features.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        if not (Path(path) / CONFIG_NAME).is_file():
            raise FileNotFoundError(
                f"no folder {path} with {CONFIG_NAME}, and not inception or timm:NAME: "
                f"benchmarks/mnist_features.py makes such a folder for MNIST"
            )
        model: nn.Module = Pretrained.from_pretrained(path)
        if not callable(getattr(model, "features", None)):
            raise ValueError(
                f"{path}: expected a model with features, such as SmallClassifier, got {type(model).__name__}"
            )
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, F) of images (B, C, H, W)."""
        features: SmallClassifier = self.model  # pyright: ignore[reportAssignmentType]
        return features.features(images)


class InceptionFeatures(nn.Module):
    """Inception's 2048 pooled features of images of any size, grey or RGB, by torch-fidelity.

    Args:
        weights: file of its weights; None for PyTorch's cache.

    Raises:
        FileNotFoundError: if the weights are not in the cache and cannot be downloaded.
        ImportError: if torch-fidelity is missing.
        ValueError: if the file does not hold these weights.
    """

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import (  # pyright: ignore[reportMissingImports]
                FeatureExtractorInceptionV3,
            )
        except ImportError as error:
            raise ImportError(
                "inception needs torch-fidelity (pip install torch-fidelity), and its weights "
                f"{INCEPTION_FILE} from {INCEPTION_URL}"
            ) from error
        path = _inception_weights() if weights is None else Path(weights)
        try:
            # torch-fidelity unpickles the file without restrictions: only after this has found no code in it.
            torch.load(path, map_location="cpu", weights_only=True)
            self.network: nn.Module = FeatureExtractorInceptionV3("inception", ["2048"], str(path))
        except Exception as error:  # of pickle, zip and state dicts
            raise ValueError(
                f"{path} does not hold Inception's weights ({INCEPTION_URL}): {error}"
            ) from error

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 2048) of images (B, C, H, W), C = 1 or 3."""
        return self.network(as_rgb(to_uint8(images)))[0]


def _inception_weights() -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(INCEPTION_URL, str(path), progress=False)
    except (URLError, OSError) as error:
        raise FileNotFoundError(
            f"inception: no {path}, and it cannot be downloaded ({error}). Get it from {INCEPTION_URL}, and "
            "put it there, or say where it is: load_extractor('inception', weights=PATH)"
        ) from error
    return path


class TimmFeatures(nn.Module):
    """The pooled features of a timm model, of images of any size, grey or RGB.

    Args:
        name: of the model, such as "resnet50.a1_in1k".
        weights: file of its weights; None for those that timm knows, from its cache or the hub.

    Raises:
        FileNotFoundError: if the weights are not in the cache and cannot be downloaded.
        ImportError: if timm is missing.
        ValueError: if timm has no such model, or no weights for it, or the file does not fit it.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, weights: str | Path | None = None) -> None:
        super().__init__()
        try:
            import timm
            from timm.data import resolve_data_config
            from timm.models import load_state_dict
        except ImportError as error:
            raise ImportError(f"timm:{name} needs timm: pip install timm") from error
        if not timm.is_model(name):
            raise ValueError(f"timm:{name}: timm has no such model; timm.list_models() tells which it has")
        missing: list[str] = []
        try:
            self.network: nn.Module = timm.create_model(name, pretrained=weights is None, num_classes=0)
            if weights is not None:  # the head's, which have no place, are allowed; to lack any is not
                state = load_state_dict(str(weights), weights_only=True)
                missing = self.network.load_state_dict(state, strict=False).missing_keys
        except OSError as error:  # of the hub and of urllib
            raise FileNotFoundError(
                f"timm:{name}: its weights are not in the cache and cannot be downloaded ({error}); "
                "say where they are: load_extractor(name, weights=PATH)"
            ) from error
        except Exception as error:  # of state dicts and of models without weights
            raise ValueError(f"timm:{name}: cannot load its weights: {error}") from error
        if missing:
            raise ValueError(
                f"timm:{name}: {weights} lacks {len(missing)} of its tensors, such as {missing[0]}"
            )
        config = resolve_data_config({}, model=self.network)
        self.size: tuple[int, int] = tuple(config["input_size"][1:])
        self.register_buffer("mean", torch.tensor(config["mean"]).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).reshape(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, F) of images (B, C, H, W), C = 1 or 3."""
        x = (as_rgb(images) + 1) / 2
        if tuple(x.shape[2:]) != self.size:
            x = F.interpolate(x, self.size, mode="bicubic", antialias=True)
        return self.network((x - self.mean) / self.std)


def _expect_no_weights(name: str, weights: str | Path | None) -> None:
    if weights is not None:
        raise ValueError(f"expected no weights for {name}, got {weights}")
