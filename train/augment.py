"""Non-leaky augmentation: random transforms of training images, and labels that tell the network which.

A network that is told how its input was transformed learns the transformed distributions next to the real
one, and with labels of zero it denoises real images (Karras et al. 2022, arXiv:2206.00364, appendix F.2).
Thirteen groups of transforms, each drawn with probability min(group * p, 1), are composed in this order
(Karras et al. 2020, arXiv:2006.06676, appendix B), with N a standard normal and U uniform in [-1, 1]:

    group            transform                                          label
    xflip, yflip     mirror left to right, top to bottom (half of them) 1 if mirrored
    rotate_int       k = 0..3 quarter turns                             k in {1, 2}, k in {2, 3}
    translate_int    round(U max (W, H)) pixels right and up            pixels / (max (W, H))
    scale            larger by 2^(N std)                                N
    rotate_frac      turned by w = pi max U, anticlockwise              cos w - 1, sin w
    aniso            2^(N std) larger along an axis at angle r, and     N cos r, N sin r
                     as much smaller across it
    translate_frac   N std (W, H) pixels right and down                 N, N
    brightness       + N std                                            N
    contrast         times 2^(N std)                                    N
    lumaflip         x - 2 luma (half of them), luma = mean of RGB      1 if flipped
    hue              RGB turned about the grey axis by w = pi max U     cos w - 1, sin w
    saturation       luma + 2^(N std) (x - luma)                        N

Labels and their order are those of EDM, whose networks can thus be trained on. Groups that are switched off
have no labels. A row of zeros is an image that comes back exactly as it was.

The geometric groups are one affine map of the plane, for `train.warp`. It and the colours are sums of
products, element by element: the slices of a batch are augmented as the whole is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from gaussnet.numerics import wide_dtype
from train.warp import period, reflected, warp

# Labels per group, in the order in which groups are applied and labels are written.
GROUPS = {
    "xflip": 1, "yflip": 1, "rotate_int": 2, "translate_int": 2,
    "scale": 1, "rotate_frac": 2, "aniso": 2, "translate_frac": 2,
    "brightness": 1, "contrast": 1, "lumaflip": 1, "hue": 2, "saturation": 1,
}  # fmt: skip
_GEOMETRIC = ("scale", "rotate_frac", "aniso", "translate_frac")
_RGB_ONLY = ("lumaflip", "hue", "saturation")


@dataclass
class AugmentConfig:
    """Which groups are on, how often and how strongly; by default all are off.

    A group's probability is min(group * p, 1). Standard deviations of sizes, contrast and saturation are in
    octaves, translations relative to the image's width and height, rotations relative to the half turn.
    """

    p: float = 0.12

    xflip: float = 0.0
    yflip: float = 0.0
    rotate_int: float = 0.0  # square images
    translate_int: float = 0.0
    translate_int_max: float = 0.125

    scale: float = 0.0
    rotate_frac: float = 0.0
    aniso: float = 0.0
    translate_frac: float = 0.0
    scale_std: float = 0.2
    rotate_frac_max: float = 1.0
    aniso_std: float = 0.2
    aniso_rotate_prob: float = 0.5  # else along the axes of the image
    translate_frac_std: float = 0.125

    brightness: float = 0.0
    contrast: float = 0.0
    lumaflip: float = 0.0  # this and the following: images of 3 channels
    hue: float = 0.0
    saturation: float = 0.0
    brightness_std: float = 0.2
    contrast_std: float = 0.5
    hue_max: float = 1.0
    saturation_std: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < math.inf:
                raise ValueError(f"augment.{field.name}: expected a finite value >= 0, got {value}")
        if self.aniso_rotate_prob > 1:
            raise ValueError(f"augment.aniso_rotate_prob: expected <= 1, got {self.aniso_rotate_prob}")
        if self.translate_int_max == 0:
            raise ValueError("augment.translate_int_max: expected > 0, got 0 (translate_int=0 is off)")

    @classmethod
    def default_set(cls, p: float = 0.12) -> AugmentConfig:
        """EDM's set for CIFAR-10 (p = 0.12) and FFHQ / AFHQv2 (p = 0.15): 9 labels.

        Every second image is mirrored left to right, whatever p > 0.
        """
        return cls(p=p, xflip=1e8, yflip=1, scale=1, rotate_frac=1, aniso=1, translate_frac=1)

    def on(self) -> list[str]:
        """Names of the groups that are switched on, in their order."""
        return [group for group in GROUPS if getattr(self, group) > 0]


@dataclass(frozen=True)
class Parameters:
    """Every random number of a batch: 0 where a group is not applied. `parameters[4:8]` are those of a slice.

    Normal and uniform numbers are as drawn, before standard deviations; angles are in radians.
    """

    options: AugmentConfig
    xflip: Tensor  # (B,) 0 or 1, as yflip and lumaflip
    yflip: Tensor
    rotate_int: Tensor  # (B,) quarter turns, anticlockwise
    translate_int: Tensor  # (B, 2) x and y, uniform in [-1, 1]
    scale: Tensor  # (B,) normal
    rotate_frac: Tensor  # (B,) radians
    aniso: Tensor  # (B,) normal
    aniso_angle: Tensor  # (B,) radians
    translate_frac: Tensor  # (B, 2) x and y, normal
    brightness: Tensor  # (B,) normal
    contrast: Tensor  # (B,) normal
    lumaflip: Tensor
    hue: Tensor  # (B,) radians
    saturation: Tensor  # (B,) normal

    def __len__(self) -> int:
        return len(self.xflip)

    def __getitem__(self, index: slice) -> Parameters:
        if not isinstance(index, slice):
            raise TypeError(f"expected a slice of the batch, got {type(index).__name__}")
        names = [field.name for field in fields(self) if field.name != "options"]
        return replace(self, **{name: getattr(self, name)[index] for name in names})


def check_images(options: AugmentConfig, event_shape: tuple[int, int, int]) -> None:
    """Refuses groups that images (C, H, W) do not allow.

    Raises:
        ValueError: with the group's name.
    """
    channels, height, width = event_shape
    on = options.on()
    if "rotate_int" in on and height != width:
        raise ValueError(f"augment.rotate_int: expected square images, got {height}x{width}")
    for group in _RGB_ONLY:
        if group in on and channels != 3:
            raise ValueError(f"augment.{group}: expected images of 3 channels, got {channels}")


def label_dim(options: AugmentConfig) -> int:
    """The number of labels per image, which a network takes as its `augment_dim`."""
    return sum(GROUPS[group] for group in options.on())


def draw(count: int, options: AugmentConfig, generator: torch.Generator) -> Parameters:
    """Draws the parameters of a batch; a group's numbers do not depend on which other groups are on.

    Args:
        count: images of the whole batch, over all processes.
        options: groups and strengths.
        generator: source of randomness; the parameters lie on its device. On the CPU, `apply` can tell
            which images to resample without waiting for the images' device.
    """
    where = {"generator": generator, "device": generator.device}

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=torch.float32, **where) * 2 - 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float32, **where)

    def integer(high: int) -> Tensor:
        return torch.randint(high, (count,), **where)

    def chosen(values: Tensor, probability: float) -> Tensor:
        hit = torch.rand(count, dtype=torch.float32, **where) < probability
        return values * hit.reshape(-1, *[1] * (values.ndim - 1))

    o = options
    return Parameters(
        options=o,
        xflip=chosen(integer(2), o.xflip * o.p),
        yflip=chosen(integer(2), o.yflip * o.p),
        rotate_int=chosen(integer(4), o.rotate_int * o.p),
        translate_int=chosen(uniform(count, 2), o.translate_int * o.p),
        scale=chosen(normal(count), o.scale * o.p),
        rotate_frac=chosen(uniform(count) * (math.pi * o.rotate_frac_max), o.rotate_frac * o.p),
        aniso=chosen(normal(count), o.aniso * o.p),
        aniso_angle=chosen(uniform(count) * math.pi, o.aniso_rotate_prob),
        translate_frac=chosen(normal(count, 2), o.translate_frac * o.p),
        brightness=chosen(normal(count), o.brightness * o.p),
        contrast=chosen(normal(count), o.contrast * o.p),
        lumaflip=chosen(integer(2), o.lumaflip * o.p),
        hue=chosen(uniform(count) * (math.pi * o.hue_max), o.hue * o.p),
        saturation=chosen(normal(count), o.saturation * o.p),
    )


def apply(images: Tensor, parameters: Parameters) -> tuple[Tensor, Tensor]:
    """Transforms images and returns them with their labels.

    Args:
        images: float32 or float64 (B, C, H, W) in [-1, 1], on any device; the result may leave that range.
        parameters: of these B images.

    Returns:
        Images (B, C, H, W) of the same dtype, and labels (B, label_dim) in float32, on the images' device.

    Raises:
        TypeError: if the images are of another dtype.
        ValueError: if the parameters are those of another number of images, quarter turns are on and the
            images are not square, or colour groups of RGB are on and the images do not have 3 channels.
    """
    if images.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"expected float32 or float64 images in [-1, 1], got {images.dtype}")
    if images.ndim != 4 or len(images) != len(parameters):
        expected = f"({len(parameters)}, C, H, W), as many as the parameters"
        raise ValueError(f"expected images of shape {expected}, got {tuple(images.shape)}")
    _, channels, height, width = images.shape
    check_images(parameters.options, (channels, height, width))
    on = parameters.options.on()
    images = _blit(images, parameters, on)
    if any(group in on for group in _GEOMETRIC):
        images = _deform(images, parameters, on)
    images = _recolour(images, parameters, on)
    return images, _labels(parameters, on, height, width).to(images.device)


def _labels(parameters: Parameters, on: list[str], height: int, width: int) -> Tensor:
    p, wide = parameters, wide_dtype(parameters.xflip.device)
    turn, size = p.rotate_int, torch.tensor([width, height], device=p.xflip.device)
    columns = {
        "xflip": [p.xflip],
        "yflip": [p.yflip],
        "rotate_int": [(turn == 1) | (turn == 2), (turn == 2) | (turn == 3)],
        "translate_int": (_pixels(p, height, width) / (size * p.options.translate_int_max)).unbind(1),
        "scale": [p.scale],
        "rotate_frac": [p.rotate_frac.to(wide).cos() - 1, p.rotate_frac.to(wide).sin()],
        "aniso": [p.aniso * p.aniso_angle.to(wide).cos(), p.aniso * p.aniso_angle.to(wide).sin()],
        "translate_frac": p.translate_frac.unbind(1),
        "brightness": [p.brightness],
        "contrast": [p.contrast],
        "lumaflip": [p.lumaflip],
        "hue": [p.hue.to(wide).cos() - 1, p.hue.to(wide).sin()],
        "saturation": [p.saturation],
    }
    rows = [column.float() for group in on for column in columns[group]]
    return torch.stack(rows, dim=1) if rows else torch.zeros(len(p), 0, device=p.xflip.device)


def _pixels(parameters: Parameters, height: int, width: int) -> Tensor:
    """Whole pixels by which images move right and up: (B, 2)."""
    size = torch.tensor([width, height], device=parameters.translate_int.device)
    return (parameters.translate_int * (size * parameters.options.translate_int_max)).round().long()


def _blit(images: Tensor, parameters: Parameters, on: list[str]) -> Tensor:
    """Flips, quarter turns and shifts by whole pixels, which move pixels and change none."""

    def mask(hit: Tensor) -> Tensor:
        return hit.to(images.device)[:, None, None, None]

    if "xflip" in on:
        images = torch.where(mask(parameters.xflip == 1), images.flip(3), images)
    if "yflip" in on:
        images = torch.where(mask(parameters.yflip == 1), images.flip(2), images)
    if "rotate_int" in on:
        for turns in (1, 2, 3):
            images = torch.where(mask(parameters.rotate_int == turns), images.rot90(turns, (2, 3)), images)
    if "translate_int" in on:
        height, width = images.shape[2:]
        right, up = _pixels(parameters, height, width).to(images.device).unbind(1)
        x = reflected(torch.arange(width, device=images.device) - right[:, None], width)  # (B, W)
        y = reflected(torch.arange(height, device=images.device) + up[:, None], height)  # (B, H)
        images = images.gather(3, x[:, None, None, :].expand_as(images))
        images = images.gather(2, y[:, None, :, None].expand_as(images))
    return images


def _deform(images: Tensor, parameters: Parameters, on: list[str]) -> Tensor:
    """The geometric groups. Images that none of them moves are left alone, not resampled."""
    moved = [getattr(parameters, group).unsqueeze(-1).flatten(1) for group in _GEOMETRIC if group in on]
    rows = torch.cat(moved, dim=1).any(dim=1).nonzero()[:, 0]
    if len(rows) == 0:
        return images
    height, width = images.shape[2:]
    matrix, shift = (part[rows].to(images) for part in _source(parameters, on, height, width))
    rows = rows.to(images.device)
    return images.index_copy(0, rows, warp(images[rows], matrix, shift))


def _source(parameters: Parameters, on: list[str], height: int, width: int) -> tuple[Tensor, Tensor]:
    """Where the images' pixels come from: source = matrix @ position + shift, (B, 2, 2) and (B, 2).

    Positions are x (to the right) and y (downwards), in pixels from the centre; the source is in periods
    of the reflected image, from its first pixel.
    """
    p, o, wide = parameters, parameters.options, wide_dtype(parameters.scale.device)
    device = p.scale.device
    matrix = torch.eye(2, dtype=wide, device=device).expand(len(p), 2, 2)
    if "scale" in on:
        size = (p.scale.to(wide) * o.scale_std).exp2()
        matrix = matrix / size[:, None, None]
    if "rotate_frac" in on:
        matrix = matrix @ _rotation(p.rotate_frac.to(wide))
    if "aniso" in on:
        size, angle = (p.aniso.to(wide) * o.aniso_std).exp2(), p.aniso_angle.to(wide)
        stretch = torch.stack([1 / size, size], dim=1).diag_embed()  # (B, 2, 2)
        matrix = matrix @ _rotation(-angle) @ stretch @ _rotation(angle)
    shape = torch.tensor([width, height], dtype=wide, device=device)
    shift = torch.zeros(len(p), 2, dtype=wide, device=device)
    if "translate_frac" in on:
        shift = p.translate_frac.to(wide) * (o.translate_frac_std * shape)
    periods = torch.tensor([period(width), period(height)], dtype=wide, device=device)
    first = (shape - 1) / 2 - (matrix @ shift[:, :, None])[:, :, 0]  # in pixels
    return matrix / periods[:, None], first / periods


def _rotation(angle: Tensor) -> Tensor:
    """Matrices (B, 2, 2) that turn x to y, clockwise on the screen; sources turn so if images turn back."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, -sin, sin, cos], dim=1).unflatten(1, (2, 2))


