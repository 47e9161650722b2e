"""Probes: how much of one denoiser another explains, at which queries, in how many processes."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from cases import DTYPES, EVENT, denoiser, digits, randn, split, tiny_unet, train_digits
from torch import Tensor, nn

from gaussnet import BypassPrecond, EDMPrecond, GaussianDenoiser, ScoreProbe, unexplained_variance
from gaussnet.probes import KINDS, PAPER_SIGMAS, QUANTITIES, log_spaced, minima

SIGMAS = (0.1, 1.0, 10.0)


class Scaled(nn.Module):
    """A denoiser whose score is another's, times a factor."""

    def __init__(self, inner: nn.Module, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, x: Tensor, sigma: float) -> Tensor:
        return x + self.factor * (self.inner(x, sigma) - x)


class Spy(nn.Module):
    """Records how it is called."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, []

    def forward(self, x: Tensor, sigma: float, class_labels: Tensor | None = None) -> Tensor:
        out = self.inner(x, sigma, class_labels)
        self.calls.append((x, sigma, class_labels, torch.is_grad_enabled(), out.requires_grad))
        return out


class Shrink(nn.Module):
    """D = factor x."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((1,), 0.5, device=device))

    def forward(self, x: Tensor, sigma: float, class_labels: Tensor | None = None) -> Tensor:
        return self.factor * x


def probe(references: dict[str, Any], data: Tensor, seed: int = 0, **arguments: Any) -> ScoreProbe:
    return ScoreProbe(
        references, data, generator=torch.Generator().manual_seed(seed), **{"sigmas": SIGMAS, **arguments}
    )


def pick(rows: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    chosen = [row for row in rows if wanted.items() <= row.items()]
    assert chosen, f"no row of {wanted}"
    return chosen


def test_unexplained_variance_by_hand() -> None:
    target = torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]], [[2.0, 2.0]], [[1.0, 1.0]]])
    approx = torch.tensor([[[3.0, 0.0]], [[1.0, 0.0]], [[0.0, 0.0]], [[-1.0, -1.0]]])
    assert unexplained_variance(target, approx).tolist() == pytest.approx([16 / 25, 0.0, 1.0, 4.0])


def test_unexplained_variance_of_nothing() -> None:
    target, approx = torch.zeros(2, 3), torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert unexplained_variance(target, approx).tolist() == [0.0, math.inf]


def test_unexplained_variance_is_uncentred_and_scale_free() -> None:
    target, approx = randn(5, 1, 4, 4) + 3, randn(5, 1, 4, 4, seed=1) + 3
    shares = unexplained_variance(target, approx)
    torch.testing.assert_close(unexplained_variance(7 * target, 7 * approx), shares)
    expected = (target - approx).pow(2).sum((1, 2, 3)) / target.pow(2).sum((1, 2, 3))
    torch.testing.assert_close(shares, expected)


def test_unexplained_variance_of_two_shapes() -> None:
    with pytest.raises(ValueError, match=r"one shape, got \(2, 3\) and \(2, 4\)"):
        unexplained_variance(torch.ones(2, 3), torch.ones(2, 4))


def test_a_reference_explains_itself_both_ways() -> None:
    references = {name: denoiser(name) for name in ("isotropic", "gaussian-full", "mixture-kmeans")}
    p = probe(references, train_digits()[:8])
    for name, model in references.items():
        rows = p(model)
        own = pick(rows, reference=name)
        assert len(own) == 4 * len(SIGMAS)
        assert {row[key] for row in own for key in ("mean", "std", "mean_reverse", "std_reverse")} == {0.0}
        others = [row for row in rows if row["reference"] != name]
        assert min(row[key] for row in others for key in ("mean", "mean_reverse")) > 0, name


def test_rows_are_complete_and_in_order() -> None:
    references = {"iso": denoiser("isotropic"), "full": denoiser("gaussian-full")}
    rows = probe(references, train_digits()[:8])(denoiser("delta"))
    columns = ["sigma", "queries", "reference", "quantity", "mean", "std", "mean_reverse", "std_reverse"]
    assert all(list(row) == [*columns, "count"] for row in rows)
    keys = [(row["sigma"], row["queries"], row["reference"], row["quantity"]) for row in rows]
    assert keys == [(s, k, r, q) for s in SIGMAS for k in KINDS for r in references for q in QUANTITIES]
    assert {row["count"] for row in rows} == {8}


