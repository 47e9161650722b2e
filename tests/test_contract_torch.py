"""How every denoiser behaves inside PyTorch: precision, transforms, compilation, copies and state."""

import copy
from typing import Any

import pytest
import torch
from cases import ANALYTIC, DENOISERS, DTYPES, EVENT, LABELLED, denoiser, noised, randn, relative_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gaussnet import Denoiser

every = pytest.mark.parametrize("name", DENOISERS)
analytic = pytest.mark.parametrize("name", ANALYTIC)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

F32, F64 = torch.float32, torch.float64


# Precision ----------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("buffers", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("given", "returned"),
    [(torch.bfloat16, F32), (torch.float16, F32), (F32, F32), (F64, F64)],
    ids=str,
)
def test_output_dtype(name: str, buffers: torch.dtype, given: torch.dtype, returned: torch.dtype) -> None:
    d, x = denoiser(name, buffers), noised(0.5, 2).to(given)
    outputs = [d(x, 0.5), d.score(x, 0.5)]
    if name in ANALYTIC:
        outputs.append(d.log_prob(x, 0.5))
    assert [out.dtype for out in outputs] == [returned] * len(outputs)
    assert relative_error(outputs[0], d(x.double(), 0.5)) < 1e-4, "computed on x as given"


class MatrixProducts(TorchDispatchMode):
    """Records matrix products that would lose digits: below float32, or with TF32 / bfloat16 allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.imprecise: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
            self.count += 1
            precision = torch.get_float32_matmul_precision()
            if args[0].dtype != F64 and (args[0].dtype != F32 or precision != "highest"):
                self.imprecise.append(f"{func} of {args[0].dtype} at precision {precision}")
        return func(*args, **(kwargs or {}))


@analytic
@dtypes
@pytest.mark.parametrize("method", ["forward", "score", "log_prob"])
def test_reduced_precision_modes_change_nothing(name: str, dtype: torch.dtype, method: str) -> None:
    x, call = noised(0.05, dtype=dtype), getattr(denoiser(name, dtype), method)
    expected = call(x, 0.05)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16), MatrixProducts() as products:
            out = call(x, 0.05)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert out.dtype == dtype
    assert out.equal(expected)
    assert products.imprecise == []
    assert products.count > 0 or name == "isotropic"


# Transforms ---------------------------------------------------------------------------------------


@every
@dtypes
def test_gradients_flow_through_x(name: str, dtype: torch.dtype) -> None:
    d, x = denoiser(name, dtype), noised(1.0, 3, dtype).requires_grad_()
    direction = randn(3, *EVENT, seed=7, dtype=dtype)
    (gradient,) = torch.autograd.grad((d(x, 1.0) * direction).sum(), x)
    assert gradient.isfinite().all()
    if dtype == F64:  # against a central difference
        step = 1e-5 * randn(3, *EVENT, seed=8)
        with torch.no_grad():
            change = ((d(x + step, 1.0) - d(x - step, 1.0)) * direction).sum() / 2
        torch.testing.assert_close((gradient * step).sum(), change, rtol=1e-5, atol=1e-12)


@analytic
@dtypes
def test_vmap(name: str, dtype: torch.dtype) -> None:
    d, x = denoiser(name, dtype), noised(0.5, 3, dtype)
    sigma = torch.tensor([0.1, 0.5, 5.0], dtype=dtype)
    bound = 1e-12 if dtype == F64 else 1e-6
    assert relative_error(torch.func.vmap(lambda x: d(x, 0.5))(x), d(x, 0.5)) < bound
    assert relative_error(torch.func.vmap(d)(x, sigma), d(x, sigma)) < bound
    assert relative_error(torch.func.vmap(d.score)(x, sigma), d.score(x, sigma)) < bound
    assert relative_error(torch.func.vmap(d.log_prob)(x, sigma), d.log_prob(x, sigma)) < bound


@analytic
def test_jvp_is_the_transpose_of_vjp(name: str) -> None:
    d, x = denoiser(name), noised(3.0, 3)
    u, v = randn(3, *EVENT, seed=7), randn(3, *EVENT, seed=8)
    forward = torch.func.jvp(lambda x: d(x, 3.0), (x,), (u,))[1]
    pullback = torch.func.vjp(lambda x: d(x, 3.0), x)[1]
    torch.testing.assert_close((forward * v).sum(), (u * pullback(v)[0]).sum(), rtol=1e-9, atol=1e-12)
    assert forward.abs().amax() > 1e-6


@pytest.mark.parametrize("name", [name for name in ANALYTIC if "delta" not in name])
@pytest.mark.parametrize("method", ["forward", pytest.param("score", marks=pytest.mark.slow), "log_prob"])
def test_compiles_without_graph_breaks(name: str, method: str) -> None:
    torch.compiler.reset()
    d, x = denoiser(name, F32), noised(0.5, 4, F32)
    call = getattr(d, method)
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    for sigma in (0.5, torch.tensor([0.1, 0.5, 1.0, 5.0])):
        assert relative_error(compiled(x, sigma), call(x, sigma)) < 1e-6, sigma


# Life cycle ---------------------------------------------------------------------------------------


@every
@dtypes
def test_state_dict_round_trip(name: str, dtype: torch.dtype) -> None:
    d, x = denoiser(name, dtype), noised(0.5, 4, dtype)
    twin = type(d).from_arguments(d.to_arguments()).to(dtype).eval()
    assert twin.to_arguments() == d.to_arguments()
    assert not twin(x, 0.5).equal(d(x, 0.5)), "the twin starts empty"
    twin.load_state_dict(d.state_dict(), strict=True)
    assert twin(x, 0.5).equal(d(x, 0.5))
    assert twin.event_shape == d.event_shape == EVENT


@every
def test_copies_are_independent(name: str) -> None:
    d, x = denoiser(name), noised(0.5, 4)
    expected, twin = d(x, 0.5), copy.deepcopy(d)
    assert twin(x, 0.5).equal(expected)
    for tensor in twin.state_dict().values():
        tensor.zero_()
    assert d(x, 0.5).equal(expected)


@every
def test_dtype_follows_the_module(name: str) -> None:
    d = denoiser(name, F32)
    assert isinstance(d, Denoiser)
    assert d.double() is d
    dtypes_ = {key: tensor.dtype for key, tensor in d.state_dict().items() if tensor.is_floating_point()}
    assert set(dtypes_.values()) == {F64}, dtypes_
    assert len(dtypes_) >= 1


@every
def test_every_tensor_is_in_the_state_dict(name: str) -> None:
    d = denoiser(name)
    state = {tensor.data_ptr() for tensor in d.state_dict(keep_vars=True).values()}
    loose = [
        f"{prefix}.{key}"
        for prefix, module in d.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, Tensor) and value.data_ptr() not in state
    ]
    assert loose == []
    if name in ANALYTIC:
        assert list(d.parameters()) == []


@every
def test_repr_names_the_class(name: str) -> None:
    assert repr(denoiser(name)).startswith(type(denoiser(name)).__name__ + "(")


@pytest.mark.parametrize("name", LABELLED)
def test_class_labels_pass_vmap_and_compile(name: str) -> None:
    d, x, labels = denoiser(name), noised(0.5, 3), torch.tensor([3, 1, 4])
    expected = d(x, 0.5, labels)
    mapped = torch.func.vmap(lambda x, label: d(x, 0.5, label))(x, labels)
    assert relative_error(mapped, expected) < 1e-12
    one_hot = torch.func.vmap(lambda x, row: d(x, 0.5, row))(x, torch.eye(10)[labels])
    assert relative_error(one_hot, expected) < 1e-12
    if name == "mixture-classes":
        torch.compiler.reset()
        compiled = torch.compile(d, fullgraph=True, backend="eager")
        assert relative_error(compiled(x, 0.5, labels), expected) < 1e-12
