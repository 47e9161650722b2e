"""The closed forms of a bypass, fitted in one call: each is the fit by hand."""

import re
from typing import Any

import pytest
import torch
from cases import digits, held_out_digits, mixture, noised, split, tiny_unet, train_digits
from torch import Tensor

from gaussnet import (
    BypassPrecond,
    Gate,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    MarginalDenoiser,
    Marginals,
    MeasuredError,
)


def train_labels() -> Tensor:
    return digits()[1][split()[0]]


def held_out_labels() -> Tensor:
    return digits()[1][split()[1]]


@pytest.mark.parametrize(("given", "mirror"), [(False, True), (True, False)], ids=["mirrored", "given"])
def test_fit_is_each_fit_by_hand(given: bool, mirror: bool) -> None:
    data, heldout = train_digits(torch.float32)[:400], held_out_digits(torch.float32)[:100]
    net = tiny_unet(in_channels=3)
    gaussian = GaussianDenoiser.fit(data[:200]) if given else GaussianDenoiser.fit(data, mirror=mirror)
    model = BypassPrecond.fit(
        net,
        data,
        heldout,
        gaussian=gaussian if given else None,
        mirror=mirror,
        generator=torch.Generator().manual_seed(5),
    ).eval()
    generator = torch.Generator().manual_seed(5)
    other = MarginalDenoiser.fit(data, gaussian, generator=generator, mirror=mirror)
    error = MeasuredError.fit(gaussian, heldout, generator=generator, other=other)
    gate = Gate.fit(gaussian, data, generator=generator, mirror=mirror)
    expected = BypassPrecond(
        net, gaussian, gate, base="marginal", marginals=other.marginals, error=error
    ).eval()
    x = noised(0.7, dtype=torch.float32)
    assert model(x, 0.7).equal(expected(x, 0.7))
    assert model.to_arguments() == expected.to_arguments()


def test_fit_of_other_bases_and_what_is_given() -> None:
    data = train_digits(torch.float32)
    gaussian = GaussianDenoiser.isotropic(data.mean(0), 1.0)
    model = BypassPrecond.fit(
        tiny_unet(), data, base="blend", gaussian=gaussian, gate=None, show_gaussian=False
    )
    assert model.gaussian is gaussian
    assert model.gate is model.marginals is model.error is None
    with pytest.raises(ValueError, match=r"^expected heldout samples with base='marginal', got None$"):
        BypassPrecond.fit(tiny_unet(in_channels=3), data)
    with pytest.raises(ValueError, match=r"^expected no marginals or error with base='marginal', which fits"):
        BypassPrecond.fit(
            tiny_unet(in_channels=3), data, data[:9], marginals=Marginals.fit(data[:9], n_levels=4)
        )
    nothing = data[:50] * torch.nan  # which a fit would refuse: channels are looked at before
    bases: dict[Any, int] = {"marginal": 3, "blend": 2}
    for base, channels in bases.items():
        with pytest.raises(ValueError, match=rf"in_channels={channels} .* got in_channels=1"):
            BypassPrecond.fit(tiny_unet(), nothing, held_out_digits(torch.float32), base=base)


