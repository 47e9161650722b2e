"""An unpickler that runs nothing: what NVlabs/edm pickles, as plain data and tensors.

Its networks are pickled as calls that carry source code,

    torch_utils.persistence._reconstruct_persistent_obj({type, version, module_src, class_name, state})

where state is the module's __dict__. `pickle.load` would compile module_src, and call whatever a file names.
Here no file reaches `pickle`: `pickletools.genops`, the disassembler of the standard library, splits it into
opcodes, and those that a snapshot needs are interpreted on plain data. A class or function is never imported:
it is a name, and must be one of these:

    torch_utils.persistence._reconstruct_persistent_obj    class name and state; the source is dropped
    torch.nn.modules.container.ModuleDict                  a state alone
    torch._utils._rebuild_tensor_v2, _rebuild_parameter    a view that lies inside its storage
    torch.storage._load_from_bytes                         a storage, by torch.load(weights_only=True)
    collections.OrderedDict, dnnlib.util.EasyDict          a dict
    numpy.dtype, numpy.(_)core.multiarray.scalar           a Python number

Every other opcode, class and function is refused by name. Memory and time are bounded by the file's size.
Reference: https://github.com/NVlabs/edm, torch_utils/persistence.py.
"""

from __future__ import annotations

import io
import math
import mmap
import pickletools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from types import NoneType
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

MAX_OPCODES = 1_000_000  # EDM's own snapshots have about 120 a tensor
MAX_STORAGE_OPCODES = 200  # PyTorch writes about 50
MAX_DIM = 16


class EDMPickleError(ValueError):
    """A file that is no snapshot of NVlabs/edm, is damaged, or asks for what no snapshot needs."""


def unpickle(stream: mmap.mmap) -> Any:
    """What a pickle describes: numbers, strings, containers, tensors and `Persistent` objects.

    Args:
        stream: the mapped file. Reading from a map, unlike from a file, never allocates more than there is,
            whatever length an opcode claims.

    Raises:
        EDMPickleError: at the first opcode that is damaged or refused.
    """
    machine = _Machine(budget=len(stream))
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(cast("io.BytesIO", stream))):
            if count >= MAX_OPCODES:
                raise EDMPickleError(f"expected at most {MAX_OPCODES} opcodes, got more")
            machine.step(opcode.name, argument)
        (result,) = machine.stack
    except EDMPickleError:
        raise
    except (ValueError, LookupError) as error:  # of genops, an empty stack, an unknown memo
        raise EDMPickleError(f"truncated or damaged: {error}") from error
    return result


# Stand-ins ----------------------------------------------------------------------------------------


@dataclass(eq=False)
class Persistent:
    """A persistent object or a ModuleDict: what its __dict__ would be."""

    class_name: str
    state: dict[str, Any] | None = None


class _Name(NamedTuple):
    """A class or function: the name, nothing else."""

    name: str


@dataclass(eq=False)
class _DType:
    """A numeric numpy.dtype; its byte order comes with a BUILD opcode."""

    code: str
    order: str = "<"


class _Storage(NamedTuple):
    """The numbers that tensors are views of, (N,)."""

    numbers: Tensor


# Opcodes ------------------------------------------------------------------------------------------


