r"""SongUNet: the DDPM++ and NCSN++ networks, F(x; c_noise, labels).

A U-Net with levels l = 0 .. L - 1, of resolution img_resolution / 2^l and model_channels *
channel_mult[l] channels. Its embedding and ends, for the noise label c, the class y (one-hot,
dropped in training with probability label_dropout) and the augmentation labels a:

    e = silu(W1 silu(W0 (emb(c) + Wy sqrt(label_dim) y + Wa a)))
    encoder  standard: x_l = down(x_{l-1})
             skip:     x_l = down(x_{l-1}) + conv1x1(image shrunk to level l)
             residual: x_l = (down(x_{l-1}) + pyramid_l) / sqrt 2,  pyramid_l made from x_{l-1}'s
    decoder  standard: F = out_0(x_0)
             skip:     F = sum over l of out_l(x_l) enlarged to level 0

DDPM++ is positional + standard + standard with the box filter [1, 1]. NCSN++ is fourier + residual
+ standard with [1, 3, 3, 1] and channel_mult_noise 2. Modules bear the names of NVlabs/edm, whose
state dicts load strictly. The output is exactly zero before training (EDM starts at 1e-5), so that
a preconditioned model starts as its base.

References:
    Song et al., Score-Based Generative Modeling through SDEs, 2021, arXiv 2011.13456, appendix H.
    Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, 2022,
    arXiv 2206.00364, table 7.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gaussnet.hub import register
from gaussnet.networks.base import Network, check_config, check_levels, class_rows, noise_row
from gaussnet.networks.blocks import (
    Conv2d,
    Resample,
    UNetBlock,
    check_images,
    check_labels,
    fast_layout,
    group_norm,
    zero_,
)
from gaussnet.networks.embeddings import FourierEmbedding, PositionalEmbedding

EmbeddingType = Literal["positional", "fourier"]
EncoderType = Literal["standard", "skip", "residual"]
DecoderType = Literal["standard", "skip"]

EPS = 1e-6


@register
class SongUNet(Network):
    """The U-Net of Song et al. (2021) with the arguments and state-dict names of EDM.

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
        attn_resolutions: Resolutions (of ``img_resolution``'s levels) with self-attention.
        dropout: Dropout probability inside the blocks.
        label_dropout: Probability to drop class labels in training, for guidance.
        embedding_type: "positional" (DDPM++) or "fourier" (NCSN++).
        channel_mult_noise: Multiple of ``model_channels`` for the noise embedding, 2 for NCSN++.
        encoder_type: "standard" (DDPM++), "residual" (NCSN++) or "skip".
        decoder_type: "standard" or "skip".
        resample_filter: Taps of the resampling filter, [1, 1] (DDPM++) or [1, 3, 3, 1] (NCSN++).

    Raises:
        ValueError: if an argument is impossible, or does not fit another; the message names it.

    Example:
        >>> network = SongUNet(8, 1, 1, model_channels=8, channel_mult=[1, 2], num_blocks=1)
        >>> larger = network(torch.randn(2, 1, 16, 12), noise_labels=torch.zeros(2))
        >>> larger.shape, larger.abs().max().item()  # 0 until it is trained
        (torch.Size([2, 1, 16, 12]), 0.0)
    """

    map_noise: PositionalEmbedding | FourierEmbedding

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
        embedding_type: EmbeddingType = "positional",
        channel_mult_noise: int = 1,
        encoder_type: EncoderType = "standard",
        decoder_type: DecoderType = "standard",
        resample_filter: Sequence[float] = (1, 1),
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
            "embedding_type": embedding_type,
            "channel_mult_noise": channel_mult_noise,
            "encoder_type": encoder_type,
            "decoder_type": decoder_type,
            "resample_filter": list(resample_filter),
        }
        check_config(
            config,
            embedding_type=get_args(EmbeddingType),
            encoder_type=get_args(EncoderType),
            decoder_type=get_args(DecoderType),
        )
        super().__init__(config)
        self.multiple: int = check_levels(config)
        self.num_blocks = num_blocks
        self.encoder_type = encoder_type
        self.resolutions: list[int] = [img_resolution >> level for level in range(len(channel_mult))]

        # Embedding.
        noise_channels = model_channels * channel_mult_noise
        emb_channels = model_channels * channel_mult_emb
        if embedding_type == "positional":
            self.map_noise = PositionalEmbedding(noise_channels, endpoint=True)
        else:
            self.map_noise = FourierEmbedding(noise_channels)
        if label_dim:
            self.map_label: nn.Linear = nn.Linear(label_dim, noise_channels)
        if augment_dim:
            self.map_augment: nn.Linear = nn.Linear(augment_dim, noise_channels, bias=False)
        self.map_layer0: nn.Linear = nn.Linear(noise_channels, emb_channels)
        self.map_layer1: nn.Linear = nn.Linear(emb_channels, emb_channels)

        block = partial(
            UNetBlock,
            emb_channels=emb_channels,
            channels_per_head=None,
            dropout=dropout,
            skip_scale=math.sqrt(0.5),
            eps=EPS,
            resample_filter=resample_filter,
            resample_proj=True,
            adaptive_scale=False,
        )

        # Encoder. Every tensor that a level makes is a skip of the decoder.
        self.enc: nn.ModuleDict = nn.ModuleDict()
        skips: list[int] = []
        c, c_aux = model_channels, in_channels
        for res, mult in zip(self.resolutions, channel_mult, strict=True):
            at = f"{res}x{res}"
            if res == img_resolution:
                self.enc[f"{at}_conv"] = Conv2d(in_channels, c, 3)
            else:
                self.enc[f"{at}_down"] = block(c, c, resample="down")
                if encoder_type == "skip":
                    self.enc[f"{at}_aux_down"] = Resample("down", resample_filter)
                    self.enc[f"{at}_aux_skip"] = Conv2d(c_aux, c, 1)
                elif encoder_type == "residual":
                    self.enc[f"{at}_aux_residual"] = Conv2d(c_aux, c, 3, "down", resample_filter, fused=True)
                    c_aux = c
            skips.append(c)
            for i in range(num_blocks):
                c_in, c = c, model_channels * mult
                self.enc[f"{at}_block{i}"] = block(c_in, c, attention=res in attn_resolutions)
                skips.append(c)

        # Decoder.
        self.dec: nn.ModuleDict = nn.ModuleDict()
        for res, mult in zip(reversed(self.resolutions), reversed(channel_mult), strict=True):
            at = f"{res}x{res}"
            coarsest = res == self.resolutions[-1]
            if coarsest:
                self.dec[f"{at}_in0"] = block(c, c, attention=True)
                self.dec[f"{at}_in1"] = block(c, c)
            else:
                self.dec[f"{at}_up"] = block(c, c, resample="up")
            for i in range(num_blocks + 1):
                c_in, c = c + skips.pop(), model_channels * mult
                attention = i == num_blocks and res in attn_resolutions
                self.dec[f"{at}_block{i}"] = block(c_in, c, attention=attention)
            if decoder_type == "skip" or res == img_resolution:
                if not coarsest and decoder_type == "skip":
                    self.dec[f"{at}_aux_up"] = Resample("up", resample_filter)
                self.dec[f"{at}_aux_norm"] = group_norm(c, EPS)
                self.dec[f"{at}_aux_conv"] = Conv2d(c, out_channels, 3)

        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws Xavier-uniform weights; zeroes biases, residual branches and output."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name, module in self.named_modules():
            if isinstance(module, UNetBlock):
                module.zero_residual()
            elif name.endswith("qkv"):
                nn.init.xavier_uniform_(module.get_parameter("weight"), gain=math.sqrt(0.2))
            elif name.endswith("aux_conv"):
                zero_(module)

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        check_images(x, self.in_channels, self.multiple)
        emb = self._embed(x.shape[0], noise_labels, class_labels, augment_labels)
        x = fast_layout(x.to(self.dtype))
        return self._decode(self._encode(x, emb), emb).contiguous()

    def _embed(
        self,
        batch: int,
        noise_labels: Tensor,
        class_labels: Tensor | None,
        augment_labels: Tensor | None,
    ) -> Tensor:
        """The embedding (B, emb_channels), or (1, emb_channels) where one label serves all."""
        dtype = self.dtype
        cos, sin = self.map_noise(noise_row(noise_labels, batch))
        emb = torch.cat([sin, cos], dim=1).to(dtype)

        if class_labels is None:
            class_labels = emb.new_zeros(batch, self.label_dim)
        drop = self.label_dropout if self.training else 0.0
        y = class_rows(class_labels, batch, self.label_dim, drop).to(dtype)
        if self.label_dim:
            emb = emb + self.map_label(y * math.sqrt(self.label_dim))

        if augment_labels is not None:
            check_labels("augment_labels", augment_labels, batch, self.augment_dim)
            if self.augment_dim:
                emb = emb + self.map_augment(augment_labels.to(dtype))

        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def _encode(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        """All skips, finest first; the last is the encoder's output."""
        enc = self.enc
        skips: list[Tensor] = []
        aux = x
        for res in self.resolutions:
            at = f"{res}x{res}"
            if res == self.img_resolution:
                x = enc[f"{at}_conv"](x)
            else:
                x = enc[f"{at}_down"](x, emb)
                if self.encoder_type == "skip":
                    aux = enc[f"{at}_aux_down"](aux)
                    x = x + enc[f"{at}_aux_skip"](aux)
                elif self.encoder_type == "residual":
                    x = aux = (x + enc[f"{at}_aux_residual"](aux)) * math.sqrt(0.5)
            skips.append(x)
            for i in range(self.num_blocks):
                x = enc[f"{at}_block{i}"](x, emb)
                skips.append(x)
        return skips

    def _decode(self, skips: list[Tensor], emb: Tensor) -> Tensor:
        """The output, from skips that it uses up."""
        dec = self.dec
        x, out = skips[-1], None
        for res in reversed(self.resolutions):
            at = f"{res}x{res}"
            if res == self.resolutions[-1]:
                x = dec[f"{at}_in1"](dec[f"{at}_in0"](x, emb), emb)
            else:
                x = dec[f"{at}_up"](x, emb)
            for i in range(self.num_blocks + 1):
                x = dec[f"{at}_block{i}"](torch.cat([x, skips.pop()], dim=1), emb)
            if f"{at}_aux_conv" in dec:
                head = dec[f"{at}_aux_conv"](F.silu(dec[f"{at}_aux_norm"](x)))
                out = head if out is None else dec[f"{at}_aux_up"](out) + head
        assert out is not None
        return out
