"""Data, covariances and denoisers that several test files share, by name."""

import copy
import json
import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from scipy.stats import multivariate_normal
from sklearn.datasets import load_digits
from torch import Tensor

from gaussnet import (
    BypassPrecond,
    Covariance,
    DeltaDenoiser,
    Denoiser,
    EDMPrecond,
    Gate,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    GuidedDenoiser,
    MarginalDenoiser,
    PatchDenoiser,
    PCALocalDenoiser,
    SongUNet,
    VEPrecond,
    VPPrecond,
    iDDPMPrecond,
)

SIGMAS = (0.002, 0.01, 0.05, 0.5, 5.0, 80.0)
DTYPES = (torch.float64, torch.float32)
EVENT = (1, 8, 8)

COVARIANCES = ("full", "low-rank", "zero-tail", "isotropic")
ANALYTIC = (
    "isotropic",
    "gaussian-full",
    "gaussian-rank-10",
    "mixture-kmeans",
    "mixture-classes",
    "mixture-unequal-ranks",
    "delta",
    "delta-classes",
)
LOCAL = ("pca-local", "patch-ls", "patch-els")
NETWORKS = ("edm", "bypass", "vp", "ve", "iddpm")
DENOISERS = (*ANALYTIC, *LOCAL, "marginal", "marginal-kmeans", "marginal-classes", "guided", *NETWORKS)
LABELLED = ("mixture-classes", "delta-classes", "marginal-classes")


@cache
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits: images (1797, 1, 8, 8) in [-1, 1], float64, and their classes."""
    data, classes = load_digits(return_X_y=True)
    return torch.from_numpy(data).reshape(-1, *EVENT) / 8 - 1, torch.from_numpy(classes).long()


@cache
def split() -> tuple[Tensor, Tensor]:
    """Indices of a fixed 80/20 split into training and test digits."""
    order = torch.randperm(len(digits()[0]), generator=torch.Generator().manual_seed(0))
    return order[:1437], order[1437:]


def train_digits(dtype: torch.dtype = torch.float64) -> Tensor:
    return digits()[0][split()[0]].to(dtype)


def held_out_digits(dtype: torch.dtype = torch.float64) -> Tensor:
    return digits()[0][split()[1]].to(dtype)


def noised(sigma: float, count: int = 16, dtype: torch.dtype = torch.float64) -> Tensor:
    """Test digits with noise: queries that a denoiser meets at this level."""
    clean = held_out_digits()[:count]
    return (clean + sigma * randn(*clean.shape, seed=1)).to(dtype)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthogonal(dim: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A random orthogonal matrix."""
    q, r = torch.linalg.qr(randn(dim, dim, seed=seed))
    return (q * r.diagonal().sign()).to(dtype)


def covariance(name: str, dim: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64) -> Covariance:
    """A random covariance of a named kind; eigenvalues from 0.01 to 4."""
    rank = {"full": dim, "low-rank": dim // 2, "zero-tail": dim // 2, "isotropic": 0}[name]
    tail = {"full": 0.0, "low-rank": 0.07, "zero-tail": 0.0, "isotropic": 0.6}[name]
    eigvals = torch.logspace(0.6, -2, rank, dtype=torch.float64)
    return Covariance(orthogonal(dim, seed)[:, :rank], eigvals, tail).to(dtype)


def gaussian(name: str = "full", event_shape: tuple[int, ...] = (1, 2, 3), seed: int = 0) -> GaussianDenoiser:
    """A small Gaussian with a random mean and a covariance of a named kind, in float64."""
    mean = randn(*event_shape, seed=seed + 100)
    return GaussianDenoiser(mean, covariance(name, mean.numel(), seed))


def mixture() -> GaussianMixtureDenoiser:
    """Four components of unequal weights and ranks (one full, two low, one isotropic), in float64."""
    covariances = [covariance(name, seed=k) for k, name in enumerate(COVARIANCES)]
    weights = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)
    return GaussianMixtureDenoiser(weights, randn(4, 1, 2, 3, seed=200), covariances)


