"""What all networks have in common, and what they are inside a preconditioner."""

import copy
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import EVENT, denoiser, noised, relative_error
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gaussnet import BypassPrecond, EDMPrecond, from_pretrained
from gaussnet.hub import build, describe
from gaussnet.networks import MLP, DhariwalUNet, DiT, SongUNet, blocks, dit, mlp
from gaussnet.networks.embeddings import FourierEmbedding, PositionalEmbedding

ARGUMENTS: dict[str, dict[str, Any]] = {
    "song-unet": {"model_channels": 8, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": ()},
    "dhariwal-unet": {
        "model_channels": 16,
        "channel_mult": (1, 4),
        "num_blocks": 1,
        "attn_resolutions": (4,),
    },
    "dit": {"model_channels": 24, "num_blocks": 2, "num_heads": 3, "dropout": 0.1},
    "mlp": {"model_channels": 24, "num_blocks": 2, "dropout": 0.1},
}
CLASSES: dict[str, Callable[..., nn.Module]] = {
    "song-unet": SongUNet,
    "dhariwal-unet": DhariwalUNet,
    "dit": DiT,
    "mlp": MLP,
}
LABELS: dict[str, Any] = {"label_dim": 4, "augment_dim": 3}
networks = pytest.mark.parametrize("name", CLASSES)


def tiny(name: str, **changes: Any) -> Any:
    """A small network of 8 x 8 images, 2 channels to 1, as initialised."""
    sizes = {"img_resolution": 8, "in_channels": 2, "out_channels": 1}
    return CLASSES[name](**{**sizes, **ARGUMENTS[name], **changes})


def awake(net: Any) -> Any:
    """The network in evaluation mode, with noise on its parameters: no layer is zero."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return net.eval()


def inputs(net: Any, batch: int = 3, size: tuple[int, ...] = (8, 8)) -> list[Tensor]:
    """Positional arguments of a call: x, noise_labels and, where the network takes them, both labels."""
    args = [torch.randn(batch, net.in_channels, *size), torch.randn(batch)]
    if net.label_dim:
        args.append(torch.eye(net.label_dim)[torch.arange(batch) % net.label_dim])
        args.append(torch.randn(batch, net.augment_dim))
    return args


# Initialisation and configuration -----------------------------------------------------------------


@networks
def test_untrained_output_is_exactly_zero_and_can_learn(name: str) -> None:
    net = tiny(name, **LABELS)
    out = net(*inputs(net))
    assert out.shape == (3, 1, 8, 8)
    assert out.count_nonzero() == 0
    F.mse_loss(out, torch.ones_like(out)).backward()
    assert any(p.grad is not None and p.grad.count_nonzero() for p in net.parameters())


@networks
def test_every_parameter_has_a_gradient(name: str) -> None:
    net = awake(tiny(name, **LABELS))
    net(*inputs(net)).square().sum().backward()
    dead = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.count_nonzero()]
    assert dead == []


@networks
def test_config_rebuilds_the_architecture(name: str) -> None:
    net = awake(tiny(name, **LABELS, label_dropout=0.5))
    description = json.loads(json.dumps(describe(net)))
    assert description == {"class_name": type(net).__name__, "arguments": net.config}
    twin = build(description).eval()
    twin.load_state_dict(net.state_dict(), strict=True)
    args = inputs(net)
    assert twin(*args).equal(net(*args))
    given = {"img_resolution": 8, "in_channels": 2, "out_channels": 1, **LABELS}
    assert {key: getattr(twin, key) for key in given} == given


@networks
def test_all_arguments_are_in_the_config(name: str) -> None:
    changed: dict[str, Any] = {"dropout": 0.25, "label_dropout": 0.125, "num_blocks": 3, **LABELS}
    config = tiny(name, **changed).config
    assert {key: config[key] for key in changed} == changed
    default = CLASSES[name].__init__.__annotations__.keys() - {"return"}
    assert config.keys() == default


# Inside a preconditioner --------------------------------------------------------------------------


@networks
@pytest.mark.parametrize("base", ["blend", "gaussian"])
def test_untrained_model_is_exactly_the_gaussian(name: str, base: Any) -> None:
    gaussian, x = denoiser("gaussian-full", torch.float32), noised(0.5, 4, torch.float32)
    model = BypassPrecond(tiny(name), gaussian, base=base)
    assert model(x, 0.5).equal(model.untrained(x, 0.5))
    assert base == "blend" or model(x, 0.5).equal(gaussian(x, 0.5))


@networks
def test_round_trip(name: str, tmp_path: Path) -> None:
    gaussian, x = denoiser("gaussian-full", torch.float32), noised(0.5, 3, torch.float32)
    model = BypassPrecond(awake(tiny(name, label_dim=4)), gaussian).eval()
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    classes = torch.tensor([0, 3, 1])
    assert loaded(x, 0.5, classes).equal(model(x, 0.5, classes))
    assert relative_error(model(x, 0.5, classes), model(x, 0.5)) > 1e-4
    assert relative_error(model(x, 0.5), model.untrained(x, 0.5)) > 1e-3


@networks
def test_edm_preconditioning_knows_the_event_shape(name: str) -> None:
    assert EDMPrecond(tiny(name, in_channels=1)).event_shape == EVENT


@networks
def test_training_lowers_the_loss(name: str) -> None:
    gaussian = denoiser("gaussian-full", torch.float32)
    model = BypassPrecond(tiny(name, dropout=0.0), gaussian)
    clean, noise = noised(0.0, 16, torch.float32), torch.randn(16, *EVENT)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses: list[float] = []
    for _ in range(12):
        loss = model.weight(0.5) * F.mse_loss(model(clean + 0.5 * noise, 0.5), clean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


# Inputs -------------------------------------------------------------------------------------------


@networks
@pytest.mark.parametrize("size", [(4, 12), (16, 4)])
def test_other_sizes(name: str, size: tuple[int, int]) -> None:
    net = awake(tiny(name, **({"img_resolution": size} if name == "mlp" else {})))
    out = net(*inputs(net, size=size))
    assert out.shape == (3, 1, *size)
    assert out.isfinite().all()


@networks
def test_samples_are_independent(name: str) -> None:
    net = awake(tiny(name, **LABELS))
    args = inputs(net)
    for i in range(3):
        one = net(*[t[i : i + 1] for t in args])
        torch.testing.assert_close(one, net(*args)[i : i + 1], rtol=1e-4, atol=1e-5, msg=f"{i=}")


@networks
@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_noise_label_serves_the_batch(name: str, shape: tuple[int, ...]) -> None:
    net = awake(tiny(name))
    x, _ = inputs(net)
    shared = net(x, torch.full(shape, 0.3))
    torch.testing.assert_close(shared, net(x, torch.full((3,), 0.3)))
    assert relative_error(shared, net(x, torch.full((3,), -0.3))) > 1e-3


@networks
def test_labels_as_indices_or_nothing(name: str) -> None:
    net = awake(tiny(name, **LABELS))
    x, noise_labels, one_hot, augment = inputs(net)
    by_index = net(x, noise_labels, one_hot.argmax(1), augment)
    torch.testing.assert_close(by_index, net(x, noise_labels, one_hot, augment), rtol=0, atol=0)
    plain = net(x, noise_labels)
    torch.testing.assert_close(plain, net(x, noise_labels, torch.zeros(3, 4), torch.zeros(3, 3)))
    assert relative_error(net(x, noise_labels, one_hot), plain) > 1e-3
    assert relative_error(net(x, noise_labels, None, augment), plain) > 1e-3


@networks
def test_label_dropout_only_in_training(name: str) -> None:
    net = awake(tiny(name, label_dim=4, label_dropout=0.5, dropout=0.0))
    x, noise_labels = torch.randn(16, 2, 8, 8), torch.randn(16)
    classes = torch.arange(16) % 4
    kept, dropped = net(x, noise_labels, classes), net(x, noise_labels)
    assert kept.equal(net(x, noise_labels, classes))
    mixed = net.train()(x, noise_labels, classes)
    is_kept, is_dropped = ((mixed - y).abs().amax((1, 2, 3)) < 1e-5 for y in (kept, dropped))
    assert (is_kept ^ is_dropped).all()
    assert 0 < is_dropped.sum() < 16
    always = tiny(name, label_dim=4, label_dropout=1.0, dropout=0.0).train()
    always.load_state_dict(net.state_dict())
    torch.testing.assert_close(always(x, noise_labels, classes), dropped)


@networks
def test_dropout_only_in_training(name: str) -> None:
    net = awake(tiny(name, dropout=0.5))
    args = inputs(net)
    assert net(*args).equal(net(*args))
    net.train()
    assert not net(*args).equal(net(*args))


# Precision, compilation, transforms ---------------------------------------------------------------


@networks
def test_float64(name: str) -> None:
    net = awake(tiny(name, **LABELS))
    args = inputs(net)
    double = copy.deepcopy(net).double()(*args)
    assert double.dtype == torch.float64
    assert relative_error(net(*args), double) < 1e-5


@networks
def test_bfloat16_module(name: str) -> None:
    net = awake(tiny(name, **LABELS))
    x, _, *labels = inputs(net)
    noise_labels = torch.tensor([-1.5, 2.0, 999.0])  # VP's labels reach 999
    out = copy.deepcopy(net).bfloat16()(x, noise_labels, *labels)
    assert out.dtype == torch.bfloat16
    assert relative_error(out.float(), net(x, noise_labels, *labels)) < 0.1


@networks
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(name: str, dtype: torch.dtype) -> None:
    net = awake(tiny(name, **LABELS))
    args = inputs(net)
    with torch.autocast("cpu", dtype):
        out = net(*args)
    out.float().square().mean().backward()
    assert relative_error(out.float(), net(*args)) < (0.1 if dtype == torch.bfloat16 else 0.01)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.slow
@networks
def test_compiles_without_graph_breaks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (blocks, dit, mlp):  # what is compiled keeps PyTorch's dropout
        monkeypatch.setattr(module, "dropout", F.dropout)
    torch.compiler.reset()
    net = awake(tiny(name, **LABELS, label_dropout=0.5)).train()
    x, noise_labels, classes, augment = inputs(net)
    outs: list[Tensor] = []
    for call in (net, torch.compile(net, fullgraph=True, backend="eager")):
        torch.manual_seed(2)  # for dropout
        outs.append(call(x, noise_labels, classes.argmax(1), augment))
    torch.testing.assert_close(outs[1], outs[0])


@networks
def test_vmap(name: str) -> None:
    net = awake(tiny(name))
    x, noise_labels = torch.randn(2, 3, 2, 8, 8), torch.randn(2, 3)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no batching rule
        mapped = torch.func.vmap(net)(x, noise_labels)
    torch.testing.assert_close(mapped, torch.stack([net(x[i], noise_labels[i]) for i in range(2)]))


# Errors -------------------------------------------------------------------------------------------


@networks
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"img_resolution": 0}, r"img_resolution: got 0"),
        ({"in_channels": 0}, r"in_channels: got 0, expected at least 1"),
        ({"out_channels": 0}, r"out_channels: got 0, expected at least 1"),
        ({"model_channels": 15}, r"model_channels: got 15, expected"),
        ({"model_channels": -4}, r"model_channels: got -4, expected"),
        ({"num_blocks": 0}, r"num_blocks: got 0, expected at least 1"),
        ({"label_dim": -1}, r"label_dim: got -1, expected 0 or more"),
        ({"augment_dim": -1}, r"augment_dim: got -1, expected 0 or more"),
        ({"dropout": 1.5}, r"dropout: got 1.5, expected a probability"),
        ({"label_dropout": float("nan")}, r"label_dropout: got nan, expected a probability"),
    ],
    ids=str,
)
def test_impossible_arguments(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(name, **changes)


@networks
@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.ones(3, 1, 8, 8), r"x: got shape \(3, 1, 8, 8\), expected \(B, 2, "),
        (0, torch.ones(2, 8, 8), r"x: got shape \(2, 8, 8\)"),
        (0, torch.ones(3, 2, 8, 7), r"x: got shape \(3, 2, 8, 7\)"),
        (1, torch.ones(2), r"noise_labels: got shape \(2,\), expected \(3,\) or \(\)"),
        (1, torch.ones(3, 1), r"noise_labels: got shape \(3, 1\)"),
        (2, torch.ones(3, 5), r"class_labels: got shape \(3, 5\).*expected \(3, 4\)"),
        (2, torch.ones(3), r"class_labels: got shape \(3,\) of torch.float32"),
        (2, torch.ones(2).long(), r"class_labels: got shape \(2, 4\).*expected \(3, 4\)"),
        (3, torch.ones(3, 8), r"augment_labels: got shape \(3, 8\).*expected \(3, 3\)"),
    ],
)
def test_wrong_inputs(name: str, index: int, value: Tensor, message: str) -> None:
    net = tiny(name, **LABELS)
    args = inputs(net)
    args[index] = value
    with pytest.raises(ValueError, match=message):
        net(*args)


@networks
@pytest.mark.parametrize("classes", [[0, -1, 3], [0, 4, 4]])
def test_classes_that_there_are_not(name: str, classes: list[int]) -> None:
    net = tiny(name, **LABELS)
    x, noise_labels = inputs(net)[:2]
    got = re.escape(str(sorted(set(classes))))
    with pytest.raises(ValueError, match=rf"class_labels: got classes {got}, expected them from 0 to 3"):
        net(x, noise_labels, torch.tensor(classes))


@networks
def test_no_images_give_no_images(name: str) -> None:
    net = tiny(name)
    x, noise_labels = inputs(net)[:2]
    assert net(x[:0], noise_labels[:0]).shape == net(x, noise_labels)[:0].shape


@networks
def test_labels_for_a_network_without_labels(name: str) -> None:
    net = tiny(name)
    x, noise_labels = inputs(net)
    with pytest.raises(ValueError, match=r"class_labels: .*expected \(3, 0\)"):
        net(x, noise_labels, torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"augment_labels: .*expected \(3, 0\)"):
        net(x, noise_labels, None, torch.ones(3, 4))
    net(x, noise_labels, torch.ones(3, 0), torch.ones(3, 0))


@pytest.mark.parametrize(
    ("make", "channels", "least"),
    [
        (FourierEmbedding, 0, 2),
        (FourierEmbedding, 5, 2),
        (PositionalEmbedding, 7, 2),
        (partial(PositionalEmbedding, endpoint=True), 2, 4),
    ],
)
def test_impossible_embeddings(make: Any, channels: int, least: int) -> None:
    with pytest.raises(ValueError, match=rf"embedding channels: got {channels}, expected even, >= {least}"):
        make(channels)
    assert [part.shape for part in make(least)(torch.zeros(3))] == [(3, least // 2)] * 2
