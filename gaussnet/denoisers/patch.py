"""Local denoisers: each pixel is estimated from its neighbourhood alone, by a posterior of its own.

With y_1..y_N the data and Omega_u the neighbourhood of pixel u, at noise level s (Kamb and Ganguli, "An
analytic theory of creativity in convolutional diffusion models", ICML 2025, arXiv 2412.20292, whose equation
numbers these are; their phi / sqrt(alpha) is our x, (1 - alpha) / alpha our s^2, and Tweedie's formula turns
their scores into denoisers):

    LS    D(x)_u = sum_i w_i(u) y_i(u),          w_i(u)   = softmax_i(-||x - y_i||^2_u / 2 s^2)   (Eq. 7, 8)
    ELS   D(x)_u = sum_{i,v} w_{i,v}(u) y_i(v),  w_{i,v}(u) = softmax over i and v               (Eq. 9, 10)

where ||x - y||^2_u sums squared differences over Omega_u and all channels, and in ELS the patch of x about u
is compared with the patches of the data about every pixel v. At the border of the image a neighbourhood

    circular    continues on the other side: ELS then commutes with every circular shift         (App. B.1)
    zeros       ends, as zero padding has it, and in ELS a patch that lacks pixels is compared with
                patches that lack the same ones: corners with that corner, edges along that edge  (Eq. 41)

Both are computed as LS: ELS is LS on the data and all their circular shifts (of which "zeros" discards, pixel
by pixel, those that bring a patch of another kind). Squared differences are formed directly, summed by 0/1
band matrices along rows and columns, and enter an online softmax: exact over all data, in float64, in memory
that does not grow with N.
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from gaussnet.denoisers.base import Denoiser, check_samples, class_index, other_class
from gaussnet.numerics import (
    Sigma,
    as_sigma,
    check_event,
    expand_as_event,
    full_precision,
    known_true,
    pick,
    result_dtype,
    wide_dtype,
)

PADDINGS = ("zeros", "circular")

LocalSum = Callable[[Tensor], Tensor]


class LocalDenoiser(Denoiser):
    """A posterior over the data for each location: what local denoisers share.

    Neighbourhoods differ from location to location, so the result is not the posterior mean of any one
    distribution: its Jacobian need not be symmetric, and its score is that of no density.

    Args:
        data: (N, *event_shape), N >= 1, floating and finite.
        class_labels: integer class >= 0 of each sample, shape (N,): with them, `class_labels` of a call
            restrict the data to that class.
        max_numel: numbers in the largest arrays of a step; more data or queries are handled in chunks.

    Raises:
        TypeError: if the data are not floating-point.
        ValueError: if the data are empty or not finite, the labels do not fit them, or max_numel < 1.
    """

    data: Tensor
    data_labels: Tensor | None

    def __init__(self, data: Tensor, class_labels: Tensor | None = None, max_numel: int = 2**20) -> None:
        super().__init__()
        class_labels = check_samples(data, class_labels)
        if max_numel < 1:
            raise ValueError(f"expected max_numel >= 1, got {max_numel}")
        self.register_buffer("data", data)
        self.register_buffer("data_labels", class_labels)
        self.max_numel = max_numel

    @property
    def event_shape(self) -> torch.Size:
        return self.data.shape[1:]

    @property
    @abstractmethod
    def _grid(self) -> tuple[int, ...]:
        """The event as (channels, *locations): the channels of a location share its weights."""

    @abstractmethod
    def _local_sum(self, level: Tensor) -> LocalSum:
        """Sums (b, *locations, n) over the neighbourhood of each location, at the levels () or (b,)."""

    def _arranged(self, values: Tensor, level: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The candidates that data (channels, *locations, n) offer, and where each may be used.

        Yields:
            Candidates of the shape of `values`, and either None or flags (b or 1, *locations).
        """
        yield values, None

    def forward(self, x: Tensor, sigma: Sigma, class_labels: Tensor | None = None) -> Tensor:
        return self._posterior_mean(x, sigma, class_labels)[0].to(result_dtype(x))

    def score(self, x: Tensor, sigma: Sigma, class_labels: Tensor | None = None) -> Tensor:
        denoised, level = self._posterior_mean(x, sigma, class_labels)
        level = expand_as_event(level, len(self.event_shape))
        return ((denoised - x.to(denoised.dtype)) / level**2).to(result_dtype(x))

    def _posterior_mean(self, x: Tensor, sigma: Sigma, class_labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """The denoised and the level, in the wide dtype; chunks the queries."""
        batch_shape = check_event(x, self.event_shape, type(self).__name__)
        dtype = wide_dtype(x.device)
        level = as_sigma(sigma, x, batch_shape, dtype)
        queries = x.to(dtype).reshape(-1, *self._grid)
        levels = level.flatten() if level.ndim else level
        if levels.numel() > 1 and known_true((levels == levels[0]).all()):
            levels = levels[0]  # as samplers call: one neighbourhood serves all
        labels = None
        if class_labels is not None and self.data_labels is not None:
            labels = class_index(class_labels, batch_shape, self.data_labels).flatten()
        locations = math.prod(self._grid[1:])
        points = min(len(self.data), max(1, self.max_numel // self.event_shape.numel()))
        # A query brings (locations, points) differences, and a level (locations, locations) flags.
        step = max(1, self.max_numel // (locations * max(points, locations)))
        shared = None if levels.ndim else self._local_sum(levels)
        parts = [queries[:0]]
        for start in range(0, len(queries), step):
            part = slice(start, start + step)
            own = levels[part] if levels.ndim else levels
            local_sum = shared or self._local_sum(own)
            chosen = None if labels is None else labels[part]
            parts.append(self._attend(queries[part], own, local_sum, chosen, points))
        return torch.cat(parts).reshape(x.shape), level

    def _attend(
        self, query: Tensor, level: Tensor, local_sum: LocalSum, labels: Tensor | None, points: int
    ) -> Tensor:
        """Online softmax over `points` data at a time: the local posterior means of (b, *grid)."""
        scale = -1 / (2 * expand_as_event(level, query.ndim - 1) ** 2)
        running_max = torch.full_like(query[:, 0], -math.inf)
        total = torch.zeros_like(running_max)
        weighted = torch.zeros_like(query)
        for start in range(0, len(self.data), points):
            chunk = self.data[start : start + points].to(query.dtype).reshape(-1, *self._grid)
            other = None  # (b, n): data of other classes
            if labels is not None and self.data_labels is not None:
                other = other_class(labels, self.data_labels[start : start + points])
                other = other.reshape(len(query), *(1,) * (query.ndim - 2), -1)
            for values, allowed in self._arranged(chunk.movedim(0, -1).contiguous(), level):
                squared = (query[:, 0, ..., None] - values[0]) ** 2
                for c in range(1, len(values)):
                    squared = squared + (query[:, c, ..., None] - values[c]) ** 2  # (b, *locations, n)
                with full_precision(query.device.type):
                    logits = local_sum(squared) * scale  # Eq. 8, 10
                    if other is not None:
                        logits = logits.masked_fill(other, -math.inf)
                    if allowed is not None:
                        logits = logits.masked_fill(~allowed[..., None], -math.inf)  # Eq. 41
                    new_max = torch.maximum(running_max, logits.amax(-1))
                    # A location may have had no candidate so far: keep exp(-inf - -inf) out.
                    shift = torch.where(torch.isfinite(new_max), new_max, 0.0)
                    decay = torch.exp(running_max - shift)
                    weights = torch.exp(logits - shift[..., None])
                    total = total * decay + weights.sum(-1)
                    gain = torch.stack([(weights * values[c]).sum(-1) for c in range(len(values))], 1)
                    weighted = weighted * decay[:, None] + gain  # Eq. 7, 9
                running_max = new_max
        return weighted / total[:, None]


class PatchDenoiser(LocalDenoiser):
    """The local (LS) or equivariant local (ELS) score machine: posteriors of square patches.

    Args:
        data: images, (N, C, H, W).
        sizes: odd side of the patch, >= 1; or one for each of `sigmas`.
        sigmas: noise levels > 0; a call uses the size of the level that is nearest in log sigma.
        equivariant: compare with patches about all pixels (ELS), not about the same one only (LS). It costs
            H W times as much.
        padding: "zeros" or "circular", what neighbourhoods do at the border.
        class_labels: integer class of each sample, shape (N,): with them, `class_labels` of a call
            restrict the data to that class.
        max_numel: numbers in the largest arrays of a step; more data or queries are handled in chunks.

    Raises:
        ValueError: if the data are no finite images, a size is not odd, or sizes and sigmas do not match.

    Example:
        >>> images = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 1.0]]).reshape(2, 1, 1, 3)
        >>> PatchDenoiser(images, sizes=1)(torch.full((1, 1, 1, 3), 0.9), sigma=0.1).flatten()
        tensor([0., 1., 1.])
    """

    patch_sigmas: Tensor
    patch_sizes: Tensor

    def __init__(
        self,
        data: Tensor,
        sizes: int | Sequence[int],
        sigmas: Sequence[float] | None = None,
        equivariant: bool = False,
        padding: str = "zeros",
        class_labels: Tensor | None = None,
        max_numel: int = 2**20,
    ) -> None:
        if data.ndim != 4:
            raise ValueError(f"expected images of shape (N, C, H, W), got {tuple(data.shape)}")
        super().__init__(data, class_labels, max_numel)
        sizes = [sizes] if isinstance(sizes, int) else list(sizes)
        levels = torch.as_tensor([1.0] if sigmas is None else sigmas, dtype=torch.float64)
        if any(size < 1 or size % 2 == 0 for size in sizes):
            raise ValueError(f"expected odd patch sizes >= 1, got {sizes}")
        if not sizes or levels.shape != (len(sizes),):
            raise ValueError(
                f"expected one size, or one for each of sigmas, got {len(sizes)} sizes and "
                f"{'no' if sigmas is None else len(sigmas)} sigmas"
            )
        if not bool((torch.isfinite(levels) & (levels > 0)).all()):
            raise ValueError(f"expected finite sigmas > 0, got {levels.tolist()}")
        if padding not in PADDINGS:
            raise ValueError(f"expected padding among {PADDINGS}, got {padding!r}")
        float_dtype = data.dtype if data.is_floating_point() else torch.float32
        self.register_buffer("patch_sigmas", levels.to(data.device, float_dtype))
        self.register_buffer("patch_sizes", torch.tensor(sizes, device=data.device))
        self.equivariant = equivariant
        self.padding = padding

    @classmethod
    def fit(
        cls,
        data: Tensor,
        heldout: Tensor,
        sigmas: Sequence[float],
        sizes: Sequence[int],
        generator: torch.Generator | None = None,
        **arguments: Any,
    ) -> Self:
        """Chooses, at each level, the patch size of least mean squared error on held-out images.

        Args:
            data: (N, C, H, W).
            heldout: other images, (Q, C, H, W).
            sigmas: noise levels.
            sizes: odd sizes to choose from.
            generator: draws the noise, one draw for all levels.
            **arguments: equivariant, padding, class_labels, max_numel.

        Raises:
            ValueError: as the class.
        """
        device = generator.device if generator is not None else heldout.device
        noise = torch.randn(heldout.shape, generator=generator, device=device, dtype=heldout.dtype)
        noise = noise.to(heldout.device)
        candidates = [cls(data, size, **arguments) for size in sizes]
        best: list[int] = []
        with torch.no_grad():
            for sigma in sigmas:
                x = heldout + sigma * noise
                errors = [float((one(x, sigma) - heldout).square().mean()) for one in candidates]
                best.append(sizes[errors.index(min(errors))])
        return cls(data, best, sigmas, **arguments)

    @property
    def _grid(self) -> tuple[int, ...]:
        return tuple(self.event_shape)

    def patch_size(self, sigma: Sigma) -> Tensor:
        """The side of the patch at a noise level, of the shape of `sigma`."""
        table = self.patch_sigmas.to(wide_dtype(self.data.device))
        level = torch.as_tensor(sigma, dtype=table.dtype, device=table.device)
        return pick(self.patch_sizes, (level[..., None].log() - table.log()).abs().argmin(-1))

    def _reach(self, level: Tensor) -> Tensor:
        """How far patches reach from their centre, (b, 1) or (1, 1)."""
        return (self.patch_size(level) // 2).reshape(-1, 1)

    def _local_sum(self, level: Tensor) -> LocalSum:
        reach = self._reach(level)[..., None]
        bands: list[Tensor] = []
        for length in self.event_shape[1:]:
            index = torch.arange(length, device=self.data.device)
            apart = (index[:, None] - index).abs()
            if self.padding == "circular":
                apart = torch.minimum(apart, length - apart)
            bands.append((apart <= reach).to(level.dtype))  # (b or 1, length, length)
        rows, columns = bands

        def local_sum(squared: Tensor) -> Tensor:
            by_row = (rows @ squared.flatten(2)).reshape(squared.shape)
            return columns[:, None] @ by_row

        return local_sum

    def _arranged(self, values: Tensor, level: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        if not self.equivariant:
            yield values, None
            return
        height, width = self.event_shape[1:]
        reach = self._reach(level)
        for down, right in itertools.product(range(height), range(width)):
            allowed = None
            if self.padding == "zeros":
                rows, columns = self._alike(reach, height, down), self._alike(reach, width, right)
                allowed = rows[..., None] & columns[:, None]  # (b or 1, H, W)
                if known_true(~allowed.any()):
                    continue
            yield torch.roll(values, (-down, -right), dims=(1, 2)), allowed

    def _alike(self, reach: Tensor, length: int, shift: int) -> Tensor:
        """Along an axis: which positions have patches that lack what the patch `shift` further on lacks."""
        index = torch.arange(length, device=self.data.device)
        whole = (index >= reach) & (index < length - reach)  # (b or 1, length)
        # What a patch lacks tells its position, unless it lacks nothing.
        return whole & whole.roll(-shift, -1) if shift else torch.ones_like(whole)

    def to_arguments(self) -> dict[str, Any]:
        return {
            "event_shape": list(self.event_shape),
            "size": len(self.data),
            "labelled": self.data_labels is not None,
            "levels": len(self.patch_sizes),
            "equivariant": self.equivariant,
            "padding": self.padding,
            "max_numel": self.max_numel,
        }

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Self:
        size, levels = arguments["size"], len(torch.zeros(arguments["levels"]))  # bounded as tensors are
        return cls(
            torch.zeros(size, *arguments["event_shape"]),
            [1] * levels,
            [1.0] * levels,
            arguments["equivariant"],
            arguments["padding"],
            torch.zeros(size, dtype=torch.long) if arguments["labelled"] else None,
            arguments["max_numel"],
        )

    def extra_repr(self) -> str:
        return f"equivariant={self.equivariant}, padding={self.padding!r}"
