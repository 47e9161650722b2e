"""Block Krylov: leading principal axes of data too large for any square matrix.

With X the (N, D) samples about their mean and A = X^T X (or X X^T, whichever is smaller), a block Lanczos
iteration from a random block Q_0 spans

    [Q_0, A Q_0, ..., A^(m-1) Q_0],

and the Ritz vectors of A on it converge to the leading eigenvectors far sooner than the same number of
products does in a power (randomized subspace) iteration. Where the space has grown to some multiple of the
rank, its leading Ritz vectors are kept and the iteration goes on from there (thick restart), until the
residuals of all axes are small. The basis is orthogonalised in full. Products with X are in the dtype of the
data, the small matrices in float64. The eigenvalues are the squared singular values of X on the axes,
which have twice the digits that those of A have. The trace is that of all the data, so that what the axes
leave out is known exactly.

References: Golub and Underwood, "The block Lanczos method for computing eigenvalues", 1977; Wu and Simon,
"Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM J. Matrix Anal. Appl. 2000; Musco
and Musco, "Randomized block Krylov methods for stronger and faster approximate singular value decomposition",
NeurIPS 2015, arXiv 1504.05477.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from gaussnet.fit.moments import inner
from gaussnet.fit.streams import as_tensor
from gaussnet.numerics import full_precision

NEGLIGIBLE = 1e-13  # share of the total variance below which an eigenvector is rounding
TOLERANCE = 1e-4
_RESTARTS = 40  # after which the axes are taken as they are
_SMALL = 256  # dimensions that cost nothing: smaller problems are solved exactly
_BLOCK = 64  # columns of a product, at most
_IN_MEMORY = 2**31  # bytes of centred samples that are kept, rather than read again for each product
_CHUNK = 2**26  # elements read at a time, where they are not

log: logging.Logger = logging.getLogger(__name__)


class Rows:
    """Samples about a mean, as (n, D) matrices; of an array that may lie on disk.

    Args:
        data: (N, *event_shape).
        index: which samples; None for all.
        mean: (D,), to subtract; default: their own.
        mirror: add their mirror images, flipped along the last axis.

    Attributes:
        mean: (D,), float64.
        total: summed squared distance to the mean, 0-d, float64.
        spread: mean fourth power of that distance.

    Raises:
        ValueError: if a sample is not finite, or there is none.
    """

    def __init__(
        self,
        data: Tensor | np.ndarray,
        index: Tensor | None = None,
        mean: Tensor | None = None,
        mirror: bool = False,
    ) -> None:
        self._data = data
        self._index = None if index is None else index.cpu()
        self._mirror = mirror
        first = as_tensor(data[:1])
        self.dtype: torch.dtype = torch.promote_types(first.dtype, torch.float32)
        self.in_memory: bool = False
        self._cache: list[Tensor] = []
        if not len(self):
            raise ValueError("expected at least one sample, got none")
        if mean is None:
            mean = torch.zeros(first[0].numel(), dtype=torch.float64, device=first.device)
            for rows in self._read():
                mean = mean + rows.sum(0, dtype=torch.float64)
            mean = mean / len(self)
        self.mean = mean
        if len(self) * mean.numel() * self.dtype.itemsize <= _IN_MEMORY:
            self._cache = list(self)
            self.in_memory = True
        norms = [torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64) for rows in self]
        distance2 = torch.cat(norms) ** 2
        if not bool(torch.isfinite(distance2).all()):
            bad = self._bad()
            if bad is None:
                raise ValueError("expected data whose squares are finite in float64, got larger numbers")
            raise ValueError(f"expected finite data, got NaN or infinite values in sample {bad}")
        self.total: Tensor = distance2.sum()
        self.spread: Tensor = distance2.square().mean()

    def __len__(self) -> int:
        return (len(self._data) if self._index is None else len(self._index)) * (1 + self._mirror)

    def __iter__(self) -> Iterator[Tensor]:
        if self.in_memory:
            yield from self._cache
            return
        first = self.mean.to(self.dtype)
        rest = (self.mean - first).to(self.dtype)
        for rows in self._read():
            # Twice: the second subtraction takes off what rounding the mean has left.
            yield rows.sub(first).sub_(rest)

    def _read(self) -> Iterator[Tensor]:
        for _, samples in self._parts():
            yield samples.flatten(1).to(self.dtype)
            if self._mirror:
                yield samples.flip(-1).flatten(1).to(self.dtype)

    def _parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Indices of samples, and the samples."""
        index = torch.arange(len(self._data)) if self._index is None else self._index
        for part in index.split(max(1, _CHUNK // max(1, int(np.prod(self._data.shape[1:]))))):
            # A slice of an array on disk is read faster than single samples.
            chosen = slice(int(part[0]), int(part[-1]) + 1) if self._index is None else part.numpy()
            yield part, as_tensor(self._data[chosen])

    def _bad(self) -> int | None:
        """The first sample with values that are not finite."""
        for part, samples in self._parts():
            finite = torch.isfinite(samples.flatten(1)).all(1).cpu()
            if not bool(finite.all()):
                return int(part[(~finite).nonzero()[0]])
        return None

    def project(self, v: Tensor) -> Tensor:
        """X v, (n, b), for v (D, b)."""
        with full_precision(v.device.type):
            return torch.cat([rows @ v.to(rows.dtype) for rows in self])

    def back(self, z: Tensor) -> Tensor:
        """X^T z, (D, b), for z (n, b)."""
        start, total = 0, torch.zeros((), dtype=self.dtype, device=z.device)
        with full_precision(z.device.type):
            for rows in self:
                total = total + z[start : start + len(rows)].to(rows.dtype).mT @ rows
                start += len(rows)
        return total.mT

    def square(self, v: Tensor) -> Tensor:
        """X^T X v, (D, b), for v (D, b), in one pass over the samples."""
        total = torch.zeros((), dtype=self.dtype, device=v.device)
        with full_precision(v.device.type):
            for rows in self:
                total = total + (rows @ v.to(rows.dtype)).mT @ rows
        return total.mT


def krylov_axes(rows: Rows, rank: int, tolerance: float = TOLERANCE) -> tuple[Tensor, Tensor]:
    """The leading eigenvalues (over n), decreasing, and axes (D, r) of the covariance, in float64.

    Args:
        rows: samples about their mean.
        rank: axes to find; cheap where it is well below min(n, D). There are fewer where the samples vary
            along fewer.
        tolerance: residual of an axis, |A u - lam u|, relative to its eigenvalue; lam errs by its square.
    """
    count, dim = len(rows), rows.mean.numel()
    wide = dim > count  # then the samples' side is the smaller one

    def product(q: Tensor) -> Tensor:
        return rows.project(rows.back(q)) if wide else rows.square(q)

    vectors = _lanczos(product, min(count, dim), rank, rows, tolerance)
    images = (rows.back(vectors) if wide else rows.project(vectors)).double()
    eigvals, turn = torch.linalg.eigh(inner(images))  # squared singular values of X on the Ritz vectors
    eigvals, turn = eigvals.flip(0), turn.flip(1)
    kept = int((eigvals > NEGLIGIBLE * rows.total).sum())
    eigvals, turn = eigvals[:kept], turn[:, :kept]
    axes = images @ (turn / torch.sqrt(eigvals)) if wide else vectors.double() @ turn
    del images  # before there may be new axes beside these
    return eigvals / count, _orthonormal(axes) if _leans(axes) else axes


def _lanczos(
    product: Callable[[Tensor], Tensor], size: int, rank: int, rows: Rows, tolerance: float
) -> Tensor:
    """The leading eigenvectors (size, rank) of a symmetric operator."""
    # From disk, wide blocks: more products, but fewer passes.
    block = min(_BLOCK, max(8, rank // 8)) * (1 if rows.in_memory else 4)
    keep = rank + max(rank // 5, block // 2)
    space = min(size, max(5 * rank // 2, rank + 4 * block, _SMALL))
    generator, device = torch.Generator().manual_seed(0), rows.mean.device
    basis = torch.empty(size, 0, dtype=rows.dtype, device=device)
    image = torch.zeros(size, block, dtype=rows.dtype, device=device)
    small = torch.zeros(0, 0, dtype=torch.float64)  # basis^T A basis
    restarts, check = 0, max(3 * rank // 2 + block, _SMALL)
    while True:
        new, old = _directions(image, basis, generator), basis.shape[1]
        basis = torch.cat([basis, new], 1)
        image = product(new)
        with full_precision(device.type):
            part = basis.mT @ image
            image = image - basis @ part
        coefficients = part.double().cpu()
        grown = torch.zeros(basis.shape[1], basis.shape[1], dtype=torch.float64)
        grown[:old, :old] = small
        grown[:, old:] = coefficients
        grown[old:, :old] = coefficients[:old].mT
        small = (grown + grown.mT) / 2
        if basis.shape[1] < min(check, space):
            continue
        check = basis.shape[1] + rank // 4
        eigvals, vectors = torch.linalg.eigh(small)
        eigvals, vectors = eigvals.flip(0), vectors.flip(1)
        # By the last block only, A takes Ritz vectors out of the space.
        residuals = (image.double().cpu() @ vectors[old:, :rank]).norm(dim=0)
        leading = eigvals[:rank].clamp_min(NEGLIGIBLE * float(eigvals[0]))
        rounding = torch.finfo(rows.dtype).eps * torch.sqrt(eigvals[0] * leading)
        missed = int((residuals > tolerance * leading + rounding).sum())
        if not missed or basis.shape[1] == size or restarts == _RESTARTS:
            break
        if basis.shape[1] < space:
            continue
        restarts += 1
        basis, small = _turned(basis, vectors[:, :keep]), torch.diag(eigvals[:keep])
    if missed and basis.shape[1] < size:
        log.warning("%d of %d axes have not converged: their eigenvalues are too small", missed, rank)
    return _turned(basis, vectors[:, :rank])


def _directions(residual: Tensor, basis: Tensor, generator: torch.Generator) -> Tensor:
    """Orthonormal directions of the residual, orthogonal to the basis; any, where nothing is left of it."""
    wide = residual.double()
    squares, turn = torch.linalg.eigh(inner(wide))  # a tenth of the cost of a singular value decomposition
    sizes = torch.sqrt(squares.flip(0).clamp_min(0))
    left = wide @ turn.flip(1) / sizes.clamp_min(torch.finfo(residual.dtype).tiny)
    sizes = torch.where(sizes > 1e-7 * sizes[0], sizes, 0)  # what squaring leaves of the others is noise
    other = torch.randn(left.shape, generator=generator, dtype=torch.float64).to(left)
    left = torch.where(sizes > torch.finfo(residual.dtype).tiny, left, other)
    left = left[:, : len(basis) - basis.shape[1]].to(basis)
    for _ in range(2):  # again, since QR makes rounding of what little is left
        with full_precision(basis.device.type):
            left = left - basis @ (basis.mT @ left)
        left = torch.linalg.qr(left.double()).Q.to(basis)
    return left


def _turned(basis: Tensor, vectors: Tensor) -> Tensor:
    with full_precision(basis.device.type):
        return basis @ vectors.to(basis)


def _leans(axes: Tensor) -> bool:
    """Whether the columns are not orthonormal, judged by the last ones, which lean most."""
    last = axes[:, -8:]
    off = last.mT @ axes
    off[:, -last.shape[1] :] -= torch.eye(last.shape[1], dtype=axes.dtype, device=axes.device)
    return bool((off.abs() > 1e-14).any())


def _orthonormal(axes: Tensor) -> Tensor:
    """Nearly orthogonal columns made orthonormal, each changed as little as its predecessors allow."""
    factor = torch.linalg.cholesky(inner(axes), upper=True)
    return torch.linalg.solve_triangular(factor, axes, upper=True, left=False)