class _Machine:
    """The stack machine of `pickle`, as much of it as a snapshot needs, on plain data.

    Args:
        budget: bytes that may be decoded, so that no opcode loads the same storage again and again.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under each open MARK
        self.memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        """Executes one opcode."""
        stack = self.stack
        match opcode:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "LONG4":
                if argument.bit_length() > 63:
                    raise EDMPickleError(f"{opcode}: expected an integer of 64 bits, got a longer one")
                stack.append(argument)
            case "BINFLOAT" | "SHORT_BINUNICODE" | "BINUNICODE" | "BINUNICODE8":
                stack.append(argument)
            case "SHORT_BINBYTES" | "BINBYTES" | "BINBYTES8":
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_SET":
                stack.append(set())
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(_pop(stack, int(opcode[-1])))
            case "MARK":
                self.below.append(stack)
                self.stack = []
            case "TUPLE":
                self.stack = self.below.pop()
                self.stack.append(tuple(stack))
            case "APPENDS" | "SETITEMS" | "ADDITEMS":
                self.stack = self.below.pop()
                _fill(opcode, self.stack[-1], stack)
            case "APPEND" | "SETITEM":
                items = _pop(stack, 1 if opcode == "APPEND" else 2)
                _fill(opcode, stack[-1], items)
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(_look_up(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_look_up(*_pop(stack, 2)))
            case "REDUCE" | "NEWOBJ":
                stack.append(self._call(opcode, *_pop(stack, 2)))
            case "BUILD":
                (state,) = _pop(stack, 1)
                _build(stack[-1], state)
            case _:
                raise EDMPickleError(f"refused: the opcode {opcode}, which no snapshot needs")

    def _call(self, opcode: str, function: Any, arguments: Any) -> Any:
        """What an entry of the table makes of its arguments, whose types are checked first."""
        entry = _TABLE[function.name] if type(function) is _Name else None
        if entry is None or entry.opcode != opcode:
            raise EDMPickleError(f"refused: {opcode} of {kind_of(function)}")
        check_types(function.name, arguments, entry.types)
        self.budget -= sum(len(argument) for argument in arguments if type(argument) is bytes)
        if self.budget < 0:
            raise EDMPickleError("refused: storages of more bytes than the file")
        return entry.make(*arguments)


def _pop(stack: list[Any], count: int) -> tuple[Any, ...]:
    if len(stack) < count:
        raise IndexError("too few values on the stack")
    items = tuple(stack[-count:])
    del stack[-count:]
    return items


_FILLED: dict[str, type] = {"APP": list, "ADD": set, "SET": dict}


def _fill(opcode: str, target: Any, items: Sequence[Any]) -> None:
    """Adds items to a list, a set or a dict (keys and values in turn), and to nothing else."""
    if type(target) is not _FILLED[opcode[:3]]:
        raise EDMPickleError(f"refused: {opcode} on {kind_of(target)}")
    if type(target) is list:
        target.extend(items)
        return
    keys = items if type(target) is set else items[::2]
    if any(type(key) is not str for key in keys):  # hashing tuples inside tuples may overrun the C stack
        raise EDMPickleError(f"{opcode}: expected keys to be strings, got others")
    target.update(keys if type(target) is set else zip(keys, items[1::2], strict=True))


def _build(target: Any, state: Any) -> None:
    """Sets the state of the two stand-ins that get one after their creation."""
    if type(target) is Persistent and target.state is None and type(state) is dict:
        target.state = state
    elif type(target) is _DType:
        types = (int, str, NoneType, NoneType, NoneType, int, int, int)  # no fields, no subarray
        check_types("the state of numpy.dtype", state, types)
        target.order = _one_of("byte order of numpy.dtype", state[1], ("<", ">", "=", "|"))
    else:
        raise EDMPickleError(f"refused: BUILD of {kind_of(target)}")


def _look_up(module: Any, name: Any) -> _Name:
    """The stand-in of a class or function of the table."""
    if type(module) is not str or type(name) is not str:
        raise EDMPickleError(f"refused: a class or function named by {kind_of(module)} and {kind_of(name)}")
    if "." in name or f"{module}.{name}" not in _TABLE:  # a dotted name would reach for attributes
        full = shown(f"{module}.{name}")
        raise EDMPickleError(f"refused: {full}, which is no class or function of an EDM snapshot")
    return _Name(f"{module}.{name}")


# Checks -------------------------------------------------------------------------------------------


def check_types(name: str, values: Any, types: tuple[type, ...]) -> None:
    """Raises an EDMPickleError unless `values` is a tuple of exactly these types, subclasses excluded."""
    got = tuple(map(type, values)) if type(values) is tuple else type(values)
    if got != types:
        found = ", ".join(map(kind_of, values[:MAX_DIM])) if type(values) is tuple else kind_of(values)
        expected = ", ".join(kind.__name__.strip("_") for kind in types)
        raise EDMPickleError(f"{name}: expected ({expected}), got ({found})")


def kind_of(value: Any) -> str:
    """The type of a value for a message, or the name of what it stands for."""
    return shown(value.name) if type(value) is _Name else type(value).__name__.strip("_")


def shown(text: str) -> str:
    """A string of a file for a message: short, and with its control characters escaped."""
    return repr(text if len(text) <= 100 else text[:100] + "...")


def _one_of(name: str, value: str, expected: Sequence[str]) -> str:
    if value not in expected:
        raise EDMPickleError(f"refused: {name} {shown(value)}, expected one of {', '.join(expected)}")
    return value


# Calls --------------------------------------------------------------------------------------------

_NUMBERS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
_STORAGES = frozenset(
    f"torch {kind}Storage"
    for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
)
# PROTO STOP MARK NONE TRUE FALSE LONG1 BININT(1, 2) BINUNICODE, dict, list, TUPLE, memo, GLOBAL BINPERSID
_STORAGE_OPCODES = "\x80.(N\x88\x89\x8aJKMX}us]eatqhcQ"
# torch.save's magic number, of its format before zip files, in which pickled tensors have their storages
_STORAGE_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def _persistent(meta: dict[str, Any]) -> Persistent:
    keys = ("type", "version", "module_src", "class_name", "state")
    check_types("a persistent object", tuple(map(meta.get, keys)), (str, int, str, str, dict))
    if (meta["type"], meta["version"]) != ("class", 6):
        raise EDMPickleError(
            f"a persistent object: expected type 'class' and version 6, "
            f"got {shown(meta['type'])} and {meta['version']}"
        )
    return Persistent(meta["class_name"], meta["state"])


def _storage(data: bytes) -> _Storage:
    """What torch.load makes of a storage's bytes, once they are seen to be that of a storage and no more."""
    where = "torch.storage._load_from_bytes"
    if not data.startswith(_STORAGE_MAGIC):
        raise EDMPickleError(f"{where}: expected a storage as pickled tensors have it, got {data[:16]}")
    stream = io.BytesIO(data)
    # Five pickles: magic number, version, byte order, storage, keys. Then come the numbers.
    opcodes = chain.from_iterable(pickletools.genops(stream) for _ in range(5))
    for count, (opcode, argument, _) in enumerate(opcodes):
        if opcode.name == "GLOBAL" and argument not in _STORAGES:
            raise EDMPickleError(f"refused: {shown(str(argument).replace(' ', '.'))} in {where}")
        known = opcode.code in _STORAGE_OPCODES and (opcode.name != "PROTO" or argument == 2)
        if not known or count >= MAX_STORAGE_OPCODES:
            raise EDMPickleError(f"refused: the opcode {opcode.name} (number {count}) in {where}")
    try:
        storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a parser may raise anything on bytes that are not what they seem
        raise EDMPickleError(f"{where}: {str(error)[:200]}") from error
    if type(storage) is not torch.storage.TypedStorage:
        raise EDMPickleError(f"{where}: expected a storage, got {kind_of(storage)}")
    # The public TypedStorage.untyped() warns that it is deprecated.
    raw = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage._untyped_storage)  # pyright: ignore[reportPrivateUsage]
    # A header may announce numbers that do not follow: then memory was reserved, and nothing read into it.
    if not np.array_equal(raw.numpy(), np.frombuffer(data, np.uint8)[len(data) - len(raw) :]):
        raise EDMPickleError(f"{where}: expected the {len(raw)} bytes of a storage at the end of its data")
    return _Storage(raw.view(storage.dtype))


