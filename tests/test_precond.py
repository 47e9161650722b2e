"""The bypass: its base, its scale, its inputs; and EDM as its isotropic case."""

import json
import math
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from cases import (
    EVENT,
    SIGMAS,
    cubature,
    denoiser,
    digits,
    golden,
    held_out_digits,
    noised,
    randn,
    relative_error,
    split,
    tiny_unet,
    train_digits,
)
from torch import Tensor, nn

from gaussnet import (
    BypassPrecond,
    Covariance,
    Denoiser,
    EDMPrecond,
    Gate,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    MarginalDenoiser,
    Marginals,
    MeasuredError,
    SongUNet,
    count_nfe,
    from_pretrained,
    heun,
    karras_sigmas,
)
from gaussnet.bypass_parts import Base, Centre
from gaussnet.gate import find_sigma_gate

GATE = Gate(torch.tensor([0.1, 1.0, 10.0]), torch.tensor([0.9, 0.6, 0.1]))

sigmas = pytest.mark.parametrize("sigma", SIGMAS)
bases = pytest.mark.parametrize("base", ["blend", "gaussian", "isotropic"])
shown = pytest.mark.parametrize("show_gaussian", [True, False], ids=["shown", "hidden"])


def bypass(
    gaussian: Any,
    gate: Gate | None = None,
    show_gaussian: bool = True,
    base: Base = "blend",
    awake: bool = True,
    *,
    whiten: bool = False,
    error: MeasuredError | None = None,
    **changes: Any,
) -> BypassPrecond:
    net = tiny_unet(awake, in_channels=1 + show_gaussian, **changes).to(gaussian.mean.dtype)
    return BypassPrecond(net, gaussian, gate, show_gaussian, base, whiten=whiten, error=error).eval()


