"""MLP against its formulas, layer by layer; the rest: test_networks.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, randn, relative_error
from torch import Tensor

from gaussnet import BypassPrecond, EDMPrecond, GaussianDenoiser, from_pretrained
from gaussnet.networks import MLP


def awake(*args: Any, **changes: Any) -> MLP:
    """A small MLP in evaluation mode whose layers are far from their zero start."""
    net = MLP(*args, model_channels=16, num_blocks=2, **changes).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return net


def layer_norm(h: Tensor) -> Tensor:
    return (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()


def reference(
    state: dict[str, Tensor], x: Tensor, noise_labels: Tensor, classes: Tensor, augment: Tensor
) -> Tensor:
    """The flat output of an awake network, from its float64 parameters."""

    def linear(name: str, h: Tensor) -> Tensor:
        return F.linear(h, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(name: str, h: Tensor) -> Tensor:
        return layer_norm(h) * state[f"{name}.weight"] + state[f"{name}.bias"]

    phase = noise_labels[:, None] * 1e4 ** (-torch.arange(8, dtype=torch.float64) / 8)
    e = torch.cat([phase.cos(), phase.sin()], dim=1) + linear("map_augment", augment)
    e = linear("map_layer1", F.silu(linear("map_layer0", e)))
    e = F.silu(e + state["map_label.weight"].T[classes])

    h = linear("fc_in", x.flatten(1))
    for block in range(2):
        at = f"blocks.{block}"
        scale, shift = linear(f"{at}.affine", e).chunk(2, dim=1)
        y = shift + (1 + scale) * linear(f"{at}.fc0", norm(f"{at}.norm", h))
        h = h + linear(f"{at}.fc1", F.silu(y))
    return linear("fc_out", F.silu(norm("out_norm", h)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [4, (2, 5), (7,), ()], ids=str)
def test_is_its_formulas(size: Any, dtype: torch.dtype) -> None:
    net = awake(size, 3, 2, label_dim=4, augment_dim=5)
    state = {name: parameter.detach().double() for name, parameter in net.named_parameters()}
    shape = (4, 4) if size == 4 else size
    x, noise_labels, augment = randn(3, 3, *shape), randn(3, seed=1), randn(3, 5, seed=2)
    classes = torch.tensor([3, 0, 2])
    out = net.to(dtype)(x.to(dtype), noise_labels.to(dtype), classes, augment.to(dtype))
    assert out.shape == (3, 2, *shape)
    bound = 1e-6 if dtype == torch.float64 else 1e-4  # the frequencies are float32 numbers
    assert relative_error(out.flatten(1), reference(state, x, noise_labels, classes, augment)) < bound


def test_blocks_start_as_the_identity() -> None:
    net, h = MLP((), 5, 5, model_channels=16), torch.randn(2, 16)
    for block in net.blocks:
        assert block(h, torch.randn(2, 16)).equal(h)


@pytest.mark.parametrize("event_shape", [(6,), (2, 3), (1, 2, 3)], ids=str)
def test_models_of_any_event_shape(event_shape: tuple[int, ...], tmp_path: Path) -> None:
    gaussian, x = GaussianDenoiser.fit(torch.randn(40, *event_shape)), torch.randn(5, *event_shape)
    channels, *size = event_shape
    bypass = BypassPrecond(MLP(size, 2 * channels, channels), gaussian)
    assert bypass(x, 0.5).equal(bypass.untrained(x, 0.5))
    for model in (
        BypassPrecond(awake(size, 2 * channels, channels), gaussian),
        EDMPrecond(awake(size, channels, channels), event_shape=event_shape),
    ):
        assert relative_error(model(x, 0.5), model.untrained(x, 0.5)) > 1e-3
        model.save_pretrained(tmp_path)
        assert from_pretrained(tmp_path)(x, 0.5).equal(model.eval()(x, 0.5))


def test_config_holds_the_arguments() -> None:
    arguments = {"img_resolution": [2, 5], "in_channels": 3, "out_channels": 2, "model_channels": 16}
    config = MLP(**arguments, num_blocks=3).config
    assert config == {**config, **arguments, "num_blocks": 3}


def test_preconditioning_knows_the_event_shape() -> None:
    for size, event_shape in ((4, (3, 4, 4)), ((2, 5), (3, 2, 5)), ((), (3,))):
        assert EDMPrecond(MLP(size, 3, 3)).event_shape == event_shape


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((4, 0), r"img_resolution: got \[4, 0\], expected at least 1 on every axis"),
        (-2, r"img_resolution: got -2, expected at least 1"),
    ],
)
def test_impossible_sizes(size: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MLP(size, 1, 1)


def test_inputs_of_another_shape() -> None:
    net = MLP((2, 5), 3, 2)
    with pytest.raises(ValueError, match=r"x: got shape \(4, 3, 5, 2\), expected \(B, 3, 2, 5\)"):
        net(torch.ones(4, 3, 5, 2), torch.ones(4))
    with pytest.raises(ValueError, match=r"x: got shape \(4, 3\), expected \(B, 3, 2, 5\)"):
        net(torch.ones(4, 3), torch.ones(4))
