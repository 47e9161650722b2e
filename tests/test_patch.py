"""Patch posteriors against loops over pixels and patches, and what all local denoisers share."""

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import (
    DTYPES,
    EVENT,
    SIGMAS,
    digits,
    held_out_digits,
    noised,
    randn,
    relative_error,
    split,
    train_digits,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gaussnet import DeltaDenoiser, GaussianDenoiser, from_pretrained
from gaussnet.denoisers.patch import PADDINGS, PatchDenoiser
from gaussnet.denoisers.pca_local import PCALocalDenoiser

sigmas = pytest.mark.parametrize("sigma", SIGMAS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
paddings = pytest.mark.parametrize("padding", PADDINGS)

F32, F64 = torch.float32, torch.float64
TINY = (2, 4, 5)
COUNT = 200


PIXELS = list(itertools.product(range(TINY[1]), range(TINY[2])))


def patch(u: tuple[int, int], size: int, padding: str) -> dict[tuple[int, int], tuple[int, int]]:
    """The pixels of the tiny image in the patch about u, each once, by an offset from u."""
    reach, found = size // 2, {}
    for down, right in itertools.product(range(-reach, reach + 1), repeat=2):
        i, j = u[0] + down, u[1] + right
        if padding == "circular":
            i, j = i % TINY[1], j % TINY[2]
        if (i, j) in PIXELS and (i, j) not in found.values():
            found[down, right] = (i, j)
    return found


def brute_force(data: Tensor, x: Tensor, sigma: float, size: int, equivariant: bool, padding: str) -> Tensor:
    """Eq. 7-10 and 41 by a loop over pixels and the patches that each is compared with, in float64."""
    data, x = data.double(), x.double()
    out = torch.empty_like(x)
    for u in PIXELS:
        mine = patch(u, size, padding)
        distances: list[Tensor] = []
        centres: list[Tensor] = []
        for v in PIXELS if equivariant else [u]:
            theirs = patch(v, size, padding)
            if theirs.keys() == mine.keys():
                a, b = torch.tensor([[*mine[offset], *theirs[offset]] for offset in mine]).T.split(2)
                difference = x[:, None, :, a[0], a[1]] - data[:, :, b[0], b[1]]
                distances.append(difference.square().sum((-1, -2)))  # (B, N)
                centres.append(data[:, :, v[0], v[1]])
        weights = (-torch.cat(distances, 1) / (2 * sigma**2)).softmax(1)
        out[:, :, u[0], u[1]] = weights @ torch.cat(centres)
    return out


@dtypes
@paddings
@pytest.mark.parametrize("equivariant", [False, True], ids=["LS", "ELS"])
@pytest.mark.parametrize("size", [1, 3, 5, 9])
def test_equals_brute_force(size: int, equivariant: bool, padding: str, dtype: torch.dtype) -> None:
    data = randn(4, *TINY).to(dtype)
    denoiser = PatchDenoiser(data, size, equivariant=equivariant, padding=padding)
    for sigma in (0.002, 0.3, 5.0):
        x = (data[:2].double() + sigma * randn(2, *TINY, seed=1)).to(dtype)
        expected = brute_force(data, x, sigma, size, equivariant, padding)
        bound = 1e-12 if dtype == F64 else 1e-6
        assert relative_error(denoiser(x, sigma), expected) < bound, f"denoised at {sigma}"
        score = (expected - x.double()) / sigma**2
        assert relative_error(denoiser.score(x, sigma), score) < 1e2 * bound, f"score at {sigma}"
        x = (data[:2] + data[2:]) / 2
        expected = brute_force(data, x, sigma, size, equivariant, padding)
        bound = 1e-8 if dtype == F64 else 1e-6
        assert relative_error(denoiser(x, sigma), expected) < bound, f"between two data at {sigma}"


@pytest.mark.parametrize("shift", [(1, 0), (0, -3), (2, 5)], ids=str)
@pytest.mark.parametrize("size", [3, 7])
def test_circular_els_commutes_with_shifts(size: int, shift: tuple[int, int]) -> None:
    data, x = train_digits()[:40], noised(0.5, 3)
    moved = torch.roll(x, shift, (-2, -1))
    els = PatchDenoiser(data, size, equivariant=True, padding="circular")
    assert relative_error(els(moved, 0.5), torch.roll(els(x, 0.5), shift, (-2, -1))) < 1e-12
    for other in (
        PatchDenoiser(data, size, padding="circular"),
        PatchDenoiser(data, size, equivariant=True, padding="zeros"),
    ):
        assert relative_error(other(moved, 0.5), torch.roll(other(x, 0.5), shift, (-2, -1))) > 1e-2


def test_zero_padded_els_commutes_with_shifts_inside() -> None:
    x = torch.zeros(1, *EVENT, dtype=F64)
    x[..., 2:5, 2:5] = randn(1, 1, 3, 3)
    els = PatchDenoiser(train_digits()[:40], 3, equivariant=True)
    inside = els(x, 0.5)[..., 1:6, 1:6]
    assert relative_error(els(torch.roll(x, (1, 1), (-2, -1)), 0.5)[..., 2:7, 2:7], inside) < 1e-12


@sigmas
@pytest.mark.parametrize(("padding", "size"), [("circular", 9), ("circular", 15), ("zeros", 15)])
def test_patches_of_the_whole_image_give_the_delta_denoiser(sigma: float, padding: str, size: int) -> None:
    data, x = train_digits()[:COUNT], noised(sigma)
    ls, delta = PatchDenoiser(data, size, padding=padding), DeltaDenoiser(data)
    assert relative_error(ls(x, sigma), delta(x, sigma)) < 1e-9
    assert relative_error(ls.score(x, sigma), delta.score(x, sigma)) < 1e-9


def test_els_with_patches_of_the_whole_image() -> None:
    data, x = train_digits()[:8], noised(0.5, 4)
    shifts = itertools.product(range(8), repeat=2)
    orbit = torch.cat([torch.roll(data, shift, (-2, -1)) for shift in shifts])
    circular = PatchDenoiser(data, 9, equivariant=True, padding="circular")
    assert relative_error(circular(x, 0.5), DeltaDenoiser(orbit)(x, 0.5)) < 1e-10, "all shifts of the data"
    zeros = PatchDenoiser(data, 9, equivariant=True, padding="zeros")
    assert relative_error(zeros(x, 0.5), PatchDenoiser(data, 9)(x, 0.5)) < 1e-12, "each pixel of its own kind"


@paddings
def test_limits(padding: str) -> None:
    data, x = randn(10, 1, *TINY[1:]), randn(3, 1, *TINY[1:], seed=1)
    ls = PatchDenoiser(data, 3, padding=padding)
    els = PatchDenoiser(data, 3, equivariant=True, padding=padding)
    assert relative_error(ls(x, 1e6), data.mean(0).expand_as(x)) < 1e-9, "high noise: the mean"
    inside = els(x, 1e6)[..., 1:-1, 1:-1]
    mean = data.mean() if padding == "circular" else data[..., 1:-1, 1:-1].mean()
    assert relative_error(inside, mean.expand_as(inside)) < 1e-9, "high noise: the mean over pixels"
    assert relative_error(els(data, 1e-3), data) < 1e-12, "low noise: the data stay"
    assert torch.isin(els(x, 1e-3), data).all(), "low noise: centres of patches (Thm. 4.1)"


@paddings
def test_one_datum(padding: str) -> None:
    data, x = train_digits()[:1], noised(0.5)
    assert relative_error(PatchDenoiser(data, 3, padding=padding)(x, 0.5), data.expand_as(x)) < 1e-14
    constant = PatchDenoiser(torch.full_like(data, 0.3), 3, equivariant=True, padding=padding)
    assert relative_error(constant(x, 0.5), torch.full_like(x, 0.3)) < 1e-14


# Patch sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("equivariant", [False, True], ids=["LS", "ELS"])
def test_each_level_has_its_size(equivariant: bool) -> None:
    data, x = train_digits()[:20], noised(0.5, 6)
    table = PatchDenoiser(data, (1, 3, 9), (0.1, 1.0, 10.0), equivariant=equivariant)
    levels = torch.tensor([0.001, 0.31, 0.32, 3.1, 3.2, 100.0], dtype=F64)
    expected = torch.tensor([1, 1, 3, 3, 9, 9])
    assert table.patch_size(levels).equal(expected), "the nearest level in log sigma"
    assert int(table.patch_size(0.32)) == 3
    together = table(x, levels)
    for i, size in enumerate(expected.tolist()):
        alone = PatchDenoiser(data, size, equivariant=equivariant)(x[i], levels[i])
        assert relative_error(together[i], alone) < 1e-12, f"sample {i}"


def test_fit_takes_the_best_size_at_each_level() -> None:
    data, heldout = train_digits()[:100], held_out_digits()[:3]
    levels, sizes = torch.logspace(-1, 0.5, 12).tolist(), (1, 3, 5, 7, 9, 15)
    generator = torch.Generator().manual_seed(3)
    fitted = PatchDenoiser.fit(data, heldout, levels, sizes, generator, padding="circular")
    noise = torch.randn(heldout.shape, generator=torch.Generator().manual_seed(3), dtype=F64)
    chosen = fitted.patch_sizes.tolist()
    for sigma, size in zip(levels, chosen, strict=True):
        x = heldout + sigma * noise
        errors = {k: (PatchDenoiser(data, k, padding="circular")(x, sigma) - heldout).norm() for k in sizes}
        assert errors[size] == min(errors.values()), (sigma, errors)
    assert fitted.padding == "circular"
    assert chosen[0] < chosen[-1], "larger patches at higher noise"


# All local denoisers ------------------------------------------------------------------------------

LOCAL = ("LS", "ELS", "ELS circular", "PCA")
local = pytest.mark.parametrize("name", LOCAL)


def tiny(images: Tensor) -> Tensor:
    """Two overlapping cuts of each digit, as channels."""
    return torch.cat([images[..., 2:6, 1:6], images[..., 3:7, 2:7]], 1)


def tiny_noised(sigma: float, count: int, dtype: torch.dtype = F64) -> Tensor:
    return (tiny(held_out_digits()[:count]) + sigma * randn(count, *TINY, seed=1)).to(dtype)


def make(name: str, data: Tensor, **arguments: Any) -> Any:
    if name == "PCA":
        gaussian = GaussianDenoiser.fit(tiny(train_digits())).to(data.dtype)
        return PCALocalDenoiser(data, gaussian, threshold=0.1, **arguments)
    padding = "circular" if "circular" in name else "zeros"
    return PatchDenoiser(data, (1, 3), (0.05, 5.0), "ELS" in name, padding, **arguments)


def training(count: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    return tiny(train_digits(dtype)[:count]), digits()[1][split()[0]][:count]


@local
@sigmas
def test_float32_equals_float64(name: str, sigma: float) -> None:
    single = make(name, training(30, F32)[0])
    double, x = copy.deepcopy(single).double(), tiny_noised(sigma, 4, F32)
    for quantity in ("forward", "score"):
        actual = getattr(single, quantity)(x, sigma)
        assert actual.dtype == F32
        assert relative_error(actual, getattr(double, quantity)(x.double(), sigma)) < 1e-5, quantity


@local
@pytest.mark.parametrize("max_numel", [1, 300, 5000])
def test_order_and_chunks_are_immaterial(name: str, max_numel: int) -> None:
    data, labels = training(15)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(0))
    whole = make(name, data, class_labels=labels % 2)
    chunked = make(name, data[order], class_labels=labels[order] % 2, max_numel=max_numel)
    x, levels, classes = tiny_noised(0.5, 3), torch.logspace(-1, 1, 3), torch.arange(3) % 2
    for arguments in ((x, 0.05), (x, levels), (x, 0.5, classes), (x, levels, classes)):
        assert relative_error(chunked(*arguments), whole(*arguments)) < 1e-12


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, out.numel() if isinstance(out, Tensor) else 0)
        return out


@local
@pytest.mark.parametrize(("count", "batch"), [(1400, 5), (20, 300)])
def test_memory_does_not_grow_with_data_or_queries(name: str, count: int, batch: int) -> None:
    denoiser, x = make(name, training(count)[0], max_numel=2**15), tiny_noised(0.5, batch)
    for sigma in (0.5, torch.linspace(0.1, 1, batch)):
        with Largest() as largest:
            denoiser(x, sigma)
        assert largest.numel <= 2**15


@local
@pytest.mark.parametrize("max_numel", [500, 2**20])
def test_class_labels_restrict_the_data(name: str, max_numel: int) -> None:
    data, classes = training(40)
    both = make(name, data, class_labels=classes, max_numel=max_numel)
    x, labels = tiny_noised(0.5, 10), torch.arange(10)
    denoised = both(x, 0.5, labels)
    for k in range(10):
        alone = make(name, data[classes == k])(x[k], 0.5)
        assert relative_error(denoised[k], alone) < 1e-12, f"class {k}"
    assert both(x, 0.5, torch.eye(10)).equal(denoised), "one-hot"
    assert relative_error(both(x, 0.5), denoised) > 1e-2
    unlabelled = make(name, data)
    assert unlabelled(x, 0.5, labels).equal(unlabelled(x, 0.5)), "ignored"
    with pytest.raises(ValueError, match=r"expected class_labels among .*, got \[11\]"):
        both(x[0], 0.5, torch.tensor(11))


@local
def test_far_queries_at_low_noise_are_averages_of_the_data(name: str) -> None:
    denoiser = make(name, training(20, F32)[0], max_numel=2000)
    for distance in (1e2, 1e6):
        x = distance * randn(2, *TINY, dtype=F32)
        assert denoiser(x, 0.002).abs().max() <= 1
        assert denoiser.score(x, 0.002).isfinite().all()


@local
def test_a_large_common_mean_costs_no_digits(name: str) -> None:
    data, x = training(30)[0], tiny_noised(0.05, 4)
    shifted = make(name, data + 1e5)(x + 1e5, 0.05) - 1e5
    assert relative_error(shifted, make(name, data)(x, 0.05)) < 1e-8


@local
def test_sigma_and_batch_in_every_form(name: str) -> None:
    denoiser, x = make(name, training(20)[0]), tiny_noised(0.5, 6)
    expected = denoiser(x, 0.5)
    for sigma in (torch.tensor(0.5), torch.full((6,), 0.5), torch.full((6,), 0.5, dtype=F64)):
        assert relative_error(denoiser(x, sigma), expected) < 1e-13
    pairs, levels = x.reshape(2, 3, *TINY), torch.logspace(-1, 1, 6, dtype=F64)
    each = torch.stack([denoiser(x[i], levels[i]) for i in range(6)])
    assert relative_error(denoiser(x, levels), each) < 1e-12
    assert relative_error(denoiser(pairs, levels.reshape(2, 3)), each.reshape(pairs.shape)) < 1e-12
    scores = (each - x) / levels.reshape(6, 1, 1, 1) ** 2
    assert relative_error(denoiser.score(pairs, levels.reshape(2, 3)), scores.reshape(pairs.shape)) < 1e-12
    assert denoiser(x[:0], 0.5).shape == denoiser(x[:0], levels[:0]).shape == (0, *TINY)
    for sigma in (0.0, math.nan, torch.tensor([1.0, -1.0])):
        with pytest.raises(ValueError, match="expected sigma to be finite and > 0"):
            denoiser(x[:2], sigma)
    with pytest.raises(
        ValueError, match=rf"{type(denoiser).__name__}: expected x of shape \(\*batch, 2, 4, 5\)"
    ):
        denoiser(torch.zeros(2, 40), 1.0)


@pytest.mark.parametrize("name", ["LS", "PCA"])
def test_one_level_for_all_queries_makes_one_neighbourhood(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser, levels = make(name, training(20)[0], max_numel=1600), list[Tensor]()
    make_sum = denoiser._local_sum
    monkeypatch.setattr(denoiser, "_local_sum", lambda level: (levels.append(level), make_sum(level))[1])
    denoiser(tiny_noised(0.5, 6), torch.full((6,), 0.5))
    assert [level.shape for level in levels] == [()]


@local
def test_transforms(name: str) -> None:
    data, classes = training(20)
    denoiser, x = make(name, data, class_labels=classes % 3, max_numel=1000), tiny_noised(1.0, 3)
    levels, labels = torch.tensor([0.3, 1.0, 5.0], dtype=F64), torch.tensor([2, 0, 1])
    assert relative_error(torch.func.vmap(lambda x: denoiser(x, 1.0))(x), denoiser(x, 1.0)) < 1e-12
    mapped = torch.func.vmap(denoiser)(x, levels, labels)
    assert relative_error(mapped, denoiser(x, levels, labels)) < 1e-12
    u, v = randn(3, *TINY, seed=7), randn(3, *TINY, seed=8)
    forward = torch.func.jvp(lambda x: denoiser(x, levels, labels), (x,), (u,))[1]
    change = denoiser(x + 1e-5 * u, levels, labels) - denoiser(x - 1e-5 * u, levels, labels)
    torch.testing.assert_close(forward, change / 2e-5, rtol=1e-5, atol=1e-7)
    x = x.requires_grad_()
    (pulled,) = torch.autograd.grad((denoiser(x, levels, labels) * v).sum(), x)
    torch.testing.assert_close((pulled * u).sum(), (forward * v).sum(), rtol=1e-9, atol=1e-12)
    assert pulled.isfinite().all()


@pytest.mark.parametrize("name", ["LS", "PCA"])
def test_the_jacobian_is_local_and_its_diagonal_a_variance(name: str) -> None:
    (data, _), x, sigma = training(50), tiny_noised(0.6, 1)[0], 0.6
    denoiser = make(name, data)
    jacobian = torch.func.jacrev(lambda x: denoiser(x, sigma))(x).reshape(40, 40)
    if isinstance(denoiser, PCALocalDenoiser):
        seen = denoiser.neighbourhoods(torch.tensor(sigma, dtype=F64))
    else:
        pixels = torch.tensor(PIXELS)
        seen = ((pixels[:, None] - pixels).abs() <= 1).all(-1).repeat(2, 2)  # size 3, all channels
    assert (jacobian[~seen] == 0).all()
    assert jacobian[seen].count_nonzero() > 0.9 * seen.sum()
    flat = data.flatten(1)
    weights = ((x.flatten() - flat).square() @ seen.double().T / (-2 * sigma**2)).softmax(0)  # (N, D)
    variance = (weights * (flat - (weights * flat).sum(0)) ** 2).sum(0)
    torch.testing.assert_close(sigma**2 * jacobian.diagonal(), variance, rtol=1e-8, atol=1e-10)


@local
@dtypes
@pytest.mark.parametrize("labelled", [False, True])
def test_save_and_load(name: str, dtype: torch.dtype, labelled: bool, tmp_path: Path) -> None:
    data, labels = training(20, dtype)
    denoiser = make(name, data, max_numel=3000, class_labels=labels % 2 if labelled else None)
    denoiser.save_pretrained(tmp_path)
    loaded: Any = from_pretrained(tmp_path)
    assert type(loaded).__name__ == type(denoiser).__name__
    assert loaded.to_arguments() == denoiser.to_arguments()
    for key, tensor in denoiser.state_dict().items():
        assert loaded.state_dict()[key].equal(tensor), key
        assert loaded.state_dict()[key].dtype == tensor.dtype, key
    x, chosen = tiny_noised(0.5, 4, dtype), torch.tensor([0, 1, 1, 0])
    assert loaded(x, 0.5, chosen).equal(denoiser(x, 0.5, chosen))
    assert repr(loaded) == repr(denoiser)


# Bad input ----------------------------------------------------------------------------------------

IMAGES = torch.zeros(4, 1, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": torch.zeros(3, 3)}, r"images of shape \(N, C, H, W\), got \(3, 3\)"),
        ({"data": torch.zeros(0, 1, 3, 3)}, r"N >= 1, got \(0, 1, 3, 3\)"),
        ({"data": torch.full((1, 1, 3, 3), math.nan)}, "finite data, got NaN"),
        ({"class_labels": torch.zeros(3).long()}, r"each of 4 samples, got torch.int64 of shape \(3,\)"),
        ({"max_numel": 0}, "max_numel >= 1, got 0"),
        ({"sizes": 2}, r"odd patch sizes >= 1, got \[2\]"),
        ({"sizes": -1}, r"got \[-1\]"),
        ({"sizes": []}, "got 0 sizes and no sigmas"),
        ({"sizes": [1, 3]}, "got 2 sizes and no sigmas"),
        ({"sizes": [1, 3], "sigmas": [1.0]}, "got 2 sizes and 1 sigmas"),
        ({"sizes": [1, 3], "sigmas": [1.0, 0.0]}, r"finite sigmas > 0, got \[1.0, 0.0\]"),
        ({"sizes": [1], "sigmas": [math.inf]}, r"finite sigmas > 0, got \[inf\]"),
        ({"padding": "reflect"}, r"padding among \('zeros', 'circular'\), got 'reflect'"),
    ],
    ids=str,
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PatchDenoiser(**{"data": IMAGES, "sizes": 3, **arguments})
