r"""The Frechet distance between Gaussians fitted to features, in float64.

    FD = |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1^(1/2) C2 C1^(1/2))^(1/2)

With any factors C = R R^T, the last trace is the sum of the singular values of R1^T R2. They are not taken as
roots of eigenvalues, whose rounding the root would enlarge: so covariances may be of low rank.

References: Dowson and Landau, The Frechet distance between multivariate normal distributions, 1982;
Heusel et al., GANs Trained by a Two Time-Scale Update Rule, 2017, arXiv 1706.08500 (of Inception's features).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from gaussnet.fit import Data, Moments, fit_moments, merge_all

_ROUNDING = 1e-4  # of the largest entry: what a covariance accumulated in float32 may lack of being one


def frechet_distance(
    mean1: Tensor | np.ndarray,
    cov1: Tensor | np.ndarray,
    mean2: Tensor | np.ndarray,
    cov2: Tensor | np.ndarray,
) -> float:
    """The squared Frechet (Wasserstein-2) distance between N(mean1, cov1) and N(mean2, cov2).

    Args:
        mean1: (F,).
        cov1: (F, F), symmetric and positive semi-definite, of any rank.
        mean2: (F,).
        cov2: (F, F).

    Returns:
        The distance, >= 0, in squared units of the features.

    Raises:
        ValueError: if the shapes do not fit, a number is not finite, or a covariance is not symmetric and
            positive semi-definite up to the rounding of float32.

    Example:
        >>> frechet_distance(torch.zeros(2), torch.eye(2), torch.ones(2), 4 * torch.eye(2))
        4.0
    """
    first, second = _checked(mean1, cov1), _checked(mean2, cov2)
    if first[0].shape != second[0].shape:
        raise ValueError(f"expected means of one length, got {len(first[0])} and {len(second[0])}")
    return _distance(first[0], _root(first[1]), second[0], _root(second[1]))


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean and covariance of the features of `count` samples.

    Attributes:
        mean: (F,), float64.
        cov: (F, F), float64, over N - 1: unbiased, as in EDM's reference statistics. 0 for one sample.
        count: N; None if a file does not tell it.

    Example:
        >>> x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
        >>> whole = FeatureStatistics.fit(x)
        >>> halves = FeatureStatistics.fit(x[:50]).merge(FeatureStatistics.fit(x[50:]))
        >>> torch.allclose(halves.cov, whole.cov), round(whole.distance(FeatureStatistics.fit(x + 1)), 3)
        (True, 3.0)
    """

    mean: Tensor
    cov: Tensor
    count: int | None = None

    @classmethod
    def fit(cls, features: Data, *, all_processes: bool = False) -> Self:
        """Accumulates features in one pass.

        Args:
            features: (N, F), or an iterable of such batches, as `extract_features` gives.
            all_processes: sum over the processes of `torch.distributed`, each with its own features.

        Raises:
            TypeError: if a batch is neither a tensor nor an array.
            ValueError: if there is no feature, they are not of shape (N, F), or one is not finite.
        """
        return cls._of(merge_all(fit_moments(features, all_processes=all_processes)))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads an npz file with mu (F,), sigma (F, F) and perhaps count: of `save`, or a reference of EDM.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not such a file, or holds no mean and covariance.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no file {path}")
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: np.asarray(file[name]) for name in ("mu", "sigma", "count") if name in file}
        except Exception as error:  # of zips and of headers: BadZipFile, EOFError, TokenError and others
            raise ValueError(
                f"{path}: expected an npz file with mu and sigma, got {str(error)[:200]}"
            ) from error
        if not {"mu", "sigma"} <= set(arrays):
            raise ValueError(
                f"{path}: expected an npz file with mu and sigma, got {', '.join(arrays) or 'none'}"
            )
        try:
            mean, cov = _checked(arrays["mu"], arrays["sigma"])
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error
        count = arrays.get("count")
        if count is not None and (count.shape or count.dtype.kind not in "iu"):
            raise ValueError(
                f"{path}: expected count to be an integer, got {count.dtype} of shape {count.shape}"
            )
        return cls(mean, cov, None if count is None else int(count))

    def save(self, path: str | Path) -> None:
        """Writes an npz file of mu, sigma and, if it is known, count, which EDM reads, too.

        NumPy appends .npz to a name that does not end so.
        """
        arrays: dict[str, Any] = {"mu": self.mean.cpu().numpy(), "sigma": self.cov.cpu().numpy()}
        if self.count is not None:
            arrays["count"] = np.int64(self.count)
        np.savez(path, **arrays)

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """The statistics of both sets of samples together, exactly.

        Raises:
            ValueError: if the features differ in length, or a count is not known.
        """
        return self._of(self._moments().merge(other._moments()))

    def distance(self, other: FeatureStatistics) -> float:
        """The Frechet distance to other statistics.

        Raises:
            ValueError: if the features differ in length, or there are statistics of one sample only.
        """
        _check_count(self)
        _check_count(other)
        return frechet_distance(self.mean, self.cov, other.mean, other.cov)

    @classmethod
    def _of(cls, moments: Moments) -> Self:
        if len(moments.event_shape) != 1:
            shape = ", ".join(map(str, moments.event_shape))
            raise ValueError(f"expected features of shape (N, F), got (N, {shape})")
        return cls(moments.mean, moments.scatter / max(1, moments.count - 1), moments.count)

    def _moments(self) -> Moments:
        if self.count is None:
            raise ValueError("expected statistics with a count: without, they cannot be merged")
        scatter = self.cov * (self.count - 1)
        return Moments(self.count, self.mean, scatter, self.mean.shape, torch.float32)