@pytest.mark.parametrize("factor", [2.0, 0.5, -1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_multiple_of_a_score(factor: float, dtype: torch.dtype) -> None:
    full = denoiser("gaussian-full", dtype)
    rows = probe({"full": full}, train_digits(dtype)[:8])(Scaled(full, factor))
    for row in pick(rows, quantity="score"):
        assert row["mean"] == pytest.approx((1 - 1 / factor) ** 2, rel=1e-5), row
        assert row["mean_reverse"] == pytest.approx((factor - 1) ** 2, rel=1e-5), row
        assert max(row["std"], row["std_reverse"]) < 1e-4, row


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_two_isotropic_gaussians_in_closed_form(quantity: str) -> None:
    # Of N(0, v I): score = -x / (v + s^2), D = v x / (v + s^2); the share does not depend on x.
    a, b = 0.3, 1.7
    model, reference = (GaussianDenoiser.isotropic(torch.zeros(EVENT).double(), v) for v in (a, b))
    for row in pick(probe({"b": reference}, train_digits()[:8])(model), quantity=quantity):
        noise = row["sigma"] ** 2
        ratio = (a + noise) / (b + noise) * (1.0 if quantity == "score" else b / a)
        assert row["mean"] == pytest.approx((1 - ratio) ** 2, rel=1e-9), row
        assert row["mean_reverse"] == pytest.approx((1 - 1 / ratio) ** 2, rel=1e-9), row
        assert max(row["std"], row["std_reverse"]) < 1e-12, row


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("sigma", SIGMAS)
def test_gaussian_against_isotropic_at_noise(sigma: float, quantity: str) -> None:
    # At x = sigma n, both quantities of a Gaussian of mean 0 scale n by f(lam) along each axis, and the
    # expectation is that of a ratio of two weighted sums of chi-squares.
    eigvals = torch.logspace(0.5, -2, EVENT[0] * EVENT[1] * EVENT[2], dtype=torch.float64)
    full = denoiser("gaussian-full")
    full.mean.zero_()
    full.covariance.eigvals.copy_(eigvals)
    mean_variance = eigvals.mean()
    isotropic = GaussianDenoiser.isotropic(torch.zeros(EVENT).double(), mean_variance)
    count = 4000
    data = torch.zeros(count, *EVENT).double()
    (row,) = pick(probe({"iso": isotropic}, data, kinds=("noise",), sigmas=(sigma,))(full), quantity=quantity)

    def gain(lam: Tensor) -> Tensor:
        return (1.0 if quantity == "score" else lam) / (lam + sigma**2)

    power = randn(100_000, len(eigvals), seed=5) ** 2
    residual = power @ (gain(eigvals) - gain(mean_variance)) ** 2
    for name, norm in (
        ("", power @ gain(eigvals) ** 2),
        ("_reverse", power.sum(1) * gain(mean_variance) ** 2),
    ):
        shares = residual / norm
        error = 5 * float(shares.std()) * (1 / count + 1 / len(power)) ** 0.5
        assert row[f"mean{name}"] == pytest.approx(float(shares.mean()), abs=error), f"{name} {sigma}"
        assert row[f"std{name}"] == pytest.approx(float(shares.std()), rel=0.1), f"{name} {sigma}"
    # The error allowed is far below the mean, or this would hold for anything.
    assert error < 0.1 * row["mean_reverse"]


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("kind", KINDS)
def test_mean_and_spread_over_queries(kind: str, quantity: str) -> None:
    p = probe({"full": denoiser("gaussian-full"), "iso": denoiser("isotropic")}, train_digits()[:8])
    model = denoiser("mixture-kmeans")
    for row in pick(p(model), reference="full", queries=kind, quantity=quantity):
        x, sigma = p.queries(row["sigma"])[KINDS.index(kind)], row["sigma"]
        method = "score" if quantity == "score" else "forward"
        pair = [getattr(d, method)(x, sigma) for d in (model, denoiser("gaussian-full"))]
        for name, shares in (
            ("", unexplained_variance(*pair)),
            ("_reverse", unexplained_variance(*reversed(pair))),
        ):
            assert row[f"mean{name}"] == pytest.approx(float(shares.mean()), rel=1e-8), sigma
            assert row[f"std{name}"] == pytest.approx(float(shares.std(correction=0)), rel=1e-6), sigma


def test_float32_keeps_its_digits_at_every_level() -> None:
    pairs = {
        dtype: (denoiser("gaussian-full", dtype), denoiser("gaussian-rank-10", dtype)) for dtype in DTYPES
    }
    data = train_digits(torch.float32)[:8]
    tables = []
    for dtype, (model, reference) in pairs.items():
        p = probe({"reference": reference}, data, sigmas=PAPER_SIGMAS)
        p._clean, p._noise = p._clean.to(dtype), p._noise.to(dtype)  # one draw for both
        p._answers = {s: [p._denoise(reference, s)] for s in PAPER_SIGMAS}
        tables.append(p.measure(model))
    wide, narrow = tables
    assert narrow.dtype == torch.float64
    assert bool((narrow - wide).abs().le(1e-3 * wide + 1e-9).all())
    # At sigma = 80 the scores differ by 1e-8 and less, which a difference of scores could not tell.
    assert 0 < float(wide[-1, ..., 0, 0, :].max()) < 1e-5


def test_queries_are_reproducible_and_one_draw_for_all_levels_and_kinds() -> None:
    data = train_digits()[:8]
    probes = [probe({"iso": denoiser("isotropic")}, data, seed) for seed in (0, 0, 1)]
    unit = torch.randn(data.shape, generator=torch.Generator().manual_seed(0), dtype=data.dtype)
    for sigma in SIGMAS:
        first, second, other = (p.queries(sigma) for p in probes)
        assert first.equal(second)
        assert not first.equal(other)
        torch.testing.assert_close(first, torch.stack([data + sigma * unit, sigma * unit]), rtol=0, atol=0)
    assert probes[0](denoiser("delta")) == probes[1](denoiser("delta"))
    for kind, expected in zip(KINDS, probes[0].queries(1.0), strict=True):
        alone = probe({"iso": denoiser("isotropic")}, data, kinds=(kind,))
        assert alone.queries(1.0).equal(expected[None]), kind


@pytest.mark.parametrize("world", [1, 2, 3])
def test_shares_are_one_process_together(world: int) -> None:
    data, classes = train_digits()[:12], digits()[1][split()[0]][:12]
    references = {name: denoiser(name) for name in ("isotropic", "mixture-classes", "delta")}
    whole = probe(references, data, class_labels=classes)
    parts = [
        probe(references, data, class_labels=classes, share=(rank, world), batch_size=5)
        for rank in range(world)
    ]
    for sigma in SIGMAS:
        assert torch.cat([p.queries(sigma) for p in parts], 1).equal(whole.queries(sigma)), sigma
    model = denoiser("delta-classes")
    expected = whole.measure(model)
    assert expected.shape == (len(SIGMAS), 2, 3, 2, 2, 12)
    values = torch.cat([p.measure(model) for p in parts], -1)
    torch.testing.assert_close(values, expected, rtol=1e-8, atol=1e-12)
    for row, one in zip(parts[-1].rows(values), whole(model), strict=True):
        names = [name for name, value in one.items() if isinstance(value, str)]
        assert all(row.pop(name) == one.pop(name) for name in names)
        assert row == pytest.approx(one, rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("one_hot", [False, True])
def test_labels_reach_model_and_references_with_their_queries(one_hot: bool) -> None:
    data, classes = train_digits()[:6], digits()[1][split()[0]][:6]
    labels = nn.functional.one_hot(classes, 10).double() if one_hot else classes
    labelled, plain = denoiser("mixture-classes"), denoiser("mixture-kmeans")
    model = Spy(labelled)
    p = probe({"classes": labelled, "plain": plain}, data, class_labels=labels)
    rows = p(model)
    assert {row["mean"] for row in pick(rows, reference="classes")} == {0.0}
    for x, sigma, got, _, _ in model.calls:
        assert got.equal(torch.cat([labels, labels])), sigma
        assert x.equal(p.queries(sigma).flatten(0, 1)), sigma
    # Without labels the same denoiser says something else, and is called without the argument.
    bare = Spy(labelled)
    values = probe({"classes": labelled}, data).measure(bare)
    assert all(call[2] is None for call in bare.calls)
    assert not torch.allclose(p.measure(plain)[:, :, :1], probe({"c": labelled}, data).measure(plain))
    assert float(values.max()) == 0.0


def test_one_evaluation_a_level_in_batches_without_a_graph() -> None:
    bypass = BypassPrecond(tiny_unet(in_channels=2), denoiser("gaussian-full", torch.float32))
    references = {"full": bypass.gaussian, "iso": denoiser("isotropic", torch.float32)}
    data = train_digits(torch.float32)[:4]
    tables = []
    for batch_size, lengths in ((None, [8]), (8, [8]), (3, [3, 3, 2])):
        model = Spy(bypass)
        spied = {"full": Spy(references["full"]), "iso": references["iso"]}
        p = probe(spied, data, batch_size=batch_size)
        tables.append(p.measure(model))
        for spy in (model, spied["full"]):
            assert [len(call[0]) for call in spy.calls] == lengths * len(SIGMAS)
            assert [call[1] for call in spy.calls] == [s for s in SIGMAS for _ in lengths]
            assert not any(grad or graph for *_, grad, graph in spy.calls)
    assert torch.is_grad_enabled()
    torch.testing.assert_close(tables[0], tables[2], rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_network_of_another_dtype_than_the_queries(dtype: torch.dtype) -> None:
    model = EDMPrecond(tiny_unet().to(dtype))
    model.train()
    values = probe({"full": denoiser("gaussian-full")}, train_digits()[:4]).measure(model)
    assert values.dtype == torch.float64
    assert bool(torch.isfinite(values).all())
    assert model.training, "the mode is the caller's affair"


def test_measures_on_the_device_of_the_model() -> None:
    # "meta" computes shapes only, but mixes with no other device.
    data, classes = train_digits()[:4], digits()[1][split()[0]][:4]
    p = probe({"full": denoiser("gaussian-full")}, data, class_labels=classes)
    model = Spy(Shrink("meta"))
    values = p.measure(model)
    assert {tensor.device.type for call in model.calls for tensor in (call[0], call[2])} == {"meta"}
    assert (values.device.type, values.shape) == ("meta", (len(SIGMAS), 2, 1, 2, 2, 4))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("store", [None, "cpu"])
def test_answers_are_kept_where_asked_for(store: str | None) -> None:
    data, classes = train_digits()[:6], digits()[1][split()[0]][:6]
    references = {name: denoiser(name).cuda() for name in ("isotropic", "mixture-classes", "delta")}
    model = denoiser("gaussian-full")
    expected = probe({k: denoiser(k) for k in references}, data, class_labels=classes).measure(model)
    p = probe(references, data.cuda(), class_labels=classes.cuda(), store=store)
    kept = [p.queries(SIGMAS[0]), *p._labels, *p._answers[SIGMAS[0]]]
    assert {tensor.device.type for tensor in kept} == {store or "cuda"}
    values = p.measure(model.cuda())
    assert values.is_cuda
    torch.testing.assert_close(values.cpu(), expected, rtol=1e-8, atol=1e-12)


def test_the_default_levels_are_the_papers() -> None:
    p = ScoreProbe({"iso": denoiser("isotropic")}, train_digits()[:2])
    assert p.sigmas == PAPER_SIGMAS == tuple(sorted(PAPER_SIGMAS))
    assert (len(PAPER_SIGMAS), PAPER_SIGMAS[0], PAPER_SIGMAS[-1]) == (16, 0.01, 80.0)
    assert p.kinds == KINDS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"references": {}}, "references and queries, got 0 and 6"),
        ({"data": torch.zeros(0, *EVENT)}, "references and queries, got 1 and 0"),
        ({"sigmas": ()}, "at least one noise level"),
        ({"kinds": "noise"}, "noised and noise, got 'noise'"),
        ({"kinds": ("noise", "data")}, "noised and noise, got"),
        ({"kinds": ()}, "noised and noise, got"),
        ({"kinds": ("noise", "noise")}, "noised and noise, got"),
        ({"share": (2, 2)}, r"0 <= rank < world, got \(2, 2\)"),
        ({"share": (-1, 2)}, r"0 <= rank < world, got \(-1, 2\)"),
        ({"share": (0, 4)}, "queries that 4 processes can share equally, got 6"),
        ({"share": (0, 2), "generator": None}, "a generator, of one seed in all 2 processes"),
        ({"class_labels": torch.zeros(5).long()}, "6 class_labels, one a query, got 5"),
        ({"batch_size": 0}, "batch_size >= 1, got 0"),
    ],
    ids=str,
)
def test_impossible_probes(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"references": {"iso": denoiser("isotropic")}, "data": train_digits()[:6]}
    arguments |= {"sigmas": SIGMAS, "generator": torch.Generator()}
    with pytest.raises(ValueError, match=message):
        ScoreProbe(**(arguments | changes))


