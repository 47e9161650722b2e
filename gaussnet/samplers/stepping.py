"""What the solvers share: how they are called, how they call a denoiser, what they report.

Every solver is called as `solver(denoiser, x, sigmas, *, class_labels=None, callback=None, dtype=None)`: x is
the state at sigmas[0], the grid decreases and ends in 0, and the state at 0 is returned. This is the
convention of k-diffusion: its samplers and these can be exchanged, and take any denoiser, and what teleport
returns, as they are: `sample_lms(model, x, sigmas.to(x), extra_args={"class_labels": class_labels})`. (Some
promote x to the dtype of sigmas, and grids are float64 here.) Multistep solvers take `history` besides, and
stochastic ones `generator`.

Denoisers get one sigma per sample. `callback` receives a dict per step: x, i, sigma, sigma_hat (the level of
x), denoised. With `dtype` the state is kept, and returned, in that dtype (EDM samples in float64), while the
denoiser gets it in the dtype of the x that came in.

The step to 0 is the same in every solver: it ends on the denoised. It is the exact solution for a denoised
that no longer changes, and it needs no output at 0, where a network has none.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gaussnet.network_denoiser import NetworkDenoiser
from gaussnet.numerics import result_dtype

Callback = Callable[[dict[str, Any]], None]
Denoise = Callable[[Tensor, float], Tensor]
History = Sequence[tuple[float, Tensor, Tensor]]
"""What is known of the trajectory above sigmas[0]: (sigma, x, denoised) from high to low, newest last."""


class Solver(Protocol):
    """A function that takes the state at sigmas[0] to the state at 0.

    Example:
        >>> from gaussnet import GaussianDenoiser, karras_sigmas, teleport
        >>> def at_once(denoiser, x, sigmas, *, class_labels=None, callback=None, dtype=None):
        ...     return denoiser(x, sigmas[0], class_labels)  # to the mean of what x may be
        >>> gaussian = GaussianDenoiser.isotropic(torch.zeros(1), 1.0)
        >>> at_once(gaussian, *teleport(gaussian, torch.tensor([[80.0]]), karras_sigmas(18), sigma_skip=1.0))
        tensor([[0.7071]])
    """

    def __call__(
        self,
        denoiser: nn.Module,
        x: Tensor,
        sigmas: Tensor,
        *,
        class_labels: Tensor | None = None,
        callback: Callback | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Integrates the probability flow from one level to the next, down to 0.

        Args:
            denoiser: any denoiser.
            x: state at sigmas[0], (B, *event_shape).
            sigmas: decreasing levels that end in 0, shape (n + 1,).
            class_labels: handed to the denoiser, integers (B,) or one-hot rows (B, classes).
            callback: called with a dict at each step: x, i, sigma, sigma_hat, denoised.
            dtype: in which the state is kept and returned; default: that of x.

        Returns:
            The state at 0, of the shape of x.

        Raises:
            ValueError: if the grid does not decrease to 0.
        """
        ...


def start(
    denoiser: nn.Module, x: Tensor, class_labels: Tensor | None, dtype: torch.dtype | None
) -> tuple[Tensor, Denoise]:
    """The state in the dtype in which it is kept, and the denoiser as a function of a state and a level."""
    own = x.dtype

    def denoise(x: Tensor, sigma: float) -> Tensor:
        if dtype is not None:
            x = x.to(own)
        denoised = evaluate(denoiser, x, sigma, class_labels)
        return denoised if dtype is None else denoised.to(dtype)

    return x if dtype is None else x.to(dtype), denoise


def evaluate(denoiser: nn.Module, x: Tensor, sigma: float, class_labels: Tensor | None = None) -> Tensor:
    """The denoiser at one level; it gets class labels only where there are some."""
    level = level_of(x, sigma)
    return denoiser(x, level) if class_labels is None else denoiser(x, level, class_labels=class_labels)


def level_of(x: Tensor, sigma: float) -> Tensor:
    """A level for each sample of x, (B,), in its dtype, but at least float32."""
    return torch.full(x.shape[:1], sigma, dtype=result_dtype(x), device=x.device)


def report(
    callback: Callback | None,
    x: Tensor,
    i: int,
    sigma: float,
    denoised: Tensor,
    sigma_hat: float | None = None,
) -> None:
    """Calls back, if anyone listens. `sigma_hat` is the level of x where that is not sigma."""
    if callback is not None:
        level = sigma if sigma_hat is None else sigma_hat
        callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": level, "denoised": denoised})


@contextmanager
def count_nfe(denoiser: nn.Module) -> Generator[Callable[[], int]]:
    """Counts the evaluations of a denoiser; of one that holds a network, those of the network.

    A model whose gate is closed therefore counts for nothing.

    Args:
        denoiser: whose forward calls are counted: the network's, where it has one in `model`.

    Yields:
        A function that tells the number of calls so far.

    Example:
        >>> from gaussnet import GaussianDenoiser, heun, karras_sigmas
        >>> gaussian = GaussianDenoiser.isotropic(torch.zeros(1, 2, 2), 1.0)
        >>> with count_nfe(gaussian) as nfe:
        ...     x = heun(gaussian, 80 * torch.randn(1, 1, 2, 2), karras_sigmas(18))
        >>> nfe()
        35
    """
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    counted = denoiser.model if isinstance(denoiser, NetworkDenoiser) else denoiser
    handle = counted.register_forward_pre_hook(count)
    try:
        yield lambda: calls
    finally:
        handle.remove()
