"""Closed forms for training that have not seen the image they denoise.

A denoiser fitted to few images errs less on these than on others: by tens of percent, where they are no more
than their dimensions. A network that is shown it, and is trained on the same images, learns to trust it more
than it will deserve. Here the images are dealt into K folds, and the closed form is fitted K times, each time
to all folds but one:

    while training on x_0 of fold k:    D^(-k)(x_0 + s n, s),  which has not seen x_0
    ever after:                         D(x, s), fitted to all folds.

What the network learns from then holds for what it will see: cross-fitting, as in stacked generalisation
(Wolpert 1992) and double machine learning (Chernozhukov et al. 2018, arXiv 1608.00060).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self, cast

import torch
from torch import Tensor, nn

from gaussnet.denoisers import Denoiser, MarginalDenoiser
from gaussnet.fit.moments import fold_members
from gaussnet.numerics import Sigma, as_sigma, result_dtype


class CrossFit(nn.Module):
    """One closed-form denoiser a fold of the training set, which saw all folds but this one.

    It is for training alone, and no part of the model: what it returns is given to
    `BypassPrecond.forward` as `closed_forms`.

    Args:
        denoisers: one a fold, of one event shape: Gaussians, mixtures, or marginal denoisers.
        folds: the fold of each training image, integers (N,). They stay where they are, best on the CPU.

    Raises:
        ValueError: if there are fewer than two denoisers, or one has no fold.
        TypeError: if some are marginal denoisers, and some are not.
    """

    def __init__(self, denoisers: Sequence[Denoiser], folds: Tensor) -> None:
        super().__init__()
        if len(denoisers) < 2:
            raise ValueError(f"expected at least 2 denoisers, got {len(denoisers)}")
        if len({isinstance(denoiser, MarginalDenoiser) for denoiser in denoisers}) > 1:
            raise TypeError("expected denoisers of one kind, got marginal ones and others")
        if folds.ndim != 1 or folds.is_floating_point() or folds.dtype == torch.bool:
            raise ValueError(f"expected integer folds of shape (N,), got {folds.dtype}, {tuple(folds.shape)}")
        if not torch.equal(folds.unique(), torch.arange(len(denoisers), device=folds.device)):
            raise ValueError(
                f"expected folds 0 to {len(denoisers) - 1}, each with images, got {folds.unique().tolist()}"
            )
        self.denoisers: nn.ModuleList = nn.ModuleList(denoisers)
        self.folds: Tensor = folds

    @classmethod
    def fit(
        cls,
        fit: Callable[[Tensor], Denoiser],
        count: int,
        n_folds: int = 5,
        groups: Tensor | None = None,
    ) -> Self:
        """Fits one denoiser a fold.

        Args:
            fit: makes a denoiser of the images with the given indices, integers (n,) in ascending order.
            count: number of training images N.
            n_folds: number of folds K. Image i is in fold i % K.
            groups: an integer for each image, (N,): those of a group, such as variants of one image, are in
                one fold.

        Raises:
            ValueError: if there are fewer images, or groups, than folds, or fewer than two folds.

        Example:
            >>> from gaussnet import MarginalDenoiser
            >>> images = torch.rand(60, 1, 4, 4, generator=torch.Generator().manual_seed(0))
            >>> cross = CrossFit.fit(lambda kept: MarginalDenoiser.fit(images[kept]), len(images))
            >>> index = torch.tensor([3, 8, 17])  # of the images of a batch
            >>> gaussian, marginal = cross(images[index] + torch.randn(3, 1, 4, 4), 1.0, index)
            >>> marginal.shape
            torch.Size([3, 1, 4, 4])
        """
        folds = fold_members(count, n_folds, groups) if n_folds > 1 else torch.zeros(count)
        found = len(folds.unique())
        if n_folds < 2 or found < n_folds:
            raise ValueError(
                f"expected at least 2 folds and as many images or groups, got {n_folds} folds and {found}"
            )
        return cls([fit((folds != k).nonzero()[:, 0]) for k in range(n_folds)], folds)

    def forward(
        self, x: Tensor, sigma: Sigma, index: Tensor, class_labels: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """The closed forms of noisy training images, each by those that have not seen it.

        Args:
            x: noisy images (B, *event_shape).
            sigma: their noise levels.
            index: which training images they are, integers (B,). On the CPU, no GPU is waited for.
            class_labels: as of the denoisers.

        Returns:
            D_gauss(x, sigma), of the shape of `x`; of marginal denoisers, D_m(x, sigma), too.

        Raises:
            ValueError: if there is not one index for each image; and as of the denoisers.
        """
        if index.shape != x.shape[:1]:
            raise ValueError(
                f"expected an index for each of {len(x)} images, got indices of shape {tuple(index.shape)}"
            )
        level = as_sigma(sigma, x, (len(x),), result_dtype(x)).expand(len(x))
        folds = self.folds[index.to(self.folds.device)].cpu()
        order, sizes = folds.argsort(), folds.bincount(minlength=len(self.denoisers)).tolist()
        back = order.argsort().to(x.device, non_blocking=True)
        order = order.to(x.device, non_blocking=True)
        forms: list[tuple[Tensor, ...]] = []
        for denoiser, mine in zip(self.denoisers, order.split(sizes), strict=True):
            if len(mine) or not len(x):
                labels = None if class_labels is None else class_labels[mine]
                forms.append(_closed_forms(cast(Denoiser, denoiser), x[mine], level[mine], labels))
        return tuple(torch.cat(form)[back] for form in zip(*forms, strict=True))

    def extra_repr(self) -> str:
        """The number of images."""
        return f"images={len(self.folds)}"


def _closed_forms(
    denoiser: Denoiser, x: Tensor, sigma: Tensor, class_labels: Tensor | None
) -> tuple[Tensor, ...]:
    if not isinstance(denoiser, MarginalDenoiser):
        return (denoiser(x, sigma, class_labels),)
    return denoiser.closed_forms(x, sigma, class_labels)
