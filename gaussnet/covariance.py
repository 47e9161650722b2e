"""One covariance matrix and its spectral functions: the only linear algebra of the library.

    Sigma = U diag(lam) U^T + tail (I - U U^T)

`U` (D, r) has orthonormal columns, `lam` (r,) are eigenvalues, and the scalar `tail` is the variance in
each of the D - r directions that `U` leaves out. r = D is a full-rank matrix, 0 < r < D probabilistic
PCA, r = 0 an isotropic one. Every formula of the Gaussian diffusion model is a scalar function `f` of the
eigenvalues, applied to a vector:

    f(Sigma) u = f(tail) u + U [(f(lam) - f(tail)) * (U^T u)]        (two matrix products)
               = U [f(lam) * (U^T u)]                                when r = D

With s the noise level, for instance: denoising is lam / (lam + s^2) (Eq. 12, 13), the negative score
1 / (lam + s^2) (Eq. 5), the probability-flow ODE from s0 to s1 sqrt((lam + s1^2) / (lam + s0^2)) (Eq. 15).

Reference: Wang and Vastola, "The Unreasonable Effectiveness of Gaussian Score Approximation for
Diffusion Models and its Applications", TMLR 2024, arXiv 2412.09726. Equation numbers are theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self, overload

import torch
from torch import Tensor, nn

from gaussnet.numerics import Sigma, check_floating, full_precision

SpectralFunction = Callable[[Tensor], Tensor]


class Covariance(nn.Module):
    """A symmetric positive semi-definite matrix in its eigenbasis, with an isotropic tail.

    Args:
        eigvecs: orthonormal columns U, shape (D, r), 0 <= r <= D.
        eigvals: eigenvalues lam >= 0, shape (r,), in squared data units.
        tail: variance in every direction orthogonal to `eigvecs`.

    Raises:
        TypeError: if eigvecs or eigvals are not floating-point.
        ValueError: if the shapes do not fit, or an eigenvalue is negative or not finite.

    Example:
        >>> covariance = Covariance(torch.eye(3)[:, :1], torch.tensor([4.0]), tail=1.0)
        >>> covariance.apply(torch.sqrt, torch.ones(3))
        tensor([2., 1., 1.])
    """

    eigvecs: Tensor
    eigvals: Tensor
    tail: Tensor

    def __init__(self, eigvecs: Tensor, eigvals: Tensor, tail: Sigma = 0.0) -> None:
        super().__init__()
        check_floating(eigvecs=eigvecs, eigvals=eigvals)
        if eigvecs.ndim != 2 or eigvecs.shape[1] > eigvecs.shape[0]:
            raise ValueError(f"expected eigvecs of shape (D, r) with r <= D, got {tuple(eigvecs.shape)}")
        if eigvals.shape != eigvecs.shape[1:]:
            raise ValueError(
                f"expected one eigenvalue for each of the {eigvecs.shape[1]} eigenvectors, "
                f"got eigvals of shape {tuple(eigvals.shape)}"
            )
        tail = torch.as_tensor(tail, dtype=eigvecs.dtype, device=eigvecs.device)
        if tail.ndim != 0:
            raise ValueError(f"expected tail to be a scalar, got shape {tuple(tail.shape)}")
        spectrum = torch.cat([eigvals, tail.to(eigvals.dtype)[None]])
        if not bool((torch.isfinite(spectrum) & (spectrum >= 0)).all()):
            raise ValueError(
                "expected finite eigenvalues >= 0, got a range of "
                f"[{spectrum.min().item():g}, {spectrum.max().item():g}] (the tail included)"
            )
        self.register_buffer("eigvecs", eigvecs)
        self.register_buffer("eigvals", eigvals)
        self.register_buffer("tail", tail)

    @property
    def dim(self) -> int:
        """D, the number of dimensions."""
        return self.eigvecs.shape[0]

    @property
    def rank(self) -> int:
        """r, the number of stored eigenvectors."""
        return self.eigvecs.shape[1]

    @overload
    def apply(self, f: SpectralFunction, u: Tensor) -> Tensor: ...

    @overload
    def apply(self, f: Callable[[nn.Module], None]) -> Self: ...

    def apply(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, f: Callable[..., Any], u: Tensor | None = None
    ) -> Tensor | Self:
        """f(Sigma) u, computed in the dtype of `u`, under autocast too.

        (Without `u` this is `nn.Module.apply`, which a parent module calls on all of its children.)

        Args:
            f: element-wise function of the eigenvalues. It receives a tensor of shape (r,) or (1,) and
                returns one that broadcasts against (*batch, r): close over `sigma[..., None]` to use one
                noise level per sample.
            u: vectors, shape (*batch, D).

        Returns:
            Tensor of shape (*batch, D).
        """
        if u is None:
            return super().apply(f)
        if self.rank == 0:
            return f(self._tail(u.dtype)) * u
        with full_precision(u.device.type):
            coefficients = self.to_basis(u)
            if self.rank == self.dim:
                return self.from_basis(f(self.eigvals.to(u.dtype)) * coefficients)
            f_tail = f(self._tail(u.dtype))
            return f_tail * u + self.from_basis((f(self.eigvals.to(u.dtype)) - f_tail) * coefficients)

    def to_basis(self, u: Tensor) -> Tensor:
        """U^T u: the coefficients (*batch, r) of vectors (*batch, D)."""
        return u @ self.eigvecs.to(u.dtype)

    def from_basis(self, coefficients: Tensor) -> Tensor:
        """U c: the vectors (*batch, D) of coefficients (*batch, r)."""
        return coefficients @ self.eigvecs.to(coefficients.dtype).mT

    def diagonal(self, f: SpectralFunction, dtype: torch.dtype | None = None) -> Tensor:
        """The diagonal of f(Sigma): shape (D,), or (*batch, D) where `f` broadcasts over a batch."""
        dtype = dtype or self.eigvals.dtype
        f_tail = f(self._tail(dtype)) * (self.rank < self.dim)
        with full_precision(self.eigvals.device.type):
            inside = (f(self.eigvals.to(dtype)) - f_tail) @ self.eigvecs.to(dtype).mT ** 2
        return f_tail + inside

    def trace(self, f: SpectralFunction, dtype: torch.dtype | None = None) -> Tensor:
        """Tr f(Sigma): shape (), or that of the batch over which `f` broadcasts."""
        dtype = dtype or self.eigvals.dtype
        total = f(self.eigvals.to(dtype)).sum(-1)
        if self.rank < self.dim:
            total = total + (self.dim - self.rank) * f(self._tail(dtype)).sum(-1)
        return total

    def logdet(self, sigma: Sigma, dtype: torch.dtype | None = None) -> Tensor:
        """Log det(Sigma + sigma^2 I), shape of `sigma`."""
        dtype = dtype or self.eigvals.dtype
        variance = torch.as_tensor(sigma, dtype=dtype, device=self.eigvals.device)[..., None] ** 2
        return self.trace(lambda lam: torch.log(lam + variance), dtype)

    def dense(self) -> Tensor:
        """The matrix itself, shape (D, D)."""
        eye = torch.eye(self.dim, dtype=self.eigvals.dtype, device=self.eigvals.device)
        return self.apply(lambda lam: lam, eye)

    def _tail(self, dtype: torch.dtype) -> Tensor:
        return self.tail.to(dtype)[None]  # (1,): broadcasts wherever (r,) does

    def extra_repr(self) -> str:
        return f"dim={self.dim}, rank={self.rank}"


class CosineCovariance(Covariance):
    """A covariance of images that is diagonal in a cosine basis: for images too large for eigenvectors.

    The basis is the 2-D DCT-II of each channel after a rotation of the channels: of stationary images it is
    nearly the eigenbasis, and it takes (C + H + W) D operations and no storage, in place of D^2 of both.

    Args:
        eigvals: variance of each coefficient, (C, H, W), in squared data units, in the order of rotated
            channel, vertical and horizontal frequency.
        rotation: orthogonal (C, C); its rows are the colours of the rotated channels.

    Raises:
        ValueError: if the shapes do not fit, or a variance is negative or not finite.

    Example:
        >>> covariance = CosineCovariance(torch.full((3, 8, 8), 4.0), torch.eye(3))
        >>> covariance.apply(torch.sqrt, torch.ones(3 * 64))[:2]
        tensor([2.0000, 2.0000])
    """

    rotation: Tensor
    cosines_h: Tensor
    cosines_w: Tensor

    def __init__(self, eigvals: Tensor, rotation: Tensor) -> None:
        nn.Module.__init__(self)
        check_floating(eigvals=eigvals, rotation=rotation)
        if eigvals.ndim != 3 or rotation.shape != (eigvals.shape[0], eigvals.shape[0]):
            raise ValueError(
                "expected eigvals of shape (C, H, W) and a rotation of shape (C, C), "
                f"got {tuple(eigvals.shape)} and {tuple(rotation.shape)}"
            )
        if not bool((torch.isfinite(eigvals) & (eigvals >= 0)).all()):
            raise ValueError(
                "expected finite eigenvalues >= 0, got a range of "
                f"[{eigvals.min().item():g}, {eigvals.max().item():g}]"
            )
        self.image_shape: torch.Size = eigvals.shape
        self.register_buffer("eigvals", eigvals.flatten())
        self.register_buffer("rotation", rotation)
        self.register_buffer("tail", eigvals.new_zeros(()))
        self._make_cosines()
        self.register_load_state_dict_post_hook(CosineCovariance._make_cosines)

    def _make_cosines(self, _: Any = None) -> None:
        """Cosines in the dtype of the eigenvalues, such as have just been loaded."""
        for name, size in zip(("cosines_h", "cosines_w"), self.image_shape[1:], strict=True):
            self.register_buffer(name, cosine_matrix(size).to(self.eigvals), persistent=False)

    @property
    def dim(self) -> int:
        return self.eigvals.numel()

    @property
    def rank(self) -> int:
        return self.dim

    @property
    def eigvecs(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The basis written out, (D, D): for small images only."""
        return self.to_basis(torch.eye(self.dim, dtype=self.eigvals.dtype, device=self.eigvals.device))

    def to_basis(self, u: Tensor) -> Tensor:
        image = u.unflatten(-1, self.image_shape)
        turned = torch.einsum("ec,...chw->...ehw", self.rotation.to(u.dtype), image)
        spectrum = self.cosines_h.to(u.dtype) @ turned @ self.cosines_w.to(u.dtype).mT
        return spectrum.flatten(-3)

    def from_basis(self, coefficients: Tensor) -> Tensor:
        dtype = coefficients.dtype
        spectrum = coefficients.unflatten(-1, self.image_shape)
        turned = self.cosines_h.to(dtype).mT @ spectrum @ self.cosines_w.to(dtype)
        return torch.einsum("ec,...ehw->...chw", self.rotation.to(dtype), turned).flatten(-3)

    def diagonal(self, f: SpectralFunction, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.eigvals.dtype
        variances = f(self.eigvals.to(dtype)).unflatten(-1, self.image_shape)
        with full_precision(self.eigvals.device.type):
            spread = self.cosines_h.to(dtype).mT ** 2 @ variances @ self.cosines_w.to(dtype) ** 2
            return torch.einsum("ec,...ehw->...chw", self.rotation.to(dtype) ** 2, spread).flatten(-3)

    def extra_repr(self) -> str:
        return f"image_shape={tuple(self.image_shape)}"


def cosine_matrix(size: int) -> Tensor:
    """The orthonormal DCT-II, (size, size), float64: row k is the cosine of frequency k."""
    k = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * k[:, None] * (k + 0.5)) * (2 / size) ** 0.5
    matrix[0] /= 2**0.5
    return matrix