class FrechetTarget:
    """The distance to fixed statistics, whose covariance is factored once."""

    mean: Tensor
    root: Tensor

    def __init__(self, statistics: FeatureStatistics) -> None:
        _check_count(statistics)
        self.mean, cov = _checked(statistics.mean, statistics.cov)
        self.root = _root(cov)

    def distance(self, features: Tensor) -> float:
        """The Frechet distance of features (N, F), N >= 2."""
        found = FeatureStatistics.fit(features)
        return _distance(found.mean, _root(found.cov), self.mean, self.root)


def _check_count(statistics: FeatureStatistics) -> None:
    if statistics.count is not None and statistics.count < 2:
        raise ValueError(f"expected statistics of at least two samples, got {statistics.count}")


def _distance(mean1: Tensor, root1: Tensor, mean2: Tensor, root2: Tensor) -> float:
    mean2, root2 = mean2.to(mean1.device), root2.to(mean1.device)
    overlap = torch.linalg.svdvals(root1.mT @ root2).sum()
    spread = root1.square().sum() + root2.square().sum() - 2 * overlap
    return max(0.0, float((mean1 - mean2).square().sum() + spread))


def _root(cov: Tensor) -> Tensor:
    """R (F, r) with R R^T = cov; r is the rank."""
    eigvals, eigvecs = torch.linalg.eigh(cov)
    largest = float(eigvals.abs().max())
    if float(eigvals.min()) < -_ROUNDING * largest:
        raise ValueError(
            f"expected a covariance without negative eigenvalues, got {float(eigvals.min()):g} to {largest:g}"
        )
    kept = eigvals > len(cov) * torch.finfo(cov.dtype).eps * largest  # the rest is rounding
    return eigvecs[:, kept] * eigvals[kept].sqrt()


def _checked(mean: Tensor | np.ndarray, cov: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
    mean, cov = torch.as_tensor(mean).double(), torch.as_tensor(cov).double()
    if mean.ndim != 1 or not len(mean) or cov.shape != (len(mean), len(mean)):
        raise ValueError(
            f"expected a mean (F,) and a covariance (F, F), got {tuple(mean.shape)} and {tuple(cov.shape)}"
        )
    if not bool(torch.isfinite(mean).all() & torch.isfinite(cov).all()):
        raise ValueError("expected a finite mean and covariance, got NaN or infinite values")
    if float((cov - cov.mT).abs().max()) > _ROUNDING * float(cov.abs().max()):
        raise ValueError("expected a symmetric covariance, got one that differs from its transpose")
    return mean, (cov + cov.mT) / 2