class Recorder(nn.Module):
    """A network without attributes that keeps its arguments and returns ones."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, ...]] = []
        self.extra: dict[str, Any] = {}

    def forward(self, inputs: Tensor, noise_labels: Tensor, class_labels: Any, **extra: Any) -> Tensor:
        self.calls.append((inputs, noise_labels, class_labels))
        self.extra = extra
        return torch.ones_like(inputs[:, :1])


# Base ---------------------------------------------------------------------------------------------


@sigmas
@bases
@shown
@pytest.mark.parametrize("gate", [None, GATE], ids=["no-gate", "gate"])
def test_untrained_it_is_its_base(sigma: float, base: Base, show_gaussian: bool, gate: Gate | None) -> None:
    gaussian = denoiser("gaussian-full", torch.float32)
    model = bypass(gaussian, gate, show_gaussian, base, awake=False)
    x = noised(sigma, dtype=torch.float32)
    assert model(x, sigma).equal(model.untrained(x, sigma))
    assert model(x, torch.full((16,), sigma)).equal(model.untrained(x, torch.full((16,), sigma)))
    if base == "gaussian":
        assert model(x, sigma).equal(gaussian(x, sigma))
        assert model.untrained(x, sigma).equal(gaussian(x, sigma))


@sigmas
@pytest.mark.parametrize("name", ["isotropic", "gaussian-full", "gaussian-rank-10"])
def test_the_blended_base_is_the_formula(name: str, sigma: float) -> None:
    gaussian, x = denoiser(name), noised(sigma)
    cov = gaussian.covariance.dense()
    v, noise = cov.trace() / 64, sigma**2
    b = 1 - gaussian.bayes_error(sigma) / noise
    isotropic = gaussian.mean + v / (v + noise) * (x - gaussian.mean)
    expected = b * gaussian(x, sigma) + (1 - b) * isotropic
    assert relative_error(bypass(gaussian).untrained(x, sigma), expected) < 1e-12


# Scale --------------------------------------------------------------------------------------------


@bases
@pytest.mark.parametrize("sigma", [0.01, 0.05, 0.2, 1.0, 5.0, 80.0])
def test_c_out_is_the_measured_error_of_the_base(sigma: float, base: Base) -> None:
    data = train_digits()[:100]
    model = bypass(GaussianDenoiser.fit(data, shrinkage="none"), base=base)
    x = (data + sigma * cubature()).flatten(0, 1)
    error = (model.untrained(x, sigma) - data.repeat(128, 1, 1, 1)).square().mean()
    torch.testing.assert_close(model.c_out(sigma) ** 2, error, rtol=1e-9, atol=0)


@bases
@pytest.mark.parametrize("sigma", [0.01, 0.05, 0.2, 1.0, 5.0, 80.0])
def test_the_training_target_has_unit_variance(sigma: float, base: Base) -> None:
    data = train_digits()
    model = bypass(GaussianDenoiser.fit(data, shrinkage="none"), base=base)
    x = data + sigma * randn(*data.shape, seed=3)
    squares = ((data - model.untrained(x, sigma)) / model.c_out(sigma)).square().flatten(1).mean(1)
    standard_error = squares.std() / len(squares) ** 0.5
    assert standard_error < 0.02, "the sample is too small to tell"
    assert abs(squares.mean() - 1) < 4 * standard_error


@sigmas
@pytest.mark.parametrize("name", ["isotropic", "gaussian-full", "gaussian-rank-10"])
def test_without_blend_c_out_is_the_bayes_error(name: str, sigma: float) -> None:
    gaussian = denoiser(name)
    error = gaussian.bayes_error(sigma)
    plain, blended = bypass(gaussian, base="gaussian"), bypass(gaussian)
    torch.testing.assert_close(plain.c_out(sigma) ** 2, error, rtol=1e-11, atol=0)
    assert blended.c_out(sigma) ** 2 >= error * (1 - 1e-12), "the Gaussian is the best affine denoiser"
    torch.testing.assert_close(blended.weight(sigma) * blended.c_out(sigma) ** 2, torch.ones_like(error))


@sigmas
@bases
def test_c_out_in_float32_and_per_sample(sigma: float, base: Base) -> None:
    single = bypass(denoiser("gaussian-full", torch.float32), base=base)
    double = bypass(denoiser("gaussian-full", torch.float32).double(), base=base)
    assert relative_error(single.c_out(sigma), double.c_out(sigma)) < 1e-5
    together = double.c_out(torch.tensor([0.3, sigma], dtype=torch.float64))
    assert together.shape == (2,)
    torch.testing.assert_close(together[1], double.c_out(sigma))
    torch.testing.assert_close(double.weight(torch.tensor([0.3, sigma]).double()), together**-2)


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan")])
def test_c_out_at_impossible_levels(sigma: float) -> None:
    with pytest.raises(ValueError, match="expected sigma to be finite and > 0"):
        bypass(denoiser("isotropic")).c_out(sigma)


def test_scale_and_weight_are_as_wide_as_their_levels() -> None:
    model = BypassPrecond(Recorder(), denoiser("gaussian-full", torch.float32), GATE)
    for dtype in (torch.float32, torch.float64):
        level = torch.tensor([0.1, 1.0], dtype=dtype)
        assert (model.c_out(level).dtype, model.weight(level).dtype) == (dtype, dtype)
    assert model.c_out(0.5).dtype == torch.float32, "that of the buffers"


# Network ------------------------------------------------------------------------------------------


@sigmas
def test_inputs_have_unit_variance_about_either_centre(sigma: float) -> None:
    gaussian = denoiser("gaussian-full")
    x = train_digits() + sigma * randn(*train_digits().shape, seed=8)
    seen: dict[str, Tensor] = {}
    for centre in ("channel", "pixel"):
        net = Recorder()
        BypassPrecond(net, gaussian, centre=centre)(x, sigma)
        seen[centre] = net.calls[0][0][:, :1]
        assert float(seen[centre].square().mean()) == pytest.approx(1, abs=0.05), centre
    flat = seen["channel"].std((2, 3)) / (x.std((2, 3)))
    torch.testing.assert_close(flat, flat[:1].expand_as(flat))  # scaled and shifted alone
    isotropic = GaussianDenoiser.isotropic(gaussian.mean, gaussian.variance)
    scale = (isotropic.variance + sigma**2).sqrt()
    torch.testing.assert_close(seen["pixel"] * scale, x - gaussian.mean)


@sigmas
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["gaussian-full", "gaussian-rank-10", "mixture-kmeans"])
def test_inputs_about_the_estimate_are_the_noise_that_it_finds(
    name: str, sigma: float, dtype: torch.dtype
) -> None:
    """(x - D)/sigma = -sigma grad log p(x; sigma)."""
    analytic, net = denoiser(name, dtype), Recorder()
    error = MeasuredError(torch.tensor([0.1, 1.0]), torch.rand(2, 3) + 1)
    error = error if name.startswith("mixture") else None
    x = noised(sigma, dtype=dtype)
    BypassPrecond(net, analytic, centre="estimate", error=error)(x, sigma)
    noise, shown = net.calls[0][0].chunk(2, dim=1)
    rounding = 100 * torch.finfo(dtype).eps * float(x.abs().max()) / sigma
    torch.testing.assert_close(noise, -sigma * analytic.score(x, sigma), rtol=1e-4, atol=max(rounding, 1e-9))
    torch.testing.assert_close(shown, analytic(x, sigma))


@sigmas
def test_the_noise_that_a_gaussian_finds_has_a_known_variance(sigma: float) -> None:
    """That of the score of its own samples: E |(x - D)/sigma|^2 = sum s^2/(lam + s^2)."""
    gaussian, net = denoiser("gaussian-full"), Recorder()
    x = gaussian.mean + gaussian.filter(
        lambda lam, s: (lam + s**2).sqrt(), gaussian.mean + randn(4000, *EVENT, seed=5), sigma
    )
    BypassPrecond(net, gaussian, centre="estimate")(x, sigma)
    lam = gaussian.covariance.eigvals
    expected = float((sigma**2 / (lam + sigma**2)).mean())
    assert float(net.calls[0][0][:, :1].square().mean()) == pytest.approx(expected, rel=0.02)


def test_the_estimate_is_that_of_marginals_and_of_what_training_gives() -> None:
    """Marginals' default."""
    model, refined = with_marginals()
    net = Recorder()
    model = BypassPrecond(
        net,
        refined.gaussian,
        base="marginal",
        marginals=refined.marginals,
        error=model.error,
    )
    x = noised(0.3, dtype=torch.float32)
    forms = (x - 0.3, x + 0.6)
    for given, other in ((None, refined(x, 0.3)), (forms, forms[1])):
        model(x, 0.3, closed_forms=given)
        seen = net.calls[-1][0]
        assert seen.shape[1] == 3
        torch.testing.assert_close(seen[:, :1], (x - other) / 0.3, msg=f"closed forms {given is not None}")
        torch.testing.assert_close(seen[:, 2:], other)


def test_in_bfloat16_the_noise_of_low_levels_is_seen_about_the_estimate_alone() -> None:
    """The share of the noise that rounding the network's input to eight bits takes away."""
    sigma, (model, refined) = 0.002, with_marginals()
    x, lost = noised(sigma, dtype=torch.float32), {}
    for centre, scale in (("estimate", 1.0), ("pixel", sigma * float(refined.gaussian.variance) ** -0.5)):
        net = Recorder()
        BypassPrecond(
            net,
            refined.gaussian,
            base="marginal",
            centre=cast(Centre, centre),
            marginals=refined.marginals,
            error=model.error,
        )(x, sigma)
        seen = net.calls[0][0][:, :1]
        lost[centre] = float((seen.bfloat16().float() - seen).square().mean().sqrt()) / scale
    assert lost["estimate"] < 0.003, lost
    assert lost["pixel"] > 0.3, lost