def _recolour(images: Tensor, parameters: Parameters, on: list[str]) -> Tensor:
    """The colour groups, each written as a change that is exactly 0 where its parameter is."""
    p, o, wide = parameters, parameters.options, wide_dtype(parameters.hue.device)

    def factor(values: Tensor) -> Tensor:
        return values.to(images)[:, None, None, None]

    def octaves(values: Tensor, std: float) -> Tensor:
        return (values.to(wide) * std).exp2()

    if "brightness" in on:
        images = images + factor(p.brightness.to(wide) * o.brightness_std)
    if "contrast" in on:
        images = images * factor(octaves(p.contrast, o.contrast_std))
    if "lumaflip" in on:
        images = images - 2 * factor(p.lumaflip) * images.mean(1, keepdim=True)
    if "hue" in on:  # Rodrigues: x + (cos w - 1) (x - luma) + sin w (v cross x), v = (1, 1, 1) / sqrt 3
        cross = (images.roll(1, 1) - images.roll(-1, 1)) / math.sqrt(3)
        chroma = images - images.mean(1, keepdim=True)
        images = images + factor(p.hue.to(wide).cos() - 1) * chroma + factor(p.hue.to(wide).sin()) * cross
    if "saturation" in on:
        chroma = images - images.mean(1, keepdim=True)
        images = images + factor(octaves(p.saturation, o.saturation_std) - 1) * chroma
    return images
