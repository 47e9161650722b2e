"""SongUNet against NVlabs/edm's outputs, and the properties that preconditioning relies on."""

import copy
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import golden
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gaussnet.networks import SongUNet, blocks

TINY: dict[str, Any] = {
    "img_resolution": 16,
    "in_channels": 3,
    "out_channels": 2,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attn_resolutions": (8,),
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "ddpmpp": {},
    "ncsnpp": {
        "embedding_type": "fourier",
        "encoder_type": "residual",
        "channel_mult_noise": 2,
        "resample_filter": (1, 3, 3, 1),
    },
    "skip": {"encoder_type": "skip", "decoder_type": "skip", "resample_filter": (1, 3, 3, 1)},
    "residual-box-skip": {"encoder_type": "residual", "decoder_type": "skip"},
    "conditional": {"label_dim": 4, "augment_dim": 9, "label_dropout": 0.5, "num_blocks": 2},
    "one-level": {"channel_mult": (2,)},
    "three-levels-residual": {"channel_mult": (1, 2, 1), "encoder_type": "residual"},
    "three-levels-skip": {
        "channel_mult": (1, 2, 1),
        "encoder_type": "skip",
        "decoder_type": "skip",
    },
}
architectures = pytest.mark.parametrize("name", ARCHITECTURES)


def tiny(name: str = "ddpmpp", **changes: object) -> SongUNet:
    """A small network of a named architecture, as initialised."""
    torch.manual_seed(0)
    return SongUNet(**{**TINY, **ARCHITECTURES[name], **changes})


def awake(net: SongUNet) -> SongUNet:
    """The network in evaluation mode, with noise on its parameters: no layer is zero."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return net.eval()


def inputs(net: SongUNet, batch: int = 3, size: tuple[int, int] = (16, 16)) -> list[Tensor | None]:
    """Positional arguments of a call: x, noise_labels, class_labels, augment_labels."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, net.in_channels, *size, generator=generator)
    noise_labels = torch.randn(batch, generator=generator)
    classes = torch.eye(net.label_dim)[torch.arange(batch) % net.label_dim] if net.label_dim else None
    augment = torch.randn(batch, net.augment_dim, generator=generator) if net.augment_dim else None
    return [x, noise_labels, classes, augment]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


# Reference outputs -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["edm_ddpmpp", "edm_ddpmpp_cond", "edm_ncsnpp"])
def test_matches_edm(name: str) -> None:
    config, tensors = golden(name)
    net = SongUNet(**config).eval()
    prefix = "state.model."
    state = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    net.load_state_dict(state, strict=True)

    x, sigma = tensors["in.x"].requires_grad_(), tensors["in.sigma"].reshape(-1, 1, 1, 1)
    labels = tensors.get("in.class_labels"), tensors.get("in.augment_labels")
    variance = sigma**2 + 0.5**2
    out = net(x / variance.sqrt(), sigma.log().flatten() / 4, *labels)
    skip = 0.5**2 / variance * x
    denoised = skip + 0.5 * sigma / variance.sqrt() * out
    (grad,) = torch.autograd.grad(denoised.square().mean(), x)

    assert relative_error(denoised, tensors["out.denoised"]) < 1e-5, name
    assert relative_error(grad, tensors["out.grad_x"]) < 1e-5, name
    # The skip is over 90 % of the output: the network's own part must match as well.
    assert relative_error(denoised - skip, tensors["out.denoised"] - skip) < 1e-4, name


# Initialisation and configuration -----------------------------------------------------------------


@architectures
def test_untrained_output_is_exactly_zero_and_can_learn(name: str) -> None:
    net = tiny(name)
    out = net(*inputs(net))
    assert out.shape == (3, 2, 16, 16)
    assert out.count_nonzero() == 0
    F.mse_loss(out, torch.ones_like(out)).backward()
    heads = [p.grad for n, p in net.named_parameters() if n.endswith("aux_conv.weight")]
    assert heads
    assert all(grad is not None and grad.count_nonzero() for grad in heads)


@architectures
def test_every_parameter_has_a_gradient(name: str) -> None:
    net = awake(tiny(name))
    net(*inputs(net)).square().sum().backward()
    dead = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.count_nonzero()]
    assert dead == []


