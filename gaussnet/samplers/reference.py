"""An adaptive reference solution of the probability-flow ODE, by scipy."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from gaussnet.samplers.schedules import check_sigmas
from gaussnet.samplers.stepping import Callback, report, start


@torch.no_grad()
def dop853(
    denoiser: nn.Module,
    x: Tensor,
    sigmas: Tensor,
    *,
    class_labels: Tensor | None = None,
    callback: Callback | None = None,
    dtype: torch.dtype | None = None,
    rtol: float = 1e-6,
    atol: float = 1e-6,
) -> Tensor:
    """Dormand and Prince's method of order 8 with adaptive steps in log sigma, from sigmas[0] to sigmas[-2].

    The NFE is whatever the tolerances take; steps are those of the whole batch, with the state on the host in
    float64. The levels between only say where the callback is called, at one more evaluation each, and three
    for each of the method's steps that they lie in. Then comes the step to 0, as in every solver.

    Reference: Hairer, Norsett and Wanner 1993, Solving Ordinary Differential Equations I, as in
    `scipy.integrate.solve_ivp`.

    Args:
        denoiser: any denoiser.
        x: state at sigmas[0], (B, *event_shape).
        sigmas: decreasing levels that end in 0, shape (n + 1,).
        class_labels: handed to the denoiser, integers (B,) or one-hot rows (B, classes).
        callback: called at every level above 0.
        dtype: of the result; default: that of x, in which the denoiser is called.
        rtol: tolerance of a step's error relative to the state.
        atol: tolerance of a step's error in the units of x.

    Returns:
        The state at 0, of the shape of x.

    Raises:
        ValueError: if the grid does not decrease to 0.
        RuntimeError: if the tolerances cannot be met.

    Example:
        >>> from gaussnet import GaussianDenoiser, karras_sigmas
        >>> gaussian, x = GaussianDenoiser.isotropic(torch.zeros(1), 1.0), torch.tensor([[80.0]])
        >>> abs(dop853(gaussian, x, karras_sigmas(2)) - gaussian.flow(x, 80.0, 0.0)).item() < 1e-5
        True
    """
    levels = check_sigmas(sigmas)[:-1]
    x, denoise = start(denoiser, x, class_labels, dtype)

    def as_state(flat: np.ndarray) -> Tensor:
        return torch.from_numpy(flat).reshape(x.shape).to(x)

    from scipy.integrate import solve_ivp  # here: SciPy takes long to import

    def slope(time: float, flat: np.ndarray) -> np.ndarray:
        state = as_state(flat)
        return (denoise(state, math.exp(-time)) - state).cpu().double().numpy().ravel()

    states = [x]
    if len(levels) > 1:
        times = [-math.log(sigma) for sigma in levels]
        flat = x.cpu().double().numpy().ravel()
        solution = solve_ivp(
            slope,
            (times[0], times[-1]),
            flat,
            method="DOP853",
            t_eval=times if callback is not None else times[-1:],
            rtol=rtol,
            atol=atol,
        )
        if not solution.success:
            raise RuntimeError(
                f"expected a solution to rtol={rtol:g}, atol={atol:g}, got: {solution.message}"
            )
        states = [as_state(np.ascontiguousarray(column)) for column in solution.y.T]
        states[0] = x if callback is not None else states[0]
    for i, (sigma, state) in enumerate(zip(levels, states, strict=False)):
        if callback is not None:
            report(callback, state, i, sigma, denoise(state, sigma))
    return denoise(states[-1], levels[-1])
