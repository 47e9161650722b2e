r"""MLP: residual layers on all entries of x at once, F(x; c_noise, labels).

With the embedding e of `networks.base`:

    h = W x + w
    h <- h + W' silu(s + (1 + b) (W norm(h) + w)),    (b, s) = W e,    num_blocks times
    F = W silu(norm(h)) + w

It knows nothing of images, but for small events and vectors it is a cheap network that can compute any global
linear map. All W' and the last W start at zero, so that a preconditioned model starts as its base.

Reference: He et al., Identity Mappings in Deep Residual Networks, 2016, arXiv 1603.05027 (norm first).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gaussnet.hub import register
from gaussnet.networks.base import EmbeddingNetwork, check_config, expect
from gaussnet.networks.blocks import dropout, zero_


class MLPBlock(nn.Module):
    """A residual block that the embedding scales and shifts; starts as the identity.

    Args:
        channels: Width of the block.
        emb_channels: Channels of the embedding.
        dropout: Dropout probability before the second layer.
    """

    def __init__(self, channels: int, emb_channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm: nn.LayerNorm = nn.LayerNorm(channels)
        self.fc0: nn.Linear = nn.Linear(channels, channels)
        self.affine: nn.Linear = nn.Linear(emb_channels, 2 * channels)
        self.fc1: nn.Linear = nn.Linear(channels, channels)
        zero_(self.fc1)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        """Features (B, channels) to the same, with the embedding (B, emb_channels) or (1, emb_channels)."""
        scale, shift = self.affine(emb).chunk(2, dim=1)
        y = F.silu(torch.addcmul(shift, self.fc0(self.norm(h)), 1 + scale))
        return h + self.fc1(dropout(y, self.dropout, self.training))


@register
class MLP(EmbeddingNetwork):
    """A residual MLP of events of any shape.

    Args:
        img_resolution: Height and width of square images, or the shape of an event behind its channels:
            ``(H, W)`` for images that are not square, ``()`` for vectors.
        in_channels: Channels of the input; the length of vectors.
        out_channels: Channels of the output; the length of vectors.
        label_dim: Number of classes, 0 for an unconditional network.
        augment_dim: Length of the augmentation labels, 0 for none.
        model_channels: Width of all layers, even.
        num_blocks: Residual blocks.
        dropout: Dropout probability inside the blocks.
        label_dropout: Probability to drop class labels in training, for guidance.

    Raises:
        ValueError: if an argument is impossible, or does not fit another; the message names it.

    Example:
        >>> network = MLP((), in_channels=3, out_channels=3, label_dim=10, model_channels=8)
        >>> x, labels = torch.randn(5, 3), torch.arange(5)
        >>> network(x, noise_labels=torch.zeros(5), class_labels=labels).shape  # of vectors, or of images
        torch.Size([5, 3])
    """

    def __init__(
        self,
        img_resolution: int | Sequence[int],
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 512,
        num_blocks: int = 4,
        dropout: float = 0.0,
        label_dropout: float = 0.0,
    ) -> None:
        square = isinstance(img_resolution, int)
        config: dict[str, Any] = {
            "img_resolution": img_resolution if square else list(img_resolution),
            "in_channels": in_channels,
            "out_channels": out_channels,
            "label_dim": label_dim,
            "augment_dim": augment_dim,
            "model_channels": model_channels,
            "num_blocks": num_blocks,
            "dropout": dropout,
            "label_dropout": label_dropout,
        }
        size = (img_resolution, img_resolution) if square else tuple(img_resolution)
        check_config(config)
        expect(config, "img_resolution", min(size, default=1) >= 1, "at least 1 on every axis")
        expect(config, "model_channels", model_channels % 2 == 0, "an even number")
        super().__init__(config, noise_channels=model_channels, emb_channels=model_channels)
        self.in_shape: tuple[int, ...] = (in_channels, *size)
        self.out_shape: tuple[int, ...] = (out_channels, *size)

        self.fc_in: nn.Linear = nn.Linear(math.prod(self.in_shape), model_channels)
        self.blocks: nn.ModuleList = nn.ModuleList(
            MLPBlock(model_channels, model_channels, dropout) for _ in range(num_blocks)
        )
        self.out_norm: nn.LayerNorm = nn.LayerNorm(model_channels)
        self.fc_out: nn.Linear = nn.Linear(model_channels, math.prod(self.out_shape))
        zero_(self.fc_out)

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        if x.shape[1:] != self.in_shape:
            shape = ", ".join(map(str, self.in_shape))
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected (B, {shape})")
        emb = self.embed(x.shape[0], noise_labels, class_labels, augment_labels)
        h = self.fc_in(x.to(self.dtype).flatten(1))
        for block in self.blocks:
            h = block(h, emb)
        return self.fc_out(F.silu(self.out_norm(h))).unflatten(1, self.out_shape)
