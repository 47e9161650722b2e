"""What an experiment works on: a model, images, and the analytic denoisers fitted to them.

Models and references have names. A saved model is a folder or a hub repository; `NAME.pkl` is a snapshot of
NVlabs/edm; `diffusers:PATH` a pipeline of diffusers in pixels. Analytic denoisers, fitted to the images
when they are first asked for:

    isotropic       N(mu, sigma_data^2 I): the paper's (mu - x)/sigma^2 has no variance at all
    point           N(mu, 0), the paper's isotropic score (Eq. 29 of arXiv 2412.09726)
    gaussian        mean and covariance (Eq. 12)
    marginal        the same, corrected by each pixel's own distribution (not in the paper)
    classes         one Gaussian a class, as a mixture
    mixture-K       K clusters by k-means (Eq. 41), mixture-KrR of rank R at most
    delta           the images themselves (Eq. 9)

Any of them can also stand for the model, which makes a check of every experiment: with `gaussian` as the
model its deviations from the Gaussian are zero.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from gaussnet.data import ImageData
from gaussnet.data.images import spread
from gaussnet.denoisers import (
    DeltaDenoiser,
    Denoiser,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    GuidedDenoiser,
    MarginalDenoiser,
)
from gaussnet.edm_import import import_edm
from gaussnet.hub import CONFIG_NAME, WEIGHTS_NAME, from_pretrained
from gaussnet.network_denoiser import NetworkDenoiser

ANALYTIC = ("isotropic", "point", "gaussian", "marginal", "classes", "mixture-K", "mixture-KrR", "delta")
_MODEL_FILES = (
    CONFIG_NAME,
    WEIGHTS_NAME,
    "model_index.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "vqvae/config.json",
    "vqvae/diffusion_pytorch_model.safetensors",
    "scheduler/scheduler_config.json",
)
_MIXTURE = re.compile(r"mixture-(\d+)(?:r(\d+))?")


@dataclass
class Setting:
    """A model, images, and where and how to compute.

    Args:
        model_name: of the model, as above.
        data: the images; padded with black to the size of the model where that is larger by an even number.
        heldout: of them, left out of all fits, to take queries from; 0: queries are among the images.
        fit_images: at most so many are fitted, drawn at random.
        shrinkage: of eigenvalues, see `GaussianDenoiser.fit`; "none" is the paper's.
        seed: of all draws.
        device: where denoisers are evaluated.
        batch: queries or samples at a time.
        cache: folder for fitted mixtures, which take long.

    Raises:
        ValueError: if the images do not fit the model, or there are too few.
        FileNotFoundError: if there is no such model.

    Example:
        >>> images = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        >>> setting = Setting("gaussian", ImageData(images, scaling=(0, 1)), heldout=4)
        >>> setting.model is setting.reference("gaussian"), setting.queries(10)[0].shape
        (True, torch.Size([4, 1, 4, 4]))
    """

    model_name: str
    data: ImageData | None = None
    heldout: int = 0
    fit_images: int = 20_000
    shrinkage: str = "cv"
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch: int = 256
    cache: Path | None = None
    _references: dict[str, Denoiser] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name in ("fit_images", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, got {getattr(self, name)}")
        if self.data is not None:
            if self._saved is not None:
                self.data = fitting(self.data, tuple(self._saved.event_shape))
            if not 0 <= self.heldout <= len(self.data) - 2:
                raise ValueError(
                    f"expected 0 <= heldout <= {len(self.data) - 2}, the images but two, got {self.heldout}"
                )

    @cached_property
    def _saved(self) -> Denoiser | None:
        """The model, unless it is analytic; a run that is still going has none, and may need none."""
        return None if is_analytic(self.model_name) else load_model(self.model_name)

    @cached_property
    def model(self) -> Denoiser:
        """The denoiser under study, in eval mode, on the device."""
        model = self._saved if self._saved is not None else self.reference(self.model_name)
        return model.to(self.device).eval()

    @property
    def lacks_labels(self) -> bool:
        """Whether the model is a network that knows classes, and may not know what to do without labels."""
        return self._saved is not None and has_classes(self._saved)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """(C, H, W) of model and images."""
        return tuple(self._images.event_shape) if self._saved is None else tuple(self._saved.event_shape)

    @property
    def identity(self) -> dict[str, Any]:
        """What results depend on, JSON-able: which model, which images, which fits."""
        return {
            "model": fingerprint(self.model_name),
            "data": None if self.data is None else repr(self.data),
            "images": self._digest,
            "heldout": self.heldout,
            "fit_images": self.fit_images,
            "shrinkage": self.shrinkage,
            "seed": self.seed,
        }

    @cached_property
    def _digest(self) -> str | None:
        """A checksum of some images and all labels: others in the same file are other data."""
        if self.data is None:
            return None
        images = self.data.raw(spread(len(self.data)))
        digest = hashlib.sha256(images.contiguous().cpu().numpy().tobytes())
        if self.data.labels is not None:
            digest.update(self.data.labels.numpy().tobytes())
        return digest.hexdigest()

    def generator(self, *purpose: object) -> torch.Generator:
        """A generator on the CPU that depends on the seed and the purpose alone."""
        digest = hashlib.sha256(json.dumps([self.seed, *map(str, purpose)]).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def queries(self, count: int) -> tuple[Tensor, Tensor | None]:
        """At most `count` clean images (n, C, H, W) and their classes: held-out ones, if some are."""
        places = self._order[: self.heldout or None][:count]
        images, labels = self._images[places]
        return self._images.to_float(images).to(self.device), self._classes(labels)

    @cached_property
    def fitted(self) -> tuple[Tensor, Tensor | None]:
        """The images (N, C, H, W) that references are fitted to, and their classes."""
        places = self._order[self.heldout :]
        places = places[-self.fit_images :].sort().values  # from the other end than queries
        images, labels = self._images[places]
        return self._images.to_float(images), self._classes(labels)

    def noise(self, count: int, *purpose: object) -> Tensor:
        """Standard normal noise (count, C, H, W), the same for the same purpose."""
        return torch.randn(count, *self.event_shape, generator=self.generator("noise", *purpose)).to(
            self.device
        )

    def check_references(self, names: Iterable[str]) -> None:
        """Refuses what `reference` would, before anything is computed.

        Raises:
            ValueError: as there.
        """
        for name in names:
            if not is_analytic(name):
                raise ValueError(f"expected an analytic denoiser among {', '.join(ANALYTIC)}, got {name!r}")
            if name == "classes" and self._images.labels is None:
                raise ValueError(f"classes: expected images with class labels, {self._images.name} has none")

    def reference(self, name: str) -> Denoiser:
        """An analytic denoiser by name, fitted once, on the device.

        Raises:
            ValueError: if the name is unknown, or the images do not allow it.
        """
        self.check_references([name])
        if name not in self._references:
            self._references[name] = self._load_or_fit(name).to(self.device).eval()
        return self._references[name]

    def references(self, names: list[str]) -> dict[str, Denoiser]:
        """Several of them by name."""
        return {name: self.reference(name) for name in names}

    @property
    def gaussian(self) -> GaussianDenoiser:
        """The Gaussian of the images."""
        return cast("GaussianDenoiser", self.reference("gaussian"))

    # Parts ----------------------------------------------------------------------------------------

    @property
    def _images(self) -> ImageData:
        if self.data is None:
            raise ValueError("expected images to fit analytic denoisers to (--data), got none")
        return self.data

    @cached_property
    def _order(self) -> Tensor:
        return torch.randperm(len(self._images), generator=self.generator("order"))

    def _classes(self, labels: Tensor) -> Tensor | None:
        return None if self._images.labels is None else labels.to(self.device)

    def _load_or_fit(self, name: str) -> Denoiser:
        mixture = _MIXTURE.fullmatch(name)
        slow = mixture is not None or name == "classes"
        if self.cache is None or not slow:
            return self._fit(name)
        told = json.dumps({**self.identity, "model": None, "name": name}, sort_keys=True)
        folder = self.cache / f"{name}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"
        if not (folder / CONFIG_NAME).is_file():
            self.cache.mkdir(parents=True, exist_ok=True)
            aside = folder.with_name(f"{folder.name}.{id(self)}.partial")
            self._fit(name).save_pretrained(aside)
            try:
                aside.rename(folder)
            except OSError:  # another process was faster
                shutil.rmtree(aside)
        return from_pretrained(folder)

    def _fit(self, name: str) -> Denoiser:
        images, labels = self.fitted
        if name == "delta":
            return DeltaDenoiser(images, labels)
        if name == "gaussian":
            return GaussianDenoiser.fit(images, shrinkage=self.shrinkage)
        if name == "marginal":
            return MarginalDenoiser.fit(images, self.gaussian, generator=self.generator("marginal"))
        if name == "isotropic":
            return GaussianDenoiser.isotropic(self.gaussian.mean, self.gaussian.variance)
        if name == "point":
            return GaussianDenoiser.isotropic(self.gaussian.mean, 0.0)
        if name == "classes":
            return GaussianMixtureDenoiser.fit(images, labels=labels, shrinkage=self.shrinkage)
        mixture = cast("re.Match[str]", _MIXTURE.fullmatch(name))
        count, rank = int(mixture[1]), None if mixture[2] is None else int(mixture[2])
        return GaussianMixtureDenoiser.fit(images, count, rank, self.seed, shrinkage=self.shrinkage)


def is_analytic(name: str) -> bool:
    """Whether a name is that of an analytic denoiser, fitted to the images."""
    return name in ANALYTIC or _MIXTURE.fullmatch(name) is not None


def load_model(name: str) -> Denoiser:
    """A saved model, an EDM snapshot or the UNet of a pipeline of diffusers, by name.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it cannot be read.
    """
    if name.startswith("diffusers:"):
        from gaussnet.integrations.diffusers_models import DiffusersDenoiser, diffusers

        path = name.removeprefix("diffusers:")
        if Path(path).is_absolute() and not Path(path, "model_index.json").is_file():
            raise FileNotFoundError(f"expected a pipeline of diffusers, got no model_index.json in {path}")
        pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(path)
        if "unet" not in pipeline.components:
            raise ValueError(f"expected a pipeline with a unet, got {type(pipeline).__name__} in {path}")
        return DiffusersDenoiser(pipeline.unet, pipeline.scheduler)
    if name.endswith(".pkl"):
        return import_edm(name)
    return from_pretrained(name)


def has_classes(model: Denoiser) -> bool:
    """Whether class labels mean something to a denoiser."""
    if isinstance(model, GuidedDenoiser):
        return has_classes(model.cond)
    if isinstance(model, NetworkDenoiser):
        return bool(getattr(model.model, "label_dim", 0))
    known = ("component_labels", "data_labels")  # of mixtures, and of the images themselves
    return any(getattr(model, name, None) is not None for name in known)


def fingerprint(name: str) -> dict[str, Any]:
    """What tells one model from another of the same name: the sizes and times of its files."""
    path = Path(name.removeprefix("diffusers:"))
    files = [path] if path.is_file() else [path / file for file in _MODEL_FILES]
    stamps = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return {"name": name, "files": stamps}


def fitting(data: ImageData, event_shape: tuple[int, ...]) -> ImageData:
    """The images at the size of a model, with a black frame where that is larger by an even number.

    Raises:
        ValueError: if they do not fit it.
    """
    shape = tuple(data.event_shape)
    if shape == event_shape:
        return data
    extra = {large - small for small, large in zip(shape[1:], event_shape[1:], strict=False)}
    frame = extra.pop() if len(extra) == 1 else -1
    if len(shape) != len(event_shape) or shape[0] != event_shape[0] or frame < 0 or frame % 2:
        raise ValueError(
            f"expected images of shape {event_shape}, that of the model, got {shape} in {data.name}"
        )
    return data.padded(frame // 2)