@pytest.mark.parametrize("shape", [(3, 2, 1, 2, 2, 0), (3, 2, 1, 2, 4), (2, 3, 1, 2, 2, 4)], ids=str)
def test_values_of_another_probe(shape: tuple[int, ...]) -> None:
    p = probe({"iso": denoiser("isotropic")}, train_digits()[:4])
    with pytest.raises(ValueError, match=r"expected values of shape \(3, 2, 1, 2, 2, queries\), got"):
        p.rows(torch.zeros(shape))


@pytest.mark.parametrize(("steps", "times"), [(1, 1), (8, 3), (5000, 24), (20_000_000, 60), (100, 1)])
def test_log_spaced(steps: int, times: int) -> None:
    schedule = log_spaced(steps, times)
    assert schedule == sorted(set(schedule))
    assert (schedule[0], schedule[-1]) == (0, steps)
    assert all(isinstance(step, int) for step in schedule)
    assert len(schedule) <= times + 1
    # From where steps are far enough apart, each is the same multiple of the one before.
    factor = steps ** (1 / max(times - 1, 1))
    for early, late in pairwise(step for step in schedule if step > 50 / (factor - 1 + 1e-9)):
        assert late / early == pytest.approx(factor, rel=0.03)


@pytest.mark.parametrize(("steps", "times"), [(0, 3), (10, 0)])
def test_no_schedule(steps: int, times: int) -> None:
    with pytest.raises(ValueError, match=f"got {steps} and {times}"):
        log_spaced(steps, times)


