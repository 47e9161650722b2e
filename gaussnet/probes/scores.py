"""Comparing denoisers: how much of what one does is explained by another.

    unexplained(a, b) = ||a - b||^2 / ||a||^2                                    (Eq. 28 of arXiv 2412.09726)

per query, uncentred, for scores (the paper's) or for denoised images; 1 - unexplained is explained. While a
network trains, its distance to simple scores falls and rises again: it learns the Gaussian first, and then
leaves it (Sec. 5, Fig. 12, 24, 25 there).

With s = (D - x)/sigma^2 (Eq. 4), sigma^2 cancels, and the numerator is ||D_a - D_b||^2 for both quantities:
no digits are lost to x there, whatever the noise level.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gaussnet.numerics import wide_dtype

PAPER_SIGMAS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.75, 1.0, 1.5, 2.0, 5.0, 10.0, 20.0, 30.0, 40.0, 80.0)
KINDS = ("noised", "noise")
QUANTITIES = ("score", "denoiser")

_CURVE = ("weights", "sigma", "queries", "reference", "quantity")  # which tell curves apart


def unexplained_variance(target: Tensor, approx: Tensor) -> Tensor:
    """The share of `target` that `approx` does not explain (Eq. 28), per query.

    Args:
        target: (B, *event_shape).
        approx: of the same shape.

    Returns:
        Tensor of shape (B,): 0 where both agree, 1 for approx = 0, inf where only the target is 0.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> unexplained_variance(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 0.0]]))
        tensor([0.6400])
    """
    if target.shape != approx.shape:
        raise ValueError(
            f"expected two tensors of one shape, got {tuple(target.shape)} and {tuple(approx.shape)}"
        )
    return _ratio((target - approx).flatten(1).square().sum(1), target.flatten(1).square().sum(1))


class ScoreProbe:
    """Compares denoisers with fixed references at fixed queries.

    What the references say is computed once and kept, which takes levels x kinds x references x queries
    times the size of a sample; a probe of a model costs one evaluation at each query and noise level.

    Several processes share the queries: each builds the probe with the same arguments but its own `share`,
    measures, and the values of all, concatenated along the last axis in the order of ranks, are what one
    process would have measured. A denoiser gets the queries as they are, on its own device: casting to the
    dtype of its parameters is its own affair. Differences and sums are taken in float64. What remains of
    float32 is the rounding of the denoised images themselves: of scores that agree it leaves up to 1e-7
    unexplained at sigma = 0.01, and less than 1e-11 from 0.2 on.

    Args:
        references: name -> analytic denoiser.
        data: clean samples to noise, (Q, *event_shape), all of them in every process.
        sigmas: noise levels; default: those of the paper.
        generator: draws the noise, one draw for all levels and kinds; of the same seed in every process.
        kinds: "noised" for data + sigma n, "noise" for sigma n, draws of N(0, sigma^2 I); or both.
        share: (rank, world): which of how many equal shares of the queries this process has.
        class_labels: classes of the data, integers (Q,) or one-hot rows (Q, classes), which the model and
            the references get.
        batch_size: queries in one evaluation; default: all of a level.
        store: device that keeps queries and answers, such as "cpu"; default: that of the data.

    Raises:
        ValueError: if there is no reference, query or level, the shares are not equal, or an argument is
            none of the above.

    Example:
        >>> from gaussnet import GaussianDenoiser
        >>> gaussian, point = (GaussianDenoiser.isotropic(torch.zeros(2), var) for var in (1.0, 0.0))
        >>> data = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
        >>> probe = ScoreProbe({"gaussian": gaussian, "point": point}, data, sigmas=[1.0], kinds=["noised"])
        >>> [(row["reference"], row["mean"]) for row in probe(gaussian) if row["quantity"] == "score"]
        [('gaussian', 0.0), ('point', 1.0)]
    """

    def __init__(
        self,
        references: Mapping[str, nn.Module],
        data: Tensor,
        sigmas: Sequence[float] = PAPER_SIGMAS,
        generator: torch.Generator | None = None,
        *,
        kinds: Sequence[str] = KINDS,
        share: tuple[int, int] = (0, 1),
        class_labels: Tensor | None = None,
        batch_size: int | None = None,
        store: torch.device | str | None = None,
    ) -> None:
        if not references or not len(data):
            raise ValueError(f"expected references and queries, got {len(references)} and {len(data)}")
        if not len(sigmas):
            raise ValueError("expected at least one noise level, got none")
        if isinstance(kinds, str) or not kinds or set(kinds) - set(KINDS) or len(set(kinds)) < len(kinds):
            raise ValueError(f"expected kinds to be a sequence of {' and '.join(KINDS)}, got {kinds!r}")
        rank, world = share
        if not 0 <= rank < world:
            raise ValueError(f"expected share=(rank, world) with 0 <= rank < world, got {share}")
        if world > 1 and generator is None:
            raise ValueError(f"expected a generator, of one seed in all {world} processes, got None")
        if len(data) % world:
            raise ValueError(
                f"expected a number of queries that {world} processes can share equally, got {len(data)}"
            )
        if class_labels is not None and len(class_labels) != len(data):
            raise ValueError(f"expected {len(data)} class_labels, one a query, got {len(class_labels)}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"expected batch_size >= 1, got {batch_size}")
        self.sigmas: tuple[float, ...] = tuple(sigmas)
        self.kinds: tuple[str, ...] = tuple(kinds)
        self.references: tuple[str, ...] = tuple(references)
        device = generator.device if generator is not None else data.device
        # The whole draw, whatever the share: the queries do not depend on the number of processes.
        noise = torch.randn(data.shape, generator=generator, dtype=data.dtype, device=device)
        size = len(data) // world
        mine = slice(rank * size, (rank + 1) * size)
        store = data.device if store is None else torch.device(store)
        clean = data[mine].to(store)
        self._noise = noise[mine].to(store)
        self._clean = torch.stack(
            [clean if kind == "noised" else torch.zeros_like(clean) for kind in self.kinds]
        )
        self._labels: tuple[Tensor, ...] = ()
        if class_labels is not None:
            labels = class_labels[mine].to(store)
            self._labels = (torch.cat([labels] * len(self.kinds)),)
        self.batch_size: int = batch_size or size * len(self.kinds)
        with torch.no_grad():
            self._answers = {
                sigma: [self._denoise(reference, sigma).to(store) for reference in references.values()]
                for sigma in self.sigmas
            }

    def queries(self, sigma: float) -> Tensor:
        """This share's queries at a level, (kinds, queries, *event_shape)."""
        return self._clean + sigma * self._noise

    @torch.no_grad()
    def measure(self, model: nn.Module) -> Tensor:
        """The unexplained variance at each of this share's queries.

        The model is left in the mode, training or eval, that it is in.

        Returns:
            Tensor of shape (levels, kinds, references, quantities, ways, queries), in float64. Quantities are
            score and denoiser; the ways are ||a - b||^2/||a||^2 with a the model, then with a the reference.
        """
        return torch.stack([self._measure(model, sigma) for sigma in self.sigmas])

    def rows(self, values: Tensor) -> list[dict[str, Any]]:
        """What was measured, one row for each noise level, kind of queries, reference and quantity.

        Args:
            values: of `measure`; those of several processes are concatenated along the last axis.

        Returns:
            Rows with sigma, queries ("noised" or "noise"), reference, quantity ("score" or "denoiser"), mean
            and std (over queries) of the variance of the model that the reference leaves unexplained,
            mean_reverse and std_reverse of that of the reference which the model does, and count, the number
            of queries.

        Raises:
            ValueError: if the values are not those of this probe.
        """
        axes = (self.sigmas, self.kinds, self.references, QUANTITIES)
        expected = (*map(len, axes), 2)
        if values.shape[:-1] != expected or not values.shape[-1]:
            shape = ", ".join([*map(str, expected), "queries"])
            raise ValueError(f"expected values of shape ({shape}), got {tuple(values.shape)}")
        # (levels, kinds, references, quantities, ways, 2), all in one transfer
        statistics = torch.stack([values.mean(-1), values.std(-1, correction=0)], -1)
        return [
            {
                "sigma": sigma,
                "queries": kind,
                "reference": reference,
                "quantity": quantity,
                "mean": mean,
                "std": std,
                "mean_reverse": mean_reverse,
                "std_reverse": std_reverse,
                "count": values.shape[-1],
            }
            for (sigma, kind, reference, quantity), ((mean, std), (mean_reverse, std_reverse)) in zip(
                product(*axes), statistics.flatten(0, 3).tolist(), strict=True
            )
        ]

    def __call__(self, model: nn.Module) -> list[dict[str, Any]]:
        """The rows of this share's queries: of all of them, in a single process."""
        return self.rows(self.measure(model))

    def _measure(self, model: nn.Module, sigma: float) -> Tensor:
        a = self._denoise(model, sigma)
        a = a.to(wide_dtype(a.device))
        x = self.queries(sigma).to(a)
        own = _norms(a, x)
        shares: list[Tensor] = []
        for answer in self._answers[sigma]:
            b = answer.to(a)
            norms = torch.stack([own, _norms(b, x)], dim=1)  # (quantities, ways, kinds, queries)
            shares.append(_ratio((a - b).flatten(2).square().sum(-1), norms))  # Eq. 28
        return torch.stack(shares).movedim(3, 0)  # kinds first

    def _denoise(self, denoiser: nn.Module, sigma: float) -> Tensor:
        """The denoised queries of a level, in batches, on the device of the denoiser; shape of `queries`."""
        x = self.queries(sigma)
        device = next(chain(denoiser.parameters(), denoiser.buffers()), x).device
        columns = [column.to(device).split(self.batch_size) for column in (x.flatten(0, 1), *self._labels)]
        batches = zip(*columns, strict=True)
        return torch.cat([denoiser(part, sigma, *labels) for part, *labels in batches]).reshape(x.shape)