def test_the_mean_colour_is_one_of_each_channel() -> None:
    mean = torch.arange(3.0).reshape(3, 1, 1) + torch.linspace(-0.5, 0.5, 16).reshape(4, 4)
    x, net = randn(2, 3, 4, 4, dtype=torch.float32), Recorder()
    model = BypassPrecond(
        net, GaussianDenoiser.isotropic(mean, 0.2), base="gaussian", show_gaussian=False, centre="channel"
    )
    model(x, 0.3)
    v = 0.2 + (mean - mean.mean((1, 2), keepdim=True)).square().mean()
    expected = (x - torch.arange(3.0).reshape(3, 1, 1)) / (v + 0.09).sqrt()
    torch.testing.assert_close(net.calls[0][0], expected)


@pytest.mark.parametrize(("shape", "axes"), [((6,), ()), ((2, 3), (1,)), ((2, 3, 4), (1, 2))])
def test_the_mean_of_a_channel_is_over_all_axes_behind_it(
    shape: tuple[int, ...], axes: tuple[int, ...]
) -> None:
    mean, x, net = randn(*shape, seed=3), randn(2, *shape), Recorder()
    gaussian = GaussianDenoiser.isotropic(mean, 0.2)
    BypassPrecond(net, gaussian, base="gaussian", show_gaussian=False, centre="channel")(x, 0.3)
    flat = mean.mean(axes, keepdim=True) if axes else mean  # without such axes, a channel is a number
    v = 0.2 + (mean - flat).square().mean()
    torch.testing.assert_close(net.calls[0][0], (x - flat) / (v + 0.09).sqrt())


def test_a_model_without_a_gate_says_so() -> None:
    gated = BypassPrecond(tiny_unet(in_channels=2), denoiser("gaussian-full"), GATE)
    open_ = BypassPrecond(tiny_unet(in_channels=2), denoiser("gaussian-full"))
    assert open_.to_arguments()["gate"] is None
    assert gated.to_arguments()["gate"] is not None


@shown
@bases
@sigmas
def test_what_the_network_sees_and_does(show_gaussian: bool, base: Base, sigma: float) -> None:
    gaussian, x, net = denoiser("gaussian-full"), noised(sigma), Recorder()
    model = BypassPrecond(net, gaussian, GATE, show_gaussian, base)
    labels = torch.arange(16)
    out = model(x, sigma, labels, augment_labels=torch.ones(16, 9))
    inputs, noise_labels, class_labels = net.calls[0]
    c_in = 1 / (gaussian.covariance.dense().trace() / 64 + sigma**2).sqrt()
    torch.testing.assert_close(inputs[:, :1], c_in * (x - gaussian.mean))
    assert inputs.shape[1] == 1 + show_gaussian
    if show_gaussian:
        assert relative_error(inputs[:, 1:], gaussian(x, sigma)) < 1e-12
    torch.testing.assert_close(noise_labels, torch.full((16,), sigma, dtype=torch.float64).log() / 4)
    assert class_labels is labels
    assert net.extra["augment_labels"].equal(torch.ones(16, 9))
    model(x, sigma)
    assert net.extra == {}
    # The network says 1: what is added to the base is g c_out.
    added = (out - model.untrained(x, sigma)) / model.c_out(sigma)
    torch.testing.assert_close(added, GATE(sigma).double().expand_as(added), rtol=1e-6, atol=1e-9)


@sigmas
@bases
def test_the_gate_multiplies_all_that_is_not_gaussian(sigma: float, base: Base) -> None:
    gaussian, x, net = denoiser("gaussian-full"), noised(sigma), Recorder()
    model = BypassPrecond(net, gaussian, GATE, base=base)
    g, cov = GATE(sigma).double(), gaussian.covariance.dense()
    w = {"blend": float(gaussian.bayes_error(sigma) / sigma**2), "gaussian": 0.0, "isotropic": 1.0}[base]
    v = cov.trace() / 64
    isotropic = gaussian.mean + v / (v + sigma**2) * (x - gaussian.mean)
    expected = gaussian(x, sigma) + g * (w * (isotropic - gaussian(x, sigma)) + model.c_out(sigma))
    assert relative_error(model(x, sigma), expected) < 1e-6
    f = torch.linalg.solve(cov + sigma**2 * torch.eye(64), cov)
    f = (1 - g * w) * f + g * w * v / (v + sigma**2) * torch.eye(64)
    rest = torch.eye(64) - f
    error = ((rest @ cov @ rest.mT).trace() + sigma**2 * (f @ f.mT).trace()) / 64
    torch.testing.assert_close(model.c_out(sigma) ** 2, error, rtol=1e-6, atol=0)


def test_class_labels_reach_conditional_networks_only() -> None:
    x, labels = noised(0.5, 4), torch.arange(4)
    conditional = bypass(denoiser("isotropic"), label_dim=4)
    assert relative_error(conditional(x, 0.5, labels), conditional(x, 0.5)) > 1e-6
    assert conditional(x, 0.5, torch.eye(4)).equal(conditional(x, 0.5, labels))
    with pytest.raises(ValueError, match="class_labels"):
        conditional(x, 0.5, torch.eye(5)[:4])
    unconditional = bypass(denoiser("isotropic"))
    assert unconditional(x, 0.5, labels).equal(unconditional(x, 0.5))


