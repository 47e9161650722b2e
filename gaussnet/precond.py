"""Gaussian preconditioning, the bypass: the network learns only what the Gaussian denoiser leaves.

With mean mu, covariance Sigma, v = tr(Sigma)/D and noise level s,

    D(x, s) = D_gauss + g [w (D_iso - D_gauss) + c_out F(inputs, c_noise)]
    inputs  = [c_in (x - mu), D_gauss(x, s)],    c_in = 1/sqrt(v + s^2),    c_noise = ln(s)/4
    D_iso   = mu + v/(v + s^2) (x - mu)
    w(s)    = e(s)^2/s^2 = 1 - (1/D) tr[s^2 (Sigma + s^2 I)^-1],    e(s) the error of D_gauss

The base, D_gauss + g w (D_iso - D_gauss), is a spectral function f(Sigma) of x - mu. Its error is therefore
known in closed form for any data with these two moments, and c_out is its root:

    f(lam)  = (1 - g w) lam/(lam + s^2) + g w v/(v + s^2)
    c_out^2 = (1/D) sum [(1 - f)^2 lam + f^2 s^2],       loss weight = 1/c_out^2.

The target, x_0 - base over c_out, then has unit variance at every noise level. g is the optional gate of
`gaussnet.gate`: where it is closed, D is D_gauss exactly, and the network is not evaluated. 1 - w is the
share of the noise that the Gaussian removes: at the lowest noise, where the Gaussian hardly improves on the
identity and would only be something for a convolutional network to undo, the base fades to the isotropic
skip.

With base="marginal", the other half of the blend is D_m of `gaussnet.denoisers.pixel_marginals`, the Gaussian
refined by each pixel's own distribution. Its share w(s) is the one with the least error on held-out data, and
c_out the root of that error, both from `gaussnet.measured`. The inputs are the noise and the images that
these find:

    inputs  = [(x - D_m)/s, D_gauss, D_m]

All keep their size at every level, where c_in (x - mu) hides the noise of low levels, and how D_m took it.

Sigma = sigma_data^2 I and mu = 0 make all of this EDM's preconditioning, term by term: c_skip = v/(v + s^2),
c_out = s sigma_data/sqrt(v + s^2). Reference: Karras et al. 2022, arXiv 2206.00364, Table 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from gaussnet.bypass_fit import fit_parts
from gaussnet.bypass_parts import Base, Centre, check_forms, check_label_dropout, check_options, check_parts
from gaussnet.covariance import Covariance
from gaussnet.denoisers import (
    ComponentMarginals,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    Marginals,
)
from gaussnet.denoisers.component_marginals import denoise, refine
from gaussnet.fit.streams import Data
from gaussnet.gate import Gate, find_sigma_gate
from gaussnet.hub import build, describe
from gaussnet.measured import MeasuredError
from gaussnet.network_denoiser import NetworkDenoiser, check_channels, check_range, range_arguments
from gaussnet.numerics import Sigma, as_sigma, expand_as_event, known_true, level_dtype, result_dtype


class BypassPrecond(NetworkDenoiser):
    """A network around a Gaussian denoiser. With a zero output layer, it is its base exactly.

    Args:
        network: called as network(inputs, noise_labels, class_labels), with inputs (B, C', H, W) and
            noise_labels (B,); returns (B, C, H, W). C' is C, with `show_gaussian` 2 C, or 3 C where there are
            marginals.
        gaussian: fitted to the training data; its event shape is that of the model. Or a mixture, which with
            classes makes the base class-conditional; it needs `error`.
        gate: factor of all that is not Gaussian over sigma, in [0, 1]; default: 1 everywhere.
        show_gaussian: whether the network sees D_gauss(x, sigma) as additional channels, which lets it undo
            a global linear map that convolutions cannot compute; and D_m(x, sigma), where there is one.
        base: "blend" and "marginal" as above; "gaussian", w = 0; "isotropic", w = 1, EDM's skip about the
            data's moments.
        centre: what the network sees the noisy image about. "pixel", the mean image: c_in (x - mu);
            "channel", the same about its mean colour: about the mean image, flat backgrounds are no longer
            flat, but the network can tell where in the image it is; "estimate", with `show_gaussian`, D_m or
            D_gauss, over sigma. Default: "estimate" with base="marginal" where that can be, else "pixel".
        whiten: whether the network sees (Sigma + sigma^2 I)^(-1/2) (x - mu) in place of these.
        marginals: with base="marginal", fitted to the training data; `ComponentMarginals` of a mixture.
        error: the base's error measured on held-out data, in place of the closed form. With marginals,
            `MeasuredError.fit(gaussian, heldout, other=MarginalDenoiser(gaussian, marginals))`.
        gate_tol: where the gate is below it, it is closed. A batch of such levels does without the network.
        sigma_data: with base="isotropic": D_iso, c_in and c_out are EDM's, about 0 with this deviation.
        sigma_min: lowest level that the network was made for.
        sigma_max: highest level that the network was made for.

    Raises:
        TypeError: if marginals of components come without a mixture, or a mixture with those of none.
        ValueError: if the network's `in_channels` or `out_channels` do not fit, the Gaussian has no
            variance, or options exclude each other.
    """

    sigma_min: float
    sigma_max: float

    def __init__(
        self,
        network: nn.Module,
        gaussian: GaussianDenoiser | GaussianMixtureDenoiser,
        gate: Gate | None = None,
        show_gaussian: bool = True,
        base: Base = "blend",
        *,
        centre: Centre | None = None,
        whiten: bool = False,
        marginals: Marginals | ComponentMarginals | None = None,
        error: MeasuredError | None = None,
        gate_tol: float = 0.01,
        sigma_data: float | None = None,
        sigma_min: float = 0.0,
        sigma_max: float = math.inf,
    ) -> None:
        super().__init__()
        if centre is None:
            centre = "estimate" if base == "marginal" and show_gaussian and not whiten else "pixel"
        shown = show_gaussian * (1 + (marginals is not None))
        told = f" and {show_gaussian=}{', with marginals' * (marginals is not None)}"
        check_channels(network, gaussian.event_shape, 1 + shown, 1, type(self).__name__, told)
        check_options(base, centre, show_gaussian, whiten, gate_tol, sigma_data)
        check_parts(network, gaussian, base, whiten, marginals, error)
        self.model = network
        self.gaussian = gaussian
        self.gate = gate
        self.marginals = marginals
        self.error = error
        self.show_gaussian = show_gaussian
        self.base = base
        self.centre: Centre = centre
        self.whiten = whiten
        self.gate_tol = gate_tol
        self.sigma_data = sigma_data
        self.sigma_min, self.sigma_max = check_range(sigma_min, sigma_max)

    @classmethod
    def fit(
        cls,
        network: nn.Module,
        data: Data,
        heldout: Data | None = None,
        *,
        labels: Tensor | None = None,
        heldout_labels: Tensor | None = None,
        gaussian: GaussianDenoiser | GaussianMixtureDenoiser | None = None,
        base: Base = "marginal",
        mirror: bool = False,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Self:
        """A network around closed forms that are fitted to data, all of them, in one call.

        With fewer than thirty samples a dimension, train it with closed forms that have not seen what they
        denoise: `CrossFit`.

        Args:
            network: as of the class.
            data: the training set (N, C, H, W), or an iterable of batches that can be gone through several
                times.
            heldout: some hundred samples that are not in the training set, with base="marginal", classes or a
                mixture: the error of the base is measured on them.
            labels: integer classes (N,) of the training set: the closed forms are those of each class, and
                the model is to be told `class_labels`.
            heldout_labels: with `labels`, those of the held-out samples.
            gaussian: default: `GaussianDenoiser.fit(data)`, or with `labels` a `GaussianMixtureDenoiser` of a
                Gaussian a class, with base="marginal" with a prior of half as many samples as dimensions.
            base: as of the class.
            mirror: whether training will mirror half of the images, left to right.
            generator: draws the noise that gate and error are measured with.
            **options: further ones of the class. gate=None leaves the gate out.

        Raises:
            TypeError: as of the fits.
            ValueError: as of the class and the fits; without held-out samples where they are needed; with
                marginals or an error where they are fitted; or if only some of labels, held-out labels and a
                given mixture tell of classes.

        Example:
            >>> from gaussnet import SongUNet
            >>> images = torch.rand(300, 1, 8, 8, generator=torch.Generator().manual_seed(0))
            >>> network = SongUNet(8, in_channels=3, out_channels=1, model_channels=16, channel_mult=[1])
            >>> model = BypassPrecond.fit(network, images[:200], images[200:])
            >>> model(torch.randn(4, 1, 8, 8), sigma=1.0).shape
            torch.Size([4, 1, 8, 8])
        """
        if isinstance(data, (Tensor, np.ndarray)) and options.get("show_gaussian", True):
            shown = 2 if base == "marginal" else 1  # before a long fit, rather than after it
            check_channels(network, data.shape[1:], 1 + shown, 1, cls.__name__, f" and {base=}")
        if labels is not None:
            check_label_dropout(network)
        parts = fit_parts(data, heldout, labels, heldout_labels, gaussian, base, mirror, generator, options)
        return cls(network, base=base, **parts, **options)

    @classmethod
    def from_edm(
        cls,
        edm_model: BypassPrecond,
        gaussian: GaussianDenoiser,
        sigma_gate: float | None = None,
        tol: float = 0.1,
        n_queries: int = 64,
        generator: torch.Generator | None = None,
    ) -> Self:
        """A trained EDM model that is exactly Gaussian, and free, above a noise level.

        Args:
            edm_model: an `EDMPrecond`. Below the level, the result is this denoiser. Its network is shared,
                not copied.
            gaussian: fitted to the model's training data.
            sigma_gate: the level. Default: the lowest of 31 from 0.5 to 80 above which the two denoisers
                differ, in mean square over draws of N(mu, Sigma + sigma^2 I), by less than (tol e(sigma))^2.
            tol: as above.
            n_queries: number of draws at each level.
            generator: draws them, on the Gaussian's device.

        Raises:
            ValueError: if the model is not EDM's, event shapes differ, or the two denoisers do, at the
                highest level, too.
        """
        if edm_model.sigma_data is None:
            raise ValueError(f"expected an EDMPrecond, with sigma_data, got base={edm_model.base!r}")
        if edm_model.event_shape != gaussian.event_shape:
            shapes = f"{tuple(edm_model.event_shape)} and {tuple(gaussian.event_shape)}"
            raise ValueError(f"expected a model and a Gaussian of one event shape, got {shapes}")
        if sigma_gate is None:
            sigma_gate = find_sigma_gate(edm_model, gaussian, tol, n_queries, generator)
        model = cls(
            edm_model.model,
            gaussian,
            Gate.step(sigma_gate).to(gaussian.mean.device),
            show_gaussian=False,
            base="isotropic",
            sigma_data=edm_model.sigma_data,
            sigma_min=edm_model.sigma_min,
            sigma_max=edm_model.sigma_max,
        )
        return model.train(edm_model.training)

    @property
    def event_shape(self) -> torch.Size:
        return self.gaussian.event_shape

    @property
    def sigma_gate(self) -> float:
        """The level above which the model is its Gaussian; inf without a gate that closes."""
        return math.inf if self.gate is None else self.gate.closes(max(self.gate_tol, 1e-30))

    def facts(self) -> dict[str, str]:
        gate = "none: the network is evaluated at every level"
        if self.sigma_gate < math.inf:
            gate = f"{self.sigma_gate:.3g}: above it, the model is its Gaussian, without the network"
        return {**super().facts(), "base": self.base, "sigma_gate": gate}

    def forward(
        self,
        x: Tensor,
        sigma: Sigma,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        closed_forms: tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        """The denoised estimate of `x`.

        Args:
            x: noisy images (B, C, H, W).
            sigma: their noise levels, as of `Denoiser.forward`.
            class_labels: as of `Denoiser.forward`.
            augment_labels: of a network that is told how its images were augmented.
            closed_forms: D_gauss(x, sigma) and, where there are marginals, D_m(x, sigma), in place of the
                model's own: what `CrossFit` returns, in training.

        Raises:
            ValueError: if there are not as many closed forms, each of the shape of `x`.
        """
        batch_shape = self._batch_shape(x)
        dtype = result_dtype(x)
        level = as_sigma(sigma, x, batch_shape, dtype).expand(batch_shape)
        forms = check_forms(closed_forms, x, self.marginals is not None)
        gaussian, weights = denoise(self.gaussian, x, level, class_labels) if not forms else (forms[0], None)
        g = self._open(level)
        # In training, every process of a group has to go through its network.
        if self.gate is not None and not self.training and known_true((g == 0).all()):
            return gaussian
        other = self._other(x, level, gaussian, weights) if len(forms) < 2 else forms[1]
        shown = [gaussian] if self.marginals is None else [gaussian, other]
        inputs = self._inputs(x, level, shown[-1])
        if self.show_gaussian:
            inputs = torch.cat([inputs, *shown], dim=1)  # (B, 2 C or 3 C, H, W)
        output = self._evaluate(inputs, torch.log(level) / 4, class_labels, augment_labels)
        share = self._share(level, g)
        residual = expand_as_event(g * self._c_out(level, share), len(self.event_shape)) * output
        return (self._blend(gaussian, other, share) + residual).to(dtype)

    def untrained(self, x: Tensor, sigma: Sigma, class_labels: Tensor | None = None) -> Tensor:
        """The base: what the model is without its network. Arguments as in `forward`."""
        level = as_sigma(sigma, x, self._batch_shape(x), result_dtype(x))
        gaussian, weights = denoise(self.gaussian, x, level, class_labels)
        other = self._other(x, level, gaussian, weights)
        return self._blend(gaussian, other, self._share(level, self._open(level)))

    def c_out(self, sigma: Sigma) -> Tensor:
        """The root mean squared error per dimension of the base, and scale of the network; shape of sigma."""
        buffer = self.gaussian.variance
        shape = tuple(sigma.shape) if isinstance(sigma, Tensor) else ()
        level = as_sigma(sigma, buffer, shape, level_dtype(sigma, buffer))
        return self._c_out(level, self._share(level, self._open(level)))

    def weight(self, sigma: Sigma) -> Tensor:
        """The loss weight 1/c_out^2 of the squared denoising error; shape of sigma."""
        return self.c_out(sigma) ** -2

    @property
    def _covariance(self) -> Covariance:
        assert isinstance(self.gaussian, GaussianDenoiser)
        return self.gaussian.covariance

    def _moments(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Mean and variance of the isotropic skip."""
        mean, v = self.gaussian.mean.to(dtype), self.gaussian.variance.to(dtype)
        if self.sigma_data is not None:
            return torch.zeros_like(mean), torch.full_like(v, self.sigma_data**2)
        return mean, v

    def _open(self, level: Tensor) -> Tensor:
        """g, 0 where the gate is closed; shape of the level."""
        if self.gate is None:
            return torch.ones_like(level)
        g = self.gate(level).to(level.dtype)
        return torch.where(g < self.gate_tol, 0, g)

    def _share(self, level: Tensor, g: Tensor) -> Tensor:
        """The share of the base that is not the Gaussian's, g w; shape of the level."""
        if self.base == "gaussian":
            return torch.zeros_like(level)
        if self.base == "isotropic":
            return g
        if self.base == "marginal":
            assert self.error is not None
            return g * self.error.best_share(level)
        noise = level**2
        if self.error is not None:
            own = self.error.error(level, torch.zeros_like(level), self.gaussian.variance.to(level.dtype))
            return g * (own / noise).clamp(max=1)
        cov = self._covariance
        return g * cov.trace(lambda lam: lam / (lam + noise[..., None]), level.dtype) / cov.dim

    def _c_out(self, level: Tensor, share: Tensor) -> Tensor:
        _, v = self._moments(level.dtype)
        if self.sigma_data is not None:  # what the network was trained with
            return torch.sqrt(v * level**2 / (v + level**2))
        if self.error is not None:
            return torch.sqrt(self.error.error(level, share, v))
        noise, share = level[..., None] ** 2, share[..., None]

        def error(lam: Tensor) -> Tensor:
            f = (1 - share) * lam / (lam + noise) + share * v / (v + noise)
            return (1 - f) ** 2 * lam + f**2 * noise

        return torch.sqrt(self._covariance.trace(error, level.dtype) / self._covariance.dim)

    def _inputs(self, x: Tensor, level: Tensor, estimate: Tensor) -> Tensor:
        if self.centre == "estimate":
            return (x.to(level.dtype) - estimate) / expand_as_event(level, len(self.event_shape))
        if self.whiten:
            assert isinstance(self.gaussian, GaussianDenoiser)
            return self.gaussian.filter(lambda lam, s: torch.rsqrt(lam + s**2), x, level).to(level.dtype)
        mean, v = self._moments(level.dtype)
        if self.centre == "channel" and mean.ndim > 1:
            flat = mean.mean(tuple(range(1, mean.ndim)), keepdim=True)
            mean, v = flat, v + (mean - flat).square().mean()
        return expand_as_event(torch.rsqrt(v + level**2), len(self.event_shape)) * (x.to(level.dtype) - mean)

    def _other(self, x: Tensor, level: Tensor, gaussian: Tensor, weights: Tensor | None) -> Tensor:
        """What the Gaussian's estimate is blended with: the isotropic one, or that of the marginals."""
        if self.marginals is not None:
            return refine(self.gaussian, self.marginals, gaussian, x, level, weights)
        mean, v = self._moments(gaussian.dtype)
        c_skip = expand_as_event(v / (v + level**2), len(self.event_shape))
        return mean + c_skip * (x.to(gaussian.dtype) - mean)

    def _blend(self, gaussian: Tensor, other: Tensor, share: Tensor) -> Tensor:
        if self.base == "gaussian":
            return gaussian
        return torch.lerp(gaussian, other, expand_as_event(share, len(self.event_shape)).expand_as(gaussian))

    def to_arguments(self) -> dict[str, Any]:
        return {
            "network": describe(self.model),
            "gaussian": describe(self.gaussian),
            "gate": None if self.gate is None else describe(self.gate),
            "show_gaussian": self.show_gaussian,
            "base": self.base,
            "centre": self.centre,
            "whiten": self.whiten,
            "marginals": None if self.marginals is None else describe(self.marginals),
            "error": None if self.error is None else describe(self.error),
            "gate_tol": self.gate_tol,
            "sigma_data": self.sigma_data,
            **range_arguments(self),
        }

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Self:
        options: dict[str, Any] = {**arguments, "sigma_max": arguments["sigma_max"] or math.inf}
        for name in ("network", "gaussian", "gate", "marginals", "error"):
            described = options.get(name)  # older models do not tell of marginals
            options[name] = None if described is None else build(described)
        return cls(**options)
