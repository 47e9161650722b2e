"""Fitting over two processes: each has its share of the data, both get the fit of one to all of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import randn
from torch import Tensor, distributed, multiprocessing

from gaussnet import GaussianDenoiser, MarginalDenoiser
from gaussnet.fit import fit_covariance, fit_moments
from gaussnet.fit.streams import process_sum

WORLD = 2
COUNT = 41  # so that one process has a sample more
EVENT = (2, 3, 4)
GROUPS = torch.arange(COUNT) // 3 * 10  # two processes have different ones of them


def samples() -> Tensor:
    return randn(COUNT, *EVENT) * torch.linspace(0.5, 2, 4) + torch.linspace(0, 9, 3)[:, None]


def striped(rank: int, world: int) -> slice:
    """Which samples a process has, as samplers of torch.distributed deal them."""
    return slice(rank, None, world)


def unequal(rank: int, world: int) -> slice:
    """One process has 3 samples, the other 38."""
    return slice(None) if world == 1 else slice(0, 3) if rank == 0 else slice(3, None)


def moments(share: Any, **arguments: Any) -> Any:
    return [[m.count, m.mean, m.scatter, m.dtype, m.event_shape] for m in fit_moments(share, **arguments)]


def denoiser(share: Any, **arguments: Any) -> Any:
    fitted = GaussianDenoiser.fit(share, **arguments)
    x = randn(3, *EVENT, seed=1).to(fitted.mean.dtype)
    size = fitted.provenance["data"]["size"]
    return [size, fitted.mean, fitted.covariance.eigvals, fitted.covariance.tail, fitted(x, 0.3)]


def marginal(share: Any, **arguments: Any) -> Any:
    """Its Gaussian, which has to be that of all shares, too."""
    gaussian = MarginalDenoiser.fit(share if isinstance(share, Tensor) else list(share), **arguments).gaussian
    assert isinstance(gaussian, GaussianDenoiser)
    return [gaussian.mean, gaussian.covariance.eigvals]


def refused(share: Any, **arguments: Any) -> Any:
    with pytest.raises(TypeError, match="one process's share of them"):
        fit_covariance(share, **arguments)
    return []


# name: call, the process's share, arguments
CASES: dict[str, tuple[Callable[..., Any], Callable[[int, int], slice], dict[str, Any]]] = {
    "moments": (moments, striped, {}),
    "moments of 3 folds": (moments, striped, {"folds": 3}),
    "moments of 2 folds, one a process": (moments, striped, {"folds": 2}),
    "moments of 4 folds, two a process": (moments, striped, {"folds": 4}),
    "moments of more folds than samples": (moments, striped, {"folds": COUNT + 3}),
    "moments of unequal shares": (moments, unequal, {}),
    "moments of mirrored images": (moments, striped, {"folds": 3, "mirror": True}),
    "moments of groups": (moments, striped, {"folds": 3, "groups": GROUPS}),
    "moments of groups in unequal shares": (moments, unequal, {"folds": 4, "groups": GROUPS}),
    "cross-validated": (denoiser, striped, {}),
    "cross-validated, mirrored": (denoiser, striped, {"mirror": True, "rank": 6}),
    "cross-validated, grouped": (denoiser, striped, {"groups": GROUPS}),
    "sample eigenvalues": (denoiser, unequal, {"shrinkage": "none", "rank": 5}),
    "oas": (denoiser, unequal, {"shrinkage": "oas"}),
    "cosine": (denoiser, striped, {"basis": "cosine"}),
    "marginal": (marginal, striped, {"mirror": True}),
    "cosine, mirrored": (denoiser, striped, {"basis": "cosine", "mirror": True}),
    "cosine, unequal": (denoiser, unequal, {"basis": "cosine"}),
}
REFUSED: dict[str, tuple[Callable[..., Any], Callable[[int, int], slice], dict[str, Any]]] = {
    "krylov": (refused, striped, {"solver": "krylov", "rank": 3}),
    "gram": (refused, striped, {"solver": "gram"}),
    "select": (refused, striped, {"select": "heldout"}),
}
SHIFTS = {"": 0.0, ", far from 0": 1e4}
KINDS = {"": lambda x: x, ", in batches": lambda x: iter(x.split(4)), ", in float32": Tensor.float}


def call(name: str, rank: int, world: int, shift: float, kind: Callable[[Tensor], Any]) -> Any:
    function, share, arguments = {**CASES, **REFUSED}[name]
    mine = share(rank, world)
    if "groups" in arguments:
        arguments = {**arguments, "groups": GROUPS[mine]}
    return function(kind((samples() + shift)[mine]), all_processes=world > 1, **arguments)


def every(rank: int, world: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for shift in SHIFTS:
        for kind in KINDS:
            for name in CASES:
                found[name + shift + kind] = call(name, rank, world, SHIFTS[shift], KINDS[kind])
    return found


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD
    )
    found = every(rank, WORLD)
    for name in REFUSED:
        call(name, rank, WORLD, 0.0, KINDS[""])
    x = torch.full((2, 2), float(rank + 1))
    found["sum"] = [process_sum(x), x]
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes has found."""
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(work, (str(folder),), nprocs=WORLD)  # pyright: ignore[reportPrivateImportUsage]
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return every(0, 1)


def leaves(found: Any) -> list[Any]:
    return [leaf for part in found for leaf in leaves(part)] if isinstance(found, list) else [found]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_find_what_one_does(
    name: str, results: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    ran = [key for key in alone if key.split(", in ")[0].split(", far")[0] == name]
    assert len(ran) >= 4
    for key in ran:
        expected = leaves(alone[key])
        # The deviations from a mean of 1e4 have 12 of 16 digits.
        tolerance = 1e-6 if "float32" in key else 1e-8 if "far" in key else 1e-10
        for rank, result in enumerate(results):
            found = leaves(result[key])
            assert len(found) == len(expected), f"{key}: process {rank}"
            for i, (a, b) in enumerate(zip(found, expected, strict=True)):
                if not isinstance(b, Tensor):
                    assert a == b, f"{key}: process {rank}, entry {i}: {a} for {b}"
                    continue
                scale = float(b.abs().max())
                message = f"{key}: process {rank}, entry {i}"
                torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(scale, 1e-9), msg=message)
        first, second = (leaves(result[key]) for result in results)
        for i, (a, b) in enumerate(zip(first, second, strict=True)):
            same = torch.equal(a, b) if isinstance(a, Tensor) else a == b
            assert same, f"{key}: the processes differ in entry {i}"


def test_sums_leave_their_terms_alone(results: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(results):
        total, own = result["sum"]
        assert total.tolist() == [[3.0, 3.0], [3.0, 3.0]]
        assert own.tolist() == [[rank + 1.0] * 2] * 2


def test_one_process_needs_torch_distributed() -> None:
    for basis in ("eigen", "cosine"):
        with pytest.raises(RuntimeError, match=r"needs an initialised torch\.distributed"):
            GaussianDenoiser.fit(samples(), all_processes=True, basis=basis)