def test_training_reaches_the_network_and_nothing_else() -> None:
    model = bypass(denoiser("gaussian-full", torch.float32), GATE).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = noised(0.5, dtype=torch.float32)
    (model(x, 0.5) - x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    optimizer.step()
    moved = {key.split(".")[0] for key, value in model.state_dict().items() if not value.equal(before[key])}
    assert moved == {"model"}


@bases
def test_autocast_leaves_the_base_alone(base: Base) -> None:
    model = bypass(denoiser("gaussian-full", torch.float32), GATE, base=base, awake=False)
    x = noised(0.05, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, 0.05)
    assert out.dtype == torch.float32
    assert out.equal(model.untrained(x, 0.05))


# EDM ----------------------------------------------------------------------------------------------


@sigmas
@bases
@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_the_isotropic_bypass_is_edm(sigma: float, base: Base, sigma_data: float) -> None:
    net, x = tiny_unet(), noised(sigma, dtype=torch.float32)
    edm = EDMPrecond(net, sigma_data)
    gaussian = GaussianDenoiser.isotropic(torch.zeros(EVENT), sigma_data**2)
    model = BypassPrecond(net, gaussian, show_gaussian=False, base=base)
    assert relative_error(model(x, sigma), edm(x, sigma)) < 1e-6
    assert relative_error(model.c_out(sigma), edm.c_out(sigma)) < 1e-6


@sigmas
@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_edm_is_edms_table_1(sigma: float, sigma_data: float) -> None:
    net, x = tiny_unet().double(), noised(sigma)
    edm = EDMPrecond(net, sigma_data).double()
    variance = sigma**2 + sigma_data**2
    c_skip = sigma_data**2 / variance
    c_out = sigma * sigma_data / variance**0.5
    c_in = 1 / variance**0.5
    c_noise = torch.full((16,), sigma, dtype=torch.float64).log() / 4
    expected = c_skip * x + c_out * net(c_in * x, c_noise)
    assert relative_error(edm(x, sigma), expected) < 1e-7  # sigma_data^2 is kept in float32
    assert relative_error(edm(x, sigma) - c_skip * x, expected - c_skip * x) < 1e-4, "the network's part"
    assert float(edm.c_out(sigma)) == pytest.approx(c_out, rel=1e-7)
    weight = variance / (sigma * sigma_data) ** 2
    assert float(edm.weight(sigma)) == pytest.approx(weight, rel=1e-6)
    assert edm.sigma_data == sigma_data


@pytest.mark.parametrize("name", ["edm_ddpmpp", "edm_ddpmpp_cond", "edm_ncsnpp"])
def test_matches_the_outputs_of_edm(name: str) -> None:
    config, tensors = golden(name)
    edm = EDMPrecond(SongUNet(**config)).eval()
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    edm.load_state_dict(state, strict=True)
    out = edm(
        tensors["in.x"],
        tensors["in.sigma"],
        tensors.get("in.class_labels"),
        augment_labels=tensors.get("in.augment_labels"),
    )
    assert relative_error(out, tensors["out.denoised"]) < 1e-5
    skip = 0.25 / (0.25 + tensors["in.sigma"].reshape(-1, 1, 1, 1) ** 2) * tensors["in.x"]
    assert relative_error(out - skip, tensors["out.denoised"] - skip) < 1e-4, "the network's part"


def test_every_level_is_known() -> None:
    grid = torch.tensor([80.0, 0.3, 0.002, 0.0], dtype=torch.float64)
    for model in (EDMPrecond(tiny_unet()), bypass(denoiser("isotropic"))):
        assert (model.sigma_min, model.sigma_max) == (0, float("inf"))
        assert model.round_sigma(grid).equal(grid)


def test_edm_has_a_range_of_levels() -> None:
    edm = EDMPrecond(tiny_unet(), sigma_min=0.002, sigma_max=80)
    assert (edm.sigma_min, edm.sigma_max) == (0.002, 80)
    loaded = EDMPrecond.from_arguments(json.loads(json.dumps(edm.to_arguments())))
    assert (loaded.sigma_min, loaded.sigma_max) == (0.002, 80)
    with pytest.raises(ValueError, match="0 <= sigma_min < sigma_max, got 2 and 1"):
        EDMPrecond(tiny_unet(), sigma_min=2, sigma_max=1)


# A closed gate ------------------------------------------------------------------------------------

CLOSING = Gate(torch.tensor([0.5, 1.0, 4.0]), torch.tensor([1.0, 0.5, 0.0]))


def test_where_the_gate_is_closed_the_network_rests() -> None:
    gaussian, net = denoiser("gaussian-full"), Recorder()
    model = BypassPrecond(net, gaussian, CLOSING, gate_tol=0.25).eval()
    assert model.sigma_gate == pytest.approx(2.0)
    x = noised(2.1)
    assert model(x, 2.1).equal(gaussian(x, 2.1))
    assert model(x, torch.full((16,), 30.0)).equal(gaussian(x, 30.0))
    assert net.calls == []
    assert model.untrained(x, 2.1).equal(gaussian(x, 2.1)), "no isotropic share either"
    # one open sample of the batch: the network is evaluated, and the others are Gaussian all the same
    mixed = torch.full((16,), 2.1, dtype=torch.float64)
    mixed[3] = 1.9
    out = model(x, mixed)
    assert len(net.calls) == 1
    others = torch.arange(16) != 3
    assert relative_error(out[others], gaussian(x, 2.1)[others]) < 1e-12
    assert relative_error(out[3], gaussian(x, 1.9)[3]) > 0.1
    model.train()
    model(x, 30.0)
    assert len(net.calls) == 2, "in training, processes must not part ways"


def test_no_gate_no_rest() -> None:
    gaussian, x = denoiser("gaussian-full"), noised(80.0)
    for gate, tol, level in ((None, 0.01, math.inf), (GATE, 0.0, math.inf), (GATE, 0.05, math.inf)):
        net = Recorder()
        model = BypassPrecond(net, gaussian, gate, gate_tol=tol).eval()
        assert model.sigma_gate == level
        model(x, 80.0)
        assert len(net.calls) == 1
    assert BypassPrecond(Recorder(), gaussian, CLOSING, gate_tol=0.0).sigma_gate == pytest.approx(4.0)


def test_evaluations_of_a_closed_gate_are_free() -> None:
    model = bypass(denoiser("gaussian-full"), CLOSING)
    grid = karras_sigmas(18)
    closed = int((grid > model.sigma_gate).sum())
    assert 2 < closed < 12
    with count_nfe(model) as nfe:
        heun(model, 80 * randn(2, *EVENT), grid)
    assert nfe() == 35 - 2 * closed + 1, "the first open level is that of a corrector"


def test_compiled_without_graph_breaks_and_with_one_recompilation() -> None:
    torch.compiler.reset()
    compilations: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        compilations.append(graph)
        return graph.forward

    model = bypass(denoiser("gaussian-full", torch.float32), CLOSING)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = noised(0.5, dtype=torch.float32)
    for sigma in (torch.tensor(0.5), torch.tensor(0.9), torch.full((16,), 0.7), torch.full((16,), 30.0)):
        assert relative_error(compiled(x, sigma), model(x, sigma)) < 1e-5, sigma
    assert len(compilations) == 2, "one for a scalar, one for a level per sample"


# Calibration --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [20, 40, 200, 1437])
def test_the_target_has_unit_variance_on_held_out_data(count: int) -> None:
    heldout = held_out_digits()
    gaussian = GaussianDenoiser.fit(train_digits()[:count])  # of 64 dimensions
    for sigma in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0):
        model = bypass(gaussian)
        x = heldout + sigma * randn(*heldout.shape, seed=3)
        variance = ((heldout - model.untrained(x, sigma)) / model.c_out(sigma)).square().mean()
        assert float(variance) == pytest.approx(1, abs=0.06), sigma