def tiny_unet(awake: bool = True, **changes: Any) -> SongUNet:
    """A small SongUNet for 8 x 8 images; awake means noise on its parameters, so that no layer is zero."""
    arguments: dict[str, Any] = {
        "img_resolution": 8,
        "in_channels": 1,
        "out_channels": 1,
        "model_channels": 8,
        "channel_mult": (1, 2),
        "num_blocks": 1,
        "attn_resolutions": (),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the initialisation of a network takes no generator
        net = SongUNet(**{**arguments, **changes})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters() if awake else ():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return net.eval()


def golden(name: str, class_name: str = "EDMPrecond") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments of a SongUNet and the tensors of NVlabs/edm's model around it, by the file's name."""
    path = Path(__file__).parent / "fixtures" / "golden" / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"{path.name} lies in the repository alone")
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert (config.pop("class_name"), config.pop("model_type")) == (class_name, "SongUNet")
    channels = config.pop("img_channels")
    return {"in_channels": channels, "out_channels": channels, **config}, tensors


def cubature(event_shape: tuple[int, ...] = EVENT) -> Tensor:
    """2 D points of mean 0 and covariance I, (2 D, 1, *event_shape).

    Quadratic functions average over them exactly as over N(0, I): the mean squared error of an affine
    denoiser is measured without sampling error.
    """
    dim = torch.Size(event_shape).numel()
    eye = torch.eye(dim, dtype=torch.float64) * dim**0.5
    return torch.cat([eye, -eye]).reshape(-1, 1, *event_shape)


@cache
def _denoiser(name: str, dtype: torch.dtype) -> Denoiser:
    data, labels = train_digits(dtype), digits()[1][split()[0]]
    gate = Gate(torch.tensor([0.1, 1.0, 10.0]), torch.tensor([0.9, 0.6, 0.1]))
    match name:
        case "isotropic":
            return GaussianDenoiser.isotropic(data.mean(0), data.var(0).mean())
        case "gaussian-full":
            return GaussianDenoiser.fit(data)
        case "gaussian-rank-10":
            return GaussianDenoiser.fit(data, rank=10)
        case "mixture-kmeans":
            return GaussianMixtureDenoiser.fit(data, n_components=5, rank=8)
        case "mixture-classes":
            return GaussianMixtureDenoiser.fit(data, labels=labels, rank=12)
        case "mixture-unequal-ranks":
            means = data.mean(0) + 0.3 * randn(3, *EVENT, dtype=dtype)
            parts = [GaussianDenoiser.fit(data).covariance, GaussianDenoiser.fit(data, rank=7).covariance]
            parts.append(GaussianDenoiser.isotropic(data.mean(0), 0.2).covariance)
            return GaussianMixtureDenoiser(torch.tensor([0.5, 0.3, 0.2], dtype=dtype), means, parts)
        case "delta":
            return DeltaDenoiser(data[:300], chunk_size=128)
        case "delta-classes":
            return DeltaDenoiser(data[:300], labels[:300])
        case "pca-local":
            return PCALocalDenoiser(data[:300], GaussianDenoiser.fit(data))
        case "patch-ls":
            return PatchDenoiser(data[:300], sizes=(1, 3, 15), sigmas=(0.05, 0.5, 5.0))
        case "patch-els":
            return PatchDenoiser(data[:20], sizes=3, equivariant=True)
        case "marginal":
            return MarginalDenoiser.fit(data)
        case "marginal-kmeans":
            return MarginalDenoiser.fit(data, GaussianMixtureDenoiser.fit(data, n_components=3, rank=8))
        case "marginal-classes":
            mixture = GaussianMixtureDenoiser.fit(data, labels=labels, rank=12, prior=64)
            return MarginalDenoiser.fit(data, mixture, labels=labels)
        case "guided":
            mixture = GaussianMixtureDenoiser.fit(data, n_components=5, rank=8)
            return GuidedDenoiser(mixture, GaussianDenoiser.fit(data, rank=10), w=1.5)
        case "edm":
            return EDMPrecond(tiny_unet()).to(dtype)
        case "vp":
            return VPPrecond(tiny_unet()).to(dtype)
        case "ve":
            return VEPrecond(tiny_unet()).to(dtype)
        case "iddpm":
            return iDDPMPrecond(tiny_unet(out_channels=2)).to(dtype)
        case "bypass":
            base = GaussianDenoiser.fit(data, rank=20)
            return BypassPrecond(tiny_unet(in_channels=2), base, gate).to(dtype)
    raise KeyError(name)


def denoiser(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A fresh copy of a named denoiser of digits, in eval mode, with its buffers in `dtype`."""
    return copy.deepcopy(_denoiser(name, dtype)).eval()


def normal_logpdf(x: Tensor, mean: Tensor, cov: Tensor) -> Tensor:
    """Log N(x; mean, cov) by scipy; x (B, D)."""
    law: Any = multivariate_normal
    return torch.from_numpy(law(mean.flatten().numpy(), cov.numpy()).logpdf(x.flatten(1).numpy()))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def k_diffusion_sampling() -> Any:
    """The samplers of k-diffusion, without the rest of the package and what that needs; skips without it."""
    spec = find_spec("k_diffusion") if "k_diffusion" not in sys.modules else None
    if spec is not None:
        package = ModuleType("k_diffusion")
        package.__path__ = list(spec.submodule_search_locations or [])
        sys.modules["k_diffusion"] = package  # its own __init__ imports all of it
    try:
        return import_module("k_diffusion.sampling")
    except ImportError as error:
        return pytest.skip(f"needs k-diffusion, torchdiffeq and torchsde: {error}")
