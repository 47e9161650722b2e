"""Which component of a mixture each sample belongs to, where its class leaves one alone.

Such a sample needs one Gaussian, not all of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gaussnet.denoisers.base import class_index, other_class
from gaussnet.numerics import known_true


def possible_components(
    class_labels: Tensor | None, batch_shape: tuple[int, ...], known: Tensor | None
) -> Tensor | None:
    """Which components (*batch, K) are of each sample's class; None where nothing tells.

    Args:
        class_labels: as of `Denoiser.forward`.
        batch_shape: of the samples.
        known: the class of each component, (K,).

    Raises:
        ValueError: if the labels fit neither the batch nor the classes.
    """
    if class_labels is None or known is None:
        return None
    return ~other_class(class_index(class_labels, batch_shape, known), known)


def sole_components(possible: Tensor | None) -> Tensor | None:
    """The component of each sample, (*batch,), if there is one for each, and values can be read."""
    if possible is None or not known_true((possible.sum(-1) == 1).all()):
        return None
    return possible.int().argmax(-1)


def rows_by_component(used: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Components and the rows that use them, of flags (B, K), in the order of components.

    On a GPU, the host waits once.
    """
    rows = used.mT.nonzero()[:, 1]
    for k, mine in enumerate(rows.split(used.sum(0).tolist())):
        if len(mine):
            yield k, mine


def used_alone(index: Tensor, count: int) -> Tensor:
    """Flags (*batch, K) of one component a sample, of their numbers (*batch,)."""
    return index[..., None] == torch.arange(count, device=index.device)
