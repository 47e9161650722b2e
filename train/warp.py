"""Affine maps of images, resampled without aliasing.

The image, reflected at its edges, is doubled in size by the orthogonal low-pass filter sym6, sampled there
bilinearly, and halved by the adjoint of the doubling, which is also its left inverse. A reflected image of n
pixels has period 2 (n - 1), so one period is all that is doubled.

All of it is sums of products, element by element: TF32, autocast and the size of the batch do not touch it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

# Low-pass filter of the least asymmetric orthogonal wavelet with 6 vanishing moments (Daubechies, Ten
# lectures on wavelets, section 6.4; sym6 of PyWavelets). With this phase, pixel i doubles to 2 i.
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
_PHASE = 5


def warp(images: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    """Takes each pixel from source = matrix @ position + shift.

    Args:
        images: floating, (B, C, H, W).
        matrix: (B, 2, 2), of positions x (to the right) and y (downwards) in pixels from the centre.
        shift: (B, 2). Sources are in periods of the reflected image, from its first pixel.

    Returns:
        Images of the same shape and dtype.
    """
    height, width = images.shape[2:]
    fine = _double(_double(images).mT).mT  # (B, C, 2 periods + 1, 2 periods + 1)
    x, y = (_fine_positions(size, images) for size in (width, height))
    source = [
        (matrix[:, i, 0, None, None] * x + matrix[:, i, 1, None, None] * y[:, None]) + shift[:, i, None, None]
        for i in (0, 1)
    ]
    grid = torch.stack(source, dim=-1).remainder(1) * 2 - 1  # (B, 2 H + 10, 2 W + 10, 2), one period: -1..1
    fine = grid_sample(fine, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return _halve(_halve(fine).mT).mT


def period(size: int) -> int:
    """After how many pixels a reflected image repeats; its edges are not doubled."""
    return max(2 * size - 2, 1)


def reflected(index: Tensor, size: int) -> Tensor:
    """The pixel of 0..size - 1 that lies at any index of the reflected image."""
    index = index % period(size)
    return torch.minimum(index, period(size) - index)


def _fine_positions(size: int, like: Tensor) -> Tensor:
    """Positions of the half pixels that `_halve` needs, from the centre of `size` pixels."""
    half = torch.arange(-_PHASE, 2 * size + len(SYM6) - _PHASE - 2, device=like.device)
    return half.to(like.dtype) / 2 - (size - 1) / 2


def _double(x: Tensor) -> Tensor:
    """One reflected period at half pixels, and its first again: fine_j = sum_i h_(j - 2 i + 5) x_i."""
    mirrored = x[..., reflected(torch.arange(period(x.shape[-1]), device=x.device), x.shape[-1])]
    even, odd = (
        _weighted(SYM6[parity::2], [mirrored.roll(d, -1) for d in range(first, first + 6)])
        for parity, first in ((1, -2), (0, -3))  # h_(2 d + 5) with j = 2 (i + d), h_(2 d + 6) with 1 more
    )
    fine = torch.stack([even, odd], dim=-1).flatten(-2)
    return torch.cat([fine, fine[..., :1]], dim=-1)


def _halve(fine: Tensor) -> Tensor:
    """The adjoint of `_double` on rows from half pixel -5 on: x_i = sum_j h_(j - 2 i + 5) fine_j."""
    count = fine.shape[-1] - len(SYM6) + 1
    return _weighted(SYM6, [fine[..., k : k + count : 2] for k in range(len(SYM6))])


def _weighted(taps: tuple[float, ...], parts: list[Tensor]) -> Tensor:
    total = taps[0] * parts[0]
    for tap, part in zip(taps[1:], parts[1:], strict=True):
        total = total + tap * part
    return total