@pytest.mark.parametrize(
    ("base", "given", "mirror"),
    [("marginal", False, True), ("marginal", True, False), ("blend", False, False)],
)
def test_fit_by_class_is_each_fit_by_hand(base: Any, given: bool, mirror: bool) -> None:
    data, heldout = train_digits(torch.float32)[:400], held_out_digits(torch.float32)[:100]
    labels, heldout_labels = train_labels()[:400], held_out_labels()[:100]
    net = tiny_unet(in_channels=3 if base == "marginal" else 2, label_dim=10)
    prior = 32.0 if base == "marginal" else 0.0
    classes = GaussianMixtureDenoiser.fit(data, labels=labels, prior=prior, mirror=mirror)
    if given:
        classes = GaussianMixtureDenoiser.fit(data, labels=labels, rank=5)
    model = BypassPrecond.fit(
        net,
        data,
        heldout,
        labels=labels,
        heldout_labels=heldout_labels,
        gaussian=classes if given else None,
        base=base,
        mirror=mirror,
        generator=torch.Generator().manual_seed(5),
    ).eval()
    generator = torch.Generator().manual_seed(5)
    options: dict[str, Any] = {}
    other: MarginalDenoiser | None = None
    if base == "marginal":
        other = MarginalDenoiser.fit(data, classes, labels=labels, mirror=mirror, generator=generator)
        options = {"marginals": other.marginals}
    options["error"] = MeasuredError.fit(
        classes, heldout, generator=generator, labels=heldout_labels, other=other
    )
    gate = Gate.fit(classes, data, generator=generator, labels=labels, mirror=mirror)
    expected = BypassPrecond(net, classes, gate, base=base, **options).eval()
    x, told = noised(0.7, dtype=torch.float32), held_out_labels()[:16]
    assert model(x, 0.7, told).equal(expected(x, 0.7, told))
    assert model.to_arguments() == expected.to_arguments()


def test_fit_measures_the_error_of_a_mixture_of_clusters() -> None:
    data, heldout = train_digits(torch.float32)[:400], held_out_digits(torch.float32)[:100]
    clusters = GaussianMixtureDenoiser.fit(data, n_components=3, rank=5)
    net = tiny_unet(in_channels=2)
    model = BypassPrecond.fit(net, data, heldout, gaussian=clusters, base="blend", gate=None)
    assert model.gaussian is clusters
    assert model.error is not None
    error = MeasuredError.fit(clusters, heldout, n_queries=50)
    given = BypassPrecond.fit(net, data, gaussian=clusters, base="blend", gate=None, error=error)
    assert given.error is error


def test_fit_tells_what_is_amiss_with_classes_before_it_fits() -> None:
    data, labels = train_digits(torch.float32)[:50] * torch.nan, train_labels()[:50]  # which no fit takes
    heldout, net = held_out_digits(torch.float32)[:10], tiny_unet(in_channels=3, label_dim=10)
    clusters = mixture()
    classes = GaussianMixtureDenoiser(
        clusters.weights, clusters.means, [clusters.component(0).covariance] * 4, torch.arange(4)
    )
    own = held_out_labels()[:10]
    cases: list[tuple[str, dict[str, Any]]] = [
        ("expected labels and heldout_labels, or neither, got labels alone", {"labels": labels}),
        ("expected labels and heldout_labels, or neither, got heldout_labels alone", {"heldout_labels": own}),
        ("expected labels with a mixture of classes, got none", {"gaussian": classes}),
        (
            "expected a mixture of classes with labels, got a GaussianMixtureDenoiser without classes",
            {"gaussian": clusters, "labels": labels, "heldout_labels": own},
        ),
        (
            "expected a mixture of classes with labels, got a GaussianDenoiser without classes",
            {"gaussian": clusters.component(0), "labels": labels, "heldout_labels": own},
        ),
        (
            "expected heldout samples with a mixture, whose error is measured, got None",
            {
                "gaussian": clusters,
                "heldout": None,
                "base": "blend",
                "show_gaussian": False,
                "network": tiny_unet(),
            },
        ),
        (
            "expected a network with label_dropout=0 in a class-conditional base, got 0.1",
            {"network": tiny_unet(in_channels=3, label_dim=10, label_dropout=0.1), "labels": labels},
        ),
    ]
    for message, arguments in cases:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            BypassPrecond.fit(**{"network": net, "data": data, "heldout": heldout, **arguments})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_unless_it_is_told_to_fit_mirrors_nothing(dtype: torch.dtype) -> None:
    data = train_digits(dtype)[:100]
    mean = BypassPrecond.fit(tiny_unet(in_channels=2), data, base="blend", gate=None).gaussian.mean
    assert mean.equal(GaussianDenoiser.fit(data).mean)
    assert not mean.allclose(mean.flip(-1)), "these can tell"
