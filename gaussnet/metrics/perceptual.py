r"""Distances between pairs of images: mean squared error per pixel, and LPIPS.

LPIPS compares the features that a network of image classification gives two images, layer by layer, with
weights fitted to human judgement. Images much smaller than those that the network knows are compared by their
borders, mostly: they are resized to 224 pixels first (arXiv 2412.09726, Appendix A.3).

Reference: Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric, 2018, arXiv
1801.03924.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gaussnet.metrics.samples import as_rgb

NETWORKS = ("alex", "vgg", "squeeze")
DISTANCES = ("mse", *(f"lpips-{name}" for name in NETWORKS))
SIZE = 224
_WEIGHTS = {"alex": "AlexNet_Weights", "vgg": "VGG16_Weights", "squeeze": "SqueezeNet1_1_Weights"}


class SquaredError(nn.Module):
    """||a - b||^2 / D, in float64.

    Example:
        >>> SquaredError()(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 2.0))
        tensor([4.], dtype=torch.float64)
    """

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances (B,) of images (B, C, H, W).

        Raises:
            ValueError: if the shapes differ, or are not those of images.
        """
        check_pairs(a, b)
        return (a.double() - b.double()).square().flatten(1).mean(1)


class PerceptualDistance(nn.Module):
    """A distance that wants RGB images of a fixed size, for images of any size, grey or RGB.

    Images are cut to [-1, 1] and resized, bilinearly; a grey one stands for its three channels.

    Args:
        network: called with two batches (B, 3, size, size) in [-1, 1]; gives (B,) or (B, 1, 1, 1).
        size: in pixels; None leaves images as they are.

    Raises:
        ValueError: if the size is not positive.

    Example:
        >>> distance = PerceptualDistance(SquaredError(), size=8)  # SquaredError in the place of LPIPS
        >>> distance(torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), 2.0))  # cut to 1
        tensor([1.])
    """

    def __init__(self, network: nn.Module, size: int | None = SIZE) -> None:
        super().__init__()
        if size is not None and size < 1:
            raise ValueError(f"expected size >= 1, got {size}")
        self.network = network
        self.size = size

    @torch.no_grad()
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances (B,), float32, of images (B, C, H, W), C = 1 or 3.

        Raises:
            ValueError: if the shapes differ, or are not those of images, or the network's answer has not one
                number a pair.
        """
        check_pairs(a, b)
        distances = self.network(self._prepare(a), self._prepare(b))
        if not isinstance(distances, Tensor) or distances.numel() != len(a):
            got = tuple(distances.shape) if isinstance(distances, Tensor) else type(distances).__name__
            raise ValueError(f"{type(self.network).__name__}: expected {len(a)} distances, got {got}")
        return distances.reshape(len(a)).float()

    def _prepare(self, images: Tensor) -> Tensor:
        images = as_rgb(images.float().clamp(-1, 1))
        if self.size is None:
            return images
        return F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)


def load_distance(name: str) -> nn.Module:
    """A distance by name.

    | name | what it is |
    |---|---|
    | `mse` | mean squared error per pixel |
    | `lpips-alex`, `lpips-vgg`, `lpips-squeeze` | LPIPS 0.1 on these networks; needs lpips |

    Args:
        name: as above.

    Returns:
        A module in eval mode, without gradients: two batches of images (B, C, H, W) in [-1, 1] to (B,).

    Raises:
        FileNotFoundError: if the weights of the network are not in PyTorch's cache and cannot be downloaded.
        ImportError: if lpips is needed and missing.
        ValueError: if the name is unknown.

    Example:
        >>> images = torch.ones(2, 1, 4, 4)
        >>> load_distance("mse")(images, images / 2)
        tensor([0.2500, 0.2500], dtype=torch.float64)
    """
    if name not in DISTANCES:
        raise ValueError(f"expected a distance among {', '.join(DISTANCES)}, got {name!r}")
    if name == "mse":
        return SquaredError().eval()
    return PerceptualDistance(_lpips(name.removeprefix("lpips-"))).eval().requires_grad_(False)


def check_pairs(a: Tensor, b: Tensor) -> None:
    """Checks that two batches are images of one shape.

    Raises:
        ValueError: if they are not.
    """
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(
            f"expected two batches of images (B, C, H, W), got {tuple(a.shape)} and {tuple(b.shape)}"
        )


def _lpips(name: str) -> nn.Module:
    try:
        import lpips  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(f"lpips-{name} needs lpips: pip install 'gaussnet[eval]'") from error
    try:
        with warnings.catch_warnings():  # it calls torchvision by a name that is going out of use
            warnings.simplefilter("ignore")
            return lpips.LPIPS(net=name, verbose=False)
    except (OSError, RuntimeError) as error:  # of urllib; of a download that was cut short
        url = _url(name)
        path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
        raise FileNotFoundError(
            f"lpips-{name}: no weights in {path}, and they cannot be downloaded ({error}). "
            f"Get them from {url}, and put them there"
        ) from error


def _url(name: str) -> str:
    """Where torchvision has the weights of a network of lpips."""
    from torchvision import models

    return models.get_weight(f"{_WEIGHTS[name]}.IMAGENET1K_V1").url