def test_measured_error_takes_the_place_of_the_closed_form() -> None:
    data, heldout = train_digits()[:40], held_out_digits()
    gaussian = GaussianDenoiser.fit(data, shrinkage="none")  # its own error is far too small
    error = MeasuredError.fit(gaussian, heldout[::2], generator=torch.Generator().manual_seed(0))
    fresh = heldout[1::2]
    for base in ("blend", "gaussian", "isotropic"):
        model = bypass(gaussian, GATE, base=base, error=error)
        for sigma in (0.02, 0.1, 0.5, 2.0, 20.0):
            x = fresh + sigma * randn(*fresh.shape, seed=4)
            variance = ((fresh - model.untrained(x, sigma)) / model.c_out(sigma)).square().mean()
            assert float(variance) == pytest.approx(1, abs=0.15), (base, sigma)


@pytest.mark.parametrize("name", ["fit", "from_edm"])
def test_what_edm_does_not_fit_is_told(name: str) -> None:
    make: Any = getattr(EDMPrecond, name)
    with pytest.raises(TypeError, match=rf"BypassPrecond\.{name}"):
        make(tiny_unet(), train_digits(torch.float32))


def test_an_error_measured_with_another_denoiser_is_refused() -> None:
    refined, error = measured_marginals(100)
    plain = MeasuredError.fit(refined.gaussian, held_out_digits(torch.float32), n_queries=50)
    net, marginals = tiny_unet(in_channels=3), refined.marginals
    with pytest.raises(ValueError, match=r"other=MarginalDenoiser\(...\), got GaussianDenoiser"):
        BypassPrecond(net, refined.gaussian, base="marginal", marginals=marginals, error=plain)
    with pytest.raises(ValueError, match="without other=, as base='blend', got MarginalDenoiser"):
        BypassPrecond(tiny_unet(in_channels=2), refined.gaussian, error=error)
    unknown = MeasuredError(error.log_sigma.exp(), error.values)  # of which it is not told
    BypassPrecond(net, refined.gaussian, base="marginal", marginals=marginals, error=unknown)


# Other bases --------------------------------------------------------------------------------------


@cache
def measured_marginals(count: int) -> tuple[MarginalDenoiser, MeasuredError]:
    """Of some digits, measured on every other held-out one."""
    refined = MarginalDenoiser.fit(train_digits(torch.float32)[:count])
    heldout, generator = held_out_digits(torch.float32)[::2], torch.Generator().manual_seed(0)
    return refined, MeasuredError.fit(refined.gaussian, heldout, generator=generator, other=refined)


def with_marginals(
    gate: Gate | None = None, show_gaussian: bool = True, awake: bool = True, count: int = 1437
) -> tuple[BypassPrecond, MarginalDenoiser]:
    """A bypass of digits with base="marginal", and its analytic half."""
    refined, error = measured_marginals(count)
    net = tiny_unet(awake, in_channels=1 + 2 * show_gaussian)
    model = BypassPrecond(
        net, refined.gaussian, gate, show_gaussian, "marginal", marginals=refined.marginals, error=error
    )
    return model.eval(), refined


