"""The geometry of sampling trajectories: how flat they are, and how near to a rotation.

A trajectory is the states x at levels s_0 > s_1 > ... > s_n in EDM's coordinates; x_T stands for the first
state and x_0 for the last. In variance-preserving coordinates, x/sqrt(1 + s^2), it turns in the plane of x_T
and x_0 (Eq. 22, 103 of arXiv 2412.09726):

    x_t = alpha_t x_0 + sigma_t x_T + R_t        alpha_t = 1/sqrt(1 + s^2),  sigma_t = s alpha_t.

In EDM's this is the chord between both, x(s) = (1 - s/S) x_0 + (s/S) x_T + R(s) with S = s_0. It needs no
alpha_T = 0, and a trajectory may end at any e >= 0, if s/S becomes (s - e)/(S - e). For a Gaussian each
coefficient is convex in s, sqrt(s^2 + lam) c with c that of x_T - mu over sqrt(S^2 + lam). R has one sign in
each direction then, and

    |R_k(s)| <= min(s, sqrt(lam_k)) |c_k|,

the bound that `GaussianFlow.rotation_bound` has for |J| (Eq. 104). Ratios of lengths at one level are the
same in both coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gaussnet.denoisers import GaussianDenoiser
from gaussnet.flow import GaussianFlow
from gaussnet.numerics import expand_as_event, wide_dtype


@torch.no_grad()
def gaussian_states(gaussian: GaussianDenoiser, x: Tensor, levels: Tensor) -> Tensor:
    """The states of a Gaussian's trajectory in closed form (Eq. 15).

    Args:
        gaussian: of the data.
        x: states at levels[0], (B, *event_shape).
        levels: that decrease, (n,); the last may be 0.

    Returns:
        Tensor (n, B, *event_shape), float64.
    """
    flow, wide = GaussianFlow(gaussian), x.to(wide_dtype(x.device))
    start, *rest = levels.tolist()
    return torch.stack([wide, *(flow.state(wide, start, level) for level in rest)])


def variance_preserving(x: Tensor, levels: Tensor) -> Tensor:
    """The states of a trajectory in coordinates with alpha^2 + sigma^2 = 1: x/sqrt(1 + s^2), wide."""
    x = x.to(wide_dtype(x.device))
    return x * expand_as_event(torch.rsqrt(1 + levels.to(x) ** 2), x.ndim - 1)


def principal_shares(states: Tensor, counts: Sequence[int] = (2, 3)) -> Tensor:
    """How much of each trajectory's variance its first principal components have.

    Every state counts the same: the shares depend on how the grid spreads them.

    Args:
        states: (n, B, *event_shape).
        counts: numbers of components, >= 1.

    Returns:
        Tensor (B, len(counts)), float64, in [0, 1]; 1 for a trajectory that does not move.

    Raises:
        ValueError: if there are fewer than two states, or a count is below 1.

    Example:
        >>> principal_shares(torch.tensor([[[0.0, 0.0]], [[1.0, 1.0]], [[2.0, 2.0]]]), [1]).round(decimals=6)
        tensor([[1.]], dtype=torch.float64)
    """
    if len(states) < 2 or min(counts) < 1:
        raise ValueError(f"expected two states or more and counts >= 1, got {len(states)} and {counts}")
    paths = states.to(wide_dtype(states.device)).flatten(2).transpose(0, 1)  # (B, n, D)
    variances = torch.linalg.svdvals(paths - paths.mean(1, keepdim=True)) ** 2  # (B, min(n, D))
    total = variances.sum(1)
    shares = [variances[:, :count].sum(1) for count in counts]
    moves = total > 0
    return torch.stack([torch.where(moves, share / total.where(moves, 1), 1) for share in shares], 1)


def plane_coordinates(states: Tensor) -> tuple[Tensor, Tensor]:
    """Each trajectory in the plane of its first and last state (Fig. 5 B).

    Args:
        states: (n, B, *event_shape), such as of `variance_preserving`.

    Returns:
        The coordinates (n, B, 2) in an orthonormal basis whose first axis is x_T, and the share of each
        state's squared length outside of the plane (n, B), 0 for a state that is 0. Both float64.
    """
    paths = states.to(wide_dtype(states.device)).flatten(2)  # (n, B, D)
    first = torch.nn.functional.normalize(paths[0], dim=-1)
    across = paths[-1] - (paths[-1] * first).sum(-1, keepdim=True) * first
    second = torch.nn.functional.normalize(across, dim=-1)
    coordinates = torch.stack([(paths * first).sum(-1), (paths * second).sum(-1)], -1)
    inside = coordinates[..., :1] * first + coordinates[..., 1:] * second
    return coordinates, _share((paths - inside).square().sum(-1), paths.square().sum(-1))


def rotation_error(x: Tensor, levels: Tensor) -> Tensor:
    """What the rotation formula misses, ||R_t|| / ||x_t||, with the trajectory's own ends (Eq. 22, 103).

    Args:
        x: states in EDM's coordinates, (n, B, *event_shape).
        levels: theirs, (n,).

    Returns:
        Tensor (n, B), float64; 0 at both ends.

    Example:
        >>> gaussian, levels = GaussianDenoiser.isotropic(torch.zeros(1), 1.0), torch.tensor([80.0, 1.0, 0.0])
        >>> states = gaussian_states(gaussian, torch.tensor([[80.0]]), levels)
        >>> rotation_error(states, levels).flatten().round(decimals=2)
        tensor([0.0000, 0.4100, 0.0000], dtype=torch.float64)
    """
    x = x.to(wide_dtype(x.device))
    turned = ((levels - levels[-1]) / (levels[0] - levels[-1])).to(x)
    along = expand_as_event(turned, x.ndim - 1)
    missed = x - ((1 - along) * x[-1] + along * x[0])
    return _share(missed.flatten(2).norm(dim=-1), x.flatten(2).norm(dim=-1))


@torch.no_grad()
def rotation_bounds(gaussian: GaussianDenoiser, x: Tensor, levels: Tensor) -> Tensor:
    """The bound of the Gaussian theory on `rotation_error`: ||min(s, sqrt(lam_k)) c_k|| / ||x_t||.

    Args:
        gaussian: of the data.
        x: states in EDM's coordinates, (n, B, *event_shape), whose first begins the Gaussian's trajectory and
            whose lengths the bound is relative to.
        levels: theirs, (n,).

    Returns:
        Tensor (n, B), float64. A trajectory of the Gaussian has no larger error.

    Example:
        >>> gaussian, levels = GaussianDenoiser.isotropic(torch.zeros(1), 1.0), torch.tensor([80.0, 1.0, 0.0])
        >>> states = gaussian_states(gaussian, torch.tensor([[80.0]]), levels)
        >>> bool((rotation_error(states, levels) <= rotation_bounds(gaussian, states, levels)).all())
        True
    """
    x = x.to(wide_dtype(x.device))

    def remainder(level: float) -> Tensor:
        def bound(lam: Tensor, start: Tensor) -> Tensor:
            return lam.sqrt().clamp_max(level) / torch.sqrt(lam + start**2)

        return gaussian.filter(bound, x[0], float(levels[0])).flatten(1).norm(dim=-1)

    bounds = torch.stack([remainder(level) for level in levels.tolist()]).to(x)
    return _share(bounds, x.flatten(2).norm(dim=-1))


def trajectory_rows(
    gaussian: GaussianDenoiser, x: Tensor, levels: Tensor, names: Sequence[int]
) -> list[dict[str, Any]]:
    """All of the above as a table, beside the Gaussian's trajectories from the same first states.

    Args:
        gaussian: of the data.
        x: states in EDM's coordinates, (n, B, *event_shape).
        levels: theirs, (n,).
        names: B numbers for the trajectories, such as seeds.

    Returns:
        A row of the kind "geometry" for each trajectory: its principal shares pc2 and pc3, those of the
        Gaussian's, the largest rotation_error and rotation_bound, and whether it is within_bound at all
        levels. And one of the kind "state" for each of its states: both, gaussian_error, its coordinates
        along and across in the plane, its share outside, and its deviation from the Gaussian's trajectory,
        root mean square per dimension in variance-preserving coordinates.
    """
    exact = gaussian_states(gaussian, x[0], levels)
    turned, expected = variance_preserving(x, levels), variance_preserving(exact, levels)
    shares = torch.cat([principal_shares(turned), principal_shares(expected)], 1).tolist()
    plane, outside = plane_coordinates(turned)
    state = {
        "rotation_error": rotation_error(x, levels),
        "rotation_bound": rotation_bounds(gaussian, x, levels),
        "gaussian_error": rotation_error(exact, levels),
        "along": plane[..., 0],
        "across": plane[..., 1],
        "outside": outside,
        "deviation": (turned - expected).flatten(2).square().mean(-1).sqrt(),
    }
    error, bound = state["rotation_error"], state["rotation_bound"]
    columns = ("pc2", "pc3", "gaussian_pc2", "gaussian_pc3", "rotation_error", "rotation_bound")
    largest = torch.stack([error.amax(0), bound.amax(0)], 1).tolist()
    within = (error <= bound).all(0).tolist()
    rows: list[dict[str, Any]] = [
        {
            "kind": "geometry",
            "seed": name,
            **dict(zip(columns, [*share, *most], strict=True)),
            "within_bound": ok,
        }
        for name, share, most, ok in zip(names, shares, largest, within, strict=True)
    ]
    table = torch.stack(list(state.values()), -1).tolist()
    for sigma, line in zip(levels.tolist(), table, strict=True):
        rows += [
            {"kind": "state", "seed": name, "sigma": sigma, **dict(zip(state, values, strict=True))}
            for name, values in zip(names, line, strict=True)
        ]
    return rows


@torch.no_grad()
def scheduler_states(
    predict: Callable[[Tensor, Tensor], Tensor], scheduler: Any, x: Tensor, timesteps: Tensor
) -> Tensor:
    """The states that a scheduler of diffusers goes through, in its own coordinates.

    Args:
        predict: what the network says of a scaled state (B, ...) at a timestep.
        scheduler: whose timesteps are set, and which is at the first of these.
        x: the first state, (B, *event_shape).
        timesteps: (n,).

    Returns:
        Tensor (n + 1, B, *event_shape).
    """
    states = [x]
    for t in timesteps:
        output = predict(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(output, t, x).prev_sample
        states.append(x)
    return torch.stack(states)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(part == 0, part, part / whole)
