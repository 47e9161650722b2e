"""What a run fits to its data: mirrored, by class, in folds, on any number of processes."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

import train.data
import train.models
from gaussnet import Gate, GaussianMixtureDenoiser, MarginalDenoiser
from gaussnet.denoisers import pixel_marginals
from gaussnet.gate import SIGMAS, measure_gate
from train.callbacks import Run, error_sums
from train.config import Config, ConfigError
from train.configfile import load_config
from train.data import generator_for, load_data
from train.models import fit_analytic, fit_base, fit_folds, fit_gate, fit_wrapping, places_in_class

ROOT = Path(__file__).parent.parent
LEAN = ["fit.components=[]", "fit.gate_queries=64", "fit.error_queries=64", "fit.max_data=300"]
CLASSES = ["data.labels=true", "bypass.gaussian=classes"]


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def configured(*overrides: str) -> Config:
    return load_config(ROOT / "configs" / "digits.yaml", [*LEAN, "out=unused", *overrides])


def labelled(tmp_path: Path, labels: list[int]) -> str:
    """A source of grey images with these labels."""
    images = np.random.default_rng(0).integers(0, 255, (len(labels), 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=images, labels=np.array(labels))
    return f"data.source={tmp_path}/data.npz"


@pytest.mark.parametrize("world", [2, 13, 30])
def test_the_gate_of_many_processes_is_that_of_one(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured()
    data = load_data(config.data)
    images = data.train.tensor()[:300]
    gaussian = fit_analytic(config, data, Accelerator(cpu=True)).gaussian
    generator, queries = generator_for(0, "gate"), config.fit.gate_queries
    whole = list(zip(SIGMAS, measure_gate(gaussian, images, SIGMAS, queries, generator), strict=True))
    shares: list[tuple[float, float]] = []
    monkeypatch.setattr(train.models, "gather_object", lambda found: shares.extend(found) or whole)

    def of(rank: int, world: int) -> Gate:
        process = SimpleNamespace(process_index=rank, num_processes=world)
        return fit_gate(config, gaussian, images, None, cast(Any, process))

    gates = [of(rank, world) for rank in range(world)]
    assert sorted(shares) == whole, "each level by one process, and as one would"
    for gate in gates:
        torch.testing.assert_close(gate.values, of(0, 1).values)


@pytest.mark.parametrize("options", [["bypass.gaussian=mixture", "bypass.components=3"], CLASSES])
def test_mixtures_are_fitted_to_mirror_images_where_training_mirrors(options: list[str]) -> None:
    config = configured("data.xflip=true", "fit.components=[3]", *options)
    data, accelerator = load_data(config.data), Accelerator(cpu=True)
    analytic = fit_analytic(config, data, accelerator)
    for mixture in (fit_base(config, data, analytic.gaussian), analytic.mixtures[3]):
        assert isinstance(mixture, GaussianMixtureDenoiser)
        mean = torch.einsum("k,k...->...", mixture.weights, mixture.means)
        if mixture.component_labels is None:  # clusters of mirrored images are of few of both
            assert (mean - mean.flip(-1)).norm() < 0.2 * mean.norm()
        else:
            torch.testing.assert_close(mixture.means, mixture.means.flip(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [[], CLASSES])
def test_gate_and_delta_have_the_mirror_images_that_training_has(options: list[str]) -> None:
    config = configured("data.xflip=true", "fit.max_data=2000", *options)
    data, accelerator = load_data(config.data), Accelerator(cpu=True)
    analytic = fit_analytic(config, data, accelerator)
    images, mirrored = analytic.delta.data.chunk(2)
    assert len(images) == len(data.train)
    assert torch.equal(images.flip(-1), mirrored)
    gate = fit_wrapping(config, data, analytic, accelerator).gate
    assert gate is not None
    assert float(gate(80.0)) < 0.01, "from afar, mirrored data are their Gaussian"


def test_groups_of_more_images_than_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "groups.npy", np.arange(1797) // 30)
    config = configured(f"data.groups={tmp_path}/groups.npy")
    data, accelerator = load_data(config.data), Accelerator(cpu=True)
    whole = fit_analytic(config, data, accelerator).gaussian
    apart = fit_analytic(config, replace(data, groups=None), accelerator).gaussian
    monkeypatch.setattr(train.data, "IN_MEMORY", 1000)
    streamed = fit_analytic(config, data, accelerator).gaussian
    torch.testing.assert_close(streamed.covariance.eigvals, whole.covariance.eigvals)
    assert not torch.allclose(apart.covariance.eigvals, whole.covariance.eigvals, rtol=1e-3)


def test_options_that_streams_do_not_allow_are_errors_of_the_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train.data, "IN_MEMORY", 1000)
    config = configured("fit.shrinkage=ledoit-wolf")
    with pytest.raises(ConfigError, match='fit: shrinkage="ledoit-wolf" needs an array of samples'):
        fit_analytic(config, load_data(config.data), Accelerator(cpu=True))


def test_places_count_the_equals_before() -> None:
    assert places_in_class(torch.tensor([3, 1, 3, 3, 0, 1])).tolist() == [0, 0, 1, 2, 0, 1]


def test_folds_leave_images_of_every_class(tmp_path: Path) -> None:
    labels = [0] * 60 + [1] * 60 + [2] * 4
    config = configured(labelled(tmp_path, labels), "data.heldout=1", *CLASSES)
    data = load_data(config.data)
    cross = fit_folds(config, data, Accelerator(cpu=True))
    assert cross is not None
    for denoiser in cross.denoisers:
        assert isinstance(denoiser, MarginalDenoiser)
        mixture = denoiser.gaussian
        assert isinstance(mixture, GaussianMixtureDenoiser)
        assert mixture.component_labels is not None
        assert mixture.component_labels.tolist() == [0, 1, 2]


def test_classes_too_rare_for_folds_are_named(tmp_path: Path) -> None:
    config = configured(labelled(tmp_path, [0, 1] * 30 + [2] * 2), "data.heldout=1", *CLASSES)
    message = r"expected at least 2 samples of each class, got one of \[2\], .*: fit.folds=0 does without"
    with pytest.raises(ConfigError, match=message):
        fit_folds(config, load_data(config.data), Accelerator(cpu=True))


def test_classes_of_held_out_images_alone_are_named(tmp_path: Path) -> None:
    labels = [0, 1] * 30
    order = torch.randperm(60, generator=generator_for(0, "split"))  # as images are split
    labels[int(order[0])] = 2
    config = configured(labelled(tmp_path, labels), "data.heldout=6", *CLASSES)
    data, accelerator = load_data(config.data), Accelerator(cpu=True)
    with pytest.raises(ConfigError, match=r"data.heldout: expected class_labels among \[0, 1\], got \[2\]"):
        fit_wrapping(config, data, fit_analytic(config, data, accelerator), accelerator)


def test_a_process_without_held_out_images_adds_nothing() -> None:
    clean = torch.zeros(0, 1, 4, 4)
    sums = error_sums(lambda *_: pytest.fail("evaluated"), clean, clean, [0.1, 1.0], None, torch.eye(16))
    assert sums.equal(torch.zeros(2, 17, dtype=torch.float64))


def test_only_classes_that_occur_are_sampled(tmp_path: Path) -> None:
    source = labelled(tmp_path, [0] * 30 + [2] * 30 + [5] * 30)
    config = configured(source, "data.heldout=12", "data.labels=true")
    run = Run(config, cast(Any, None), Accelerator(cpu=True), load_data(config.data), *[cast(Any, None)] * 3)
    _, labels = run.initial(7, "samples")
    assert labels is not None
    assert labels.shape == (7, 6)
    assert labels.argmax(1).tolist() == [0, 2, 5, 0, 2, 5, 0]
    plain = configured(source, "data.heldout=12")
    assert (
        Run(plain, cast(Any, None), run.accelerator, load_data(plain.data), *[cast(Any, None)] * 3).initial(
            7, "samples"
        )[1]
        is None
    )


@pytest.mark.parametrize(
    "options",
    [["bypass.base=marginal"], ["bypass.gaussian=mixture"], ["fit.folds=2"], [*CLASSES, "fit.folds=2"]],
)
def test_a_resumed_run_fits_what_it_fitted(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixel_marginals, "_POOLED", 2**10)  # of more images, levels are chosen from some
    config = configured(labelled(tmp_path, [0] * 400), *options)
    data, accelerator = load_data(config.data), Accelerator(cpu=True)

    def fitted(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)  # of the process: it must not matter
        analytic = fit_analytic(config, data, accelerator)
        wrapping = fit_wrapping(config, data, analytic, accelerator)
        cross = fit_folds(config, data, accelerator)
        parts = (*analytic.named().values(), wrapping.base, wrapping.gate, wrapping.error, cross)
        return [tensor for part in parts if part is not None for tensor in part.buffers()]

    for first, again in zip(fitted(0), fitted(1), strict=True):
        assert torch.equal(first, again)
