"""The blocks of the U-Nets against plain formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gaussnet.networks import Conv2d, Resample, UNetBlock, group_norm
from gaussnet.networks.blocks import Resampling


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
