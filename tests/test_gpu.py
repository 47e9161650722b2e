"""What only a GPU can show: reduced precision, graphs, compilation, and what makes the host wait.

Skipped without one. Everything else in tests/ runs on the CPU, where the same code is held to identities.
"""

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from cases import (
    ANALYTIC,
    DENOISERS,
    EVENT,
    LABELLED,
    LOCAL,
    NETWORKS,
    denoiser,
    digits,
    noised,
    randn,
    relative_error,
    split,
    tiny_unet,
    train_digits,
)
from test_train import tiny, weights

import train.loop
from gaussnet import (
    SOLVERS,
    BypassPrecond,
    CosineCovariance,
    CrossFit,
    DiT,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    MarginalDenoiser,
    from_pretrained,
    heun,
    karras_sigmas,
    teleport,
)
from gaussnet.cli import main
from train.data import load_data
from train.ema import EMA
from train.loss import denoising_loss, make_batch
from train.optim import zero_bad_gradients

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
F32, F64 = torch.float32, torch.float64


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.fixture
def tf32() -> Iterator[None]:
    """Matrix products and convolutions in TF32, as `train.tf32` sets it."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextmanager
def not_waiting() -> Iterator[None]:
    """Raises where the host waits for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def classes(name: str) -> torch.Tensor | None:
    return digits()[1][split()[1]][:16] if name in LABELLED else None


# Numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.002, 0.05, 0.5, 5.0, 80.0])
@pytest.mark.parametrize("name", [*ANALYTIC, *LOCAL, "marginal"])
@pytest.mark.usefixtures("tf32")
def test_tf32_and_autocast_do_not_reach_analytic_layers(name: str, sigma: float) -> None:
    x, labels = noised(sigma), classes(name)
    expected = denoiser(name)(x, sigma, labels)
    on_gpu = denoiser(name, F32).cuda()
    labels = None if labels is None else labels.cuda()
    with torch.autocast("cuda", torch.bfloat16):
        denoised = on_gpu(x.float().cuda(), sigma, labels)
    own = relative_error(denoiser(name, F32)(x.float(), sigma, classes(name)), expected)
    assert denoised.dtype == F32
    assert relative_error(denoised.cpu(), expected) < 3 * own + 2e-6, f"the CPU's own: {own:.1e}"


@pytest.mark.parametrize("name", DENOISERS)
def test_float64_agrees_with_the_cpu(name: str) -> None:
    x, labels = noised(0.5), classes(name)
    expected = denoiser(name).score(x, 0.5, labels)
    labels = None if labels is None else labels.cuda()
    assert relative_error(denoiser(name).cuda().score(x.cuda(), 0.5, labels).cpu(), expected) < 1e-9


def test_fits_agree_with_the_cpu() -> None:
    images, labels = train_digits(), digits()[1][split()[0]]
    x = noised(0.5)
    fits: dict[str, Any] = {
        "gaussian": lambda data, labels: GaussianDenoiser.fit(data),
        "rank 10": lambda data, labels: GaussianDenoiser.fit(data, rank=10),
        "classes": lambda data, labels: GaussianMixtureDenoiser.fit(data, labels=labels, rank=12),
        "marginal": lambda data, labels: MarginalDenoiser.fit(data),
    }
    for name, fit in fits.items():
        expected = fit(images, labels)(x, 0.5)
        fitted = fit(images.cuda(), labels.cuda()).cuda()
        assert relative_error(fitted(x.cuda(), 0.5).cpu(), expected) < 1e-6, name


@pytest.mark.usefixtures("tf32")
def test_cosine_covariance_keeps_float32() -> None:
    eigvals = torch.logspace(0.6, -4, 64, dtype=F64).reshape(EVENT)
    covariance = CosineCovariance(eigvals, torch.ones(1, 1, dtype=F64))
    gaussian = GaussianDenoiser(train_digits().mean(0), covariance)
    x = noised(0.02)
    expected = gaussian.score(x, 0.02)
    assert relative_error(gaussian.float().cuda().score(x.float().cuda(), 0.02).cpu(), expected) < 1e-4


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_agree_with_the_cpu(name: str) -> None:
    if name in {"dpm_v3", "edm_stochastic"}:
        pytest.skip("needs statistics, or draws")
    model, x = denoiser("gaussian-full"), 80 * randn(4, *EVENT)
    start, grid = teleport(model, x, karras_sigmas(12), skip=3)
    expected = SOLVERS[name](model, start, grid)
    model.cuda()
    start, grid = teleport(model, x.cuda(), karras_sigmas(12), skip=3)
    assert relative_error(SOLVERS[name](model, start, grid).cpu(), expected) < 1e-8


@pytest.mark.parametrize("network", ["unet", "dit"])
@pytest.mark.usefixtures("tf32")
def test_networks_in_bfloat16(network: str) -> None:
    unet = tiny_unet(in_channels=2)
    if network == "dit":
        unet = DiT(8, 2, 1, model_channels=64, num_blocks=2, patch_size=2, num_heads=2)
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter.add_(randn(*parameter.shape, dtype=F32), alpha=0.05)
    base = GaussianDenoiser.fit(train_digits(F32), rank=20)
    model = BypassPrecond(unet, base, show_gaussian=True).eval()
    x = noised(0.5, dtype=F32)
    expected = model(x, 0.5)
    model.cuda()
    full = relative_error(model(x.cuda(), 0.5).cpu(), expected)
    with torch.autocast("cuda", torch.bfloat16):
        half = relative_error(model(x.cuda(), 0.5).cpu(), expected)
    assert full < 2e-3
    assert full < half < 3e-2, "autocast reaches the network"


