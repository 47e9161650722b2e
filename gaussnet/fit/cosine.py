"""Mean and covariance in a cosine basis, in one pass, for images of any size.

With c(x) the 2-D DCT of each channel, the (C, C) second moments of the channels are accumulated at each
frequency. Their average over frequencies is diagonalised by a rotation of the channels; the variance of
each rotated coefficient is its eigenvalue. The basis is not fitted but for that rotation, so that its
eigenvalues need no cross-validation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gaussnet.covariance import CosineCovariance, cosine_matrix
from gaussnet.fit.solvers import check_fit
from gaussnet.fit.streams import Data, batches, check_finite, check_shape, process_rank, process_sum

_PART = 2**22  # elements converted to float64 at a time: 32 MB


def fit_cosine(
    data: Data, *, mirror: bool = False, all_processes: bool = False
) -> tuple[Tensor, CosineCovariance, int]:
    """Fits a mean (C, H, W) and a covariance that is diagonal in the cosine basis.

    Args:
        data: images (N, C, H, W), or an iterable of such batches.
        mirror: fit to mirror images, too.
        all_processes: each process of `torch.distributed` has its own share of the data.

    Returns:
        Mean and covariance in the dtype of the data, at least float32, and the number of samples, their
        mirror images not counted.

    Raises:
        TypeError: if a batch is neither a tensor nor an array.
        ValueError: for data that are no images, not finite, constant, or fewer than two.
        RuntimeError: if `all_processes` is asked for where `torch.distributed` is not initialised.
    """
    if all_processes:
        process_rank()
    count, dtype, cosines = 0, torch.float32, []
    pilot = first = second = torch.zeros(())
    for batch, _ in batches(data):
        if batch.ndim != 4:
            raise ValueError(f"expected images of shape (N, C, H, W), got {tuple(batch.shape)}")
        if not len(batch):
            continue
        event_shape = pilot.shape if count else batch.shape[1:]
        check_shape(batch, event_shape)
        check_finite(batch, count)
        if batch.is_floating_point():
            dtype = torch.promote_types(dtype, batch.dtype)
        cosines = cosines or [cosine_matrix(size).to(batch.device) for size in event_shape[1:]]
        for images in batch.split(max(1, _PART // event_shape.numel())):
            images = images.double()
            if not count:
                pilot = images.mean(0)
                first, second = torch.zeros_like(pilot), _outer(torch.zeros_like(pilot))
            # A large mean would cost digits: it is subtracted in pixels, where that is exact.
            spectrum = cosines[0] @ (images - pilot) @ cosines[1].mT  # (n, C, H, W)
            first += spectrum.sum(0)
            second += torch.einsum("nchw,nehw->cehw", spectrum, spectrum)
            count += len(images)
    if not count:
        raise ValueError("expected at least one sample, got none")
    offset, scatter = first / count, second - _outer(first) / count  # of the mean from the pilot: (C, H, W)
    if all_processes:
        share = count
        count = round(float(process_sum(offset.new_tensor([float(share)]))))
        common = process_sum(share * pilot) / count
        own = offset + cosines[0] @ (pilot - common) @ cosines[1].mT
        offset, pilot = process_sum(share * own) / count, common
        scatter = process_sum(scatter + share * _outer(own - offset))
    covariance = scatter / count  # (C, C, H, W)
    mean = pilot + cosines[0].mT @ offset @ cosines[1]
    if mirror:  # a mirrored image has the odd horizontal frequencies with the other sign
        odd = offset + cosines[0] @ (pilot - pilot.flip(-1)) @ cosines[1].mT / 2
        covariance[..., 1::2] += _outer(odd)[..., 1::2]
        mean = (mean + mean.flip(-1)) / 2
    colours = covariance.mean((2, 3))
    check_fit(count * (1 + mirror), mean, covariance.diagonal().sum(), None)
    rotation = torch.linalg.eigh(colours).eigenvectors.mT.flip(0)
    eigvals = torch.einsum("ac,cehw,ae->ahw", rotation, covariance, rotation).clamp_min(0)
    return mean.to(dtype), CosineCovariance(eigvals.to(dtype), rotation.to(dtype)), count


def _outer(x: Tensor) -> Tensor:
    """The products of the channels of (C, H, W), (C, C, H, W)."""
    return x[:, None] * x[None]
