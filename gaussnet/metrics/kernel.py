r"""The kernel distance between two sets of features, KID: an unbiased estimate at any number of samples.

With k(x, y) = (x^T y / F + 1)^3 on features of length F, for n samples x and m samples y:

    MMD^2 = sum_{i != j} k(x_i, x_j) / (n (n - 1)) + sum_{i != j} k(y_i, y_j) / (m (m - 1))
            - 2 sum_{i, j} k(x_i, y_j) / (n m)

averaged over random subsets, as is usual, so that values compare with published ones.

Reference: Binkowski et al., Demystifying MMD GANs, 2018, arXiv 1801.01401, Eq. 4 and Sec. 4.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gaussnet.fit import Data
from gaussnet.metrics.samples import collect_features, permutation


class KernelDistance(NamedTuple):
    """KID: mean and standard deviation over subsets; it scatters about 0 where distributions are equal.

    Attributes:
        mean: over subsets, in the units of k; often printed times 1,000.
        std: standard deviation over subsets, over their number.

    Example:
        >>> mean, std = KernelDistance(mean=0.0025, std=0.0004)
        >>> round(1000 * mean, 3)
        2.5
    """

    mean: float
    std: float


def kernel_distance(
    features1: Data,
    features2: Data,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    generator: torch.Generator | None = None,
) -> KernelDistance:
    """The kernel distance between two sets of samples.

    Args:
        features1: (N, F), or an iterable of batches; all are kept in memory.
        features2: (M, F), or such batches.
        subsets: random subsets of both that are compared.
        subset_size: samples of each in a subset, drawn without replacement, at most N and M.
        generator: draws the subsets.

    Returns:
        Mean and standard deviation over the subsets, computed in float64.

    Raises:
        TypeError: if the features are not tensors or arrays.
        ValueError: if they differ in length, or there are not enough samples for a subset.

    Example:
        >>> kernel_distance(torch.zeros(4, 1), torch.ones(4, 1), subsets=5, subset_size=4)  # 1 + 2^3 - 2
        KernelDistance(mean=7.0, std=0.0)
    """
    x = collect_features(features1)
    y = collect_features(features2, like=x).to(x.device)
    if subsets < 1 or not 2 <= subset_size <= min(len(x), len(y)):
        raise ValueError(
            f"expected subsets >= 1 and 2 <= subset_size <= min(N, M) = {min(len(x), len(y))}, "
            f"got {subsets} and {subset_size}"
        )
    values = torch.empty(subsets, dtype=torch.float64)
    for i in range(subsets):
        chosen = (part[permutation(len(part), generator)[:subset_size]].double() for part in (x, y))
        values[i] = _mmd(*chosen)
    return KernelDistance(float(values.mean()), float(values.std(correction=0)))


def _mmd(x: Tensor, y: Tensor) -> Tensor:
    n = len(x)  # of both
    within = _kernel(x, x).fill_diagonal_(0).sum() + _kernel(y, y).fill_diagonal_(0).sum()
    return within / (n * (n - 1)) - 2 * _kernel(x, y).mean()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.mT / x.shape[1] + 1) ** 3
