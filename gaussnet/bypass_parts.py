"""What a bypass can be made of, and what does not go together."""

from __future__ import annotations

import math
from typing import Literal, get_args

from torch import Tensor, nn

from gaussnet.denoisers import (
    ComponentMarginals,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    MarginalDenoiser,
    Marginals,
)
from gaussnet.denoisers.component_marginals import check_marginals
from gaussnet.measured import MeasuredError
from gaussnet.numerics import result_dtype

Centre = Literal["pixel", "channel", "estimate"]
Base = Literal["blend", "gaussian", "isotropic", "marginal"]


def check_options(
    base: str, centre: str, show_gaussian: bool, whiten: bool, gate_tol: float, sigma_data: float | None
) -> None:
    """Raises a ValueError unless the options of a `BypassPrecond` are possible."""
    for name, value, known in (("base", base, get_args(Base)), ("centre", centre, get_args(Centre))):
        if value not in known:
            raise ValueError(f"expected {name} to be one of {', '.join(known)}, got {value!r}")
    if centre == "estimate" and (whiten or not show_gaussian):
        raise ValueError(
            "expected show_gaussian=True and whiten=False with centre='estimate', got "
            f"{show_gaussian=} and {whiten=}"
        )
    if not 0 <= gate_tol < 1:
        raise ValueError(f"expected 0 <= gate_tol < 1, got {gate_tol}")
    if sigma_data is not None and (base != "isotropic" or not 0 < sigma_data < math.inf):
        raise ValueError(
            f"expected a finite sigma_data > 0, with base='isotropic', got {sigma_data} with {base!r}"
        )


def check_parts(
    network: nn.Module,
    gaussian: GaussianDenoiser | GaussianMixtureDenoiser,
    base: Base,
    whiten: bool,
    marginals: Marginals | ComponentMarginals | None,
    error: MeasuredError | None,
) -> None:
    """Raises a ValueError, or a TypeError, unless the parts of a base make one."""
    if not float(gaussian.variance) > 0:
        raise ValueError("expected a Gaussian with variance > 0, got 0: there is nothing to learn")
    if isinstance(gaussian, GaussianMixtureDenoiser):
        if error is None:
            raise ValueError("expected error=MeasuredError.fit(...): a mixture's has no closed form")
        if whiten:
            raise ValueError("expected whiten=False with a mixture, which has no one covariance")
        if gaussian.component_labels is not None:
            check_label_dropout(network)
    if (base == "marginal") != (marginals is not None):
        raise ValueError(f"expected marginals with base='marginal', and only then, got base={base!r}")
    if marginals is not None:
        check_marginals(gaussian, marginals)
        if error is None:
            raise ValueError("expected error=MeasuredError.fit(..., other=...) with marginals, got None")
        if error.other not in ("", MarginalDenoiser.__name__):
            raise ValueError(f"expected an error with other=MarginalDenoiser(...), got {error.other}")
    elif error is not None and error.other == MarginalDenoiser.__name__:
        raise ValueError(f"expected an error without other=, as base={base!r}, got {error.other}")


def check_label_dropout(network: nn.Module) -> None:
    """Raises a ValueError if the network drops labels that a base of classes would see."""
    if getattr(network, "label_dropout", 0):
        raise ValueError(
            "expected a network with label_dropout=0 in a class-conditional base, got "
            f"{network.label_dropout}: drop labels before the model, where both of them see it"
        )


def check_forms(forms: tuple[Tensor, ...] | None, x: Tensor, marginals: bool) -> list[Tensor]:
    """What takes the place of the closed forms of `x`, in the dtype of the result; without any, none.

    Raises:
        ValueError: if these are not D_gauss and, with marginals, D_m, each of the shape of `x`.
    """
    if forms is None:
        return []
    names = ["D_gauss", "D_m"] if marginals else ["D_gauss"]
    if [form.shape for form in forms] != [x.shape] * len(names):
        raise ValueError(
            f"expected closed_forms of {', '.join(names)}, each of shape {tuple(x.shape)}, got shapes "
            f"{[tuple(form.shape) for form in forms]}"
        )
    return [form.to(result_dtype(x)) for form in forms]
