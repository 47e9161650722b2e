r"""What the U-Nets are made of: resampling, residual blocks, and layers and checks that all networks share.

Resampling by a separable filter r, f = r r^T / (sum r)^2:

    down(x) = (f * x) at every second pixel,       up = 4 down^T       (both keep constants inside)

Residual block with embedding e and skip scale s, A the self-attention (optional):

    h = silu(norm1(conv0(silu(norm0(x))) + W e))            additive       (DDPM++, NCSN++)
    h = silu(norm1(conv0(silu(norm0(x)))) (1 + a) + b),  (a, b) = W e      adaptive (ADM)
    x <- s (skip(x) + conv1(dropout(h)))
    x <- s (x + proj(A(qkv(norm2(x)))))

References:
    Song et al., Score-Based Generative Modeling through SDEs, 2021, arXiv 2011.13456.
    Dhariwal and Nichol, Diffusion Models Beat GANs on Image Synthesis, 2021, arXiv 2105.05233.
    Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, 2022,
    arXiv 2206.00364 (module names follow its public checkpoints).
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Resampling = Literal["up", "down"]


def group_norm(channels: int, eps: float = 1e-5) -> nn.GroupNorm:
    """GroupNorm with at most 32 groups of at least 4 channels.

    Args:
        channels: a multiple of 4, above 128 of 32.
        eps: added to the variance.

    Returns:
        A layer of (B, channels, ...).

    Raises:
        ValueError: if the channels make no such groups.

    Example:
        >>> group_norm(64).num_groups, group_norm(256).num_groups
        (16, 32)
    """
    groups = min(32, channels // 4)
    if groups == 0 or channels % groups:
        raise ValueError(f"GroupNorm: got {channels} channels, expected a multiple of 4, above 128 of 32")
    # Until PyTorch 2.13, batched group norms and those in forward mode take no channels last.
    return (nn.GroupNorm if torch.__version__ >= "2.14" else _GroupNorm)(groups, channels, eps=eps)


class _GroupNorm(nn.GroupNorm):
    """Of its input in the plain layout, in a transform of torch.func."""

    def forward(self, input: Tensor) -> Tensor:
        plain = not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(input)  # pyright: ignore
        return super().forward(input.clone(memory_format=torch.contiguous_format) if plain else input)


def _filter2d(taps: Sequence[float]) -> Tensor:
    """The filter f (1, 1, k, k) of the taps r (k,)."""
    taps = list(taps)
    # An odd filter cannot double a size; and of two taps only [1, 1] is symmetric (see _up, _down).
    if not taps or len(taps) % 2 or taps != taps[::-1] or sum(taps) <= 0:
        raise ValueError(
            f"resample_filter: got {taps}, expected an even number of symmetric taps "
            "with a positive sum, such as [1, 1] or [1, 3, 3, 1]"
        )
    r = torch.tensor(taps, dtype=torch.float32)
    return (r.outer(r) / r.sum().square())[None, None]


def _up(x: Tensor, f: Tensor) -> Tensor:
    k, channels = f.shape[-1], x.shape[1]
    if k == 2:  # the box filter
        return F.interpolate(x, scale_factor=2, mode="nearest")
    weight = (4 * f).expand(channels, 1, k, k)
    return F.conv_transpose2d(x, weight, stride=2, padding=(k - 1) // 2, groups=channels)


def _down(x: Tensor, f: Tensor, padding: int) -> Tensor:
    k, channels = f.shape[-1], x.shape[1]
    if k == 2:  # the box filter, which never pads
        return F.avg_pool2d(x, 2)
    return F.conv2d(x, f.expand(channels, 1, k, k), stride=2, padding=padding, groups=channels)


class Resample(nn.Module):
    """Doubles or halves height and width without weights.

    Args:
        mode: "up" or "down".
        resample_filter: Taps r, an even number and symmetric.

    Raises:
        ValueError: if the number of taps is odd, they are not symmetric, or their sum is not positive.

    Example:
        >>> Resample("down")(torch.arange(4.0).reshape(1, 1, 2, 2))
        tensor([[[[1.5000]]]])
    """

    resample_filter: Tensor

    def __init__(self, mode: Resampling, resample_filter: Sequence[float] = (1, 1)) -> None:
        super().__init__()
        self.mode = mode
        self.register_buffer("resample_filter", _filter2d(resample_filter))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, 2H, 2W) or (B, C, H/2, W/2)."""
        f = self.resample_filter
        return _up(x, f) if self.mode == "up" else _down(x, f, (f.shape[-1] - 1) // 2)

    def extra_repr(self) -> str:
        """The mode."""
        return repr(self.mode)


class Conv2d(nn.Conv2d):
    """Convolution that keeps the size, with an optional resampling before it.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Odd kernel size.
        resample: "up", "down" or None.
        resample_filter: Taps of the resampling filter.
        fused: Resample (down only) after the convolution instead of before it, and pad once for
            both, so that the filter sees no border of zeros between them.

    Raises:
        ValueError: if `fused` comes without "down", or the taps are none of `Resample`.

    Example:
        >>> Conv2d(3, 8, kernel_size=3, resample="down")(torch.zeros(2, 3, 6, 6)).shape
        torch.Size([2, 8, 3, 3])
    """

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        resample: Resampling | None = None,
        resample_filter: Sequence[float] = (1, 1),
        fused: bool = False,
    ) -> None:
        if fused and resample != "down":
            raise ValueError(f"fused: got resample={resample!r}, expected 'down'")
        pad_filter = (len(resample_filter) - 1) // 2
        padding = kernel_size // 2 + (pad_filter if fused else 0)
        super().__init__(in_channels, out_channels, kernel_size, padding=padding)
        self.resample = resample
        self.fused = fused
        if resample is not None:
            self.register_buffer("resample_filter", _filter2d(resample_filter))

    def forward(self, input: Tensor, gain: float = 1.0) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H', W'), H' one of H, 2H, H/2; times gain."""
        weight, bias = self.weight, self.bias
        if gain != 1:  # the weights are far fewer than the pixels
            weight, bias = gain * weight, None if bias is None else gain * bias
        if self.resample is None:
            return self._conv_forward(input, weight, bias)
        f = self.resample_filter
        if self.fused:
            return _down(self._conv_forward(input, weight, bias), f, padding=0)
        if self.resample == "up":
            return self._conv_forward(_up(input, f), weight, bias)
        return self._conv_forward(_down(input, f, padding=(f.shape[-1] - 1) // 2), weight, bias)


class UNetBlock(nn.Module):
    """Residual block with an embedding, and optionally resampling and self-attention.

    Starts as ``skip_scale`` times its skip: ``conv1`` and ``proj`` are zero.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        emb_channels: Channels of the embedding.
        resample: "up", "down" or None, in the first convolution and in the skip.
        attention: Whether self-attention follows.
        channels_per_head: Channels of an attention head; None for a single head. As in EDM, the number of
            heads is rounded down: with fewer channels than one head's there is no attention.
        dropout: Dropout probability before the second convolution.
        skip_scale: Factor s on the output of both residual sums.
        eps: Epsilon of the group norms.
        resample_filter: Taps of the resampling filter.
        resample_proj: Whether a skip that resamples always has a 1x1 convolution, or only where
            the channels change.
        adaptive_scale: Whether the embedding scales and shifts (ADM) or is added (DDPM++).

    Raises:
        ValueError: if `group_norm` does not take the channels, or `Resample` the taps.

    Example:
        >>> block, x = UNetBlock(8, 8, emb_channels=4, attention=True), torch.randn(2, 8, 4, 4)
        >>> torch.equal(block(x, torch.randn(2, 4)), x)  # until it is trained
        True
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        resample: Resampling | None = None,
        attention: bool = False,
        channels_per_head: int | None = 64,
        dropout: float = 0.0,
        skip_scale: float = 1.0,
        eps: float = 1e-5,
        resample_filter: Sequence[float] = (1, 1),
        resample_proj: bool = False,
        adaptive_scale: bool = True,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.skip_scale = skip_scale
        self.adaptive_scale = adaptive_scale

        self.norm0: nn.GroupNorm = group_norm(in_channels, eps)
        self.conv0: Conv2d = Conv2d(in_channels, out_channels, 3, resample, resample_filter)
        self.affine: nn.Linear = nn.Linear(emb_channels, out_channels * (2 if adaptive_scale else 1))
        self.norm1: nn.GroupNorm = group_norm(out_channels, eps)
        self.conv1: Conv2d = Conv2d(out_channels, out_channels, 3)

        if in_channels != out_channels or (resample is not None and resample_proj):
            self.skip: nn.Module = Conv2d(in_channels, out_channels, 1, resample, resample_filter)
        else:
            self.skip = nn.Identity() if resample is None else Resample(resample, resample_filter)

        self.num_heads: int = out_channels // (channels_per_head or out_channels) if attention else 0
        if self.num_heads:
            if out_channels % self.num_heads:
                raise ValueError(
                    f"channels_per_head: got {channels_per_head}, which makes {self.num_heads} heads; "
                    f"expected {out_channels} channels to be a multiple of their number"
                )
            self.norm2: nn.GroupNorm = group_norm(out_channels, eps)
            self.qkv: Conv2d = Conv2d(out_channels, 3 * out_channels, 1)
            self.proj: Conv2d = Conv2d(out_channels, out_channels, 1)
        self.zero_residual()

    def zero_residual(self) -> None:
        """Zeroes the last convolution of both residual branches."""
        zero_(self.conv1)
        if self.num_heads:
            zero_(self.proj)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Applies the block.

        Args:
            x: Features (B, in_channels, H, W).
            emb: Embedding (B, emb_channels), or (1, emb_channels) for the whole batch.

        Returns:
            Features (B, out_channels, H', W'), H' one of H, 2H, H/2.
        """
        h = self.conv0(F.silu(self.norm0(x)))
        params = self.affine(emb)[:, :, None, None]
        if self.adaptive_scale:
            scale, shift = params.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm1(h), 1 + scale)
        else:
            h = self.norm1(h + params)
        h = dropout(F.silu(h), self.dropout, self.training)
        x = torch.add(self.conv1(h, self.skip_scale), self.skip(x), alpha=self.skip_scale)
        if self.num_heads:
            h = _self_attention(self.qkv(self.norm2(x)), self.num_heads)
            x = torch.add(self.proj(h, self.skip_scale), x, alpha=self.skip_scale)
        return x


def _self_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Attention among pixels, (B, 3C, H, W) with channels (heads, C / heads, 3) to (B, C, H, W).

    PyTorch's fused kernels have no second derivative and no forward mode: for those, evaluate under
    ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``.
    """
    batch, channels, height, width = qkv.shape
    # One copy here: the fused kernels want the channels of a head next to each other in memory.
    qkv = qkv.reshape(batch, num_heads, channels // (3 * num_heads), 3, height * width)
    qkv = qkv.permute(3, 0, 1, 4, 2).contiguous()
    q, k, v = qkv.unbind()
    out = F.scaled_dot_product_attention(q, k, v)  # (B, heads, HW, C / heads)
    return out.transpose(2, 3).reshape(batch, channels // 3, height, width)


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Zeroes elements with probability p and scales the rest by 1/(1 - p), in training.

    On the CPU the random numbers of `F.dropout`, drawn in a single thread, took 13% of a training step. Here
    each draw of 64 bits decides on four elements, so that p is a multiple of 2^-16 (0.1 becomes 0.100006).
    """
    dropped = round(p * 2**16)
    if not training or x.device.type != "cpu" or torch.compiler.is_compiling() or not 0 < dropped < 2**16:
        return F.dropout(x, p, training)
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    keep = torch.empty_like(x)  # dense, in the memory format of x
    flat = keep.as_strided((x.numel(),), (1,))
    torch.ge(bits[: x.numel()], dropped - 2**15, out=flat)
    return x * keep.mul_(1 / (1 - dropped / 2**16))


def zero_(module: nn.Module) -> None:
    """Zeroes all parameters of a module in place."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


def fast_layout(x: Tensor) -> Tensor:
    """Moves channels last in memory where convolutions gain from it: up to three times, on the CPU."""
    if x.device.type != "cpu":
        return x
    # x.contiguous(memory_format=torch.channels_last), for one channel as well, and under vmap
    return x.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format).permute(0, 3, 1, 2)


def check_images(x: Tensor, channels: int, multiple: int) -> None:
    """Raises a ValueError unless x is (B, channels, H, W), H and W multiples of ``multiple``."""
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (B, {channels}, H, W)")
    if x.shape[2] % multiple or x.shape[3] % multiple:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected height and width multiples of {multiple}")


def check_labels(name: str, labels: Tensor, batch: int, dim: int) -> None:
    """Raises a ValueError unless labels are (batch, dim)."""
    if labels.shape != (batch, dim):
        shape = f"{tuple(labels.shape)} of {labels.dtype}"
        raise ValueError(f"{name}: got shape {shape}, expected ({batch}, {dim})")
