"""The closed forms of a bypass, fitted to a data set one after another.

The Gaussian or mixture comes first; marginals are fitted around it, the error is measured of what these two
make, and the gate of the Gaussian or mixture alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gaussnet.bypass_parts import Base
from gaussnet.denoisers import GaussianDenoiser, GaussianMixtureDenoiser, MarginalDenoiser
from gaussnet.fit.streams import Data, batches
from gaussnet.gate import Gate
from gaussnet.measured import MeasuredError


def fit_parts(
    data: Data,
    heldout: Data | None,
    labels: Tensor | None,
    heldout_labels: Tensor | None,
    gaussian: GaussianDenoiser | GaussianMixtureDenoiser | None,
    base: Base,
    mirror: bool,
    generator: torch.Generator | None,
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """Those arguments of `BypassPrecond` that are closed forms, but for what is `given`.

    Arguments and errors are those of `BypassPrecond.fit`; `given` are its options.
    """
    # All that can be wrong with the call is told before a long fit, rather than after it.
    if base == "marginal" and given.keys() & {"marginals", "error"}:
        raise ValueError("expected no marginals or error with base='marginal', which fits them")
    mixture = labels is not None or isinstance(gaussian, GaussianMixtureDenoiser)
    measured = base == "marginal" or (mixture and "error" not in given)
    if measured and heldout is None:
        what = f"base={base!r}" if base == "marginal" else "a mixture, whose error is measured"
        raise ValueError(f"expected heldout samples with {what}, got None")
    if gaussian is not None:
        by_class = isinstance(gaussian, GaussianMixtureDenoiser) and gaussian.component_labels is not None
        if by_class != (labels is not None):
            what = "labels with a mixture of classes, got none"
            if not by_class:
                what = f"a mixture of classes with labels, got a {type(gaussian).__name__} without classes"
            raise ValueError(f"expected {what}")
    if measured and (labels is None) != (heldout_labels is None):
        got = "heldout_labels" if labels is None else "labels"
        raise ValueError(f"expected labels and heldout_labels, or neither, got {got} alone")

    if gaussian is None and labels is None:
        gaussian = GaussianDenoiser.fit(data, mirror=mirror)
    elif gaussian is None:
        first, _ = next(batches(data), (torch.zeros(0), None))  # of nothing, the fit tells
        prior = math.prod(first.shape[1:]) / 2 if base == "marginal" else 0.0
        gaussian = GaussianMixtureDenoiser.fit(data, labels=labels, mirror=mirror, prior=prior)
    parts: dict[str, Any] = {"gaussian": gaussian}
    other = None
    if base == "marginal":
        other = MarginalDenoiser.fit(data, gaussian, labels=labels, mirror=mirror, generator=generator)
        parts["marginals"] = other.marginals
    if measured:
        assert heldout is not None
        parts["error"] = MeasuredError.fit(
            gaussian, heldout, generator=generator, labels=heldout_labels, other=other
        )
    if "gate" not in given:
        parts["gate"] = Gate.fit(gaussian, data, generator=generator, labels=labels, mirror=mirror)
    return parts
