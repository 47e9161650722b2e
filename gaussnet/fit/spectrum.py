"""From data to a covariance: axes, eigenvalues, rank and tail.

The tail that minimises the error of score and denoiser at every noise level is the mean dropped eigenvalue;
a tail of zero is the covariance cut off, as in much of the literature.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gaussnet.covariance import Covariance
from gaussnet.fit.cosine import fit_cosine
from gaussnet.fit.moments import Moments
from gaussnet.fit.selection import Selection, select_heldout
from gaussnet.fit.shrinkage import FOLDS, LINEAR, SHRINKAGES, shrink, truncate
from gaussnet.fit.solvers import SOLVERS, Solved, check_fit, solve, solve_moments
from gaussnet.fit.streams import Data

OPTIONS: dict[str, tuple[str | None, ...]] = {
    "shrinkage": SHRINKAGES,
    "solver": SOLVERS,
    "tail": ("mean", "zero"),
    "basis": ("eigen", "cosine"),
    "select": (None, "heldout"),
}

log: logging.Logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fit:
    """A fitted mean and covariance.

    Attributes:
        mean: (*event_shape), in the dtype of the data, at least float32.
        covariance: in that dtype.
        count: number of samples, their mirror images not counted.
        selection: how rank and shrinkage were chosen, with select="heldout".

    Example:
        >>> fitted = fit_covariance(torch.tensor([[0.0], [2.0]]), shrinkage="none")
        >>> fitted.mean, fitted.covariance.dense(), fitted.count
        (tensor([1.]), tensor([[1.]]), 2)
    """

    mean: Tensor
    covariance: Covariance
    count: int
    selection: Selection | None = None


def fit_covariance(
    data: Data,
    rank: int | float | None = None,
    shrinkage: str = "cv",
    solver: str = "auto",
    groups: Tensor | None = None,
    *,
    tail: str = "mean",
    basis: str = "eigen",
    mirror: bool = False,
    select: str | None = None,
    all_processes: bool = False,
) -> Fit:
    """Fits mean and covariance.

    Args:
        data: (N, *event_shape), a tensor, array or memory map; or an iterable of such batches, or of tuples
            that begin with one.
        rank: eigenvectors to keep, 1 <= rank <= min(N - 1, D); or a number in (0, 1), for as many as explain
            this share of the variance. Default: all that the data determine.
        shrinkage: "cv" for cross-validated eigenvalues, "none" for those of the sample covariance (over N),
            "ledoit-wolf", "oas" or "remap" (see `gaussnet.fit.shrinkage`).
        solver: "dense" passes once over any data and costs D^3; "gram" needs an array and costs N^3;
            "krylov" needs an array and a rank, and takes passes over it, but no square matrix. Default: by
            shape.
        groups: an integer for each sample, (N,), in the order of the data: variants of one image share one,
            so that none is measured along axes that the others of its group have shaped.
        tail: variance along the axes left out: their "mean", or "zero".
        basis: "eigen", or "cosine" for images too large for eigenvectors: a 2-D DCT of each channel after a
            rotation of the channels (`CosineCovariance`), fitted in one pass without large matrices. It takes
            no rank, solver or selection, and needs no shrinkage.
        mirror: fit to the samples and their mirror images (x-flips).
        select: "heldout" chooses rank and shrinkage by the denoising error on a held-out fifth of an array.
        all_processes: each process of `torch.distributed` has its own share of the data: fit to them all.

    Returns:
        The fit; the same on all processes.

    Raises:
        TypeError: if something that needs an array gets an iterable.
        ValueError: for fewer than two samples, non-finite or constant data, an unknown option, a rank out
            of range, or groups that are not one a sample.

    Example:
        >>> images = torch.randn(1000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
        >>> fitted = fit_covariance(images, rank=1)
        >>> fitted.covariance.rank, round(fitted.covariance.tail.item(), 1)
        (1, 1.0)
    """
    check_options(shrinkage=shrinkage, solver=solver, tail=tail, basis=basis, select=select)
    if basis == "cosine":
        given = {"rank": rank, "select": select, "groups": groups}
        if any(value is not None for value in given.values()) or solver != "auto":
            names = [name for name, value in given.items() if value is not None] or ["solver"]
            raise ValueError(f'basis="cosine" takes no {" or ".join(names)}')
        if shrinkage not in ("cv", "none"):
            raise ValueError(f'basis="cosine" needs no shrinkage, got {shrinkage!r}')
        return Fit(*fit_cosine(data, mirror=mirror, all_processes=all_processes))
    rank, share = split_rank(rank)
    selection = None
    if select is not None:
        if not isinstance(data, (Tensor, np.ndarray)) or all_processes:
            got = "one process's share of them" if all_processes else type(data).__name__
            raise TypeError(f'select="heldout" needs an array of all samples, got {got}')
        if share is not None:
            raise ValueError(f'select="heldout" chooses the rank: expected an integer or None, got {share}')
        if solver == "krylov":  # it finds some axes; two of the shrinkages need all
            raise ValueError('select="heldout" needs all axes: expected another solver, got "krylov"')
        selection = select_heldout(data, groups, rank, mirror, tail=tail)
        rank, shrinkage = selection.rank, selection.shrinkage
    folds = FOLDS if shrinkage == "cv" else 1
    # Linear shrinkage needs all axes; "auto" might find no more of them than the rank.
    needed = None if solver == "auto" and shrinkage in LINEAR else rank
    solved = solve(data, solver, needed, folds, groups, mirror, all_processes)
    check_fit(solved.count, solved.mean, solved.total, rank)
    grouped = groups is not None or mirror
    fitted = _finish(solved, rank, share, shrinkage, tail, grouped, selection)
    return replace(fitted, count=solved.count // 2) if mirror else fitted


def fit_moments_covariance(
    folds: list[Moments],
    rank: int | float | None = None,
    *,
    shrinkage: str = "cv",
    tail: str = "mean",
    grouped: bool = False,
) -> Fit:
    """Fits mean and covariance to the moments of folds, as `fit_moments` and `fit_class_moments` give them.

    Arguments and errors as in `fit_covariance`; `grouped` samples belong together, as mirror images do.
    """
    check_options(shrinkage=shrinkage, tail=tail)
    rank, share = split_rank(rank)
    return _finish(solve_moments(folds, rank), rank, share, shrinkage, tail, grouped)


def check_options(**options: str | None) -> None:
    """Refuses unknown values of options by name.

    Raises:
        ValueError: if one is unknown.
    """
    for name, value in options.items():
        if value not in OPTIONS[name]:
            known = ", ".join(map(str, OPTIONS[name]))
            raise ValueError(f"expected {name} to be one of {known}, got {value!r}")


def split_rank(rank: int | float | None) -> tuple[int | None, float | None]:
    """The number of axes to keep, or the share of the variance to explain.

    Raises:
        ValueError: for a share that is not in (0, 1).
    """
    if not isinstance(rank, (float, np.floating)):
        return rank, None
    if not 0 < rank < 1:
        raise ValueError(f"expected rank to be an integer >= 1 or a share in (0, 1), got {rank}")
    return None, float(rank)


def _finish(
    solved: Solved,
    rank: int | None,
    share: float | None,
    shrinkage: str,
    tail: str,
    grouped: bool,
    selection: Selection | None = None,
) -> Fit:
    axes, dropped = shrink(solved, shrinkage, grouped)
    if share is not None:
        rank = explaining(axes.eigvals, (solved.dim - len(axes.eigvals)) * dropped, share)
    if rank is not None and rank > len(axes.eigvals):
        source = "folds" if shrinkage == "cv" else "data"
        log.warning("rank %d is lowered to %d, all that the %s determine", rank, len(axes.eigvals), source)
    axes, dropped = truncate(axes, dropped, rank)
    covariance = Covariance(
        axes.eigvecs.contiguous(), axes.eigvals, dropped if tail == "mean" else torch.zeros_like(dropped)
    )
    mean = solved.mean.to(solved.dtype).reshape(solved.event_shape)
    return Fit(mean, covariance.to(solved.dtype), solved.count, selection)


def explaining(eigvals: Tensor, outside: Tensor, share: float) -> int:
    """The smallest rank whose eigenvalues explain a share of the variance; `outside` is that of no axis."""
    explained = eigvals.cumsum(0) / (eigvals.sum() + outside)
    reached = float(explained[-1]) if len(explained) else 0.0
    if reached < share - 1e-9:
        log.warning("all %d axes explain %.3g of the variance, not %.3g", len(eigvals), reached, share)
    return min(int((explained < share).sum()) + 1, len(eigvals))
