"""VP, VE and iDDPM: against NVlabs/edm's outputs, against their schedules, and as denoisers."""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DTYPES, EVENT, SIGMAS, golden, noised, relative_error, tiny_unet
from torch import Tensor, nn

from gaussnet import Denoiser, SongUNet, from_pretrained, heun, karras_sigmas
from gaussnet.edm_preconds import NoisePrecond, VEPrecond, VPPrecond, iDDPMPrecond
from gaussnet.schedules import DiscreteSchedule, VPSchedule

CLASSES: dict[str, Any] = {"VP": VPPrecond, "VE": VEPrecond, "iDDPM": iDDPMPrecond}
SETTINGS: dict[str, dict[str, Any]] = {  # none at its default
    "VP": {"beta_d": 12.0, "beta_min": 0.3, "M": 100, "epsilon_t": 1e-3},
    "VE": {"sigma_min": 0.1, "sigma_max": 7.0},
    "iDDPM": {"C_1": 0.01, "C_2": 0.02, "M": 50},
}

every = pytest.mark.parametrize("name", CLASSES)
sigmas = pytest.mark.parametrize("sigma", SIGMAS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

F32, F64 = torch.float32, torch.float64


def precond(name: str, dtype: torch.dtype = F64, awake: bool = True, **changes: Any) -> Any:
    """One of the three around a small network for digits."""
    changes = {"out_channels": 2 if name == "iDDPM" else 1, **changes}
    return CLASSES[name](tiny_unet(awake, **changes)).to(dtype).eval()


class Recorder(nn.Module):
    """A network without attributes that keeps its arguments. It returns ones, and what must not be used."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def forward(self, inputs: Tensor, noise_labels: Tensor, class_labels: Any, **extra: Any) -> Tensor:
        self.calls.append((inputs, noise_labels, class_labels, extra))
        return torch.cat([torch.ones_like(inputs), torch.full_like(inputs, math.nan)], dim=1)


class Oblong(nn.Module):
    in_channels = 3
    img_resolution = (4, 6)


@cache
def iddpm_levels(C_1: float = 0.001, C_2: float = 0.008, M: int = 1000) -> list[float]:
    """u_0 .. u_M by the recursion of Table 1."""

    def alpha_bar(j: int) -> float:
        return math.sin(math.pi / 2 * j / (M * (C_2 + 1))) ** 2

    u = [0.0]
    for j in range(M, 0, -1):
        u.insert(0, math.sqrt((u[0] ** 2 + 1) / max(alpha_bar(j - 1) / alpha_bar(j), C_1) - 1))
    return u


def vp_time(sigma: float) -> float:
    """The root of sigma(t) = sigma for the default betas, by bisection."""
    low, high = 0.0, 2.0
    for _ in range(200):
        t = (low + high) / 2
        low, high = (t, high) if math.expm1(0.5 * 19.9 * t**2 + 0.1 * t) < sigma**2 else (low, t)
    return low


def table_1(name: str, sigma: float) -> tuple[float, float, float]:
    """c_out, c_in and c_noise, as Table 1 of arXiv 2206.00364 has them."""
    c_in = 1 / math.sqrt(sigma**2 + 1)
    match name:
        case "VP":
            return -sigma, c_in, 999 * vp_time(sigma)
        case "VE":
            return sigma, 1.0, math.log(0.5 * sigma)
    nearest = min(range(1000), key=lambda j: abs(iddpm_levels()[j] - sigma))
    return -sigma, c_in, 999.0 - nearest


# Reference outputs --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "file"), [("VP", "vp_ddpmpp"), ("VE", "ve_ncsnpp")])
def test_matches_the_outputs_of_edm(name: str, file: str) -> None:
    config, tensors = golden(file, f"{name}Precond")
    model = CLASSES[name](SongUNet(**config)).eval()
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    model.load_state_dict(state, strict=True)

    x = tensors["in.x"].requires_grad_()
    denoised = model(x, tensors["in.sigma"])
    (grad,) = torch.autograd.grad(denoised.square().mean(), x)
    assert relative_error(denoised, tensors["out.denoised"]) < 1e-5
    assert relative_error(grad, tensors["out.grad_x"]) < 1e-5
    # The skip is nearly all of the output: the network's own part must match as well, at every level.
    for i in range(len(x)):
        assert relative_error((denoised - x)[i], (tensors["out.denoised"] - x)[i]) < 1e-4, i


# Table 1 ------------------------------------------------------------------------------------------


@every
@sigmas
@dtypes
def test_what_the_network_sees_and_does(name: str, sigma: float, dtype: torch.dtype) -> None:
    c_out, c_in, c_noise = table_1(name, sigma)
    x, net, labels = noised(sigma, dtype=dtype), Recorder(), torch.arange(16)
    model = CLASSES[name](net, event_shape=EVENT)
    out = model(x, sigma, labels, augment_labels=torch.ones(16, 9))
    inputs, noise_labels, class_labels, extra = net.calls[0]
    eps = 1e-12 if dtype == F64 else 1e-6
    assert inputs.dtype == noise_labels.dtype == out.dtype == dtype
    torch.testing.assert_close(inputs, c_in * x, rtol=eps, atol=0)
    torch.testing.assert_close(noise_labels, torch.full((16,), c_noise, dtype=dtype), rtol=eps, atol=0)
    torch.testing.assert_close(out, x + c_out, rtol=eps, atol=1e-7 if dtype == F32 else 1e-15)
    assert class_labels is labels
    assert extra["augment_labels"].equal(torch.ones(16, 9))
    model(x, sigma)
    assert net.calls[1][2:] == (None, {})


@every
@sigmas
def test_scales_of_numbers_and_tensors(name: str, sigma: float) -> None:
    model, expected = precond(name), table_1(name, sigma)
    for method, value in zip((model.c_out, model.c_in, model.c_noise), expected, strict=True):
        assert float(method(sigma)) == pytest.approx(value, rel=1e-12), method.__name__
        together = method(torch.full((2, 3), sigma, dtype=F64))
        assert together.tolist() == [[pytest.approx(value, rel=1e-12)] * 3] * 2, method.__name__
    assert float(model.weight(sigma)) == pytest.approx(sigma**-2, rel=1e-12)
    assert model.weight(torch.full((2, 3), sigma)).dtype == F32


@sigmas
def test_the_levels_of_vp_are_those_of_its_schedule(sigma: float) -> None:
    model, schedule = precond("VP"), VPSchedule()
    t = model.sigma_inv(sigma)
    assert float(model.sigma(t)) == pytest.approx(sigma, rel=1e-12)
    assert float(schedule.sigma(t) / schedule.alpha(t)) == pytest.approx(sigma, rel=1e-12)
    assert float(model.c_in(sigma)) == pytest.approx(float(schedule.alpha(t)), rel=1e-12), "x_t = alpha x"
    times = torch.tensor([1e-5, 0.1, 0.5, 1.0], dtype=F64)
    torch.testing.assert_close(model.sigma_inv(model.sigma(times)), times, rtol=1e-9, atol=0)


@pytest.mark.parametrize("settings", [{}, SETTINGS["iDDPM"]], ids=["default", "other"])
def test_the_levels_of_iddpm_are_those_of_its_cosine_schedule(settings: dict[str, Any]) -> None:
    model = iDDPMPrecond(Recorder(), **settings, event_shape=EVENT)
    M, C_1, C_2 = model.M, model.C_1, model.C_2
    assert model.u.shape == (M + 1,)
    assert relative_error(model.u, torch.tensor(iddpm_levels(C_1, C_2, M), dtype=F64)) < 1e-7
    torch.testing.assert_close(model.u.double(), torch.tensor(iddpm_levels(C_1, C_2, M)).double())
    # arXiv 2102.09672, Eq. 17: alpha_bar(t) = cos^2, and no beta above 1 - C_1.
    alpha_bar = torch.cos(torch.linspace(0, 1, M + 1, dtype=F64).add(C_2) / (1 + C_2) * math.pi / 2) ** 2
    schedule = DiscreteSchedule.from_betas((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=1 - C_1))
    levels = model.u[:-1].double()
    torch.testing.assert_close(levels.log().flip(0), schedule.log_levels, rtol=0, atol=1e-7)
    torch.testing.assert_close(model.c_noise(levels), schedule.time(levels).round())
    assert model.c_noise(levels).tolist() == list(range(M - 1, -1, -1))


@every
def test_the_range_of_levels(name: str) -> None:
    model = precond(name)
    expected = {
        "VP": (math.sqrt(math.expm1(0.5 * 19.9e-10 + 0.1e-5)), math.sqrt(math.expm1(10.05))),
        "VE": (0.02, 100.0),
        "iDDPM": (iddpm_levels()[999], iddpm_levels()[0]),
    }[name]
    assert (model.sigma_min, model.sigma_max) == pytest.approx(expected, rel=1e-7)
    assert (model.round_sigma(model.sigma_min), model.round_sigma(model.sigma_max)) == (
        model.sigma_min,
        model.sigma_max,
    )
    other = CLASSES[name](Recorder(), **SETTINGS[name], event_shape=EVENT)
    assert other.sigma_min > model.sigma_min
    assert other.sigma_max < model.sigma_max


# Rounding -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["VP", "VE"])
def test_continuous_levels_are_kept(name: str) -> None:
    grid = karras_sigmas(18)
    assert precond(name).round_sigma(grid).equal(grid)
    assert precond(name).round_sigma(0.3).item() == 0.3


@dtypes
def test_iddpm_rounds_to_the_nearest_level(dtype: torch.dtype) -> None:
    model, levels = precond("iDDPM", F32), torch.tensor(iddpm_levels()[:-1], dtype=F64)
    grid = karras_sigmas(40, 0.001, 3e4).to(dtype)
    rounded = model.round_sigma(grid)
    assert rounded.dtype == dtype
    assert rounded[-1] == 0, "the end of the grid"
    assert bool((rounded[:-1] > 0).all()), "no level becomes 0"
    nearest = levels[(grid[:-1, None].double() - levels).abs().argmin(1)]
    torch.testing.assert_close(rounded[:-1].double(), nearest, rtol=1e-6, atol=0)
    assert model.round_sigma(rounded).equal(rounded)
    assert model.round_sigma(grid.reshape(1, -1, 1)).equal(rounded.reshape(1, -1, 1))
    assert model.round_sigma(grid.tolist()).tolist() == model.round_sigma(grid.double()).tolist()
    # Between two levels, to either side of the middle.
    middle = (levels[500] + levels[501]).item() / 2
    assert model.c_noise(torch.tensor([middle * 1.0001, middle * 0.9999])).tolist() == [499, 498]


def test_iddpm_snaps_the_label_alone() -> None:
    model, x = precond("iDDPM"), noised(0.5, 4)
    level = float(model.u[700])
    near = level * 1.0001
    assert model.c_noise(near) == model.c_noise(level) == 299
    for sigma in (level, near):
        net_out = model.model(x / math.sqrt(sigma**2 + 1), torch.tensor(299.0))[:, :1]
        assert relative_error(model(x, sigma) - x, -sigma * net_out) < 1e-12


@every
def test_levels_outside_of_the_range_go_by_the_formula(name: str) -> None:
    model, x = precond(name), noised(0.5, 2)
    for sigma in (model.sigma_min / 10, model.sigma_max * 10):
        assert model(x, sigma).isfinite().all()
        if name == "iDDPM":
            assert model.c_noise(sigma) == (0 if sigma < 1 else 999)
        else:
            assert float(model.c_noise(sigma)) == pytest.approx(table_1(name, sigma)[2], rel=1e-9)


@every
def test_sampling_within_the_range(name: str) -> None:
    model = precond(name, F32)
    grid = model.round_sigma(karras_sigmas(6, max(0.002, model.sigma_min), min(80.0, model.sigma_max)))
    x = grid[0].float() * torch.randn(2, *EVENT, generator=torch.Generator().manual_seed(0))
    assert heun(model, x, grid).isfinite().all()


# As denoisers -------------------------------------------------------------------------------------


@every
@dtypes
def test_each_sample_has_its_sigma(name: str, dtype: torch.dtype) -> None:
    model, x = precond(name, dtype), noised(0.5, 6, dtype)
    together = model(x, torch.tensor(SIGMAS, dtype=dtype))
    assert together.dtype == dtype
    eps = 1e-11 if dtype == F64 else 1e-5
    for i, level in enumerate(SIGMAS):
        one = x[i : i + 1]
        for sigma in (level, torch.tensor(level, dtype=dtype), torch.tensor([level], dtype=F64)):
            assert relative_error(together[i : i + 1], model(one, sigma)) < eps, level
        part = relative_error(together[i : i + 1] - one, model(one, level) - one)
        assert part < eps / min(level, 1.0), f"the network's part at {level}"


@every
@sigmas
def test_float32_equals_float64(name: str, sigma: float) -> None:
    single, double = precond(name, F32), precond(name, F32).double()
    x = noised(sigma, dtype=F32)
    assert relative_error(single(x, sigma), double(x.double(), sigma)) < 1e-5
    # In float32, log(1 + sigma^2) would lose the label at low noise.
    assert float(single.c_noise(torch.tensor(sigma))) == pytest.approx(float(single.c_noise(sigma)), rel=1e-6)


@every
@pytest.mark.parametrize("module", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("given", "returned"), [(torch.bfloat16, F32), (torch.float16, F32), (F32, F32), (F64, F64)], ids=str
)
def test_output_dtype(name: str, module: torch.dtype, given: torch.dtype, returned: torch.dtype) -> None:
    model, x = precond(name, module), noised(0.5, 2).to(given)
    assert model(x, 0.3).dtype == model.score(x, 0.3).dtype == returned
    assert relative_error(model(x, 0.3), model(x.double(), 0.3)) < 1e-5, "computed on x as given"


@every
def test_untrained_it_is_the_identity(name: str) -> None:
    model, x = precond(name, F32, awake=False), noised(0.5, dtype=F32)
    assert model(x, 0.5).equal(x)
    assert model.score(x, 0.5).count_nonzero() == 0
    assert isinstance(model, Denoiser)
    assert isinstance(model, NoisePrecond)


@every
def test_score_and_gradients(name: str) -> None:
    model, x = precond(name), noised(0.5, 3).requires_grad_()
    denoised = model(x, 0.5)
    assert relative_error(model.score(x, 0.5), (denoised - x) / 0.25) < 1e-12
    denoised.square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    unused = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert unused == []


@every
def test_class_labels_reach_conditional_networks_only(name: str) -> None:
    x, labels = noised(0.5, 4), torch.arange(4)
    conditional = precond(name, label_dim=4)
    assert relative_error(conditional(x, 0.5, labels), conditional(x, 0.5)) > 1e-6
    assert conditional(x, 0.5, torch.eye(4)).equal(conditional(x, 0.5, labels))
    with pytest.raises(ValueError, match="class_labels"):
        conditional(x, 0.5, torch.eye(5)[:4])
    assert precond(name)(x, 0.5, labels).equal(precond(name)(x, 0.5))


@every
def test_bfloat16_autocast_stays_inside_the_network(name: str) -> None:
    x, sigma = noised(0.05, dtype=F32), torch.full((16,), 0.05)
    untrained, model, recorder = precond(name, F32, awake=False), precond(name, F32), Recorder()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, sigma)
        assert untrained(x, sigma).equal(x), "the skip is exact"
        CLASSES[name](recorder, event_shape=EVENT)(x, sigma)
    inputs, noise_labels = recorder.calls[0][:2]
    c_in, c_noise = table_1(name, 0.05)[1:]
    torch.testing.assert_close(inputs, c_in * x)
    torch.testing.assert_close(noise_labels, torch.full((16,), c_noise))
    assert out.dtype == F32
    assert 1e-6 < relative_error(out - x, model(x, sigma) - x) < 0.1


@every
def test_bfloat16_module(name: str) -> None:
    model, x, sigma = precond(name, F32), noised(0.35, dtype=F32), torch.full((16,), 0.35)
    levels = torch.logspace(-2, 2, 100)
    expected, labels, rounded = model(x, sigma), model.c_noise(levels), model.round_sigma(levels)
    half = model.bfloat16()
    assert half(x, sigma).dtype == F32
    assert half.c_noise(levels).equal(labels), "in 8 bits, neighbours of iDDPM's table would be equal"
    assert half.round_sigma(levels).equal(rounded)
    assert relative_error(half(x, sigma) - x, expected - x) < 0.1
    assert {key for key, value in half.state_dict().items() if value.dtype == F32} <= {"u"}


@pytest.mark.slow
@every
def test_compiles_without_graph_breaks(name: str) -> None:
    torch.compiler.reset()
    model, x = precond(name, F32), noised(0.5, 4, F32)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    sigma = torch.tensor([0.1, 0.5, 1.0, 5.0])
    assert relative_error(compiled(x, sigma), model(x, sigma)) < 1e-5


# Saving -------------------------------------------------------------------------------------------


@every
@dtypes
def test_save_and_load(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    net = tiny_unet(out_channels=2 if name == "iDDPM" else 1)
    model, x = CLASSES[name](net, **SETTINGS[name]).to(dtype).eval(), noised(0.5, 4, dtype)
    assert {key: model.to_arguments()[key] for key in SETTINGS[name]} == SETTINGS[name]
    model.save_pretrained(tmp_path)
    for load in (from_pretrained, CLASSES[name].from_pretrained):
        loaded: Any = load(tmp_path)
        assert type(loaded) is CLASSES[name]
        assert loaded(x, 0.5).equal(model(x, 0.5))
        assert loaded.to_arguments() == model.to_arguments()
        assert (loaded.sigma_min, loaded.sigma_max) == (model.sigma_min, model.sigma_max)
        assert loaded.event_shape == EVENT


@every
def test_state_dicts_have_the_names_of_edm(name: str) -> None:
    net = tiny_unet(out_channels=2 if name == "iDDPM" else 1)
    expected = {f"model.{key}" for key in net.state_dict()} | ({"u"} if name == "iDDPM" else set())
    assert set(CLASSES[name](net).state_dict()) == expected


def test_a_table_from_a_checkpoint_is_used() -> None:
    model = precond("iDDPM", F32)
    shifted = {**model.state_dict(), "u": model.u * 1.1}
    model.load_state_dict(shifted, strict=True)
    assert model.round_sigma(float(model.u[300])) == model.u[300] == shifted["u"][300]
    assert model.c_noise(model.u[[300, 301]]).tolist() == [699, 698]


# Errors -------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf], ids=str)
def test_impossible_sigma(name: str, sigma: float) -> None:
    model, x = precond(name), noised(0.5, 2)
    calls: list[Callable[[Any], Any]] = [lambda s: model(x, s), model.c_out, model.c_in, model.c_noise]
    for call in calls:
        for wrapped in (sigma, torch.tensor([1.0, sigma])):
            with pytest.raises(ValueError, match=rf"expected sigma to be finite and > 0, got {sigma}"):
                call(wrapped)
    if sigma != 0:
        with pytest.raises(ValueError, match=rf"expected sigma to be finite and >= 0, got {sigma}"):
            model.round_sigma([1.0, sigma])


@every
def test_impossible_x(name: str) -> None:
    model = precond(name)
    for shape, message in (
        ((2, 3, *EVENT), r"Precond: expected x of shape \(B, 1, 8, 8\), got \(2, 3, 1, 8, 8\)"),
        ((2, 1, 8, 7), r"Precond: expected x of shape \(\*batch, 1, 8, 8\), got \(2, 1, 8, 7\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model(torch.zeros(shape), 1.0)
    with pytest.raises(TypeError, match=r"floating-point tensor, got torch.int64"):
        model(torch.zeros(2, *EVENT, dtype=torch.long), 1.0)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("VP", {"beta_d": -1.0}, r"beta_d > 0, got 0.1 and -1.0"),
        ("VP", {"epsilon_t": 0.0}, r"0 < epsilon_t < 1, got 0.0"),
        ("VP", {"epsilon_t": 1.0}, r"0 < epsilon_t < 1, got 1.0"),
        ("VP", {"M": 1}, r"M >= 2 steps, got 1"),
        ("VE", {"sigma_min": 0.0}, r"0 < sigma_min < sigma_max, got 0.0 and 100.0"),
        ("VE", {"sigma_max": math.inf}, r"0 < sigma_min < sigma_max, got 0.02 and inf"),
        ("VE", {"sigma_max": math.nan}, r"got 0.02 and nan"),
        ("VE", {"sigma_min": 2.0, "sigma_max": 1.0}, r"got 2.0 and 1.0"),
        ("iDDPM", {"C_1": 0.0}, r"0 < C_1 < 1 and C_2 >= 0, got 0.0 and 0.008"),
        ("iDDPM", {"C_1": 1.0}, r"got 1.0 and 0.008"),
        ("iDDPM", {"C_2": -0.1}, r"got 0.001 and -0.1"),
        ("iDDPM", {"M": 0}, r"M >= 2 steps, got 0"),
    ],
    ids=str,
)
def test_impossible_constants(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CLASSES[name](Recorder(), **arguments, event_shape=EVENT)


@every
def test_channels_must_fit(name: str) -> None:
    expected, wrong = (2, 1) if name == "iDDPM" else (1, 2)
    message = rf"{name}Precond: expected a network with out_channels={expected} .*\(1, 8, 8\), got .*={wrong}"
    with pytest.raises(ValueError, match=message):
        precond(name, out_channels=wrong)
    with pytest.raises(ValueError, match=r"in_channels=3 for events of shape \(3, 8, 8\), got in_channels=1"):
        CLASSES[name](tiny_unet(), event_shape=(3, 8, 8))
    with pytest.raises(ValueError, match="event_shape for Recorder"):
        CLASSES[name](Recorder())
    assert CLASSES[name](Recorder(), event_shape=(1, 4, 6)).event_shape == (1, 4, 6)
    assert CLASSES[name](Oblong()).event_shape == (3, 4, 6)
