"""Denoisers that hold a network: how it is called, and on which noise levels."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from gaussnet.denoisers import Denoiser
from gaussnet.numerics import Sigma, as_level, check_event


class NetworkDenoiser(Denoiser):
    """What every preconditioner shares.

    Attributes:
        model: called as model(inputs, noise_labels, class_labels), and with augment_labels if there are any.
        sigma_min: lowest level that the network was made for.
        sigma_max: highest level that the network was made for.
    """

    model: nn.Module  # EDM's name: its state dicts fit
    sigma_min: float = 0.0
    sigma_max: float = math.inf

    def facts(self) -> dict[str, str]:
        levels = f"{self.sigma_min:g} to {self.sigma_max:g}"
        return {**super().facts(), "network": type(self.model).__name__, "sigma": levels}

    def round_sigma(self, sigma: Sigma | Sequence[float]) -> Tensor:
        """The levels nearest to sigma that the network knows: here every level.

        Args:
            sigma: levels of any shape, such as a grid; 0, where grids end, stays 0.

        Returns:
            Tensor of the shape of sigma, at least float32; numbers become float64.

        Raises:
            ValueError: if a level is negative or not finite.
        """
        return as_level(sigma, zero_ok=True)

    def _batch_shape(self, x: Tensor) -> tuple[int, ...]:
        batch_shape = check_event(x, self.event_shape, type(self).__name__)
        if len(batch_shape) != 1:
            raise ValueError(
                f"{type(self).__name__}: expected x of shape (B, {', '.join(map(str, self.event_shape))}), "
                f"got {tuple(x.shape)}"
            )
        return batch_shape

    def _evaluate(
        self,
        inputs: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None,
        augment_labels: Tensor | None,
    ) -> Tensor:
        """The network's output, in the dtype of its inputs."""
        if not getattr(self.model, "label_dim", 1):
            class_labels = None
        extra = {} if augment_labels is None else {"augment_labels": augment_labels}
        return self.model(inputs, noise_labels, class_labels, **extra).to(inputs.dtype)


def check_channels(
    network: nn.Module, event_shape: tuple[int, ...], inputs: int, outputs: int, owner: str, options: str = ""
) -> None:
    """Refuses a network whose channels are not `inputs` and `outputs` times those of an event.

    `owner` is the caller's name and `options` are those that ask for these channels, for the message.

    Raises:
        ValueError: if it has others.
    """
    for name, multiple in (("in_channels", inputs), ("out_channels", outputs)):
        expected = multiple * event_shape[0]
        got = getattr(network, name, expected)
        if got != expected:
            raise ValueError(
                f"{owner}: expected a network with {name}={expected} for events of shape "
                f"{tuple(event_shape)}{options}, got {name}={got}"
            )


def check_range(sigma_min: float, sigma_max: float) -> tuple[float, float]:
    """The range of noise levels of a network.

    Raises:
        ValueError: if it is none.
    """
    if not 0 <= sigma_min < sigma_max:
        raise ValueError(f"expected 0 <= sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    return sigma_min, sigma_max


def range_arguments(model: NetworkDenoiser) -> dict[str, float | None]:
    """sigma_min and sigma_max for config.json, which knows no infinity: there it is null."""
    return {
        "sigma_min": model.sigma_min,
        "sigma_max": None if math.isinf(model.sigma_max) else model.sigma_max,
    }


def image_shape(network: nn.Module) -> tuple[int, ...]:
    """The shape of a network's events: its channels, and a square unless its resolution lists the axes."""
    channels, resolution = (getattr(network, name, None) for name in ("in_channels", "img_resolution"))
    if not (isinstance(channels, int) and isinstance(resolution, int | list | tuple)):
        raise ValueError(
            f"expected event_shape for {type(network).__name__}, "
            "a network that has no in_channels and img_resolution"
        )
    size = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
    return channels, *size
