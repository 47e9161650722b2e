"""The networks F that a preconditioner wraps, and the blocks they are made of."""

from gaussnet.networks.base import Network
from gaussnet.networks.blocks import Conv2d, Resample, UNetBlock, group_norm
from gaussnet.networks.dhariwal_unet import DhariwalUNet
from gaussnet.networks.dit import DiT
from gaussnet.networks.embeddings import FourierEmbedding, PositionalEmbedding
from gaussnet.networks.mlp import MLP
from gaussnet.networks.song_unet import SongUNet

__all__ = [
    "MLP",
    "Conv2d",
    "DhariwalUNet",
    "DiT",
    "FourierEmbedding",
    "Network",
    "PositionalEmbedding",
    "Resample",
    "SongUNet",
    "UNetBlock",
    "group_norm",
]
