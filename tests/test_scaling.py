"""Counts that plans rest on, against what torch counts and fits allocate; the page against its calculator."""

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gaussnet import (
    CosineCovariance,
    Covariance,
    DhariwalUNet,
    DiT,
    Gate,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
)
from gaussnet.fit import fit_covariance, fit_moments
from gaussnet.gate import SIGMAS

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
results, scaling, scaling_cases, plan, timing = (
    importlib.import_module(name)
    for name in ("results", "scaling", "scaling_cases", "scaling_plan", "timing")
)
sys.path.remove(str(ROOT / "benchmarks"))


def counted(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def gaussian(dim: int, rank: int) -> GaussianDenoiser:
    return GaussianDenoiser(
        torch.zeros(dim), Covariance(torch.linalg.qr(torch.randn(dim, rank)).Q, torch.ones(rank), 0.1)
    )


@pytest.mark.parametrize("power", [-1.0, 0.0, 1.5, 3.0])
def test_exponents_of_powers(power: float) -> None:
    sizes = [2, 3, 8, 50]
    assert scaling.exponent(sizes, [7 * size**power for size in sizes]) == pytest.approx(power, abs=1e-12)


@pytest.mark.parametrize("rank", [5, 48])
def test_operations_of_a_gaussian(rank: int) -> None:
    model, x = gaussian(48, rank), torch.randn(7, 48)
    assert counted(lambda: model(x, 0.5)) == 7 * plan.gaussian_work(48, rank, 0)
    assert counted(lambda: model.flow(x, 80.0, 5.0)) == 7 * plan.gaussian_work(48, rank, 0)


def test_operations_of_a_cosine_basis() -> None:
    model = GaussianDenoiser(torch.zeros(4, 8, 8), CosineCovariance(torch.ones(4, 8, 8), torch.eye(4)))
    x = torch.randn(7, 4, 8, 8)
    assert counted(lambda: model(x, 0.5)) == 7 * plan.gaussian_work(256, None, 8, channels=4)


def test_operations_of_a_mixture() -> None:
    one = gaussian(48, 5).covariance
    model = GaussianMixtureDenoiser(torch.ones(3), torch.randn(3, 48), [one] * 3)
    x = torch.randn(64, 48)
    centres = 2 * 2 * 3 * 48  # of all components, twice, whatever the batch
    assert counted(lambda: model(x, 5.0)) == pytest.approx(
        64 * plan.mixture_work(48, 3, 5) + centres, rel=0.05
    )


def test_operations_of_fits() -> None:
    x = torch.randn(1000, 512)
    assert counted(lambda: fit_moments(x)) == plan.INNER * 1000 * 512**2
    images = torch.randn(10, 3, 16, 16)
    found = counted(lambda: fit_covariance(images, basis="cosine", shrinkage="none"))
    inverse = 4 * 16 * 768  # of the mean
    assert found == pytest.approx(10 * plan.cosine_work(768, 3, 16) + inverse, rel=0.2)


@pytest.mark.parametrize("folds", [1, 3])
def test_memory_of_fits(folds: int) -> None:
    x, dim = torch.randn(600, 512), 512
    unit = 2**20 / (8 * dim**2)  # numbers of a covariance a MB
    shrinkage = "cv" if folds == 3 else "none"
    assert unit * timing.peak_memory(lambda: fit_moments(x, folds)) == pytest.approx(
        plan.moments_bytes(600, dim, folds) / 2**20 * unit, rel=0.15
    )
    fitted = timing.peak_memory(lambda: fit_covariance(x, solver="dense", shrinkage=shrinkage))
    assert unit * fitted == pytest.approx(plan.fit_bytes(dim, folds) / 2**20 * unit, rel=0.15)


def test_memory_of_a_gram_fit() -> None:
    x = torch.randn(200, 2000)
    found = timing.peak_memory(lambda: fit_covariance(x, solver="gram")) * 2**20
    assert found == pytest.approx(plan.gram_bytes(200, 2000), rel=0.1)


def test_memory_of_a_krylov_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gaussnet.fit.krylov._IN_MEMORY", 0)
    monkeypatch.setattr("gaussnet.fit.krylov._CHUNK", 2**16)
    x = torch.randn(300, 4000) * torch.arange(1.0, 4001) ** -0.6
    for shrinkage, folds in (("none", 1), ("cv", 3)):
        found = timing.peak_memory(lambda name=shrinkage: fit_covariance(x, 100, name, "krylov")) * 2**20
        assert found == pytest.approx(plan.axes_bytes(100, 4000, folds), rel=0.3), shrinkage


def test_memory_of_a_gate() -> None:
    dim, queries = 20_000, 64
    data, model = torch.randn(128, dim), GaussianDenoiser.isotropic(torch.zeros(dim), 1.0)
    found = timing.peak_memory(lambda: Gate.fit(model, data, [0.5, 1.0], queries)) * 2**20
    keys = 4 * 128 * dim
    assert found - keys == pytest.approx(plan.gate_bytes(queries, dim), rel=0.2)
    assert len(SIGMAS) == plan.LEVELS


NETWORKS: dict[str, Callable[[], tuple[torch.nn.Module, Any]]] = {
    "DiT-XL/2": lambda: (
        DiT(64, 4, 4, label_dim=1000, patch_size=2, model_channels=1152, num_blocks=28, num_heads=16),
        plan.LATENTS,
    ),
    "ADM": lambda: (
        DhariwalUNet(
            512, 3, 3, label_dim=1000, model_channels=128, channel_mult=(1, 2, 2, 4, 4, 8, 8),
            channel_mult_emb=8, num_blocks=2, attn_resolutions=(32, 16, 8),
        ),
        plan.PIXELS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_operations_and_parameters_of_the_networks(name: str) -> None:
    with torch.device("meta"), torch.no_grad():
        network, target = NETWORKS[name]()
        x, noise, labels = torch.empty(1, *target.shape), torch.empty(1), torch.empty(1, 1000)
        found = counted(lambda: network.eval()(x, noise, labels))
    assert target.network == name
    assert found / 1e9 == pytest.approx(target.gflop, rel=1e-3)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(target.parameters, rel=2e-3)


def test_buffers_of_the_plan_are_those_of_the_model() -> None:
    dim, rank = 96, 10
    held = sum(b.numel() * b.element_size() for b in gaussian(dim, rank).buffers())
    assert held == pytest.approx(4 * dim * (1 + rank), rel=0.02)


def test_the_page_holds_what_the_calculator_prints(capsys: pytest.CaptureFixture[str]) -> None:
    plan.plan(plan.Assumptions(), results.Record(argparse.Namespace(json=None)))
    page = (ROOT / "docs" / "planning.md").read_text()
    tables = [part for part in capsys.readouterr().out.split("\n\n") if part.startswith("|")]
    assert len(tables) == 5
    for table in tables:
        assert table.strip() in page


def test_a_faster_machine_changes_the_plan() -> None:
    slow, fast = (
        plan.predict(plan.Assumptions(fp64=rate, cpu=rate), plan.LATENTS)["Fit"] for rate in (10.0, 1000.0)
    )
    changed = {name for name in slow if slow[name] != fast[name]}
    assert "dense: its time on all GPUs; on all CPU cores" in changed
    assert "dense: the covariance, float64" not in changed


@pytest.mark.parametrize("case", scaling_cases.cases(), ids=lambda case: f"{case.panel}, {case.name}")
def test_counts_of_cases_do_not_fall(case: Any) -> None:
    work, space = ([count(size) for size in case.sizes] for count in (case.work, case.space))
    assert work == sorted(work)
    assert space == sorted(space)
    assert min(work) > 0
    assert min(space) > 0


def test_rows_table_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [64, 128, 256]
    case = scaling_cases.Case(
        "panel", "moments", "D", sizes, lambda d: scaling_cases.moments_pass(300, d), lambda d: d**2, float
    )
    square = torch.randn(64, 64)
    rows = list(scaling.measure(case, True, lambda: square @ square))
    assert [row["size"] for row in rows] == sizes[:-1]
    for row in rows:
        assert set(row) == set(scaling.COLUMNS)
        assert min(row[key] for key in ("units", "over_bare", "memory_mb")) > 0
    record = results.Record(argparse.Namespace(json=tmp_path / "found.json"))
    scaling.tell(record, rows)
    line = capsys.readouterr().out.splitlines()[2].split(" | ")
    assert line[:3] == ["| panel", "moments", "D = 64 to 128"]
    assert line[4] == "2.00"
    assert line[6] == "1.00"
    assert [number.against for number in record.numbers] == ["operations", "bytes", "bare operation"]
    scaling.draw(rows, tmp_path / "found.png")
    assert (tmp_path / "found.png").is_file()
