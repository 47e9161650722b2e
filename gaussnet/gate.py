"""The gate: how much of the Gaussian's error a network can remove, at each noise level, from data alone.

The Gaussian denoiser errs by e(s)^2 per dimension. Part of this is noise that nobody can remove: the
posterior variance of the data. By the Pythagorean identity of conditional means, what is left is

    E||D_delta(x, s) - D_gauss(x, s)||^2 / D  =  e(s)^2 - (Bayes error of the data),

with D_delta the exact denoiser of the data set. The gate is the square root of its share,

    g(s)^2 = E||D_delta - D_gauss||^2 / (D e(s)^2)   in [0, 1].

A network whose output is multiplied by g is silent where there is nothing to learn: at high noise g vanishes,
the model is exactly Gaussian, and teleporting down to there is free. A mixture in the Gaussian's place has no
closed e(s): its error is measured on the same samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gaussnet.denoisers import DeltaDenoiser, Denoiser, GaussianDenoiser
from gaussnet.fit.streams import Data, check_mirror, subsample
from gaussnet.hub import register
from gaussnet.tables import LevelTable

SIGMAS: list[float] = torch.logspace(-1.3, 2, 25, dtype=torch.float64).tolist()


@register
class Gate(LevelTable):
    """A table of g over log sigma, interpolated linearly and constant beyond its ends.

    Args:
        sigmas: increasing noise levels, shape (n,), n >= 2.
        values: g at these levels, within [0, 1], shape (n,).

    Raises:
        TypeError: if the values are not floating-point.
        ValueError: if the table is malformed.

    Example:
        >>> gate = Gate(torch.tensor([1.0, 100.0]), torch.tensor([1.0, 0.0]))
        >>> gate(10.0), round(gate.closes(0.25), 2)  # linear in log sigma
        (tensor(0.5000), 31.62)
    """

    def __init__(self, sigmas: Tensor, values: Tensor) -> None:
        super().__init__(sigmas, values)
        if values.ndim != 1:
            raise ValueError(f"expected gate values of shape (n,), got {tuple(values.shape)}")
        if not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError(f"expected gate values within [0, 1], got {values.tolist()}")

    @classmethod
    def fit(
        cls,
        gaussian: Denoiser,
        data: Data,
        sigmas: Sequence[float] | Tensor | None = None,
        n_queries: int = 1024,
        generator: torch.Generator | None = None,
        *,
        labels: Tensor | None = None,
        max_data: int = 65_536,
        mirror: bool = False,
    ) -> Gate:
        """Measures the gate on noised data.

        Args:
            gaussian: the base that the network corrects: a Gaussian, or a mixture.
            data: the training set, (N, *event_shape), or an iterable of batches.
            sigmas: increasing noise levels of the table; default: 25 from 0.05 to 100, evenly in log.
            n_queries: data points noised at each level, at most N.
            generator: draws the points and the noise.
            labels: integer classes (N,), for a model with classes: the denoisers then see them, too.
            max_data: where there are more samples, this many stand for them. Memory is that of these.
            mirror: also of the data's mirror images, left to right, as the Gaussian.

        Returns:
            The gate, on the device of `gaussian`.

        Raises:
            TypeError: if the data are neither an array nor an iterable of batches.
            ValueError: if they do not fit the Gaussian.
        """
        buffer = next(gaussian.buffers())
        levels = torch.as_tensor(SIGMAS if sigmas is None else sigmas, dtype=torch.float64, device="cpu")
        found = measure_gate(
            gaussian,
            data,
            levels.tolist(),
            n_queries,
            generator,
            labels=labels,
            max_data=max_data,
            mirror=mirror,
        )
        # The share falls with the noise; sampling error must not make it rise again.
        values = torch.tensor(found, dtype=torch.float64).cummin(0).values
        return cls(levels.to(buffer), values.to(buffer))

    @classmethod
    def step(cls, sigma: float) -> Gate:
        """1 up to sigma, 0 above.

        Args:
            sigma: the level, > 0.

        Raises:
            ValueError: if it is not positive and finite.
        """
        return cls(torch.tensor([sigma, sigma * (1 + 1e-5)]), torch.tensor([1.0, 0.0]))

    def cut(self, sigma: float) -> Gate:
        """The same up to sigma, 0 above.

        Args:
            sigma: the level, > 0.

        Raises:
            ValueError: if it is not positive and finite.
        """
        sigmas = torch.exp(self.log_sigma)
        low = sigmas < sigma * (1 - 1e-5)
        top = self(sigma)[None]
        ends = sigmas.new_tensor([sigma, sigma * (1 + 1e-5)])
        return Gate(torch.cat([sigmas[low], ends]), torch.cat([self.values[low], top, torch.zeros_like(top)]))

    def closes(self, tol: float) -> float:
        """The level above which g stays below `tol`; inf if it does not, 0 if it is there everywhere."""
        open_at = (self.values >= tol).nonzero().flatten()
        if len(open_at) == 0:
            return 0.0
        last = int(open_at[-1])
        if last == len(self.values) - 1:
            return math.inf
        (x0, x1), (y0, y1) = (
            pair[last : last + 2].double().tolist() for pair in (self.log_sigma, self.values)
        )
        return math.exp(x0 + (x1 - x0) * (y0 - tol) / (y0 - y1))


@torch.no_grad()
def measure_gate(
    gaussian: Denoiser,
    data: Data,
    sigmas: Sequence[float],
    n_queries: int = 1024,
    generator: torch.Generator | None = None,
    *,
    labels: Tensor | None = None,
    max_data: int = 65_536,
    mirror: bool = False,
) -> list[float]:
    """The values of a gate at some levels, each as measured; arguments and errors as of `Gate.fit`."""
    device = next(gaussian.buffers()).device
    drawn, classes = subsample(data, max_data, labels, generator)
    drawn = drawn.to(device)
    if drawn.shape[1:] != gaussian.event_shape:
        expected = ", ".join(map(str, gaussian.event_shape))
        raise ValueError(f"expected data of shape (N, {expected}), got {tuple(drawn.shape)}")
    if mirror:
        check_mirror(drawn.shape[1:])
        drawn = torch.cat([drawn, drawn.flip(-1)])
        classes = None if classes is None else classes.repeat(2)
    source = torch.device("cpu") if generator is None else generator.device
    picked = torch.randperm(len(drawn), generator=generator, device=source)[:n_queries].to(device)
    clean = drawn[picked]
    clean = clean.to(torch.promote_types(clean.dtype, torch.float32))  # half precision would round the noise
    noise = torch.randn(clean.shape, generator=generator, device=source).to(clean)
    if classes is not None:
        classes = classes.to(device)
    delta, own = DeltaDenoiser(drawn, classes), None if classes is None else classes[picked]
    values: list[float] = []
    for sigma in sigmas:
        x = clean + sigma * noise
        denoised = gaussian(x, sigma, own)
        gain = (delta(x, sigma, own) - denoised).square().mean()
        measured = (denoised - clean).square().mean()
        error = gaussian.bayes_error(sigma) if isinstance(gaussian, GaussianDenoiser) else measured
        values.append(min(1.0, math.sqrt(float(gain / error))))
    return values


def find_sigma_gate(
    model: Denoiser,
    gaussian: GaussianDenoiser,
    tol: float = 0.1,
    n_queries: int = 64,
    generator: torch.Generator | None = None,
) -> float:
    """The lowest noise level above which a model is its Gaussian, as measured on the model alone.

    Args:
        model: any denoiser.
        gaussian: with the moments of the model's data.
        tol: the two may differ, in mean square over draws of N(mu, Sigma + sigma^2 I), by less than
            (tol e(sigma))^2, with e(sigma) the Gaussian's own error.
        n_queries: number of draws at each of 31 levels from 0.5 to 80.
        generator: draws them, on the Gaussian's device.

    Returns:
        The level, one of 31 from 0.5 to 80 that are even in log.

    Raises:
        ValueError: if they differ by more at the highest level, too.

    Example:
        >>> data = torch.tensor([[-1.0], [1.0]])  # two points: from afar, and only from there, a Gaussian
        >>> gaussian = GaussianDenoiser.fit(data, shrinkage="none")
        >>> generator = torch.Generator().manual_seed(0)
        >>> round(find_sigma_gate(DeltaDenoiser(data), gaussian, generator=generator), 1)
        1.9
    """
    lowest = ratio = math.inf
    with torch.no_grad():
        for sigma in torch.logspace(math.log10(80), math.log10(0.5), 31, dtype=torch.float64).tolist():
            x = gaussian.sample(n_queries, sigma, generator)
            difference = (model(x, sigma) - gaussian(x, sigma)).double().square().mean()
            ratio = float(difference / gaussian.bayes_error(sigma)) ** 0.5
            if not ratio < tol:  # NaN, too
                break
            lowest = sigma
    if math.isinf(lowest):
        raise ValueError(
            f"expected a model that differs from the Gaussian by less than {tol} e(sigma) at sigma = 80, "
            f"got {ratio:.3g} e(sigma): it is not trained there, or the Gaussian is not that of its data"
        )
    return lowest
