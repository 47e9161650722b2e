r"""DiT: a transformer of image patches, F(x; c_noise, labels).

The image is cut into N patches of patch_size x patch_size pixels, each a token with its place. With the
embedding e of `networks.base`, every block scales, shifts and gates by numbers that e gives (adaLN-Zero):

    t_n = W x_n + p_n,                     x_n patch n, p_n sines and cosines of its row and its column
    t <- t + g (A(m(t; b, s))),            m(t; b, s) = s + (1 + b) layernorm(t),  (b, s, g) = W e
    t <- t + g'(MLP(m(t; b', s'))),        MLP of one hidden layer, gelu
    F = patches of W m(t; b'', s'')

Half of p's channels say the row, half the column, both counted in patches. All modulations and the last W
start at zero: blocks start as the identity, and the output is exactly zero, so that a preconditioned model
starts as its base.

References:
    Peebles and Xie, Scalable Diffusion Models with Transformers, 2022, arXiv 2212.09748, section 3.2.
    Dosovitskiy et al., An Image is Worth 16x16 Words, 2020, arXiv 2010.11929.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from gaussnet.hub import register
from gaussnet.networks.base import EmbeddingNetwork, check_config, expect
from gaussnet.networks.blocks import check_images, dropout, zero_
from gaussnet.networks.embeddings import PositionalEmbedding

EPS = 1e-6


class DiTBlock(nn.Module):
    """Self-attention and MLP, both modulated and gated by the embedding; starts as the identity.

    Args:
        channels: Channels of a token.
        num_heads: Attention heads, a divisor of ``channels``.
        mlp_ratio: Multiple of ``channels`` in the MLP's hidden layer.
        emb_channels: Channels of the embedding.
        dropout: Dropout probability before the last layer of the MLP.
    """

    def __init__(
        self, channels: int, num_heads: int, mlp_ratio: int, emb_channels: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.modulation: nn.Linear = nn.Linear(emb_channels, 6 * channels)
        self.qkv: nn.Linear = nn.Linear(channels, 3 * channels)
        self.proj: nn.Linear = nn.Linear(channels, channels)
        self.fc1: nn.Linear = nn.Linear(channels, mlp_ratio * channels)
        self.fc2: nn.Linear = nn.Linear(mlp_ratio * channels, channels)
        for layer in (self.qkv, self.proj, self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        zero_(self.modulation)

    def forward(self, t: Tensor, emb: Tensor) -> Tensor:
        """Tokens (B, N, channels) to the same, with the embedding (B, emb_channels) or (1, emb_channels)."""
        scale0, shift0, gate0, scale1, shift1, gate1 = self.modulation(emb)[:, None].chunk(6, dim=2)
        h = self.qkv(modulate(t, scale0, shift0))
        q, k, v = rearrange(h, "b n (three head c) -> three b head n c", three=3, head=self.num_heads)
        h = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, channels / heads)
        t = t + gate0 * self.proj(rearrange(h, "b head n c -> b n (head c)"))
        h = F.gelu(self.fc1(modulate(t, scale1, shift1)), approximate="tanh")
        return t + gate1 * self.fc2(dropout(h, self.dropout, self.training))


def modulate(t: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Layer norm of tokens (B, N, C) with scale and shift (B, 1, C)."""
    return torch.addcmul(shift, F.layer_norm(t, t.shape[-1:], eps=EPS), 1 + scale)


@register
class DiT(EmbeddingNetwork):
    """The diffusion transformer of Peebles and Xie (2022); the defaults are those of DiT-S/2.

    Args:
        img_resolution: Image size, a multiple of ``patch_size``. Other sizes run as well if height and
            width are such multiples, though attention has then not been trained on their places.
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        label_dim: Number of classes, 0 for an unconditional network.
        augment_dim: Length of the augmentation labels, 0 for none.
        patch_size: Height and width of a patch, in pixels.
        model_channels: Channels of a token, a multiple of 4 and of ``num_heads``.
        num_blocks: Transformer blocks.
        num_heads: Attention heads.
        mlp_ratio: Multiple of ``model_channels`` in the hidden layers of the MLPs.
        dropout: Dropout probability inside the MLPs.
        label_dropout: Probability to drop class labels in training, for guidance.

    Raises:
        ValueError: if an argument is impossible, or does not fit another; the message names it.

    Example:
        >>> network = DiT(8, in_channels=1, out_channels=1, model_channels=8, num_blocks=1, num_heads=2)
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
        patch_size: int = 2,
        model_channels: int = 384,
        num_blocks: int = 12,
        num_heads: int = 6,
        mlp_ratio: int = 4,
        dropout: float = 0.0,
        label_dropout: float = 0.0,
    ) -> None:
        config: dict[str, Any] = {
            "img_resolution": img_resolution,
            "in_channels": in_channels,
            "out_channels": out_channels,
            "label_dim": label_dim,
            "augment_dim": augment_dim,
            "patch_size": patch_size,
            "model_channels": model_channels,
            "num_blocks": num_blocks,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "dropout": dropout,
            "label_dropout": label_dropout,
        }
        check_config(config)
        expect(config, "model_channels", model_channels % 4 == 0, "a positive multiple of 4")
        expect(config, "num_heads", model_channels % num_heads == 0, f"a divisor of {model_channels=}")
        expect(config, "img_resolution", img_resolution % patch_size == 0, f"a multiple of {patch_size=}")
        super().__init__(config, noise_channels=model_channels, emb_channels=model_channels)
        self.patch_size = patch_size

        self.map_position: PositionalEmbedding = PositionalEmbedding(model_channels // 2)
        self.patch_in: nn.Linear = nn.Linear(in_channels * patch_size**2, model_channels)
        nn.init.xavier_uniform_(self.patch_in.weight)
        nn.init.zeros_(self.patch_in.bias)
        self.blocks: nn.ModuleList = nn.ModuleList(
            DiTBlock(model_channels, num_heads, mlp_ratio, model_channels, dropout) for _ in range(num_blocks)
        )
        self.out_modulation: nn.Linear = nn.Linear(model_channels, 2 * model_channels)
        self.patch_out: nn.Linear = nn.Linear(model_channels, out_channels * patch_size**2)
        zero_(self.out_modulation)
        zero_(self.patch_out)

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        check_images(x, self.in_channels, self.patch_size)
        emb = self.embed(x.shape[0], noise_labels, class_labels, augment_labels)
        p, rows = self.patch_size, x.shape[2] // self.patch_size
        t = rearrange(x.to(self.dtype), "b c (h p) (w q) -> b h w (c p q)", p=p, q=p)
        t = (self.patch_in(t) + self._places(*t.shape[1:3])).flatten(1, 2)  # (B, N, model_channels)
        for block in self.blocks:
            t = block(t, emb)
        scale, shift = self.out_modulation(emb)[:, None].chunk(2, dim=2)
        t = self.patch_out(modulate(t, scale, shift))
        return rearrange(t, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=p, q=p)

    def _places(self, rows: int, columns: int) -> Tensor:
        """Sines and cosines of row and column, (rows, columns, model_channels)."""

        def place(count: int) -> Tensor:
            steps = torch.arange(count, device=self.map_position.freqs.device)
            return torch.cat(self.map_position(steps), dim=1)  # (count, model_channels / 2)

        row, column = place(rows)[:, None], place(columns)[None]
        grid = (rows, columns, -1)
        return torch.cat([row.expand(grid), column.expand(grid)], dim=2).to(self.dtype)