# Graphs and compilation -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ANALYTIC, "marginal", "edm", "bypass"])
def test_denoisers_are_captured_in_graphs(name: str) -> None:
    model, x, sigma = denoiser(name, F32).cuda(), noised(0.5, dtype=F32).cuda(), torch.full((16,), 0.5).cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(2):
            model(x, sigma)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = model(x, sigma)
    x.copy_(noised(2.0, dtype=F32))
    sigma.fill_(2.0)
    graph.replay()
    with torch.no_grad():
        assert relative_error(out, model(x, sigma)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ANALYTIC, "marginal", *NETWORKS])
def test_compiled_denoisers_agree(name: str) -> None:
    torch._dynamo.reset()
    model, x, sigma = denoiser(name, F32).cuda(), noised(0.5, dtype=F32).cuda(), torch.full((16,), 0.5).cuda()
    with torch.no_grad():
        expected, compiled = model(x, sigma), torch.compile(model)(x, sigma)
    assert relative_error(compiled, expected) < (2e-3 if name in NETWORKS else 1e-5)


# What makes the host wait ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", DENOISERS)
@pytest.mark.parametrize("sigma", ["number", "level"])
def test_denoisers_do_not_wait(name: str, sigma: str) -> None:
    # The one wait that is meant, a look at a flag, takes the error for a flag that cannot be read.
    if name in {"delta-classes", "patch-ls", "patch-els"}:
        pytest.skip("sizes of what it computes depend on values")
    model, x = denoiser(name, F32).cuda(), noised(0.5, dtype=F32).cuda()
    level: Any = 0.5 if sigma == "number" else torch.tensor(0.5)
    with torch.no_grad():
        model(x, level)
        with not_waiting():
            model(x, level)


def test_a_step_of_a_solver_does_not_wait() -> None:
    model, x = denoiser("edm", F32).cuda(), 80 * randn(4, *EVENT, dtype=F32).cuda()
    grid = karras_sigmas(6)
    with torch.no_grad():
        heun(model, x, grid)
        with not_waiting():
            heun(model, x, grid)


@pytest.mark.parametrize("base", ["gaussian", "marginal", "folds"])
def test_a_training_step_does_not_wait(base: str, tmp_path: Path) -> None:
    config = tiny(tmp_path, "data.xflip=true", "loss.sigma_max=20")
    data = load_data(config.data)
    images = data.train.tensor().cuda()
    held_out = data.heldout.tensor().cuda()
    cross = None
    if base == "folds":
        cross = CrossFit.fit(lambda kept: MarginalDenoiser.fit(images[kept]), len(images))
    if base != "gaussian":
        model = BypassPrecond.fit(tiny_unet(in_channels=3), images, held_out)
    else:
        model = BypassPrecond(tiny_unet(in_channels=2), GaussianDenoiser.fit(images))
    model = model.cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    average = EMA(model.model, 1000)
    raw, labels = (part.cuda() for part in data.train[torch.arange(config.train.batch)])

    def step(number: int) -> None:
        batch = make_batch(raw, labels, number, slice(0, config.train.batch), data, config)
        optimizer.zero_grad()
        denoising_loss(model, model, batch, cross=cross).backward()
        zero_bad_gradients(model.model.parameters())
        optimizer.step()
        average.update(model.model, 16 * (number + 1), 16)

    step(0)
    with not_waiting():
        step(1)


# Training -------------------------------------------------------------------------------------------


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_it_trains_in_every_precision(precision: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train.loop.run(
        tiny(run, f"train.precision='{precision}'", "train.steps=60", "train.lr=3e-3", "data.xflip=true")
    )
    table = [row for row in rows(run / "heldout.csv") if row["weights"] == "ema"]
    first, last = (sum(float(row["error"]) for row in table if row["step"] == step) for step in ("0", "60"))
    assert 0 < last < first, "it learns"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["step"] == 60
    # The scaler of fp16 begins so high that it skips first steps.
    assert steps[-1]["bad_steps"] <= (8 if precision == "fp16" else 0)
    model = from_pretrained(run).cuda()
    x = randn(4, *model.event_shape, dtype=F32).cuda()
    assert model(x, 1.0).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_compiled_it_trains_the_same(precision: str, tmp_path: Path) -> None:
    common = ["network.arguments.dropout=0", "train.tf32=false", f"train.precision='{precision}'"]
    for compiled in ("false", "true"):
        train.loop.run(tiny(tmp_path / compiled, f"train.compile={compiled}", *common))
        AcceleratorState._reset_state(reset_partial_state=True)
    plain, compiled_weights = weights(tmp_path / "false"), weights(tmp_path / "true")
    loose = precision == "bf16"
    for name, tensor in plain.items():
        torch.testing.assert_close(
            compiled_weights[name], tensor, rtol=1e-2, atol=1e-2 if loose else 1e-3, msg=name
        )


def test_samples_of_the_gpu_are_those_of_the_cpu(tmp_path: Path) -> None:
    train.loop.run(tiny(tmp_path / "run", "train.tf32=false"))
    images: dict[str, np.ndarray] = {}
    for device in ("cuda", "cpu"):
        out = tmp_path / f"{device}.npz"
        command = ["sample", str(tmp_path / "run"), "--seeds", "0-7", "--steps", "6", "--teleport", "auto"]
        main([*command, "--device", device, "--out", str(out)])
        images[device] = np.load(out)["images"].astype(int)
    assert images["cuda"].shape[0] == 8
    assert abs(images["cuda"] - images["cpu"]).max() <= 2, "in 256 levels"