@architectures
def test_config_rebuilds_the_architecture(name: str) -> None:
    net = awake(tiny(name))
    config = json.loads(json.dumps(net.config))
    assert config == net.config
    twin = SongUNet(**config).eval()
    twin.load_state_dict(net.state_dict(), strict=True)
    assert twin.config == net.config
    torch.testing.assert_close(twin(*inputs(net)), net(*inputs(net)), rtol=0, atol=0)


def test_attributes_are_plain() -> None:
    net = tiny("conditional")
    names = ("img_resolution", "in_channels", "out_channels", "label_dim", "augment_dim")
    assert [getattr(net, name) for name in names] == [16, 3, 2, 4, 9]


def test_only_fourier_frequencies_are_in_the_state_dict() -> None:
    assert "map_noise.freqs" not in tiny("ddpmpp").state_dict()
    assert "map_noise.freqs" in tiny("ncsnpp").state_dict()


# Inputs -------------------------------------------------------------------------------------------


@architectures
@pytest.mark.parametrize("size", [(8, 24), (32, 4)])
def test_other_sizes(name: str, size: tuple[int, int]) -> None:
    net = awake(tiny(name))
    out = net(*inputs(net, size=size))
    assert out.shape == (3, 2, *size)
    assert out.isfinite().all()


@architectures
def test_samples_are_independent(name: str) -> None:
    net = awake(tiny(name))
    args = inputs(net)
    for i in range(3):
        one = net(*[None if t is None else t[i : i + 1] for t in args])
        torch.testing.assert_close(one, net(*args)[i : i + 1], rtol=1e-4, atol=1e-5, msg=f"{i=}")


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_noise_label_serves_the_batch(shape: tuple[int, ...]) -> None:
    net = awake(tiny("conditional"))
    x, _, *labels = inputs(net)
    shared = net(x, torch.full(shape, 0.3), *labels)
    torch.testing.assert_close(shared, net(x, torch.full((3,), 0.3), *labels))


def test_class_labels_as_indices_or_nothing() -> None:
    net = awake(tiny("conditional"))
    x, noise_labels, one_hot, _ = inputs(net)
    assert one_hot is not None
    by_index = net(x, noise_labels, one_hot.argmax(1))
    torch.testing.assert_close(by_index, net(x, noise_labels, one_hot), rtol=0, atol=0)
    unconditional = net(x, noise_labels)
    zeros = net(x, noise_labels, torch.zeros(3, 4), torch.zeros(3, 9))
    torch.testing.assert_close(unconditional, zeros)
    assert relative_error(by_index, unconditional) > 1e-3


def test_label_dropout_only_in_training() -> None:
    net = awake(tiny("conditional", dropout=0.0))
    x, noise_labels, classes, _ = inputs(net, batch=16)
    kept, dropped = net(x, noise_labels, classes), net(x, noise_labels)
    assert kept.equal(net(x, noise_labels, classes))

    net.train()
    torch.manual_seed(2)
    mixed = net(x, noise_labels, classes)
    is_kept, is_dropped = ((mixed - y).abs().amax((1, 2, 3)) < 1e-5 for y in (kept, dropped))
    assert (is_kept ^ is_dropped).all()
    assert is_kept.any()
    assert is_dropped.any()
    torch.manual_seed(2)
    assert mixed.equal(net(x, noise_labels, classes))


def test_dropout_only_in_training() -> None:
    net = awake(tiny(dropout=0.5))
    args = inputs(net)
    assert net(*args).equal(net(*args))
    net.train()
    assert not net(*args).equal(net(*args))


# Precision, compilation ---------------------------------------------------------------------------


@architectures
def test_float64(name: str) -> None:
    net = awake(tiny(name))
    args = inputs(net)
    double = copy.deepcopy(net).double()(*args)
    assert double.dtype == torch.float64
    assert relative_error(net(*args), double) < 1e-5


@architectures
def test_bfloat16_module(name: str) -> None:
    net = awake(tiny(name))
    x, _, *labels = inputs(net)
    noise_labels = torch.tensor([-1.5, 2.0, 999.0])  # VP's labels reach 999
    half = copy.deepcopy(net).bfloat16()
    assert half.map_noise.freqs.dtype == torch.float32
    out = half(x, noise_labels, *labels)
    assert out.dtype == torch.bfloat16
    assert relative_error(out.float(), net(x, noise_labels, *labels)) < 0.1


