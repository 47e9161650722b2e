r"""DhariwalUNet: the ADM network, F(x; c_noise, labels).

A U-Net with levels l = 0 .. L - 1, of resolution img_resolution / 2^l and C_l = model_channels *
channel_mult[l] channels. With the embedding e of `networks.base` and blocks R whose normalisation e scales
and shifts (adaptive, skip scale 1, heads of 64 channels: `networks.blocks`):

    x_0 = conv3x3(x),   x_l = down(x_{l-1}),   then num_blocks of R a level; every result is a skip
    middle R with attention, R; back up the levels, num_blocks + 1 of R(x, skip) and up(x)
    F = conv3x3(silu(norm(x)))

Attention follows R at attn_resolutions, in encoder and decoder. Modules bear the names of NVlabs/edm, whose
state dicts load strictly. Weights start at PyTorch's default, uniform in +-1/sqrt(fan_in), the class
embedding at N(0, 1), and the output at zero, so that a preconditioned model starts as its base.

References:
    Dhariwal and Nichol, Diffusion Models Beat GANs on Image Synthesis, 2021, arXiv 2105.05233, appendix B.
    Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, 2022,
    arXiv 2206.00364, table 7.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gaussnet.hub import register
from gaussnet.networks.base import EmbeddingNetwork, check_config, check_levels
from gaussnet.networks.blocks import Conv2d, UNetBlock, check_images, fast_layout, group_norm, zero_


@register
class DhariwalUNet(EmbeddingNetwork):
    """The U-Net of Dhariwal and Nichol (2021) with the arguments and state-dict names of EDM.

    Args:
        img_resolution: Image size, which names the levels and places the attention. Other sizes run
            as well if height and width are multiples of ``2 ** (len(channel_mult) - 1)``.
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        label_dim: Number of classes, 0 for an unconditional network.
        augment_dim: Length of the augmentation labels, 0 for none.
        model_channels: Base number of channels, a multiple of 4.
        channel_mult: Multiple of ``model_channels`` at each level, finest first.
        channel_mult_emb: Multiple of ``model_channels`` for the embedding.
        num_blocks: Residual blocks a level in the encoder; the decoder has one more.
        attn_resolutions: Resolutions (of ``img_resolution``'s levels) with self-attention. As in EDM,
            a level of fewer than 64 channels has none.
        dropout: Dropout probability inside the blocks.
        label_dropout: Probability to drop class labels in training, for guidance.

    Raises:
        ValueError: if an argument is impossible, or does not fit another; the message names it.

    Example:
        >>> network = DhariwalUNet(8, 1, 1, model_channels=8, channel_mult=[1, 2], num_blocks=1)
        >>> larger = network(torch.randn(2, 1, 16, 12), noise_labels=torch.zeros(2))
        >>> larger.shape, larger.abs().max().item()  # 0 until it is trained
        (torch.Size([2, 1, 16, 12]), 0.0)
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
    ) -> None:
        config: dict[str, Any] = {
            "img_resolution": img_resolution,
            "in_channels": in_channels,
            "out_channels": out_channels,
            "label_dim": label_dim,
            "augment_dim": augment_dim,
            "model_channels": model_channels,
            "channel_mult": list(channel_mult),
            "channel_mult_emb": channel_mult_emb,
            "num_blocks": num_blocks,
            "attn_resolutions": list(attn_resolutions),
            "dropout": dropout,
            "label_dropout": label_dropout,
        }
        check_config(config)
        multiple = check_levels(config)
        emb_channels = model_channels * channel_mult_emb
        super().__init__(config, noise_channels=model_channels, emb_channels=emb_channels)
        self.multiple = multiple

        block = partial(UNetBlock, emb_channels=emb_channels, dropout=dropout)
        resolutions = [img_resolution >> level for level in range(len(channel_mult))]

        # Encoder. Every tensor that it makes is a skip of the decoder.
        self.enc: nn.ModuleDict = nn.ModuleDict()
        c = model_channels * channel_mult[0]
        self.enc[f"{img_resolution}x{img_resolution}_conv"] = Conv2d(in_channels, c, 3)
        skips = [c]
        for res, mult in zip(resolutions, channel_mult, strict=True):
            at = f"{res}x{res}"
            if res != img_resolution:
                self.enc[f"{at}_down"] = block(c, c, resample="down")
                skips.append(c)
            for i in range(num_blocks):
                c_in, c = c, model_channels * mult
                self.enc[f"{at}_block{i}"] = block(c_in, c, attention=res in attn_resolutions)
                skips.append(c)

        # Decoder.
        self.dec: nn.ModuleDict = nn.ModuleDict()
        for res, mult in zip(reversed(resolutions), reversed(channel_mult), strict=True):
            at = f"{res}x{res}"
            if res == resolutions[-1]:
                self.dec[f"{at}_in0"] = block(c, c, attention=True)
                self.dec[f"{at}_in1"] = block(c, c)
            else:
                self.dec[f"{at}_up"] = block(c, c, resample="up")
            for i in range(num_blocks + 1):
                c_in, c = c + skips.pop(), model_channels * mult
                self.dec[f"{at}_block{i}"] = block(c_in, c, attention=res in attn_resolutions)
        self.out_norm: nn.GroupNorm = group_norm(c)
        self.out_conv: Conv2d = Conv2d(c, out_channels, 3)
        zero_(self.out_conv)

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        check_images(x, self.in_channels, self.multiple)
        emb = self.embed(x.shape[0], noise_labels, class_labels, augment_labels)
        x = fast_layout(x.to(self.dtype))
        skips: list[Tensor] = []
        for block in self.enc.values():
            x = block(x, emb) if isinstance(block, UNetBlock) else block(x)
            skips.append(x)
        for name, block in self.dec.items():
            if "_block" in name:
                x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, emb)
        return self.out_conv(F.silu(self.out_norm(x))).contiguous()
