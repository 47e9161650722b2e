"""Statistics of a denoiser that make the coefficients of DPM-Solver-v3.

In lambda = -log sigma the ODE is dx/dlambda = D - x. For any l(lambda) it is dx/dlambda = -l x - f, with

    f(x, lambda) = (1 - l) x - D(x, sigma),

and for any s(lambda) and b(lambda), g(lambda) = e^(-S) f - B is what they leave unexplained of f along a
trajectory, dg/dlambda = e^(-S) (df/dlambda - s f - b), where from the start of a step to lambda

    L = int l,        S = int s,        B = int e^(-S) b        (all of them pixel by pixel),
    x' = e^(-L') [x - int e^(L + S) (g + B) dlambda]        exactly.

The statistics make g as nearly constant as they can, in the mean over noised data, with df/dlambda along the
ODE:

    l = E diag(I - dD/dx),        s = Cov[f, df/dlambda] / Var[f],        b = E[df/dlambda] - s E[f].

The first minimises E||df/dx||^2 among diagonal l, the others are the least squares of df/dlambda on f.
l = 1, s = b = 0 interpolates the data, as DPM-Solver++ does, and l = b = 0, s = -1 the noise, as DPM-Solver.

Reference: Zheng et al. 2023, arXiv 2310.13268. Their code has the noise in place of the data: sigma times
their network is x - D, with which their N_theta is f.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from gaussnet.numerics import wide_dtype
from gaussnet.samplers.stepping import level_of
from gaussnet.samplers.weights import POINTS, SHARES

if TYPE_CHECKING:
    from scipy.interpolate import CubicSpline, PPoly

_RESOLVED = 1e-4  # least spread of f that is told from none, in units of (1 - l) sigma

_LEGENDRE = np.polynomial.legendre.legvander(2 * POINTS - 1, len(POINTS) - 1)
# _UP_TO[q, k] = int_0^(p_q) of the Lagrange polynomial k of the points, a column of the inverse as a series
_PRIMITIVES = np.polynomial.legendre.legint(np.linalg.inv(_LEGENDRE), lbnd=-1) / 2
_UP_TO = np.polynomial.legendre.legval(2 * POINTS - 1, _PRIMITIVES).T


@dataclass(frozen=True, eq=False)
class ModelStatistics:
    """l, s and b of a denoiser over log sigma: cubic splines through a table.

    Args:
        sigmas: increasing noise levels, shape (n,), n >= 2.
        l: the linear part, (n, *event_shape) or what broadcasts to it, such as (n, 1, 1, 1).
        s: the rate of f, of the same shape.
        b: the drift of f, of the same shape, in units of x.

    Raises:
        ValueError: if the levels do not increase from above 0, or a table is not finite or of another shape.

    Example:
        >>> sigmas = torch.tensor([0.01, 1.0, 100.0])
        >>> zero = torch.zeros(3, 1)
        >>> statistics = ModelStatistics(sigmas, l=1 + zero, s=zero, b=zero)  # l = 1: that f is -D alone
        >>> statistics.residual(torch.tensor([[3.0]]), denoised=torch.tensor([[2.0]]), sigma=1.0)
        tensor([[-2.]])
    """

    sigmas: Tensor
    l: Tensor  # noqa: E741 - the name in the paper
    s: Tensor
    b: Tensor

    def __post_init__(self) -> None:
        sigmas = self.sigmas
        if sigmas.ndim != 1 or len(sigmas) < 2 or not bool((sigmas.diff() > 0).all() & (sigmas[0] > 0)):
            raise ValueError(f"expected at least two increasing positive sigmas, got {sigmas.tolist()}")
        for name in ("l", "s", "b"):
            table = getattr(self, name)
            if len(table) != len(sigmas) or table.shape != self.l.shape or not bool(table.isfinite().all()):
                raise ValueError(
                    f"expected finite tables of shape ({len(sigmas)}, *event_shape), as l's "
                    f"{tuple(self.l.shape)}, got {name} of shape {tuple(table.shape)}"
                )

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file."""
        tables = {field.name: getattr(self, field.name).contiguous() for field in fields(self)}
        save_file(tables, path, metadata={"format": "pt"})

    @classmethod
    def load(cls, path: str | Path) -> ModelStatistics:
        """What `save` wrote, on the CPU.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it holds something else.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no file {path}: expected one that ModelStatistics.save wrote")
        try:
            tables = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
        if set(tables) != {field.name for field in fields(cls)}:
            raise ValueError(f"expected {path} to hold sigmas, l, s and b, got {sorted(tables)}")
        return cls(**tables)

    def slice(self, sigma_max: float) -> ModelStatistics:
        """The table up to a level, as for a sampler that a teleport takes there; nothing is stretched.

        Raises:
            ValueError: if the level is not within the table, above its first.
        """
        self.check_levels([sigma_max])
        kept = self.sigmas < sigma_max * (1 - 1e-9)
        if not bool(kept.any()):
            raise ValueError(f"expected sigma_max above {float(self.sigmas[0]):g}, got {sigma_max}")
        end = torch.from_numpy(self._spline(-math.log(sigma_max))).to(self.l)  # (3, *event_shape)
        tables = (torch.cat([t[kept], e[None]]) for t, e in zip((self.l, self.s, self.b), end, strict=True))
        return ModelStatistics(torch.cat([self.sigmas[kept], self.sigmas.new_tensor([sigma_max])]), *tables)

    def check_levels(self, levels: Sequence[float]) -> None:
        """Refuses levels outside of the table, but for rounding.

        Raises:
            ValueError: if there is one.
        """
        low, high = float(self.sigmas[0]), float(self.sigmas[-1])
        outside = [level for level in levels if not low * (1 - 1e-6) <= level <= high * (1 + 1e-6)]
        if outside:
            raise ValueError(
                f"expected levels within those of the statistics, {low:g} to {high:g}, got {outside}"
            )

    def residual(self, x: Tensor, denoised: Tensor, sigma: float) -> Tensor:
        """What l leaves of the ODE: f = (1 - l) x - D, of the shape of x, (B, *event_shape)."""
        return as_factor(1 - self._spline(-math.log(sigma))[0], x) * x - denoised

    def step(
        self, sigma: float, sigma_next: float, levels: Sequence[float], pseudo: bool = False
    ) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
        """What a step from one level to another sums.

        Args:
            sigma: its first level.
            sigma_next: its last level.
            levels: where f is known. g is the polynomial through all of them; or, with `pseudo`, has for its
                k-th derivative the divided difference of the first k + 1 of them, which begin with `sigma`.
            pseudo: see there.

        Returns:
            The factor of x, those of f at each of the levels, and the constant, of event_shape; float64.
        """
        now, then, *nodes = (-math.log(level) for level in (sigma, sigma_next, *levels))
        origin, end = self._integral(now), self._integral(then)[0]  # (3, *event_shape), (*event_shape)
        points, h = now + (then - now) * POINTS, then - now
        to_l, to_s, _ = np.moveaxis(self._integral(points) - origin, 1, 0)  # (points, *event_shape) each
        decay = np.exp(to_l + to_s - (end - origin[0]))  # e^(L + S - L')
        drift = h * np.tensordot(_UP_TO, np.exp(-to_s) * self._spline(points)[:, 2], 1)  # B at the points
        constant = -h * np.tensordot(SHARES, decay * drift, 1)
        factors: list[np.ndarray] = []
        for node, basis in zip(nodes, _bases(points, nodes, pseudo), strict=True):
            weight = h * np.tensordot(SHARES * basis, decay, 1)
            factors.append(-weight * np.exp(origin[1] - self._integral(node)[1]))
            constant += weight * self._drift(now, node)
        return np.exp(origin[0] - end), factors, constant

    def _drift(self, now: float, node: float) -> np.ndarray:
        """B from one lambda to another."""
        points = now + (node - now) * POINTS
        to_s = (self._integral(points) - self._integral(now))[:, 1]
        return (node - now) * np.tensordot(SHARES, np.exp(-to_s) * self._spline(points)[:, 2], 1)

    @cached_property
    def _spline(self) -> CubicSpline:
        """l, s and b as a function of lambda."""
        from scipy.interpolate import CubicSpline  # here: SciPy takes long to import

        tables = torch.stack([self.l, self.s, self.b], 1).flip(0).double().cpu().numpy()
        return CubicSpline(-self.sigmas.flip(0).double().log().cpu().numpy(), tables)

    @cached_property
    def _integral(self) -> PPoly:
        return self._spline.antiderivative()


def compute_ems(
    denoiser: nn.Module,
    data: Tensor,
    sigmas: Tensor,
    *,
    n: int = 1024,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
    class_labels: Tensor | None = None,
) -> ModelStatistics:
    """The empirical model statistics of a denoiser, in the mean over noised data.

    Two Jacobian-vector products for each sample and level, about four evaluations. The diagonal of the
    Jacobian is Hutchinson's estimate v * (J v) with random signs v. All levels share samples, noise and
    signs, so that the tables are smooth in log sigma. States of the model's own trajectories may serve in
    place of noised data, of which they are samples as far as the model has learnt them.

    Reference: Zheng et al. 2023, arXiv 2310.13268.

    Args:
        denoiser: any denoiser that has forward-mode derivatives in x and sigma. (One that rounds sigma hides
            its dependence on it.)
        data: clean samples (N, *event_shape) on the device and in the dtype of the denoiser.
        sigmas: the levels of the table, (m,), in any order; a 0, as at the end of a grid, is left out. They
            must span the sampler's grids. 60 from 0.002 to 80, even in log sigma, resolve smooth statistics.
        n: number of noised samples; data are repeated, with other noise, if there are fewer.
        batch_size: how many the denoiser gets at a time.
        generator: draws samples, noise and signs, on its own device.
        class_labels: of the data, handed to the denoiser; (N,) or one-hot rows (N, classes).

    Returns:
        The statistics, in float64 on the CPU.

    Raises:
        ValueError: if the data are no batch of samples, the labels do not fit them, n < 2, or there are not
            two positive levels.

    Example:
        >>> from gaussnet import GaussianDenoiser, log_snr_sigmas
        >>> data = torch.randn(64, 1, generator=torch.Generator().manual_seed(0))
        >>> gaussian = GaussianDenoiser.isotropic(torch.zeros(1), 1.0)
        >>> statistics = compute_ems(gaussian, data, log_snr_sigmas(9, 0.1, 10.0), n=64)
        >>> statistics.l[4].item()  # at sigma = 1, where dD/dx = 1/(1 + sigma^2)
        0.5
    """
    if data.ndim < 2 or not len(data) or not data.is_floating_point():
        raise ValueError(f"expected floating data (N, *event_shape), got {data.dtype} {tuple(data.shape)}")
    if class_labels is not None and len(class_labels) != len(data):
        raise ValueError(f"expected {len(data)} class_labels, one for each sample, got {len(class_labels)}")
    if n < 2 or batch_size < 1:
        raise ValueError(f"expected n >= 2 samples in batches of at least 1, got {n} and {batch_size}")
    levels = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu").flatten().unique()  # increasing
    levels = levels[levels != 0]
    if len(levels) < 2 or not bool((levels > 0).all() & levels.isfinite().all()):
        raise ValueError(f"expected at least two finite positive sigmas, got {levels.tolist()}")
    device = data.device if generator is None else generator.device
    order = torch.randperm(len(data), generator=generator, device=device).to(data.device)
    places = order.repeat(-(-n // len(data)))[:n]
    shape = (n, *data.shape[1:])
    noise = torch.randn(shape, generator=generator, device=device).to(data)
    signs = torch.randint(2, shape, generator=generator, device=device).to(data) * 2 - 1
    parts = [
        (data[at], noise[k], signs[k], None if class_labels is None else class_labels[at])
        for k, at in zip(torch.arange(n).split(batch_size), places.split(batch_size), strict=True)
    ]
    means, products, diagonals = list[Tensor](), list[Tensor](), list[Tensor]()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward-mode derivatives
        for sigma in tqdm(
            levels.tolist(), desc="statistics", unit="level", delay=2, leave=False, disable=None
        ):
            rows = [
                _known(denoiser, clean + sigma * own, sigma, sign, labels)
                for clean, own, sign, labels in parts
            ]
            known = torch.cat([row for row, _ in rows], 1)  # (3, n, *event_shape)
            diagonals.append(torch.cat([diagonal for _, diagonal in rows]).mean(0))
            if not bool(known.isfinite().all() & diagonals[-1].isfinite().all()):
                raise ValueError(
                    f"expected {type(denoiser).__name__} to have finite derivatives in x and sigma, "
                    f"got others at sigma = {sigma:g}"
                )
            means.append(known.mean(1))
            off = known - means[-1][:, None]
            products.append(torch.einsum("in...,jn...->ij...", off, off) / n)
    moments = (torch.stack(rows).cpu().double() for rows in (means, products, diagonals))
    return _statistics(levels, *moments, eps=torch.finfo(data.dtype).eps)


def _bases(points: np.ndarray, nodes: Sequence[float], pseudo: bool) -> list[np.ndarray]:
    """What each node's value contributes to Newton's interpolation, at the points: (nodes, points).

    sum_k [g_0, ..., g_k] prod_(m < k) (lambda - lambda_m), with (lambda - lambda_0)^k for the product if
    `pseudo`.
    """
    one = np.ones_like(points)
    powers = [
        math.prod((points - nodes[0 if pseudo else m] for m in range(k)), start=one)
        for k in range(len(nodes))
    ]
    bases = list[np.ndarray]()
    for j, node in enumerate(nodes):
        gaps = [
            math.prod(node - other for other in nodes[: k + 1] if other != node) for k in range(len(nodes))
        ]
        bases.append(np.sum([powers[k] / gaps[k] for k in range(j, len(nodes))], axis=0))
    return bases


def _known(
    denoiser: nn.Module, x: Tensor, sigma: float, sign: Tensor, class_labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x, D and dD/dlambda along the ODE, (3, B, *event_shape), and estimates of the diagonal of dD/dx."""

    def denoise(x: Tensor, level: Tensor) -> Tensor:
        return denoiser(x, level) if class_labels is None else denoiser(x, level, class_labels=class_labels)

    level = level_of(x, sigma)
    denoised, product = cast(
        "tuple[Tensor, Tensor]", torch.func.jvp(denoise, (x, level), (sign, torch.zeros_like(level)))
    )
    direction = (denoised.to(x) - x, -level)  # of x and sigma, in lambda
    slope = cast(Tensor, torch.func.jvp(denoise, (x, level), direction)[1])
    wide = wide_dtype(x.device)
    return torch.stack([x.to(wide), denoised.to(wide), slope.to(wide)]), (sign * product).to(wide)