@pytest.mark.parametrize("count", [100, 1437])
def test_marginal_base_is_the_best_blend_and_knows_its_error(count: int) -> None:
    model, refined = with_marginals(GATE, count=count)
    fresh = held_out_digits(torch.float32)[1::2]
    for sigma in (0.02, 0.1, 0.5, 2.0, 20.0):
        x = fresh + sigma * randn(*fresh.shape, seed=4, dtype=torch.float32)
        base = model.untrained(x, sigma)
        variance = ((fresh - base) / model.c_out(sigma)).square().mean()
        assert float(variance) == pytest.approx(1, abs=0.2), sigma
        ungated = with_marginals(count=count)[0].untrained(x, sigma)
        least = min(float((d(x, sigma) - fresh).square().mean()) for d in (refined, refined.gaussian))
        assert float((ungated - fresh).square().mean()) <= 1.05 * least, sigma


@sigmas
@shown
def test_marginal_base_untrained_gated_and_seen(sigma: float, show_gaussian: bool) -> None:
    model, refined = with_marginals(GATE, show_gaussian, awake=False)
    x = noised(sigma, dtype=torch.float32)
    torch.testing.assert_close(model(x, sigma), model.untrained(x, sigma), rtol=1e-5, atol=1e-6)
    closed = with_marginals(Gate.step(sigma / 2), show_gaussian)[0]
    assert closed(x, sigma).equal(refined.gaussian(x, sigma))
    net = Recorder()
    model.model = net
    model(x, sigma)
    assert net.calls[0][0].shape[1] == 1 + 2 * show_gaussian
    if show_gaussian:
        assert net.calls[0][0][:, 1:2].equal(refined.gaussian(x, sigma))
        torch.testing.assert_close(net.calls[0][0][:, 2:], refined(x, sigma), rtol=1e-6, atol=1e-6)


def test_marginal_base_is_saved_and_loaded(tmp_path: Path) -> None:
    model, _ = with_marginals(GATE)
    model.save_pretrained(tmp_path)
    x = noised(0.3, dtype=torch.float32)
    assert from_pretrained(tmp_path)(x, 0.3).equal(model(x, 0.3))


def test_marginals_that_do_not_fit_are_refused() -> None:
    model, refined = with_marginals()
    gaussian, own, error = refined.gaussian, refined.marginals, model.error
    with pytest.raises(ValueError, match="marginals with base='marginal', and only then, got base='blend'"):
        BypassPrecond(tiny_unet(in_channels=3), gaussian, marginals=own, error=error)
    with pytest.raises(ValueError, match="and only then, got base='marginal'"):
        BypassPrecond(tiny_unet(in_channels=2), gaussian, base="marginal", error=error)
    with pytest.raises(ValueError, match=r"expected error=MeasuredError.fit\(..., other=...\)"):
        BypassPrecond(tiny_unet(in_channels=3), gaussian, base="marginal", marginals=own)
    with pytest.raises(ValueError, match=r"in_channels=3 .* with marginals, got in_channels=2"):
        BypassPrecond(tiny_unet(in_channels=2), gaussian, base="marginal", marginals=own, error=error)
    other = Marginals.fit(torch.randn(9, 1, 4, 4))
    with pytest.raises(ValueError, match=r"of one event shape, got \(1, 8, 8\) and \(1, 4, 4\)"):
        BypassPrecond(tiny_unet(in_channels=3), gaussian, base="marginal", marginals=other, error=error)


@sigmas
def test_isotropic_base_is_edm_with_the_moments_of_the_data(sigma: float) -> None:
    gaussian, x, net = denoiser("gaussian-full"), noised(sigma), Recorder()
    model = BypassPrecond(net, gaussian, show_gaussian=False, base="isotropic")
    isotropic = GaussianDenoiser.isotropic(gaussian.mean, gaussian.variance)
    expected = isotropic(x, sigma) + isotropic.bayes_error(sigma).sqrt()
    assert relative_error(model(x, sigma), expected) < 1e-10
    torch.testing.assert_close(model.c_out(sigma) ** 2, isotropic.bayes_error(sigma), rtol=1e-9, atol=0)


@sigmas
def test_whitened_input(sigma: float) -> None:
    gaussian, x, net = denoiser("gaussian-full"), noised(sigma), Recorder()
    model = BypassPrecond(net, gaussian, whiten=True)
    model(x, sigma)
    inputs = net.calls[0][0]
    lam, axes = torch.linalg.eigh(gaussian.covariance.dense())
    expected = (x - gaussian.mean).flatten(1) @ axes @ torch.diag((lam + sigma**2) ** -0.5) @ axes.mT
    assert relative_error(inputs[:, :1].flatten(1), expected) < 1e-9
    other = bypass(gaussian, whiten=True)
    assert relative_error(other(x, sigma), bypass(gaussian)(x, sigma)) > 1e-7


def test_mixture_bypass() -> None:
    (train, test), labels = split(), digits()[1]
    heldout = held_out_digits()
    mixture = GaussianMixtureDenoiser.fit(train_digits(), labels=labels[train])
    generator = torch.Generator().manual_seed(0)
    for own in (None, labels[test]):
        halves = (None, None) if own is None else (own[:180], own[180:])
        error = MeasuredError.fit(mixture, heldout[:180], generator=generator, labels=halves[0])
        model = bypass(mixture, error=error, awake=False)
        x, sigma = heldout[180:] + 0.3 * randn(180, *EVENT, seed=5), 0.3
        untrained = model.untrained(x, sigma, halves[1])
        assert model(x, sigma, halves[1]).equal(untrained)
        w = float(((mixture(x, sigma, halves[1]) - heldout[180:]).square().mean()) / sigma**2)
        isotropic = GaussianDenoiser.isotropic(mixture.mean, mixture.variance)(x, sigma)
        expected = (1 - w) * mixture(x, sigma, halves[1]) + w * isotropic
        assert relative_error(untrained, expected) < 0.02
        variance = ((heldout[180:] - untrained) / model.c_out(sigma)).square().mean()
        assert float(variance) == pytest.approx(1, abs=0.1), own
    seen = bypass(mixture, error=error, label_dim=10)
    assert relative_error(seen(x, 0.3, halves[1]), seen(x, 0.3)) > 1e-2, "classes reach the base"


