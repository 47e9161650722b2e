"""Probes: how much of one denoiser another explains."""

from typing import Any

import pytest
import torch
from cases import EVENT, denoiser, randn, tiny_unet, train_digits
from torch import Tensor

from gaussnet import BypassPrecond, GaussianDenoiser, ScoreProbe, unexplained_variance
from gaussnet.probes import PAPER_SIGMAS

SIGMAS = (0.1, 1.0, 10.0)


def probe(references: dict[str, Any], data: Tensor, seed: int = 0, **arguments: Any) -> ScoreProbe:
    return ScoreProbe(
        references, data, generator=torch.Generator().manual_seed(seed), **{"sigmas": SIGMAS, **arguments}
    )


def test_unexplained_variance_by_hand() -> None:
    target = torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]], [[2.0, 2.0]], [[1.0, 1.0]]])
    approx = torch.tensor([[[3.0, 0.0]], [[1.0, 0.0]], [[0.0, 0.0]], [[-1.0, -1.0]]])
    assert unexplained_variance(target, approx).tolist() == pytest.approx([16 / 25, 0.0, 1.0, 4.0])


def test_unexplained_variance_is_uncentred_and_scale_free() -> None:
    target, approx = randn(5, 1, 4, 4) + 3, randn(5, 1, 4, 4, seed=1) + 3
    shares = unexplained_variance(target, approx)
    torch.testing.assert_close(unexplained_variance(7 * target, 7 * approx), shares)
    expected = (target - approx).pow(2).sum((1, 2, 3)) / target.pow(2).sum((1, 2, 3))
    torch.testing.assert_close(shares, expected)


def test_unexplained_variance_of_two_shapes() -> None:
    with pytest.raises(ValueError, match=r"one shape, got \(2, 3\) and \(2, 4\)"):
        unexplained_variance(torch.ones(2, 3), torch.ones(2, 4))


def test_a_reference_explains_itself() -> None:
    references = {name: denoiser(name) for name in ("isotropic", "gaussian-full", "mixture-kmeans")}
    for name, model in references.items():
        rows = probe(references, train_digits()[:8])(model)
        own = [row["mean"] for row in rows if row["reference"] == name]
        others = [row["mean"] for row in rows if row["reference"] != name]
        assert own == [0.0] * (2 * len(SIGMAS)), name
        assert min(others) > 0, name


def test_rows_are_complete() -> None:
    references = {"iso": denoiser("isotropic"), "full": denoiser("gaussian-full")}
    rows = probe(references, train_digits()[:8])(denoiser("delta"))
    assert all(set(row) == {"sigma", "reference", "quantity", "mean", "std", "queries"} for row in rows)
    keys = [(row["sigma"], row["reference"], row["quantity"]) for row in rows]
    expected = {(s, r, q) for s in SIGMAS for r in references for q in ("score", "denoiser")}
    assert set(keys) == expected
    assert len(keys) == len(expected)
    assert {row["queries"] for row in rows} == {8}


@pytest.mark.parametrize("quantity", ["score", "denoiser"])
def test_two_isotropic_gaussians_in_closed_form(quantity: str) -> None:
    # Of N(0, v I): score = -x / (v + s^2), D = v x / (v + s^2); the share does not depend on x.
    a, b = 0.3, 1.7
    model, reference = (GaussianDenoiser.isotropic(torch.zeros(EVENT).double(), v) for v in (a, b))
    for row in probe({"b": reference}, train_digits()[:8])(model):
        noise = row["sigma"] ** 2
        ratio = (a + noise) / (b + noise) * (1.0 if row["quantity"] == "score" else b / a)
        if row["quantity"] == quantity:
            assert row["mean"] == pytest.approx((1 - ratio) ** 2, rel=1e-9), row["sigma"]
            assert row["std"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("quantity", ["score", "denoiser"])
def test_mean_and_spread_over_queries(quantity: str) -> None:
    p = probe({"full": denoiser("gaussian-full")}, train_digits()[:8])
    model = denoiser("mixture-kmeans")
    for row in p(model):
        if row["quantity"] == quantity:
            x, sigma = p.queries[row["sigma"]], row["sigma"]
            method = "score" if quantity == "score" else "forward"
            pair = [getattr(d, method)(x, sigma) for d in (model, denoiser("gaussian-full"))]
            shares = unexplained_variance(*pair)
            assert row["mean"] == pytest.approx(float(shares.mean()), rel=1e-8), sigma
            assert row["std"] == pytest.approx(float(shares.std(correction=0)), rel=1e-6), sigma


def test_query_noise_is_reproducible_and_one_draw_for_all_levels() -> None:
    data = train_digits()[:8]
    probes = [probe({"iso": denoiser("isotropic")}, data, seed) for seed in (0, 0, 1)]
    for sigma in SIGMAS:
        assert probes[0].queries[sigma].equal(probes[1].queries[sigma])
        assert not probes[0].queries[sigma].equal(probes[2].queries[sigma])
        noise = (probes[0].queries[sigma] - data) / sigma
        torch.testing.assert_close(noise, (probes[0].queries[1.0] - data), rtol=0, atol=1e-12)
    assert probes[0](denoiser("delta")) == probes[1](denoiser("delta"))


def test_zeros_make_the_queries_noise() -> None:
    p = probe({"iso": denoiser("isotropic")}, torch.zeros(500, *EVENT).double())
    for sigma in SIGMAS:
        x = p.queries[sigma] / sigma
        assert abs(float(x.mean())) < 4 / x.numel() ** 0.5
        assert abs(float(x.var()) - 1) < 4 * (2 / x.numel()) ** 0.5


def test_the_default_levels_are_the_papers() -> None:
    p = ScoreProbe({"iso": denoiser("isotropic")}, train_digits()[:2])
    assert p.sigmas == PAPER_SIGMAS == tuple(sorted(PAPER_SIGMAS))
    assert (len(PAPER_SIGMAS), PAPER_SIGMAS[0], PAPER_SIGMAS[-1]) == (16, 0.01, 80.0)


def test_one_evaluation_a_level_and_no_graph() -> None:
    model = BypassPrecond(tiny_unet(in_channels=2), denoiser("gaussian-full", torch.float32))
    p = probe({"full": model.gaussian, "iso": denoiser("isotropic")}, train_digits(torch.float32)[:4])
    graphs: list[bool] = []
    hook: Any = lambda module, args, out: graphs.append(out.requires_grad)  # noqa: E731
    model.register_forward_hook(hook)
    p(model)
    assert graphs == [False] * len(SIGMAS)


@pytest.mark.parametrize(
    ("references", "count", "message"),
    [({}, 2, "references and queries, got 0 and 2"), ({"a": None}, 0, "references and queries, got 1 and 0")],
)
def test_impossible_probes(references: dict[str, Any], count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScoreProbe(references, torch.zeros(count, *EVENT))
