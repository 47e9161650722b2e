"""The conventions for dtypes, noise levels and precision."""

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import randn
from torch import Tensor

from gaussnet.numerics import (
    as_sigma,
    check_event,
    compute_dtype,
    expand_as_event,
    full_precision,
    result_dtype,
)

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("x", "buffer", "result", "compute"),
    [
        (BF16, F32, F32, F32),
        (F16, F32, F32, F32),
        (BF16, BF16, F32, F32),
        (F32, BF16, F32, F32),
        (F32, F32, F32, F32),
        (F32, F64, F32, F64),
        (F64, F32, F64, F64),
        (F64, F64, F64, F64),
    ],
    ids=str,
)
def test_dtypes(x: torch.dtype, buffer: torch.dtype, result: torch.dtype, compute: torch.dtype) -> None:
    one = torch.ones(1, dtype=x)
    assert result_dtype(one) == result
    assert compute_dtype(one, torch.ones(1, dtype=buffer)) == compute


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)], ids=str)
def test_check_event_returns_the_batch_shape(batch: tuple[int, ...]) -> None:
    assert check_event(torch.zeros(*batch, 1, 8, 8), (1, 8, 8), "T") == batch


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 1, 8, 7), ValueError, r"T: .* shape \(\*batch, 1, 8, 8\), got \(2, 1, 8, 7\)"),
        (torch.zeros(8, 8), ValueError, r"got \(8, 8\)"),
        (torch.zeros(2, 1, 8, 8).int(), TypeError, r"T: expected x to be a floating.*, got torch.int32"),
        (torch.zeros(2, 1, 8, 8).bool(), TypeError, r"got torch.bool"),
        (torch.zeros(2, 1, 8, 8).numpy(), TypeError, r"got ndarray"),
    ],
    ids=["event", "ndim", "int", "bool", "numpy"],
)
def test_check_event_errors(x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_event(x, (1, 8, 8), "T")


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(
    ("sigma", "shape"),
    [
        (0.5, ()),
        (1, ()),
        (torch.tensor(0.5), ()),
        (torch.tensor(2), ()),
        (torch.tensor([0.5, 1.0, 2.0]), (3,)),
        (torch.tensor([1, 2, 3]), (3,)),
        (torch.tensor([0.5, 1.0, 2.0], dtype=F64), (3,)),
    ],
    ids=str,
)
def test_as_sigma_keeps_values(sigma: float | Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    level = as_sigma(sigma, torch.zeros(3, 2), (3,), dtype)
    assert (level.shape, level.dtype) == (shape, dtype)
    assert level.tolist() == torch.as_tensor(sigma).tolist()


@pytest.mark.parametrize("zero_ok", [False, True])
@pytest.mark.parametrize("wrap", [float, torch.tensor, lambda value: torch.tensor([1.0, value, 2.0])])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, 0.0])
def test_as_sigma_rejects_impossible_values(
    value: float, wrap: Callable[[float], float | Tensor], zero_ok: bool
) -> None:
    def call() -> Tensor:
        return as_sigma(wrap(value), torch.zeros(3, 2), (3,), F32, zero_ok=zero_ok)

    if value == 0 and zero_ok:
        assert call().min() == 0
        return
    expected = ">= 0" if zero_ok else "> 0"
    with pytest.raises(ValueError, match=rf"expected sigma to be finite and {expected}, got {value}"):
        call()


@pytest.mark.parametrize("shape", [(2,), (3, 1), (1,), (1, 3)], ids=str)
def test_as_sigma_rejects_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"a number, a 0-d tensor or of shape \(3,\)") as error:
        as_sigma(torch.ones(shape), torch.zeros(3, 2), (3,), F32)
    assert f"got shape {shape}" in str(error.value)


def test_expand_as_event_broadcasts_over_the_batch() -> None:
    values = torch.tensor([1.0, 2.0])
    assert expand_as_event(values, 3).shape == (2, 1, 1, 1)
    assert (expand_as_event(values, 3) * torch.ones(2, 1, 8, 8)).amax((1, 2, 3)).equal(values)
    assert expand_as_event(torch.tensor(3.0), 2).shape == (1, 1)


def test_full_precision_switches_autocast_off() -> None:
    a, b = randn(8, 8, dtype=F32), randn(8, 8, seed=1, dtype=F32)
    with torch.autocast("cpu", BF16):
        with full_precision("cpu"):
            product = a @ b
        assert (a @ b).dtype == BF16
    assert product.dtype == F32
    assert product.equal(a @ b)


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
def test_full_precision_restores_the_matmul_precision(before: str) -> None:
    original = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(before)
        with full_precision("cpu"):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == before
        with pytest.raises(ZeroDivisionError), full_precision("cpu"):
            _ = 1 / 0
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision(original)


SETTINGS = (
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    "torch.backends.cuda.matmul.allow_tf32 = True",
    "torch.set_float32_matmul_precision('high')",
)
INSIDE = """
import os, sys, torch
from gaussnet.numerics import full_precision
def now():
    return [backend.matmul.fp32_precision for backend in (torch.backends.cuda, torch.backends.mkldnn)]
for setting in sys.argv[1:]:
    if os.fork():
        assert os.wait()[1] == 0, setting
        continue
    exec(setting)
    before = now()
    assert before != ["none", "none"], before
    with full_precision("cpu"):
        assert now() == ["ieee", "ieee"], now()
    assert now() == before, (before, now())
    if "allow_tf32" in setting:  # the older names agree, still
        torch.backends.cuda.matmul.allow_tf32 = False
        assert torch.get_float32_matmul_precision() == "highest"
    break
"""


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="came with PyTorch 2.9")
def test_full_precision_knows_the_settings_by_backend() -> None:
    # Each in a process of its own: of the settings, not all can be undone.
    command = [sys.executable, "-c", INSIDE, *SETTINGS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
