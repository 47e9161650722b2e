"""Two measurements compared by pairs, such as the distances of samples from a model's by two references.

Samples from the same noise are a pair (Fig. 8, 18 of arXiv 2412.09726): what all have in common cancels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Paired(NamedTuple):
    """What pairs say of a difference.

    Attributes:
        mean: of first - second.
        low: lower end of its t interval.
        high: upper end.
        p_value: of Wilcoxon's signed-rank test, two-sided.
        pairs: their number.
    """

    mean: float
    low: float
    high: float
    p_value: float
    pairs: int


def paired_difference(first: Tensor, second: Tensor, level: float = 0.95) -> Paired:
    """Compares two measurements of the same things.

    Args:
        first: (N,), N >= 2.
        second: (N,).
        level: of the t interval of the mean difference.

    Returns:
        Mean, interval and p-value of first - second.

    Raises:
        ValueError: if they are not pairs, there are fewer than two, or the level is not in (0, 1).

    Example:
        >>> import torch
        >>> found = paired_difference(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.0, 1.0, 2.0]))
        >>> round(found.mean, 3), found.p_value
        (1.333, 0.25)
    """
    from scipy import stats  # here, since it takes long to import

    if first.shape != second.shape or first.ndim != 1 or len(first) < 2:
        shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
        raise ValueError(f"expected two tensors of shape (N,) with N >= 2, got {shapes}")
    if not 0 < level < 1:
        raise ValueError(f"expected 0 < level < 1, got {level}")
    difference = (first.double() - second.double()).cpu()
    mean, error = float(difference.mean()), float(difference.std() / len(difference) ** 0.5)
    reach = float(stats.t.ppf((1 + level) / 2, len(difference) - 1)) * error
    p_value = 1.0  # of equal measurements, of which the test says nothing
    if bool((difference != 0).any()):
        result: Any = stats.wilcoxon(difference.numpy())
        p_value = float(result.pvalue)
    return Paired(mean, mean - reach, mean + reach, p_value, len(difference))