def log_spaced(steps: int, times: int) -> list[int]:
    """0, and about `times` steps up to the last, evenly spaced in their logarithm: dense early.

    Args:
        steps: the last step, >= 1.
        times: how many, >= 1; where the first ones round to the same step, fewer come out.

    Returns:
        Increasing integers.

    Raises:
        ValueError: if there is no step, or no time.

    Example:
        >>> log_spaced(1000, 4)
        [0, 1, 10, 100, 1000]
    """
    if steps < 1 or times < 1:
        raise ValueError(f"expected steps >= 1 and times >= 1, got {steps} and {times}")
    return sorted({0} | {round(step) for step in np.geomspace(steps, 1, times).tolist()})


def minima(rows: Iterable[Mapping[str, Any]], tol: float = 0.05) -> list[dict[str, Any]]:
    """Where a network came closest to each reference while it learned, and whether it left it again.

    Args:
        rows: of a run's probes.csv, as numbers or strings: step, weights, sigma, queries, reference,
            quantity, mean.
        tol: a reference is left if the last mean is above (1 + tol) times the smallest.

    Returns:
        Rows with weights, sigma, queries, reference, quantity; step, the (first) one with the smallest mean,
        and minimum, that mean; last_step and last, the mean there; left, whether it was left.

    Raises:
        ValueError: if a row lacks one of its columns, or a mean is not a number.

    Example:
        >>> fixed = {"weights": "ema", "sigma": 10.0, "queries": "noised", "reference": "gaussian"}
        >>> course = [{"step": 100, "mean": 0.1}, {"step": 1000, "mean": 0.4}]
        >>> row = minima([{**fixed, "quantity": "score", **point} for point in course])[0]
        >>> row["step"], row["minimum"], row["left"]
        (100, 0.1, True)
    """
    curves: dict[tuple[Any, ...], list[tuple[int, float]]] = {}
    for row in rows:
        missing = [name for name in ("step", *_CURVE, "mean") if name not in row]
        if missing:
            raise ValueError(f"expected rows with {', '.join(missing)}, got {', '.join(row)}")
        step, mean = int(row["step"]), float(row["mean"])
        curve = {name: row[name] for name in _CURVE} | {"sigma": float(row["sigma"])}
        if math.isnan(mean):
            raise ValueError(f"expected means that are numbers, got nan at step {step} of {curve}")
        curves.setdefault(tuple(curve.items()), []).append((step, mean))
    table: list[dict[str, Any]] = []
    for curve, points in curves.items():
        step, minimum = min(points, key=lambda point: (point[1], point[0]))
        last_step, last = max(points)
        values = {"step": step, "minimum": minimum, "last_step": last_step, "last": last}
        table.append({**dict(curve), **values, "left": last > (1 + tol) * minimum})
    return table


def _norms(denoised: Tensor, x: Tensor) -> Tensor:
    """||D - x||^2, that is sigma^4 ||score||^2, and ||D||^2 of each query; (quantities, kinds, queries)."""
    return torch.stack([denoised - x, denoised]).flatten(3).square().sum(-1)


def _ratio(residual: Tensor, total: Tensor) -> Tensor:
    # Where both agree, nothing is unexplained, even if there is nothing to explain.
    return torch.where(residual == 0, residual, residual / total)
