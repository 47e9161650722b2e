"""The networks F that a preconditioner wraps, and the blocks they are made of."""

from gaussnet.networks.blocks import (
    Conv2d,
    FourierEmbedding,
    PositionalEmbedding,
    Resample,
    UNetBlock,
    group_norm,
)
from gaussnet.networks.song_unet import SongUNet

__all__ = [
    "Conv2d",
    "FourierEmbedding",
    "PositionalEmbedding",
    "Resample",
    "SongUNet",
    "UNetBlock",
    "group_norm",
]
