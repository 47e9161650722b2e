"""Dtypes, noise levels and precision: the conventions that every analytic layer shares.

A noise level `sigma` is a float, a 0-d tensor, or one value per sample of the batch, everywhere.
Analytic layers compute in at least float32: they switch autocast off and keep TF32 / bfloat16 out of
their matrix products, since (x - mu) / sigma^2 at sigma = 0.002 leaves no digits to spare.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Sigma = float | Tensor
M = TypeVar("M", bound=nn.Module)

# Settings of float32 matrix products by backend; PyTorch has them since 2.9.
_MATMULS: list[Any] = [
    getattr(torch.backends, name).matmul
    for name in ("cuda", "mkldnn")
    if hasattr(getattr(getattr(torch.backends, name), "matmul", None), "fp32_precision")
]


def result_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a denoiser returns for `x`: that of `x`, but at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def compute_dtype(x: Tensor, buffer: Tensor) -> torch.dtype:
    """The dtype in which a layer that holds `buffer` computes on `x`: the wider one, at least float32."""
    return torch.promote_types(result_dtype(x), buffer.dtype)


def level_dtype(sigma: Sigma, buffer: Tensor) -> torch.dtype:
    """The dtype of a function of the noise level alone, in a layer that holds `buffer`."""
    wide = sigma if isinstance(sigma, Tensor) and sigma.is_floating_point() else buffer
    return compute_dtype(wide, buffer)


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64, for what float32 cannot resolve; float32 on the one backend (MPS) that has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def check_floating(**tensors: Tensor) -> None:
    """Refuses tensors of integers, in which what is computed from them would be cut to integers.

    Raises:
        TypeError: with the name of the first one.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"expected {name} to be floating-point, got {tensor.dtype}")


def check_event(x: object, event_shape: tuple[int, ...], owner: str) -> tuple[int, ...]:
    """Checks that `x` is a batch of events and returns its batch shape.

    Args:
        x: floating tensor of shape (*batch, *event_shape).
        event_shape: shape of one sample.
        owner: name of the caller, for the message.

    Raises:
        TypeError: if `x` is not a floating tensor.
        ValueError: if the trailing dimensions of `x` are not `event_shape`.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{owner}: expected x to be a floating-point tensor, got {got}")
    split = x.ndim - len(event_shape)
    if split < 0 or tuple(x.shape[split:]) != tuple(event_shape):
        expected = ", ".join(["*batch", *map(str, event_shape)])
        raise ValueError(f"{owner}: expected x of shape ({expected}), got {tuple(x.shape)}")
    return tuple(x.shape[:split])


def as_sigma(
    sigma: Sigma, x: Tensor, batch_shape: tuple[int, ...], dtype: torch.dtype, *, zero_ok: bool = False
) -> Tensor:
    """Returns `sigma` as a tensor of shape () or `batch_shape`, on the device of `x`.

    Values are checked wherever that costs no device synchronisation: for numbers and CPU tensors,
    outside of `torch.compile` and of `torch.func` transforms.

    Raises:
        ValueError: if the shape is neither () nor `batch_shape`, or a value is not finite or not
            positive (not negative, with `zero_ok`).
    """
    if not isinstance(sigma, Tensor):
        _check_value(float(sigma), zero_ok)
        return torch.full((), sigma, dtype=dtype, device=x.device)  # unlike torch.tensor, waits for no GPU
    if sigma.shape not in ((), tuple(batch_shape)):
        raise ValueError(
            f"expected sigma to be a number, a 0-d tensor or of shape {tuple(batch_shape)} "
            f"(one per sample), got shape {tuple(sigma.shape)}"
        )
    if sigma.device.type == "cpu" and sigma.numel() and not torch.compiler.is_compiling():
        for value in _readable_extremes(sigma):
            _check_value(value, zero_ok)
    # From host memory, a copy need not wait for what the GPU does; to it, it has to.
    return sigma.to(device=x.device, dtype=dtype, non_blocking=sigma.device.type == "cpu")


def as_level(sigma: Sigma | Sequence[float], zero_ok: bool = False) -> Tensor:
    """Checked noise levels of any shape: numbers in float64, tensors in theirs, but at least float32."""
    level = sigma if isinstance(sigma, Tensor) else torch.tensor(sigma, dtype=torch.float64)
    return as_sigma(level, level, tuple(level.shape), result_dtype(level), zero_ok=zero_ok)


def _readable_extremes(sigma: Tensor) -> list[float]:
    try:
        return [float(value) for value in sigma.detach().aminmax()]
    except RuntimeError:  # inside torch.func.vmap, numbers cannot be read
        return []


def _check_value(sigma: float, zero_ok: bool) -> None:
    if not math.isfinite(sigma) or sigma < 0 or (sigma == 0 and not zero_ok):
        raise ValueError(f"expected sigma to be finite and {'>= 0' if zero_ok else '> 0'}, got {sigma}")


def view(cls: type[M], **tensors: Tensor) -> M:
    """A module of buffers that have been checked before, such as those of one component of several.

    Checks read values, and on a GPU the host would wait for each.
    """
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    return module


def known_true(flag: Tensor) -> bool:
    """Whether a flag is set, as far as it can be read: not in a compiled or captured graph, nor under vmap.

    On a GPU, the host waits for it.
    """
    if torch.compiler.is_compiling() or (flag.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    try:
        return bool(flag)
    except RuntimeError:  # torch.func.vmap
        return False


def expand_as_event(values: Tensor, event_ndim: int) -> Tensor:
    """Appends `event_ndim` axes to per-sample values, so that they broadcast against a batch."""
    return values.reshape(*values.shape, *(1,) * event_ndim)


def pick(table: Tensor, index: Tensor) -> Tensor:
    """`table[index]`, of shape (*index.shape, *table.shape[1:]), also under vmap of older PyTorch."""
    return table.index_select(0, index.reshape(-1)).reshape(index.shape + table.shape[1:])


def full_precision(device_type: str) -> AbstractContextManager[object]:
    """No autocast and no reduced-precision float32 matrix products inside the block."""
    # The precision is global and read when a kernel is launched; a compiled graph reads it when it is built,
    # where it cannot be changed for a part of the graph.
    if torch.compiler.is_compiling() or not _reduced():
        return torch.autocast(device_type, enabled=False)
    return _full_precision(device_type)


def _reduced() -> bool:
    if not _MATMULS:
        return torch.get_float32_matmul_precision() != "highest"
    return any(matmul.fp32_precision not in ("none", "ieee") for matmul in _MATMULS)


@contextmanager
def _full_precision(device_type: str) -> Generator[None]:
    with torch.autocast(device_type, enabled=False):
        own = [matmul.fp32_precision for matmul in _MATMULS]
        try:
            before = torch.get_float32_matmul_precision()
        except RuntimeError:  # where fp32_precision was set, which the older name cannot tell
            before = None
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            if before is not None:
                torch.set_float32_matmul_precision(before)
            for matmul, precision in zip(_MATMULS, own, strict=True):  # the older name sets all backends
                matmul.fp32_precision = precision