@architectures
def test_bfloat16_autocast(name: str) -> None:
    net = awake(tiny(name))
    args = inputs(net)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(*args)
    out.float().square().sum().backward()
    assert relative_error(out.float(), net(*args)) < 0.1
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ncsnpp", "skip", "conditional"])
def test_compiles_without_graph_breaks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "dropout", F.dropout)  # what is compiled keeps PyTorch's
    torch.compiler.reset()
    net = awake(tiny(name, num_blocks=1)).train()
    x, noise_labels, classes, augment = inputs(net)
    if classes is not None:
        classes = classes.argmax(1)
    outs: list[Tensor] = []
    for call in (net, torch.compile(net, fullgraph=True, backend="eager")):
        torch.manual_seed(2)  # for dropout
        outs.append(call(x, noise_labels, classes, augment))
    torch.testing.assert_close(outs[1], outs[0])


def test_second_derivatives_with_the_math_kernel() -> None:
    net = awake(tiny()).double()
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    v = torch.randn_like(x)

    def gradient(x: Tensor) -> Tensor:
        loss = net(x, torch.zeros(1)).square().sum()
        return torch.autograd.grad(loss, x, create_graph=True)[0]

    with sdpa_kernel(SDPBackend.MATH):
        (hessian_v,) = torch.autograd.grad((gradient(x) * v).sum(), x)
        difference = (gradient(x + 1e-5 * v) - gradient(x - 1e-5 * v)) / 2e-5
    torch.testing.assert_close(hessian_v, difference, rtol=1e-5, atol=1e-7)


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_type": "dense"}, r"encoder_type: got 'dense', expected one of .*'residual'"),
        ({"decoder_type": "residual"}, r"decoder_type: got 'residual'"),
        ({"embedding_type": "learned"}, r"embedding_type: got 'learned'"),
        ({"model_channels": 15}, r"model_channels: got 15, expected a positive multiple of 4"),
        ({"model_channels": 132}, r"GroupNorm: got 132 channels"),
        ({"channel_mult": ()}, r"channel_mult: got \[\]"),
        ({"channel_mult": (1, 0)}, r"channel_mult: got \[1, 0\]"),
        ({"img_resolution": 15}, r"img_resolution: got 15, expected a positive multiple of 2"),
        ({"img_resolution": [8, 16]}, r"img_resolution: got \[8, 16\], expected a positive multiple of 2"),
        ({"img_resolution": (8, 16)}, r"img_resolution: got \(8, 16\), expected at least 1"),
        ({"dropout": "some"}, r"dropout: got 'some', expected a probability"),
        ({"num_blocks": 0}, r"num_blocks: got 0"),
        ({"label_dim": -1}, r"label_dim: got -1"),
        ({"dropout": 1.5}, r"dropout: got 1.5, expected a probability"),
        ({"resample_filter": (1, 2, 1)}, r"resample_filter: got \[1, 2, 1\], expected an even"),
        ({"resample_filter": (1, 2)}, r"resample_filter: got \[1, 2\], .*symmetric"),
    ],
    ids=str,
)
def test_impossible_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.ones(3, 3, 16, 15), r"x: got shape \(3, 3, 16, 15\), .* multiples of 2"),
        (0, torch.ones(3, 1, 16, 16), r"x: got shape \(3, 1, 16, 16\), expected \(B, 3, H, W\)"),
        (0, torch.ones(3, 16, 16), r"x: got shape \(3, 16, 16\)"),
        (1, torch.ones(2), r"noise_labels: got shape \(2,\), expected \(3,\) or \(\)"),
        (1, torch.ones(3, 1), r"noise_labels: got shape \(3, 1\)"),
        (2, torch.ones(3, 5), r"class_labels: got shape \(3, 5\).*expected \(3, 4\)"),
        (2, torch.ones(3), r"class_labels: got shape \(3,\) of torch.float32"),
        (2, torch.ones(2).long(), r"class_labels: got shape \(2, 4\).*expected \(3, 4\)"),
        (3, torch.ones(3, 8), r"augment_labels: got shape \(3, 8\).*expected \(3, 9\)"),
    ],
)
def test_wrong_inputs(index: int, value: Tensor, message: str) -> None:
    net = tiny("conditional")
    args = inputs(net)
    args[index] = value
    with pytest.raises(ValueError, match=message):
        net(*args)


def test_labels_for_a_network_without_labels() -> None:
    net = tiny()
    x, noise_labels, *_ = inputs(net)
    with pytest.raises(ValueError, match=r"class_labels: .*expected \(3, 0\)"):
        net(x, noise_labels, torch.ones(3, 4))
    net(x, noise_labels, torch.ones(3, 0))