def test_a_base_worse_than_the_noise_fades_no_further_than_to_the_isotropic_skip() -> None:
    gaussian, x = denoiser("gaussian-full"), noised(0.5)
    error = MeasuredError(torch.tensor([0.1, 10.0]), torch.full((2, 3), 9.0))  # 9 v s^2/(v + s^2) > s^2
    untrained = bypass(gaussian, error=error).untrained(x, 0.5)
    expected = GaussianDenoiser.isotropic(gaussian.mean, gaussian.variance)(x, 0.5)
    assert relative_error(untrained, expected) < 1e-12


def test_classes_may_meet_a_network_that_never_drops_labels() -> None:
    mixture = denoiser("mixture-classes")
    error = MeasuredError(torch.tensor([0.1, 1.0]), torch.ones(2, 3))
    net = Recorder()  # which knows nothing of dropping
    model = BypassPrecond(net, mixture, error=error)
    model(noised(0.5), 0.5, torch.zeros(16, dtype=torch.long))
    assert len(net.calls) == 1


def test_a_gate_as_open_as_its_tolerance_is_open() -> None:
    gate = Gate(torch.tensor([0.1, 10.0]), torch.tensor([0.25, 0.25]))
    for tol, calls in ((0.25, 1), (0.26, 0)):
        net = Recorder()
        model = BypassPrecond(net, denoiser("gaussian-full"), gate, gate_tol=tol).eval()
        model(noised(1.0), 1.0)
        assert len(net.calls) == calls, tol


def test_options_that_exclude_each_other() -> None:
    mixture = denoiser("mixture-classes")
    error = MeasuredError(torch.tensor([0.1, 1.0]), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"error=MeasuredError.fit\(...\): a mixture's has no closed form"):
        bypass(mixture)
    with pytest.raises(ValueError, match="whiten=False with a mixture"):
        bypass(mixture, error=error, whiten=True)
    with pytest.raises(ValueError, match=r"label_dropout=0 in a class-conditional base, got 0.1"):
        bypass(mixture, error=error, label_dim=10, label_dropout=0.1)
    gaussian = denoiser("isotropic")
    with pytest.raises(ValueError, match="base to be one of blend, gaussian, isotropic, marginal, got 'edm'"):
        BypassPrecond(tiny_unet(in_channels=2), gaussian, base="edm")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="0 <= gate_tol < 1, got 1"):
        BypassPrecond(tiny_unet(in_channels=2), gaussian, gate_tol=1)
    with pytest.raises(ValueError, match="centre to be one of pixel, channel, estimate, got 'image'"):
        BypassPrecond(tiny_unet(in_channels=2), gaussian, centre="image")  # pyright: ignore[reportArgumentType]
    for seen, white in ((False, False), (True, True)):
        net = tiny_unet(in_channels=1 + seen)
        with pytest.raises(ValueError, match="show_gaussian=True and whiten=False with centre='estimate'"):
            BypassPrecond(net, gaussian, show_gaussian=seen, centre="estimate", whiten=white)
    with pytest.raises(ValueError, match=r"with base='isotropic', got 0.5 with 'blend'"):
        BypassPrecond(tiny_unet(in_channels=2), gaussian, sigma_data=0.5)
    for sigma_data in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"sigma_data > 0, with base='isotropic', got {sigma_data} "):
            BypassPrecond(tiny_unet(in_channels=2), gaussian, base="isotropic", sigma_data=sigma_data)
    with pytest.raises(ValueError, match=r"^BypassPrecond: expected a network"):
        BypassPrecond(tiny_unet(), gaussian)


@pytest.mark.parametrize(
    "options",
    [
        {"base": "gaussian", "whiten": True, "gate_tol": 0.2},
        {"base": "isotropic", "sigma_data": 0.7, "sigma_min": 0.01, "sigma_max": 50.0},
        {"error": MeasuredError(torch.tensor([0.1, 1.0]), torch.rand(2, 3) + 1), "centre": "estimate"},
    ],
    ids=["white", "edm", "measured"],
)
@pytest.mark.parametrize("name", ["gaussian-full", "mixture-classes"])
def test_every_option_is_saved(options: dict[str, Any], name: str, tmp_path: Path) -> None:
    if name == "mixture-classes" and "error" not in options:
        pytest.skip("a mixture needs an error")
    source = denoiser(name, torch.float32)
    model = BypassPrecond(tiny_unet(in_channels=2), source, CLOSING, **options).eval()
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert isinstance(loaded, BypassPrecond)
    assert loaded.to_arguments() == model.to_arguments()
    assert (loaded.sigma_min, loaded.sigma_max) == (model.sigma_min, model.sigma_max)
    x, labels = noised(0.6, 4, torch.float32), torch.arange(4)
    # Memory that a file maps is aligned otherwise, on which the last digit of a product of one row depends.
    torch.testing.assert_close(loaded(x, 0.6, labels), model(x, 0.6, labels), rtol=0, atol=1e-6)


# From EDM -----------------------------------------------------------------------------------------


def _agreeing() -> tuple[EDMPrecond, GaussianDenoiser]:
    """An untrained EDM model, and a Gaussian of nearly its moments."""
    eigvals = torch.cat([torch.full((60,), 0.25), torch.full((4,), 0.5)])
    return EDMPrecond(tiny_unet(False)), GaussianDenoiser(
        torch.zeros(EVENT), Covariance(torch.eye(64), eigvals)
    )


