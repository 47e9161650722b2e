r"""Embeddings of the noise label: cosines and sines at fixed frequencies.

For the label c (``c_noise`` of the preconditioner) and K = num_channels / 2,

    cos(f_k c), sin(f_k c),   k = 0 .. K - 1
    positional   f_k = 10000^(-k / (K - 1)) with the endpoint (DDPM++), 10000^(-k / K) without (ADM)
    Fourier      f_k = 2 pi 16 n_k,   n_k ~ N(0, 1) drawn once (NCSN++)

References:
    Song et al., Score-Based Generative Modeling through SDEs, 2021, arXiv 2011.13456.
    Dhariwal and Nichol, Diffusion Models Beat GANs on Image Synthesis, 2021, arXiv 2105.05233.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


class _NoiseEmbedding(nn.Module):
    """cos and sin of noise label times frequency, in float32 at least whatever the module is."""

    freqs: Tensor
    omega: float = 1.0

    def __init__(self, freqs: Tensor, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("freqs", freqs, persistent=persistent)

    def forward(self, noise_labels: Tensor) -> tuple[Tensor, Tensor]:
        """Embeds noise labels (B,) as their cosines and sines, (B, num_channels / 2) each."""
        phase = noise_labels[:, None] * (self.omega * self.freqs)
        return phase.cos(), phase.sin()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # .bfloat16() must not round the frequencies: phases reach hundreds of radians.
        def at_least_float32(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype.itemsize >= 4 else t.to(moved.device)

        return super()._apply(at_least_float32, recurse)


class PositionalEmbedding(_NoiseEmbedding):
    """Geometric frequencies from 1 to 1 / 10000, as of transformers; nothing in the state dict.

    Args:
        num_channels: Number of cosines and sines together, even.
        endpoint: Whether the last frequency is 1 / 10000 itself (DDPM++) or one step above (ADM).

    Raises:
        ValueError: if num_channels is odd, or below 2, or below 4 with `endpoint`.

    Example:
        >>> PositionalEmbedding(4).freqs, PositionalEmbedding(4, endpoint=True).freqs
        (tensor([1.0000, 0.0100]), tensor([1.0000e+00, 1.0000e-04]))
        >>> PositionalEmbedding(4)(torch.zeros(1))  # cosines and sines
        (tensor([[1., 1.]]), tensor([[0., 0.]]))
    """

    def __init__(self, num_channels: int, endpoint: bool = False) -> None:
        half = _half(num_channels, 4 if endpoint else 2)
        k = torch.arange(half, dtype=torch.float32)
        super().__init__((1 / 10000) ** (k / (half - endpoint)), persistent=False)


class FourierEmbedding(_NoiseEmbedding):
    """Random Gaussian frequencies, kept in the state dict.

    Args:
        num_channels: Number of cosines and sines together, even.
        scale: Standard deviation of the frequencies, in cycles.

    Raises:
        ValueError: if num_channels is odd or below 2.

    Example:
        >>> cos, sin = FourierEmbedding(8)(torch.tensor([0.5, -1.0]))
        >>> cos.shape, torch.allclose(cos**2 + sin**2, torch.ones(2, 4))
        (torch.Size([2, 4]), True)
    """

    omega: float = 2 * math.pi

    def __init__(self, num_channels: int, scale: float = 16.0) -> None:
        half = _half(num_channels, 2)
        super().__init__(torch.randn(half, dtype=torch.float32) * scale, persistent=True)


def _half(num_channels: int, least: int) -> int:
    if num_channels % 2 or num_channels < least:
        raise ValueError(f"embedding channels: got {num_channels}, expected even, >= {least}")
    return num_channels // 2