def _tensor(
    storage: _Storage,
    storage_offset: int,
    size: tuple[Any, ...],
    stride: tuple[Any, ...],
    requires_grad: bool,
    backward_hooks: dict[str, Any],
) -> Tensor:
    where, numbers = "torch._utils._rebuild_tensor_v2", storage.numbers
    check_types(f"{where}: size", size, (int,) * min(len(size), MAX_DIM))
    check_types(f"{where}: stride", stride, (int,) * len(size))
    last = storage_offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    inside = min((1, *size)) == 1 and min((storage_offset, 0, *stride)) == 0 and last < len(numbers)
    if not inside or math.prod(size) > len(numbers):  # a stride of 0 would make much of little
        raise EDMPickleError(
            f"{where}: size {size}, stride {stride} and storage offset {storage_offset} "
            f"do not fit a storage of {len(numbers)} numbers"
        )
    return _parameter(numbers.as_strided(size, stride, storage_offset), requires_grad, backward_hooks)


def _parameter(data: Tensor, requires_grad: bool, backward_hooks: dict[str, Any]) -> Tensor:
    if backward_hooks:
        raise EDMPickleError("expected a tensor without backward hooks, got some")
    return data


def _dtype(code: str, align: bool, copy: bool) -> _DType:
    return _DType(_one_of("numpy.dtype", code, _NUMBERS))


def _scalar(dtype: _DType, data: bytes) -> float:
    numeric = np.dtype(dtype.order + dtype.code)
    if len(data) != numeric.itemsize:
        raise EDMPickleError(f"a numpy scalar: expected {numeric.itemsize} bytes, got {len(data)}")
    return np.frombuffer(data, numeric)[0].item()


class _Entry(NamedTuple):
    """The opcode that may call a name, the types of its arguments, and what it makes of them."""

    opcode: str
    types: tuple[type, ...]
    make: Callable[..., Any]


_TABLE = {
    "torch_utils.persistence._reconstruct_persistent_obj": _Entry("REDUCE", (dict,), _persistent),
    "torch.nn.modules.container.ModuleDict": _Entry("NEWOBJ", (), lambda: Persistent("ModuleDict")),
    "torch._utils._rebuild_tensor_v2": _Entry("REDUCE", (_Storage, int, tuple, tuple, bool, dict), _tensor),
    "torch._utils._rebuild_parameter": _Entry("REDUCE", (Tensor, bool, dict), _parameter),
    "torch.storage._load_from_bytes": _Entry("REDUCE", (bytes,), _storage),
    "collections.OrderedDict": _Entry("REDUCE", (), dict),
    "dnnlib.util.EasyDict": _Entry("NEWOBJ", (), dict),
    "numpy.dtype": _Entry("REDUCE", (str, bool, bool), _dtype),
    "numpy.core.multiarray.scalar": _Entry("REDUCE", (_DType, bytes), _scalar),
    "numpy._core.multiarray.scalar": _Entry("REDUCE", (_DType, bytes), _scalar),
}