@pytest.mark.parametrize("sigma", [0.01, 0.5, 4.9])
def test_from_edm_is_the_model_below_the_gate(sigma: float) -> None:
    edm = EDMPrecond(
        tiny_unet(label_dim=4, augment_dim=9), sigma_data=0.7, sigma_min=0.002, sigma_max=80
    ).eval()
    model = BypassPrecond.from_edm(edm, denoiser("gaussian-full", torch.float32), sigma_gate=5.0)
    x, labels, augment = noised(sigma, 4, torch.float32), torch.arange(4), torch.rand(4, 9)
    out = model(x, sigma, labels, augment_labels=augment)
    assert relative_error(out, edm(x, sigma, labels, augment_labels=augment)) < 1e-6
    torch.testing.assert_close(model.c_out(sigma), edm.c_out(sigma))
    assert model.model is edm.model
    assert (model.sigma_min, model.sigma_max, model.training) == (0.002, 80, False)


def test_from_edm_is_the_gaussian_above_it() -> None:
    gaussian = denoiser("gaussian-full", torch.float32)
    model = BypassPrecond.from_edm(EDMPrecond(tiny_unet()).eval(), gaussian, sigma_gate=5.0)
    assert model.sigma_gate == pytest.approx(5.0, rel=1e-4)
    x = noised(5.1, dtype=torch.float32)
    with count_nfe(model) as nfe:
        assert model(x, 5.1).equal(gaussian(x, 5.1))
    assert nfe() == 0


def test_from_edm_finds_the_gate() -> None:
    edm, gaussian = _agreeing()
    generator = torch.Generator().manual_seed(0)
    model = BypassPrecond.from_edm(edm, gaussian, tol=0.05, generator=generator)
    assert 1 < model.sigma_gate < 20
    for n_queries in (2, 64):
        expected = find_sigma_gate(edm, gaussian, 0.05, n_queries, torch.Generator().manual_seed(1))
        again = torch.Generator().manual_seed(1)
        found = BypassPrecond.from_edm(edm, gaussian, tol=0.05, n_queries=n_queries, generator=again)
        assert found.sigma_gate == pytest.approx(expected, rel=1e-4)
        assert not again.get_state().equal(torch.Generator().manual_seed(1).get_state())
    x = gaussian.sample(512, model.sigma_gate, generator)
    ratio = (edm(x, model.sigma_gate) - gaussian(x, model.sigma_gate)).detach().square().mean()
    assert float(ratio / gaussian.bayes_error(model.sigma_gate)) ** 0.5 == pytest.approx(0.05, rel=0.3)


def test_from_edm_refuses_what_does_not_fit() -> None:
    awake = EDMPrecond(tiny_unet())
    with pytest.raises(ValueError, match=r"less than 0.1 e\(sigma\) at sigma = 80"):
        BypassPrecond.from_edm(awake, denoiser("gaussian-full", torch.float32))
    wide = GaussianDenoiser.isotropic(torch.zeros(1, 8, 16), 1.0)
    with pytest.raises(ValueError, match=r"one event shape, got \(1, 8, 8\) and \(1, 8, 16\)"):
        BypassPrecond.from_edm(awake, wide)
    with pytest.raises(ValueError, match="an EDMPrecond, with sigma_data, got base='isotropic'"):
        BypassPrecond.from_edm(bypass(denoiser("isotropic"), base="isotropic"), denoiser("isotropic"))


def test_facts_tell_the_base_and_where_the_network_rests() -> None:
    gaussian = denoiser("gaussian-full", torch.float32)
    facts = bypass(gaussian).facts()
    assert facts["base"] == "blend"
    assert facts["sigma_gate"] == "none: the network is evaluated at every level"
    facts = bypass(gaussian, Gate.step(5.0), base="gaussian").facts()
    assert facts["base"] == "gaussian"
    assert facts["sigma_gate"] == "5: above it, the model is its Gaussian, without the network"


def test_the_state_dict_keeps_the_network_under_model() -> None:
    edm, gaussian = _agreeing()
    model = BypassPrecond.from_edm(edm, gaussian, sigma_gate=5.0)
    ours = {key: value for key, value in model.state_dict().items() if key.startswith("model.")}
    assert ours.keys() == edm.state_dict().keys()
    assert set(model.state_dict()) - set(ours) >= {"gaussian.mean", "gate.values"}


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        ({}, {}, r"in_channels=2 for events of shape \(1, 8, 8\) and show_gaussian=True, got in_channels=1"),
        ({"show_gaussian": False}, {"in_channels": 2}, r"in_channels=1 .*=False, got in_channels=2"),
        ({}, {"in_channels": 2, "out_channels": 3}, r"out_channels=1 .*got out_channels=3"),
    ],
)
def test_channels_must_fit(arguments: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BypassPrecond(tiny_unet(**changes), denoiser("isotropic"), **arguments)


def test_impossible_arguments() -> None:
    point = GaussianDenoiser.isotropic(torch.zeros(EVENT), 0.0)
    with pytest.raises(ValueError, match="Gaussian with variance > 0, got 0"):
        bypass(point)
    for sigma_data in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"finite sigma_data > 0, got {sigma_data}"):
            EDMPrecond(tiny_unet(), sigma_data)
    with pytest.raises(ValueError, match="event_shape for Recorder"):
        EDMPrecond(Recorder())
    assert EDMPrecond(Recorder(), event_shape=(1, 4, 6)).event_shape == (1, 4, 6)
    assert isinstance(EDMPrecond(tiny_unet()), Denoiser)
