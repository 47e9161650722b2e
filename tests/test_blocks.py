"""The blocks of the U-Nets against plain formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gaussnet.networks import Conv2d, Resample, UNetBlock, group_norm
from gaussnet.networks.blocks import Resampling, dropout, fast_layout


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_resampling_is_the_depthwise_filter(taps: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    r = torch.tensor(taps, dtype=torch.float64)
    f = (r.outer(r) / r.sum() ** 2).expand(3, 1, -1, -1)
    pad = (len(r) - 1) // 2
    up, down = Resample("up", taps).double(), Resample("down", taps).double()
    torch.testing.assert_close(up(x), F.conv_transpose2d(x, 4 * f, None, 2, pad, 0, 3))
    torch.testing.assert_close(down(x), F.conv2d(x, f, None, 2, pad, 1, 3))
    # up = 4 down^T
    y = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    torch.testing.assert_close((up(x) * y).sum(), 4 * (x * down(y)).sum())


def test_fused_convolution_equals_unfused_inside() -> None:
    x = torch.randn(1, 3, 16, 16)
    fused = Conv2d(3, 4, 3, "down", (1, 3, 3, 1), fused=True)
    plain, down = nn.Conv2d(3, 4, 3, padding=1), Resample("down", (1, 3, 3, 1))
    plain.load_state_dict({"weight": fused.weight, "bias": fused.bias})
    inner = slice(1, -1)  # at the border, the unfused filter sees zeros
    out, expected = fused(x), down(plain(x))
    assert out.shape == (1, 4, 8, 8)
    torch.testing.assert_close(out[..., inner, inner], expected[..., inner, inner])


@pytest.mark.parametrize("resample", [None, "up"])
def test_only_downsampling_is_fused(resample: Resampling | None) -> None:
    with pytest.raises(ValueError, match=f"fused: got resample={resample!r}, expected 'down'"):
        Conv2d(3, 4, 3, resample, fused=True)


@pytest.mark.parametrize("channels_per_head", [None, 8])
def test_attention_is_softmax_attention(channels_per_head: int | None) -> None:
    # The reference outputs cannot tell: their random weights attend almost uniformly.
    torch.manual_seed(0)
    block = UNetBlock(16, 16, 8, attention=True, channels_per_head=channels_per_head).double()
    heads = 16 // (channels_per_head or 16)
    assert block.num_heads == heads
    with torch.no_grad():
        block.qkv.weight.mul_(8)  # sharp attention
        nn.init.dirac_(block.proj.weight)
    x = torch.randn(2, 16, 3, 4, dtype=torch.float64)
    out = block(x, torch.randn(2, 8, dtype=torch.float64)) - x

    qkv = block.qkv(block.norm2(x)).reshape(2, heads, 16 // heads, 3, 12)
    q, k, v = qkv.unbind(3)  # (B, heads, C / heads, HW)
    scores = torch.einsum("bhcq,bhck->bhqk", q, k) / (16 // heads) ** 0.5
    attention = scores.softmax(dim=-1)
    assert attention.amax() > 0.9
    expected = torch.einsum("bhqk,bhck->bhcq", attention, v).reshape(x.shape)
    torch.testing.assert_close(out, expected)
    assert block(x[:0], torch.randn(0, 8, dtype=torch.float64)).shape == (0, 16, 3, 4)


@pytest.mark.parametrize(("channels", "groups"), [(4, 1), (64, 16), (128, 32), (384, 32)])
def test_group_norm_has_32_groups_of_4_channels_or_more(channels: int, groups: int) -> None:
    assert group_norm(channels).num_groups == groups


@pytest.mark.parametrize("adaptive_scale", [True, False])
@pytest.mark.parametrize("resample", [None, "up", "down"])
@pytest.mark.parametrize("resample_proj", [True, False])
def test_block_starts_as_its_scaled_skip(
    adaptive_scale: bool, resample: Resampling | None, resample_proj: bool
) -> None:
    block = UNetBlock(
        32,
        32,
        8,
        resample=resample,
        attention=True,
        channels_per_head=16,
        skip_scale=0.5,
        resample_proj=resample_proj,
        adaptive_scale=adaptive_scale,
    )
    x = torch.randn(2, 32, 8, 8)
    out = block(x, torch.randn(2, 8))
    torch.testing.assert_close(out, 0.25 * block.skip(x))
    assert block.num_heads == 2
    assert ("skip.weight" in block.state_dict()) == (resample is not None and resample_proj)
    if resample is None:
        torch.testing.assert_close(out, 0.25 * x)


@pytest.mark.parametrize("gain", [1.0, 0.25])
@pytest.mark.parametrize("resample", [None, "up", "down"])
@pytest.mark.parametrize("fused", [False, True])
def test_gain_multiplies_the_convolution(gain: float, resample: Resampling | None, fused: bool) -> None:
    conv = Conv2d(3, 4, 3, resample, fused=fused and resample == "down").double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(conv(x, gain), gain * conv(x))


# Dropout and layout -------------------------------------------------------------------------------


def _images(layout: str) -> Tensor:
    x = torch.rand(7, 5, 33, 31) + 1  # of a size that 4 does not divide
    return {
        "contiguous": x,
        "channels last": x.to(memory_format=torch.channels_last),
        "not dense": x[:, 1:4, ::2],
        "expanded": x[:1].expand(7, -1, -1, -1),
    }[layout]


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "not dense", "expanded"])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_share_and_the_mean(layout: str, p: float) -> None:
    x = _images(layout)
    kept = torch.zeros(())
    mean = torch.zeros_like(x)
    for _ in range(20):
        out = dropout(x, p, training=True)
        kept = kept + (out != 0).double().mean() / 20
        mean = mean + out / 20
        scaled = out[out != 0] / x[out != 0]
        torch.testing.assert_close(scaled, torch.full_like(scaled, 1 / (1 - p)), rtol=2e-4, atol=0)
    n = 20 * x.numel()
    assert abs(kept - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5, "share of what is kept"
    assert abs(mean.mean() / x.mean() - 1) < 6 * (p / (1 - p) / n) ** 0.5, "mean"
    # neighbours, of one and of two words of random bits, are independent
    zero = (dropout(torch.ones(400_000), p, training=True) == 0).double() - p
    for lag in (1, 2, 3, 4, 5, 8):
        correlation = (zero[lag:] * zero[:-lag]).mean() / (p * (1 - p))
        assert abs(correlation) < 5 / 400_000**0.5, f"correlation at lag {lag}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dropout_gradient_is_its_mask(dtype: torch.dtype) -> None:
    x = torch.rand(64, 33, dtype=dtype).add_(1).requires_grad_()
    out = dropout(x, 0.3, training=True)
    out.sum().backward()
    assert x.grad is not None
    assert out.dtype == dtype
    torch.testing.assert_close(x.grad * x, out)


@pytest.mark.parametrize("p", [0.0, 1e-7, 1.0])
def test_dropout_at_its_ends(p: float) -> None:
    x = torch.randn(3, 4)
    assert dropout(x, p, training=False) is x
    torch.testing.assert_close(dropout(x, p, training=True), torch.zeros_like(x) if p == 1 else x)


def test_dropout_follows_the_seed() -> None:
    x = torch.ones(1000)
    outs: list[Tensor] = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outs.append(dropout(x, 0.5, training=True))
    assert outs[0].equal(outs[1])
    assert not outs[0].equal(outs[2])


@pytest.mark.parametrize("channels", [1, 3])
def test_layout_changes_memory_and_not_values(channels: int) -> None:
    x = torch.randn(2, channels, 4, 5)
    out = fast_layout(x)
    assert out.equal(x)
    assert out.stride() == (20 * channels, 1, 5 * channels, channels)
    assert F.conv2d(out, torch.randn(8, channels, 3, 3)).is_contiguous(memory_format=torch.channels_last)