def curve(means: dict[int, Any], **changes: Any) -> list[dict[str, Any]]:
    key = {"weights": "ema", "sigma": 0.5, "queries": "noised", "reference": "a", "quantity": "score"}
    return [{"step": step, **key, **changes, "mean": mean} for step, mean in means.items()]


@pytest.mark.parametrize("text", [False, True])
def test_minima_by_hand(text: bool) -> None:
    rows = [
        *curve({0: 3.0, 10: 0.2, 2: 0.1, 100: 0.3}),  # steps 10 and 2 in no order
        *curve({0: 3.0, 2: 0.1, 10: 0.1, 100: 0.104}, reference="b"),
        *curve({0: 3.0, 2: 0.2, 100: 0.1}, weights="raw"),
        *curve({0: 0.0, 2: 0.0, 100: 0.01}, sigma=10.0),
        *curve({0: 0.0, 100: 0.0}, sigma=80.0),
        *curve({0: 1.0, 100: 0.5}, queries="noise"),
        *curve({0: 0.5, 100: 1.0}, quantity="denoiser"),
    ]
    if text:
        rows = [{name: str(value) for name, value in row.items()} for row in reversed(rows)]
    table = minima(rows)
    names = ("weights", "sigma", "queries", "reference", "quantity")
    assert all(list(row) == [*names, "step", "minimum", "last_step", "last", "left"] for row in table)
    found = {
        tuple(row[name] for name in names): (row["step"], row["minimum"], row["last"], row["left"])
        for row in table
    }
    assert found == {
        ("ema", 0.5, "noised", "a", "score"): (2, 0.1, 0.3, True),
        ("ema", 0.5, "noised", "b", "score"): (2, 0.1, 0.104, False),
        ("raw", 0.5, "noised", "a", "score"): (100, 0.1, 0.1, False),
        ("ema", 10.0, "noised", "a", "score"): (0, 0.0, 0.01, True),
        ("ema", 80.0, "noised", "a", "score"): (0, 0.0, 0.0, False),
        ("ema", 0.5, "noise", "a", "score"): (100, 0.5, 0.5, False),
        ("ema", 0.5, "noised", "a", "denoiser"): (0, 0.5, 1.0, True),
    }
    assert {row["last_step"] for row in table} == {100}
    assert len(table) == len(found)


def test_minima_tolerance_and_nothing() -> None:
    rows = curve({0: 1.0, 1: 1.04})
    assert [minima(rows, tol)[0]["left"] for tol in (0.05, 0.03)] == [False, True]
    assert minima([]) == []


def test_minima_of_what_is_no_curve() -> None:
    with pytest.raises(ValueError, match="rows with step, queries, got weights, sigma, reference"):
        minima([{"weights": "ema", "sigma": 1, "reference": "a", "quantity": "score", "mean": 1}])
    with pytest.raises(ValueError, match="got nan at step 3"):
        minima(curve({2: 1.0, 3: math.nan}))