def _statistics(
    levels: Tensor, mean: Tensor, product: Tensor, diagonal: Tensor, eps: float
) -> ModelStatistics:
    """From the moments of u = (x, D, dD/dlambda), in which f = a.u and df/dlambda = c.u are linear."""
    from scipy.interpolate import CubicSpline  # here: SciPy takes long to import

    l = 1 - diagonal  # noqa: E741  # (n, *event_shape)
    spline = CubicSpline(-levels.log().flip(0).numpy(), l.flip(0).numpy())
    rise = torch.from_numpy(spline(-levels.log().numpy(), 1))  # dl/dlambda
    one = torch.ones_like(l)
    a = torch.stack([1 - l, -one, 0 * one], 1)  # (n, 3, *event_shape)
    c = torch.stack([l - 1 - rise, 1 - l, -one], 1)  # (1 - l) (D - x) - x dl/dlambda - dD/dlambda
    variance = torch.einsum("ni...,nij...,nj...->n...", a, product, a)
    joint = torch.einsum("ni...,nij...,nj...->n...", a, product, c)
    unit = (1 - l) * levels.reshape(-1, *(1,) * (l.ndim - 1))
    rounding = (16 * eps) ** 2 * (product[:, 1, 1] + mean[:, 1] ** 2)  # of D
    known = variance > (_RESOLVED * unit) ** 2 + rounding
    s = torch.where(known, joint / variance.where(known, one), 0)  # an f that does not vary has no rate
    b = (c * mean).sum(1) - s * (a * mean).sum(1)
    return ModelStatistics(levels, l, s, b)


def as_factor(coefficient: np.ndarray, x: Tensor) -> Tensor:
    """A coefficient, in the dtype and on the device of x."""
    return torch.from_numpy(np.asarray(coefficient)).to(x.dtype).to(x.device)
