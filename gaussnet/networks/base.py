r"""What the networks share: the interface F(x; c_noise, labels), and the embedding of all that is not x.

For the noise label c (``c_noise`` of the preconditioner), the class y (one-hot, dropped in training with
probability label_dropout) and the augmentation labels a, with the embedding emb of `PositionalEmbedding`:

    e = silu(W1 silu(W0 (emb(c) + Wa a)) + Wy y)

Modules bear the names of NVlabs/edm. SongUNet adds the class before W0 and has its own embedding.

Reference: Dhariwal and Nichol, Diffusion Models Beat GANs on Image Synthesis, 2021, arXiv 2105.05233.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gaussnet.networks.blocks import check_labels, zero_
from gaussnet.networks.embeddings import PositionalEmbedding
from gaussnet.numerics import known_true


class Network(nn.Module, ABC):
    """Base of the networks: how they are called, and their arguments.

    Args:
        config: The arguments of the subclass as JSON-able values. Among them are in_channels,
            out_channels, img_resolution, label_dim, augment_dim and label_dropout.

    Attributes:
        config: The arguments; ``type(net)(**net.config)`` has the same architecture.

    Example:
        >>> from gaussnet.networks import MLP
        >>> network = MLP((), in_channels=3, out_channels=3, model_channels=8)
        >>> again = type(network)(**network.config)
        >>> again.load_state_dict(network.state_dict())
        <All keys matched successfully>
    """

    map_layer0: nn.Linear

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.img_resolution: int | list[int] = config["img_resolution"]
        self.in_channels: int = config["in_channels"]
        self.out_channels: int = config["out_channels"]
        self.label_dim: int = config["label_dim"]
        self.augment_dim: int = config["augment_dim"]
        self.label_dropout: float = config["label_dropout"]

    @abstractmethod
    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """Evaluates the network, in the dtype of its parameters.

        Args:
            x: Images (B, in_channels, H, W); an MLP takes events of any shape (B, in_channels, ...).
            noise_labels: Noise labels ``c_noise`` (B,), or one for the batch, () or (1,).
            class_labels: One-hot classes (B, label_dim) or class indices (B,); None for all zeros,
                the unconditional network.
            augment_labels: Augmentation labels (B, augment_dim); None for all zeros.

        Returns:
            Of the shape of x, but with out_channels.

        Raises:
            ValueError: if x or labels have another shape; the message names them.
        """

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters, in which the network computes."""
        return self.map_layer0.weight.dtype

    def to_arguments(self) -> dict[str, Any]:
        """The constructor's arguments, for config.json."""
        return dict(self.config)

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Self:
        """A network of the same architecture, with new weights."""
        return cls(**arguments)


class EmbeddingNetwork(Network):
    """Base of the networks with this embedding (B, emb_channels).

    Args:
        config: As in `Network`.
        noise_channels: Channels of the noise embedding, even.
        emb_channels: Channels of the embedding of all labels.
    """

    def __init__(self, config: dict[str, Any], noise_channels: int, emb_channels: int) -> None:
        super().__init__(config)
        self.map_noise: PositionalEmbedding = PositionalEmbedding(noise_channels)
        if self.augment_dim:
            self.map_augment: nn.Linear = nn.Linear(self.augment_dim, noise_channels, bias=False)
            zero_(self.map_augment)
        self.map_layer0: nn.Linear = nn.Linear(noise_channels, emb_channels)
        self.map_layer1: nn.Linear = nn.Linear(emb_channels, emb_channels)
        if self.label_dim:
            self.map_label: nn.Linear = nn.Linear(self.label_dim, emb_channels, bias=False)
            nn.init.normal_(self.map_label.weight)  # a class then weighs as much whatever label_dim is

    def embed(
        self,
        batch: int,
        noise_labels: Tensor,
        class_labels: Tensor | None,
        augment_labels: Tensor | None,
    ) -> Tensor:
        """The embedding (B, emb_channels), or (1, emb_channels) where one serves all.

        Raises:
            ValueError: if labels do not have the shape that `forward` of the networks documents.
        """
        emb = torch.cat(self.map_noise(noise_row(noise_labels, batch)), dim=1).to(self.dtype)
        if augment_labels is not None:
            check_labels("augment_labels", augment_labels, batch, self.augment_dim)
            if self.augment_dim:
                emb = emb + self.map_augment(augment_labels.to(self.dtype))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if class_labels is not None:
            drop = self.label_dropout if self.training else 0.0
            y = class_rows(class_labels, batch, self.label_dim, drop)
            if self.label_dim:
                emb = emb + self.map_label(y.to(self.dtype))
        return F.silu(emb)


def noise_row(noise_labels: Tensor, batch: int) -> Tensor:
    """Noise labels (B,), or (1,) where one serves the batch."""
    if noise_labels.ndim > 1 or noise_labels.numel() not in (1, batch):
        raise ValueError(f"noise_labels: got shape {tuple(noise_labels.shape)}, expected ({batch},) or ()")
    return noise_labels.reshape(-1)


def class_rows(class_labels: Tensor, batch: int, label_dim: int, drop: float) -> Tensor:
    """Classes as rows (B, label_dim), from such rows or from indices (B,); dropped rows are zero."""
    if label_dim and class_labels.ndim == 1 and not class_labels.is_floating_point():
        if known_true(((class_labels < 0) | (class_labels >= label_dim)).any()):
            got = class_labels.unique().tolist()
            raise ValueError(f"class_labels: got classes {got}, expected them from 0 to {label_dim - 1}")
        class_labels = F.one_hot(class_labels.long(), label_dim)
    check_labels("class_labels", class_labels, batch, label_dim)
    if drop:
        keep = torch.rand(batch, 1, device=class_labels.device) >= drop
        class_labels = class_labels * keep
    return class_labels


def expect(config: Mapping[str, Any], name: str, holds: bool, expected: str) -> None:
    """Raises a ValueError that names an argument, unless it holds."""
    if not holds:
        raise ValueError(f"{name}: got {config[name]!r}, expected {expected}")


def check_config(config: Mapping[str, Any], **choices: tuple[str, ...]) -> None:
    """Raises a ValueError that names the first impossible choice, count, label length or probability."""
    for name, value in config.items():
        number = isinstance(value, (int, float))
        if name in choices:
            expect(config, name, value in choices[name], f"one of {choices[name]}")
        elif name in ("dropout", "label_dropout"):
            expect(config, name, number and 0 <= value <= 1, "a probability")
        elif name in ("label_dim", "augment_dim"):
            expect(config, name, number and value >= 0, "0 or more")
        elif not isinstance(value, list):
            expect(config, name, number and value >= 1, "at least 1")


def check_levels(config: Mapping[str, Any]) -> int:
    """What the sizes of a U-Net's images have to be multiples of, after `check_config`.

    Raises:
        ValueError: if its channels or its resolution do not fit its levels; the message names them.
    """
    mults = config["channel_mult"]
    expect(config, "model_channels", config["model_channels"] % 4 == 0, "a positive multiple of 4")
    expect(config, "channel_mult", min(mults, default=0) >= 1, "one factor >= 1 a level")
    multiple = 2 ** (len(mults) - 1)
    expect(
        config,
        "img_resolution",
        isinstance(config["img_resolution"], int) and config["img_resolution"] % multiple == 0,
        f"a positive multiple of {multiple}, for the {len(mults)} levels of channel_mult",
    )
    return multiple
