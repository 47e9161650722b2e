"""EDM snapshots, written here in NVlabs/edm's form and read back; hostile files, of which nothing may run."""

import copyreg
import functools
import importlib
import io
import mmap
import operator
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import time
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import golden, randn, relative_error, tiny_unet
from torch import Tensor, nn
from torch._utils import _rebuild_tensor_v2

from gaussnet import EDMPrecond, from_pretrained, open_images
from gaussnet.cli import main
from gaussnet.edm_import import _check_size, import_edm
from gaussnet.edm_pickle import read_edm_pickle
from gaussnet.edm_preconds import VEPrecond, VPPrecond, iDDPMPrecond
from gaussnet.edm_unpickler import EDMPickleError, unpickle
from gaussnet.experiments import EXPERIMENTS, Setting, defaults, run
from gaussnet.networks.dhariwal_unet import DhariwalUNet

# A witness: what CPython itself reports of imports, compilations, calls out and files -----------------

_events: list[tuple[str, tuple[Any, ...]]] | None = None
HARMLESS = {"mmap.__new__", "builtins.id", "object.__getattr__", "sys._getframe"}


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _events is not None and event not in HARMLESS:
        _events.append((event, arguments))


sys.addaudithook(_audit)


@contextmanager
def nothing_runs(path: Path) -> Iterator[None]:
    """Fails if the block imports, compiles, looks up or calls anything, or opens another file than `path`."""
    global _events
    _events = []
    try:
        yield
    finally:
        events, _events = _events, None
    assert [event for event in events if event[0] != "open" or event[1][:2] != (str(path), "r")] == []


@pytest.fixture(autouse=True)
def warm(tmp_path: Path) -> None:
    """What torch.load and the decoder of UNICODE import on their first call is not the file's doing."""
    "".encode("raw_unicode_escape")
    (tmp_path / "warm.pkl").write_bytes(pickle.dumps(torch.ones(1)))
    with pytest.raises(EDMPickleError):
        read_edm_pickle(tmp_path / "warm.pkl")


# Snapshots of EDM's form ------------------------------------------------------------------------------


class Persistent:
    """An object that pickles as EDM's persistent classes do."""

    def __init__(self, class_name: str, **state: Any) -> None:
        self.meta = {"type": "class", "version": 6, "module_src": "raise SystemExit('source was run')"}
        self.meta |= {"class_name": class_name, "state": {"_init_args": (), "_init_kwargs": {}, **state}}

    def __reduce__(self) -> Any:
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


def module(class_name: str, **state: Any) -> Persistent:
    """A persistent `nn.Module`."""
    return Persistent(class_name, **{**empty_module(), **state})


def empty_module() -> dict[str, Any]:
    return {**vars(nn.Module()), "_buffers": {"resample_filter": None}, "skip_scale": np.sqrt(0.5)}


def tree(tensors: dict[str, Tensor], class_name: str = "Block") -> Any:
    """Persistent modules from the names of a state dict; enc and dec are of PyTorch's own class."""
    children: dict[str, dict[str, Tensor]] = {}
    state: dict[str, Any] = {**empty_module(), "_parameters": {}, "_modules": {}}
    for name, tensor in tensors.items():
        head, _, rest = name.partition(".")
        if rest:
            children.setdefault(head, {})[rest] = tensor
        elif head in ("resample_filter", "freqs", "u"):
            state["_buffers"][head] = tensor.clone()
        else:
            state["_parameters"][head] = nn.Parameter(tensor.clone(), requires_grad=False)
    state["_buffers"]["scratch"] = torch.ones(2)
    state["_non_persistent_buffers_set"] = {"scratch"}
    state["_modules"] = {name: tree(part) for name, part in children.items()}
    if set(children) >= {"enc", "dec"}:
        for name in ("enc", "dec"):
            blocks = nn.ModuleDict()
            blocks._modules.update(state["_modules"][name].meta["state"]["_modules"])
            state["_modules"][name] = blocks
    return Persistent(class_name, **state)


def dumps(data: Any, protocol: int = 4) -> bytes:
    """pickle.dumps in a world where EDM's modules can be imported; its own function says so if it is run."""
    source = """
class EasyDict(dict): pass
def _reconstruct_persistent_obj(meta): raise SystemExit("reconstruction was run")
"""
    names = ("dnnlib", "dnnlib.util", "torch_utils", "torch_utils.persistence")
    modules = {name: types.ModuleType(name) for name in names}
    for name in ("dnnlib.util", "torch_utils.persistence"):
        exec(source, modules[name].__dict__)
    with pytest.MonkeyPatch.context() as patch:
        for name, fake in modules.items():
            patch.setitem(sys.modules, name, fake)
        return pickle.dumps(data() if callable(data) else data, protocol)


def snapshot(class_name: str, tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """What EDM's training loop saves."""
    ema = tree(tensors, class_name)
    ema.meta["state"] |= {"_init_args": args, "_init_kwargs": kwargs}
    loss_fn = Persistent("EDMLoss", P_mean=-1.2, _init_kwargs={"P_mean": -1.2, "P_std": np.float32(1.5)})
    dataset = sys.modules["dnnlib.util"].EasyDict(path="x.zip", resolution=8)
    return {"ema": ema, "loss_fn": loss_fn, "augment_pipe": None, "dataset_kwargs": dataset}


def write(path: Path, class_name: str, tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> Path:
    path.write_bytes(dumps(lambda: snapshot(class_name, tensors, *args, **kwargs)))
    return path


def adm(**changes: Any) -> DhariwalUNet:
    """A small DhariwalUNet for 8 x 8 images, no layer of which is zero."""
    arguments: dict[str, Any] = {"img_resolution": 8, "in_channels": 1, "out_channels": 1, **ADM, **changes}
    net = DhariwalUNet(**arguments)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return net.eval()


SONG: dict[str, Any] = {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": []}
ADM: dict[str, Any] = {"model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
NCSN: dict[str, Any] = {
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}
MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "edm": (lambda: EDMPrecond(tiny_unet()), {**SONG, "model_type": "SongUNet", "use_fp16": True}),
    "edm-settings": (
        lambda: EDMPrecond(tiny_unet(label_dim=3, augment_dim=9, decoder_type="skip"), sigma_data=0.7),
        {**SONG, "model_type": "SongUNet", "label_dim": 3, "augment_dim": 9, "decoder_type": "skip"}
        | {"sigma_data": 0.7, "sigma_min": 0, "sigma_max": float("inf")},
    ),
    "edm-adm": (lambda: EDMPrecond(adm(label_dim=3)), {**ADM, "label_dim": 3}),
    "vp": (lambda: VPPrecond(tiny_unet()), SONG),
    "vp-settings": (
        lambda: VPPrecond(tiny_unet(), beta_d=12.0, beta_min=0.3, M=100, epsilon_t=1e-3),
        {**SONG, "beta_d": 12.0, "beta_min": 0.3, "M": 100, "epsilon_t": 1e-3},
    ),
    "ve": (lambda: VEPrecond(tiny_unet(**NCSN), sigma_max=50.0), {**SONG, **NCSN, "sigma_max": 50.0}),
    "iddpm": (lambda: iDDPMPrecond(adm(out_channels=2), M=50, C_2=0.01), {**ADM, "M": 50, "C_2": 0.01}),
}
every = pytest.mark.parametrize("name", MODELS)


@every
def test_round_trip(name: str, tmp_path: Path) -> None:
    make, kwargs = MODELS[name]
    model = make()
    class_name = type(model).__name__
    kwargs = {"img_resolution": 8, "img_channels": 1, **kwargs}
    path = write(tmp_path / "snapshot.pkl", class_name, model.state_dict(), **kwargs)

    with nothing_runs(path):
        snap = read_edm_pickle(path)
    assert (snap.class_name, snap.init_args, snap.init_kwargs) == (class_name, (), kwargs)
    assert snap.state_dict.keys() == model.state_dict().keys()
    assert all(tensor.equal(snap.state_dict[key]) for key, tensor in model.state_dict().items())

    loaded: Any = import_edm(str(path))
    assert type(loaded) is type(model)
    assert not loaded.training
    assert loaded.to_arguments() == model.to_arguments()
    x, sigma = randn(3, 1, 8, 8, dtype=torch.float32), torch.tensor([0.03, 1.0, 20.0])
    labels = torch.arange(3) if "label_dim" in kwargs else None
    assert loaded(x, sigma, labels).equal(model(x, sigma, labels))
    loaded.save_pretrained(tmp_path / "saved")
    again: Any = from_pretrained(tmp_path / "saved")
    assert again(x, sigma, labels).equal(model(x, sigma, labels))


def test_the_command_imports_a_snapshot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, kwargs = MODELS["edm"]
    model, out = make(), tmp_path / "saved"
    kwargs = {"img_resolution": 8, "img_channels": 1, **kwargs}
    command = [
        "import-edm",
        str(write(tmp_path / "a.pkl", "EDMPrecond", model.state_dict(), **kwargs)),
        str(out),
    ]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "| class | EDMPrecond |" in printed
    assert printed.endswith(f"\n\nsaved to {out}\n")
    loaded: Any = from_pretrained(out)
    assert loaded.provenance == {"data": {"snapshot": "a.pkl"}}
    x, sigma = randn(3, 1, 8, 8, dtype=torch.float32), torch.tensor([0.03, 1.0, 20.0])
    assert loaded(x, sigma).equal(model(x, sigma))
    assert main(command) == 2
    assert "holds a EDMPrecond: choose another folder, or say --overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0


def test_experiments_take_snapshots(tmp_path: Path) -> None:
    make, kwargs = MODELS["edm"]
    model = make()
    path = write(
        tmp_path / "a.pkl", "EDMPrecond", model.state_dict(), img_resolution=8, img_channels=1, **kwargs
    )
    model.save_pretrained(tmp_path / "saved")
    experiment = EXPERIMENTS["score-deviation"]
    options = defaults(experiment, queries=4, sigmas=[0.5], references=["gaussian"])
    readings = [
        run(
            "score-deviation",
            experiment,
            Setting(str(name), open_images("digits")),
            options,
            tmp_path / "out",
        )
        for name in (path, tmp_path / "saved")
    ]
    assert readings[0] == readings[1]
    assert readings[0].table[0]["gaussian"] > 0.1


@pytest.mark.parametrize("name", ["edm_ddpmpp", "edm_ddpmpp_cond", "edm_ncsnpp"])
def test_denoises_as_edm_does(name: str, tmp_path: Path) -> None:
    config, tensors = golden(name)
    config = {**config, "img_channels": config.pop("in_channels"), "model_type": "SongUNet"}
    del config["out_channels"]
    state = {key.removeprefix("state."): t for key, t in tensors.items() if key.startswith("state.")}
    model: Any = import_edm(write(tmp_path / "snapshot.pkl", "EDMPrecond", state, **config))
    labels = tensors.get("in.class_labels"), tensors.get("in.augment_labels")
    denoised = model(tensors["in.x"], tensors["in.sigma"].flatten(), *labels)
    assert relative_error(denoised, tensors["out.denoised"]) < 1e-5


POSITIONAL: dict[str, tuple[Any, ...]] = {  # in the order of EDM's constructors
    "edm-settings": (8, 1, 3, False, 0, float("inf"), 0.7, "SongUNet"),
    "vp-settings": (8, 1, 0, False, 12.0, 0.3, 100, 1e-3, "SongUNet"),
    "ve": (8, 1, 0, False, 0.02, 50.0, "SongUNet"),
    "iddpm": (8, 1, 0, True, 0.001, 0.01, 50, "DhariwalUNet"),
}


@pytest.mark.parametrize("name", POSITIONAL)
def test_positional_arguments(name: str, tmp_path: Path) -> None:
    make, kwargs = MODELS[name]
    model, args = make(), POSITIONAL[name]
    names = (
        "label_dim",
        "sigma_data",
        "sigma_min",
        "sigma_max",
        "beta_d",
        "beta_min",
        "M",
        "epsilon_t",
        "C_2",
    )
    others = {key: value for key, value in kwargs.items() if key not in (*names, "model_type")}
    path = write(tmp_path / "snapshot.pkl", type(model).__name__, model.state_dict(), *args, **others)
    assert read_edm_pickle(path).init_args == args
    loaded: Any = import_edm(path)
    assert loaded.to_arguments() == model.to_arguments()


def test_metadata(tmp_path: Path) -> None:
    path = write(tmp_path / "snapshot.pkl", "EDMPrecond", {"a.b": torch.ones(2)})
    assert read_edm_pickle(path).metadata == {
        "loss_fn": {
            "class_name": "EDMLoss",
            "init_args": (),
            "init_kwargs": {"P_mean": -1.2, "P_std": 1.5},
        },
        "augment_pipe": None,
        "dataset_kwargs": {"path": "x.zip", "resolution": 8},
    }


def test_state_dict_is_that_of_nn_module(tmp_path: Path) -> None:
    """Order, None entries, non-persistent buffers and shared tensors, against PyTorch itself."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.ModuleDict({"a": nn.PReLU()}))
    net.register_buffer("hidden", torch.ones(3), persistent=False)
    net.register_buffer("table", torch.arange(4))
    net.register_parameter("nothing", None)
    net.register_module("none", None)
    net.register_parameter("tied", net.get_parameter("0.weight"))

    def convert(module: nn.Module) -> Any:
        if type(module) is nn.ModuleDict:
            module._modules = {name: convert(child) for name, child in module.items()}
            return module
        children = {name: child and convert(child) for name, child in module._modules.items()}
        return Persistent("EDMPrecond", **{**vars(module), "_modules": children})

    expected = net.state_dict()
    path = tmp_path / "snapshot.pkl"
    path.write_bytes(dumps(lambda: {"ema": convert(net)}))
    state = read_edm_pickle(path).state_dict
    assert list(state) == list(expected)
    assert all(state[name].equal(tensor) for name, tensor in expected.items())
    assert all(type(tensor) is Tensor and not tensor.requires_grad for tensor in state.values())


# The interpreter against pickle ----------------------------------------------------------------------


def inert(data: bytes) -> Any:
    """`unpickle` of bytes."""
    stream = mmap.mmap(-1, len(data))
    stream.write(data)
    stream.seek(0)
    return unpickle(stream)


SHARED = ["shared", {"a": (1, 2)}]
VALUES: dict[str, Any] = {
    "constants": [None, True, False, (), [], {}],
    "integers": [0, 1, 255, 256, 65535, 65536, -1, 2**31 - 1, -(2**31), 2**31, 2**62, -(2**62)],
    "floats": [0.0, -1.5, 1e-300, float("inf"), -float("inf")],
    "strings": ["", "a", "\u00e9\u4e00\U0001f600", "x" * 300, "\n\x00\x1b"],
    "bytes": [b"", b"\x00\xff", b"y" * 300],
    "tuples": [(1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), ((), ((1,), [2]))],
    "containers": {"one": {"x": 1}, "many": {str(i): [i] * i for i in range(5)}, "list": list(range(3000))},
    "shared": [SHARED, SHARED, (SHARED, SHARED)],
    "large": {f"key {i}": f"value {i}" for i in range(1500)},
}


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("name", VALUES)
def test_plain_data_is_read_as_pickle_reads_it(name: str, protocol: int) -> None:
    data = pickle.dumps(VALUES[name], protocol)
    assert repr(inert(data)) == repr(pickle.loads(data))


def test_sets_and_shared_parts() -> None:
    first, second = inert(pickle.dumps([SHARED, SHARED]))
    assert first is second
    assert inert(pickle.dumps([set(), {"a"}, {"a", "b", "c"}])) == [set(), {"a"}, {"a", "b", "c"}]
    assert inert(pickle.dumps(OrderedDict(b=1, a=2))) == {"b": 1, "a": 2}
    assert inert(dumps(lambda: sys.modules["dnnlib.util"].EasyDict(b=1))) == {"b": 1}


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
@pytest.mark.parametrize(
    "code", ["f2", "f4", "f8", ">f8", "i1", ">i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"]
)
def test_numpy_scalars(code: str, module: str) -> None:
    scalar = np.array(93.5, dtype=code)[()]
    data = pickle.dumps(scalar, 3)
    old = next(name for name in (b"numpy._core.multiarray", b"numpy.core.multiarray") if name in data)
    value = inert(data.replace(old, module.encode()))
    assert value == scalar
    assert type(value) is type(scalar.item())


@pytest.mark.parametrize(("order", "expected"), [("<", 1), (">", 256), ("=", int(np.int16(1)))])
def test_byte_order_of_numpy_scalars(order: str, expected: int) -> None:
    data = pickle.dumps(np.int16(1), 3)
    state = text("<")
    assert data.count(state) == 1
    assert inert(data.replace(state, text(order))) == expected


TENSORS: dict[str, Tensor] = {
    "scalar": torch.tensor(3.0),
    "matrix": torch.arange(6.0).reshape(2, 3),
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
    "view": torch.arange(60.0).reshape(3, 4, 5)[1:, ::2, 3],
    "channels-last": torch.arange(120.0).reshape(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "parameter": nn.Parameter(torch.ones(3)),
    "float64": torch.tensor([1 / 3], dtype=torch.float64),
    "float16": torch.tensor([1 / 3], dtype=torch.float16),
    "bfloat16": torch.tensor([1 / 3, 2.0], dtype=torch.bfloat16),
    "int64": torch.tensor([2**40, -1]),
    "int32": torch.tensor([1, 2], dtype=torch.int32),
    "uint8": torch.tensor([255], dtype=torch.uint8),
    "bool": torch.tensor([True, False]),
}


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("name", TENSORS)
def test_tensors(name: str, protocol: int) -> None:
    value, tensor = TENSORS[name], inert(pickle.dumps(TENSORS[name], protocol))
    assert type(tensor) is Tensor
    assert not tensor.requires_grad
    assert (tensor.dtype, tensor.shape, tensor.stride()) == (value.dtype, value.shape, value.stride())
    assert tensor.equal(value)


def test_storages_go_through_weights_only_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda file, **options: calls.append(options) or load(file, **options))
    assert inert(pickle.dumps(torch.ones(1))).item() == 1
    assert calls == [{"map_location": "cpu", "weights_only": True}]


def test_default_device_is_ignored() -> None:
    data = pickle.dumps(torch.ones(3))
    with torch.device("meta"):
        tensor = inert(data)
    assert tensor.equal(torch.ones(3))


# Attacks: every one is alive, as pickle.loads shows after the refusal ---------------------------------


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call

    def __call__(self) -> None:
        """Only callables can be pickled as functions."""


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"  # STACK_GLOBAL


def saved(value: Any, zip_file: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zip_file)
    return file.getvalue()


def touch(sentinel: Path) -> str:
    return f"open({str(sentinel)!r}, 'w').close()"


def shell(sentinel: Path) -> str:
    return f"touch {sentinel}"


def chain(sentinel: Path) -> Call:
    return Call(Call(getattr, Call(importlib.import_module, "os"), "system"), shell(sentinel))


def call_system(opcodes: bytes) -> Callable[[Path], bytes]:
    return lambda s: b"\x80\x04" + opcodes.replace(b"COMMAND", text(shell(s))) + b"."


LOAD = torch.storage._load_from_bytes
ATTACKS: dict[str, tuple[str, Callable[[Path], bytes]]] = {
    "os.system": (r"'(posix|nt)\.system'", lambda s: pickle.dumps(Call(os.system, shell(s)))),
    "eval": (r"'builtins\.eval'", lambda s: pickle.dumps(Call(eval, touch(s)))),
    "exec": (r"'builtins\.exec'", lambda s: pickle.dumps(Call(exec, touch(s)))),
    "exec, protocol 2": (r"'__builtin__\.exec'", lambda s: pickle.dumps(Call(exec, touch(s)), 2)),
    "subprocess": (r"'subprocess\.call'", lambda s: pickle.dumps(Call(subprocess.call, ["touch", str(s)]))),
    "partial": (
        r"'functools\.partial'",
        lambda s: pickle.dumps(Call(functools.partial(exec, touch(s)))),
    ),
    "methodcaller": (
        r"'operator\.methodcaller'",
        lambda s: pickle.dumps(Call(operator.methodcaller("touch"), s)),
    ),
    "chain of calls": (r"'builtins\.getattr'", lambda s: pickle.dumps(chain(s))),
    "storage of a call": (
        r"'(posix|nt)\.system' in torch\.storage\._load_from_bytes",
        lambda s: pickle.dumps(Call(LOAD, saved(Call(os.system, shell(s))))),
    ),
    "storage with a call behind it": (
        r"'__builtin__\.exec' in torch\.storage\._load_from_bytes",
        lambda s: pickle.dumps(Call(LOAD, saved([torch.ones(2)._typed_storage(), Call(exec, touch(s))]))),
    ),
    "storage in a zip file": (
        r"torch\.storage\._load_from_bytes: expected a storage as pickled tensors have it, got b'PK",
        lambda s: pickle.dumps(Call(LOAD, saved(Call(exec, touch(s)), zip_file=True))),
    ),
    "storage in a storage": (
        r"'torch\.storage\._load_from_bytes' in torch\.storage\._load_from_bytes",
        lambda s: pickle.dumps(Call(LOAD, saved(Call(LOAD, saved(Call(exec, touch(s))))))),
    ),
    "dotted name": (
        r"'torch\.serialization\.os\.system'",
        call_system(named("torch.serialization", "os.system") + b"COMMAND\x85R"),
    ),
    "dotted name in an allowed module": (
        r"'torch\.storage\.io\.open'",
        lambda s: b"\x80\x04" + named("torch.storage", "io.open") + text(str(s)) + text("w") + b"\x86R.",
    ),
    "globals of an allowed function": (
        r"'torch\._utils\._rebuild_tensor_v2\.__globals__\.get'",
        lambda s: (
            b"\x80\x04"
            + (named("torch._utils", "_rebuild_tensor_v2.__globals__.get") + text("__builtins__") + b"\x85R0")
            + (named("builtins", "exec") + text(touch(s)) + b"\x85R.")
        ),
    ),
    "GLOBAL": (r"'os\.system'", call_system(b"cos\nsystem\nCOMMAND\x85R")),
    "GLOBAL with a dot": (
        r"'torch\.serialization\.os\.system'",
        call_system(b"ctorch.serialization\nos.system\nCOMMAND\x85R"),
    ),
    "INST": (r"the opcode INST", call_system(b"(COMMANDios\nsystem\n")),
    "OBJ": (r"'os\.system'", call_system(b"(cos\nsystem\nCOMMANDo")),
    "EXT1": (r"the opcode EXT1", call_system(b"\x82\xf0COMMAND\x85R")),
    "EXT2": (r"the opcode EXT2", call_system(b"\x83\xf0\x00COMMAND\x85R")),
    "EXT4": (r"the opcode EXT4", call_system(b"\x84\xf0\x00\x00\x00COMMAND\x85R")),
    "NEWOBJ_EX": (
        r"'subprocess\.Popen'",
        lambda s: (
            b"\x80\x04"
            + named("subprocess", "Popen")
            + b"]"
            + text("touch")
            + b"a"
            + text(str(s))
            + b"a\x85R."
        ),
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_are_refused_and_nothing_runs(name: str, tmp_path: Path) -> None:
    refusal, attack = ATTACKS[name]
    sentinel, path = tmp_path / "sentinel", tmp_path / "snapshot.pkl"
    path.write_bytes(attack(sentinel))
    copyreg.add_extension("os", "system", 0xF0)
    try:
        with nothing_runs(path), pytest.raises(EDMPickleError, match=refusal) as error:
            read_edm_pickle(path)
        assert str(path) in str(error.value)
        assert not sentinel.exists()
        pickle.loads(path.read_bytes())
        assert wait_for(sentinel), f"{name} is no attack: there was nothing to refuse"
    finally:
        copyreg.remove_extension("os", "system", 0xF0)


def wait_for(sentinel: Path) -> bool:
    for _ in range(200):  # Popen does not wait
        if sentinel.exists():
            return True
        time.sleep(0.01)
    return False


PLACES: dict[str, Callable[[dict[str, Any], Any], None]] = {
    "key of the snapshot": lambda data, evil: data.update(more=evil),
    "instead of ema": lambda data, evil: data.update(ema=evil),
    "loss_fn": lambda data, evil: data["loss_fn"].meta["state"].update(P_mean=evil),
    "argument": lambda data, evil: data["ema"].meta["state"]["_init_kwargs"].update(dropout=evil),
    "class name": lambda data, evil: data["ema"].meta.update(class_name=evil),
    "source": lambda data, evil: data["ema"].meta.update(module_src=evil),
    "state": lambda data, evil: data["ema"].meta.update(state=evil),
    "hook": lambda data, evil: data["ema"].meta["state"]["_forward_hooks"].update({"0": evil}),
    "parameter": lambda data, evil: data["ema"].meta["state"]["_parameters"].update(w=evil),
    "module": lambda data, evil: data["ema"].meta["state"]["_modules"].update(m=evil),
}


@pytest.mark.parametrize("place", PLACES)
def test_attacks_anywhere_in_a_snapshot(place: str, tmp_path: Path) -> None:
    sentinel, path = tmp_path / "sentinel", tmp_path / "snapshot.pkl"

    def data() -> dict[str, Any]:
        good = snapshot("EDMPrecond", {"a.b": torch.ones(2), "w": torch.ones(1)})
        PLACES[place](good, Call(exec, touch(sentinel)))
        return good

    path.write_bytes(dumps(data))
    with nothing_runs(path), pytest.raises(EDMPickleError, match=r"refused: 'builtins\.exec'"):
        read_edm_pickle(path)
    assert not sentinel.exists()


def test_embedded_source_is_dropped(tmp_path: Path) -> None:
    """EDM's own loader would exec module_src; the fakes here raise SystemExit on it."""
    path = write(tmp_path / "snapshot.pkl", "EDMPrecond", {"a.b": torch.ones(2)})
    assert b"raise SystemExit" in path.read_bytes()
    with nothing_runs(path):
        snap = read_edm_pickle(path)
    assert "SystemExit" not in repr(snap)


# Misuse of what is allowed ---------------------------------------------------------------------------

MODULE_DICT = named("torch.nn.modules.container", "ModuleDict")
ORDERED = named("collections", "OrderedDict")
DTYPE = named("numpy", "dtype")
SCALAR = named("numpy._core.multiarray", "scalar")
PERSISTENT = named("torch_utils.persistence", "_reconstruct_persistent_obj")
F8 = DTYPE + text("f8") + b"\x89\x88\x87R"
BINARY = {length: b"C" + bytes([length]) + b"z" * length for length in (1, 8)}
REFUSED: dict[str, tuple[str, bytes]] = {
    "BUILD of a class": ("BUILD of 'torch.nn.modules.container.ModuleDict'", MODULE_DICT + b"}b"),
    "BUILD of a function": ("BUILD of 'collections.OrderedDict'", ORDERED + b"}b"),
    "BUILD of a dict": ("BUILD of dict", b"}}b"),
    "BUILD with slots": ("BUILD of Persistent", MODULE_DICT + b")\x81N}\x86b"),
    "BUILD twice": ("BUILD of Persistent", MODULE_DICT + b")\x81}b}b"),
    "BUILD of a tensor": ("BUILD of Tensor", pickle.dumps(torch.ones(1), 3)[2:-1] + b"}b"),
    "NEWOBJ of a function": ("NEWOBJ of 'collections.OrderedDict'", ORDERED + b")\x81"),
    "NEWOBJ of an object": ("NEWOBJ of dict", b"})\x81"),
    "NEWOBJ with arguments": (r"ModuleDict: expected \(\), got \(int\)", MODULE_DICT + b"K\x01\x85\x81"),
    "REDUCE of a class": ("REDUCE of 'torch.nn.modules.container.ModuleDict'", MODULE_DICT + b")R"),
    "REDUCE of a result": ("REDUCE of dict", ORDERED + b")R)R"),
    "REDUCE of a string": ("REDUCE of str", text("os.system") + b")R"),
    "REDUCE with a list": (r"OrderedDict: expected \(\), got \(list\)", ORDERED + b"]R"),
    "SETITEM of a list": ("SETITEM on list", b"]" + text("a") + b"Ns"),
    "SETITEMS of a module": ("SETITEMS on Persistent", MODULE_DICT + b")\x81(" + text("a") + b"Nu"),
    "APPEND to a dict": ("APPEND on dict", b"}Na"),
    "APPENDS to a name": ("APPENDS on 'collections.OrderedDict'", ORDERED + b"(Ne"),
    "ADDITEMS to a dict": ("ADDITEMS on dict", b"}(" + text("a") + b"\x90"),
    "key that is a number": ("SETITEM: expected keys to be strings", b"}K\x01Ns"),
    "key that is a tuple": ("SETITEMS: expected keys to be strings", b"}()Nu"),
    "member that is a tuple": ("ADDITEMS: expected keys to be strings", b"\x8f()\x90"),
    "key without value": ("damaged", b"}(" + text("a") + b"u"),
    "name that is no string": ("named by str and NoneType", text("os") + b"N\x93"),
    "PERSID": ("opcode PERSID", b"Pid\n"),
    "BINPERSID": ("opcode BINPERSID", b"NQ"),
    "NEWOBJ_EX": ("opcode NEWOBJ_EX", MODULE_DICT + b")}\x92"),
    "OBJ": ("opcode OBJ", b"(" + ORDERED + b"o"),
    "DUP": ("opcode DUP", b"N2"),
    "FROZENSET": ("opcode FROZENSET", b"(\x91"),
    "BYTEARRAY8": ("opcode BYTEARRAY8", b"\x96" + struct.pack("<Q", 1) + b"a"),
    "NEXT_BUFFER": ("opcode NEXT_BUFFER", b"\x97"),
    "object dtype": ("numpy.dtype 'O8', expected one of b1, i1", DTYPE + text("O8") + b"\x89\x88\x87R"),
    "record dtype": ("numpy.dtype 'V16'", DTYPE + text("V16") + b"\x89\x88\x87R"),
    "complex dtype": ("numpy.dtype 'c16'", DTYPE + text("c16") + b"\x89\x88\x87R"),
    "dtype with fields": (
        r"state of numpy.dtype: expected .*, got \(int, str, NoneType, NoneType, dict",
        F8 + b"(K\x03" + text("<") + b"NN}K\x01K\x01K\x00tb",
    ),
    "byte order": ("byte order of numpy.dtype 'O'", F8 + b"(K\x03" + text("O") + b"NNNK\x01K\x01K\x00tb"),
    "scalar of 1 byte": ("numpy scalar: expected 8 bytes, got 1", SCALAR + F8 + BINARY[1] + b"\x86R"),
    "scalar of a tensor": (
        r"scalar: expected \(DType, bytes\), got \(DType, dict\)",
        SCALAR + F8 + b"}\x86R",
    ),
    "no meta": (r"persistent object: expected \(str, int, str, str, dict\), got", PERSISTENT + b"}\x85R"),
    "not a meta": (r"_reconstruct_persistent_obj: expected \(dict\), got \(list\)", PERSISTENT + b"]\x85R"),
    "parameter of a dict": (
        r"_rebuild_parameter: expected \(Tensor, bool, dict\), got \(dict, bool, dict\)",
        named("torch._utils", "_rebuild_parameter") + b"}\x88}\x87R",
    ),
    "parameter with state": (
        r"refused: 'torch\._utils\._rebuild_parameter_with_state'",
        named("torch._utils", "_rebuild_parameter_with_state"),
    ),
    "storage of nothing": (
        "expected a storage as pickled tensors have it, got b'z'",
        named("torch.storage", "_load_from_bytes") + BINARY[1] + b"\x85R",
    ),
    "dotted name in a package": (
        r"refused: 'torch\._utils\._rebuild_tensor_v2'",
        named("torch", "_utils._rebuild_tensor_v2"),
    ),
    "control characters": (r"refused: 'os\.\\x1b\[31m'", named("os", "\x1b[31m")),
    "long name": (r"'os\.x{90,100}\.\.\.', which", named("os", "x" * 10_000)),
    "long integer": ("expected an integer of 64 bits", b"\x8a\x09" + b"\x01" * 9),
    "memo that is not there": ("damaged", b"h\x00"),
    "empty stack": ("truncated or damaged", b"0"[:0]),
    "too few on the stack": ("too few values", b"N\x86"),
    "below a mark": ("too few values", b"N(N\x86"),
    "no mark": ("damaged", b"Nt"),
    "two results": ("damaged", b"NN"),
    "unknown opcode": (r"damaged: at position 2, opcode b'\\xff' unknown", b"\xff"),
    "length beyond the end": ("expected 4611686018427387904 bytes", b"\x8e" + struct.pack("<Q", 2**62)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_misuse_is_refused(name: str, tmp_path: Path) -> None:
    message, opcodes = REFUSED[name]
    path = tmp_path / "snapshot.pkl"
    path.write_bytes(b"\x80\x04" + opcodes + b".")
    with nothing_runs(path), pytest.raises(EDMPickleError, match=message):
        read_edm_pickle(path)


def tensor_call(**changes: Any) -> bytes:
    arguments: dict[str, Any] = {
        "storage": torch.arange(6.0)._typed_storage(),
        "storage_offset": 0,
        "size": (2, 3),
        "stride": (3, 1),
        "requires_grad": False,
        "backward_hooks": OrderedDict(),
    }
    return pickle.dumps(Call(_rebuild_tensor_v2, *{**arguments, **changes}.values()))


def test_tensor_call_is_accepted() -> None:
    assert inert(tensor_call()).equal(torch.arange(6.0).reshape(2, 3))
    assert inert(tensor_call(size=(2,), stride=(2,), storage_offset=3)).tolist() == [3, 5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"storage_offset": 1},
            r"size \(2, 3\), stride \(3, 1\) and storage offset 1 do not fit .* of 6 numbers",
        ),
        ({"storage_offset": -1}, "storage offset -1 do not fit"),
        ({"storage_offset": 2**62}, "do not fit"),
        ({"size": (3, 3)}, "do not fit"),
        ({"size": (-2, -3)}, "do not fit"),
        ({"size": (0, 3)}, "do not fit"),
        ({"stride": (4, 1)}, "do not fit"),
        ({"stride": (-1, 1)}, "do not fit"),
        ({"stride": (2**62, 2**62)}, "do not fit"),
        ({"size": (7,), "stride": (0,)}, "do not fit"),
        ({"size": (2**40, 2**40), "stride": (0, 0)}, "do not fit"),
        ({"size": (2, 3, 1)}, r"stride: expected \(int, int, int\), got \(int, int\)"),
        ({"size": (2.0, 3)}, r"size: expected \(int, int\), got \(float, int\)"),
        ({"size": (True, 3)}, r"got \(bool, int\)"),
        ({"size": (1,) * 17, "stride": (1,) * 17}, "size: expected"),
        ({"storage_offset": "0"}, r"expected \(Storage, int, tuple, tuple, bool, dict\), got \(Storage, str"),
        ({"storage": torch.ones(6)}, r"got \(Tensor, int"),
        ({"backward_hooks": OrderedDict(a=1)}, "without backward hooks"),
        ({"metadata": {"conj": True}}, r"got \(Storage, int, tuple, tuple, bool, dict, dict\)"),
    ],
)
def test_tensors_stay_inside_their_storage(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EDMPickleError, match=message):
        inert(tensor_call(**changes))


STORAGE = saved(torch.arange(6.0)._typed_storage())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (STORAGE.replace(b"K\x06N", b"K\x07N"), "_load_from_bytes: "),
        (STORAGE[:-1], "_load_from_bytes: "),
        (STORAGE[:-32].replace(b"a.", b"0."), "opcode POP"),
        (STORAGE[:-32].replace(b"\x80\x02]", b"\x80\x04]"), "opcode PROTO"),
        (STORAGE + b"z", r"expected the 24 bytes of a storage at the end"),
        (STORAGE.replace(b"ctorch\nFloatStorage", b"ctorch\nQInt8Storage"), r"'torch.QInt8Storage' in"),
        (STORAGE.replace(b"ctorch\nFloatStorage", b"ctorch\nTensor"), r"'torch.Tensor' in torch.storage"),
        (saved(torch.ones(2)), r"'torch._utils._rebuild_tensor_v2' in torch.storage._load_from_bytes"),
        (saved({"a": 1}), "expected a storage, got dict"),
        (saved(list(range(300))), r"opcode .* \(number 200\) in torch.storage._load_from_bytes"),
        (STORAGE[:20], "truncated or damaged"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,  # bytes hold a number of the process
)
def test_storages_are_only_storages(data: bytes, message: str) -> None:
    with pytest.raises(EDMPickleError, match=message):
        inert(tensor_call(storage=Call(LOAD, data)))


def test_storage_that_nothing_was_read_into() -> None:
    """The list of the storages that follow is emptied: torch.load leaves the memory as it found it."""
    keys = STORAGE[:-32].rindex(b"\x80\x02]q\x00")
    data = STORAGE[:keys] + b"\x80\x02]q\x00."
    assert torch.load(io.BytesIO(data), weights_only=True)._untyped_storage.nbytes() == 24
    with pytest.raises(EDMPickleError, match="expected the 24 bytes of a storage at the end of its data"):
        inert(tensor_call(storage=Call(LOAD, data)))


# Bombs -----------------------------------------------------------------------------------------------


DEEP = 50_000


def test_one_storage_cannot_be_loaded_again_and_again() -> None:
    data = saved(torch.arange(10_000.0)._typed_storage())
    call = Call(LOAD, data)
    assert len(inert(pickle.dumps([call])))
    with pytest.raises(EDMPickleError, match="storages of more bytes than the file"):
        inert(pickle.dumps([Call(LOAD, data), Call(LOAD, data)]))  # the bytes are shared by the memo


def test_opcodes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty set takes one byte in the file and 200 in memory."""
    monkeypatch.setattr("gaussnet.edm_unpickler.MAX_OPCODES", 1000)
    assert len(inert(b"\x80\x04](" + b"\x8f" * 995 + b"e.")) == 995
    with pytest.raises(EDMPickleError, match="at most 1000 opcodes"):
        inert(b"\x80\x04](" + b"\x8f" * 996 + b"e.")


@pytest.mark.parametrize(
    "opcodes",
    [b"N" + b"\x85" * DEEP, b"]" * DEEP + b"a" * (DEEP - 1), (b"}" + text("a")) * DEEP + b"N" + b"s" * DEEP],
    ids=["tuples", "lists", "dicts"],
)
def test_deep_nesting_does_not_overrun_the_stack(opcodes: bytes) -> None:
    value = inert(b"\x80\x04" + opcodes + b".")
    assert len(value) == 1
    del value


def bomb(**state: Any) -> Callable[[], Any]:
    return lambda: {"ema": module("EDMPrecond", **state)}


def doubled(depth: int) -> Any:
    value: Any = [1]
    for _ in range(depth):
        value = [value, value]
    return value


def looped() -> Any:
    loop: list[Any] = []
    loop.append(loop)
    return loop


def lattice() -> Persistent:
    block = module("Block")
    for _ in range(14):
        block = module("Block", _modules={"a": block, "b": block})
    return block


def tower() -> Persistent:
    block = module("Block")
    for _ in range(20):
        block = module("Block", _modules={"a": block})
    return block


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (bomb(_init_kwargs={"a": doubled(40)}), "arguments of ema: expected at most 10000 values, 16 deep"),
        (bomb(_init_kwargs={"a": doubled(14)}), "arguments of ema: expected at most 10000 values, 16 deep"),
        (bomb(_init_args=(looped(),)), "arguments of ema: expected at most 10000 values, 16 deep"),
        (bomb(_modules={"a": lattice()}), "expected a tree of modules"),
        (bomb(_modules={"a": tower()}), "expected a tree of modules, 16 deep at most"),
        (bomb(_modules={"x" * 101: module("Block")}), "expected short names without dots, got 'xxx"),
        (bomb(_modules={"a.b": module("Block")}), "expected short names without dots, got 'a.b'"),
        (bomb(_parameters={"": torch.ones(1)}), "expected short names without dots, got ''"),
    ],
    ids=["lists", "wide", "loop", "lattice", "tower", "long name", "dotted name", "no name"],
)
def test_what_grows_without_end(data: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "snapshot.pkl").write_bytes(dumps(data))
    with pytest.raises(EDMPickleError, match=message):
        read_edm_pickle(tmp_path / "snapshot.pkl")


# Files that are something else ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: {"G": 1, "D": 2, "G_ema": 3}, "expected a dict with the key 'ema'.*, got 'G', 'D', 'G_ema'"),
        (lambda: [1], "expected a dict with the key 'ema', .* got list"),
        (lambda: {"ema": {"a": 1}}, "expected ema to be one of VPPrecond, .*, got dict"),
        (lambda: {"ema": module("Generator")}, "expected ema to be one of .*EDMPrecond, got 'Generator'"),
        (lambda: {"ema": nn.ModuleDict()}, "expected ema to be one of .*EDMPrecond, got 'ModuleDict'"),
        (lambda: {"ema": nn.Linear(1, 1)}, r"'torch\.nn\.modules\.linear\.Linear'"),
        (lambda: {"ema": np.ones(2)}, r"'numpy\._?core\.\S*\._reconstruct'"),
        (bomb(_parameters=None), "parameters, buffers and modules of the module ''"),
        (bomb(_parameters={"w": 3}), "w: expected a tensor, got int"),
        (bomb(_modules={"m": torch.ones(1)}), "the module 'm.': expected a module, got Tensor"),
        (
            bomb(_init_args=None),
            r"_init_args and _init_kwargs of ema: expected \(tuple, dict\), got \(NoneType",
        ),
        (bomb(_init_kwargs={"a": torch.ones(1)}), "arguments of ema: expected numbers, .* got Tensor"),
    ],
)
def test_other_pickles(data: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "snapshot.pkl").write_bytes(dumps(data))
    with pytest.raises(EDMPickleError, match=f"snapshot.pkl: .*{message}"):
        read_edm_pickle(tmp_path / "snapshot.pkl")


@pytest.mark.parametrize("encoder", ["plain", "array"])
def test_edm2_is_refused_by_name(encoder: str, tmp_path: Path) -> None:
    """EDM2 writes its encoder first, in some snapshots with arrays, and its ema is a Precond of MPConv."""

    def data() -> Any:
        scale = np.ones(4) if encoder == "array" else 1.0
        ema = module("Precond", _modules={"unet": module("UNet", _modules={"c": module("MPConv")})})
        return sys.modules["dnnlib.util"].EasyDict(encoder=Persistent("Encoder", scale=scale), ema=ema)

    (tmp_path / "snapshot.pkl").write_bytes(dumps(data))
    with pytest.raises(EDMPickleError, match="expected a snapshot of EDM, got one of EDM2"):
        read_edm_pickle(tmp_path / "snapshot.pkl")


def test_other_version(tmp_path: Path) -> None:
    def data() -> Any:
        ema = module("EDMPrecond")
        ema.meta["version"] = 5
        return {"ema": ema}

    (tmp_path / "snapshot.pkl").write_bytes(dumps(data))
    with pytest.raises(EDMPickleError, match="expected type 'class' and version 6, got 'class' and 5"):
        read_edm_pickle(tmp_path / "snapshot.pkl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a pickle, got an empty file"),
        (b"\x80", "truncated or damaged"),
        (b"not a pickle at all", "expected a pickle, got a file that begins with b'not a pi'"),
        (b"(dp0\n.", "expected a pickle, got a file that begins with b'\\(dp0"),
        (saved({"a": 1}, zip_file=True), r"begins with b'PK.*\(a zip file, as torch.save writes\)"),
        (pickle.dumps(3), "expected a dict with the key 'ema', .* got int"),
    ],
)
def test_other_files(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "snapshot.pkl").write_bytes(content)
    with pytest.raises(EDMPickleError, match=f"snapshot.pkl: .*{message}"):
        read_edm_pickle(tmp_path / "snapshot.pkl")


@pytest.mark.parametrize("read", [read_edm_pickle, import_edm])
def test_no_file(read: Any, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing.pkl"):
        with pytest.raises(FileNotFoundError, match="expected a network-snapshot"):
            read(path)


def small() -> bytes:
    return dumps(
        lambda: snapshot("EDMPrecond", {"a.weight": torch.ones(2, 3), "u": torch.ones(2)}, dropout=0.1)
    )


def test_truncated_files(tmp_path: Path) -> None:
    path, data = tmp_path / "snapshot.pkl", small()
    for length in range(1, len(data), 29):
        path.write_bytes(data[:length])
        with pytest.raises(EDMPickleError):
            read_edm_pickle(path)


def test_damaged_files_raise_one_kind_of_error(tmp_path: Path) -> None:
    """Random bytes of a good snapshot are replaced, dropped or doubled."""
    path, data, rng, refused = tmp_path / "snapshot.pkl", small(), random.Random(0), 0
    for _ in range(500):
        broken = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 5])):
            at, length = rng.randrange(len(broken)), rng.randrange(1, 9)
            match rng.randrange(3):
                case 0:
                    broken[at] = rng.randrange(256)
                case 1:
                    del broken[at : at + length]
                case _:
                    broken[at:at] = broken[at : at + length]
        path.write_bytes(broken)
        with nothing_runs(path):
            try:
                read_edm_pickle(path)
            except EDMPickleError:
                refused += 1
    assert 100 < refused < 500


# Import ----------------------------------------------------------------------------------------------


def imported(tmp_path: Path, class_name: str = "EDMPrecond", **changes: Any) -> Any:
    """A snapshot of the first model with changed arguments or, as `tensors`, a changed state dict."""
    state = EDMPrecond(tiny_unet()).state_dict()
    state |= changes.pop("tensors", {})
    kwargs = {"img_resolution": 8, "img_channels": 1, "model_type": "SongUNet", **SONG, **changes}
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    return import_edm(write(tmp_path / "snapshot.pkl", class_name, state, *kwargs.pop("args", ()), **kwargs))


HEAD = "model.map_layer0.weight"
HEAD_ARGUMENTS = ("img_resolution", "img_channels", "model_type")
INF = float("inf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "os.system"},
            "expected model_type to be one of SongUNet, DhariwalUNet, got 'os.system'",
        ),
        ({"model_type": 3}, "expected model_type to be one of"),
        (
            {"img_resolution": None},
            "EDMPrecond: expected img_resolution and img_channels, .* got 0 positional",
        ),
        ({"args": (8,)}, "every argument once"),
        (
            {**dict.fromkeys(HEAD_ARGUMENTS), "args": (8, 1, 0, False, 0, INF, 0.5, "SongUNet", 9)},
            "got 9 positional",
        ),
        ({"sigma_min": 2.0, "sigma_max": 1.0}, "expected 0 <= sigma_min < sigma_max, got 2.0 and 1.0"),
        ({"sigma_data": -1.0}, "EDMPrecond of SongUNet: expected a finite sigma_data > 0, got -1.0"),
        ({"sigma_data": "x"}, "EDMPrecond of SongUNet: "),
        ({"beta_d": 3.0}, "EDMPrecond of SongUNet: .*unexpected keyword argument 'beta_d'"),
        ({"model_channels": 15}, "EDMPrecond of SongUNet: model_channels: got 15"),
        ({"img_channels": {}}, "EDMPrecond of SongUNet: "),
        ({"img_channels": 2}, "tensors do not fit the arguments.*size mismatch"),
        ({"num_blocks": 2}, "tensors do not fit the arguments.*Missing key"),
        ({"tensors": {"model.surplus": torch.ones(1)}}, "do not fit the arguments.*Unexpected key"),
        (
            {"tensors": {HEAD: torch.full((32, 8), torch.nan)}},
            f"expected finite numbers, got others in {HEAD}",
        ),
        ({"tensors": {HEAD: torch.ones(32, 8).int()}}, "expected tensors of floating-point numbers"),
        # what would be larger than the file is not built
        ({"model_channels": 2**40}, "describe a network of .* numbers or more"),
        ({"num_blocks": 10**9}, "describe a network of"),
        ({"channel_mult": [1, 10**6]}, "describe a network of"),
        ({"channel_mult_emb": 10**6}, "describe a network of"),
        ({"channel_mult_noise": 10**6}, "describe a network of"),
        ({"label_dim": 10**9}, "describe a network of"),
        ({"augment_dim": 10**9}, "describe a network of"),
        ({"img_channels": 10**9}, "describe a network of"),
        ({"img_resolution": 2**20}, r"for images of 1099511627776; expected at most .* and 67108864"),
        ({"resample_filter": [1] * 5000}, "describe a network of"),
        ({"model_channels": 8.0}, r"model_channels: expected an integer >= 0, got 8\.0"),
        ({"num_blocks": -1}, "num_blocks: expected an integer >= 0, got -1"),
        ({"channel_mult": ["a"]}, r"channel_mult: expected integers, got \['a'\]"),
    ],
)
def test_arguments_that_make_no_model(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(EDMPickleError, match=re.compile(f"snapshot.pkl: .*{message}", re.S)):
        imported(tmp_path, **changes)


@pytest.mark.parametrize("changes", [{}, {"num_blocks": 10**9}], ids=str)
@pytest.mark.parametrize("M", [10**12, -(10**15), float("nan"), -INF])
@pytest.mark.parametrize("class_name", ["VPPrecond", "iDDPMPrecond"])
def test_number_of_levels_lifts_no_limit(
    class_name: str, M: float, changes: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(EDMPickleError, match="describe a network of"):
        imported(tmp_path, class_name, M=M, **changes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_weights_are_imported_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {name: tensor.to(dtype) for name, tensor in EDMPrecond(tiny_unet()).state_dict().items()}
    model = imported(tmp_path, tensors=state)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in model.parameters())


LARGE: list[dict[str, Any]] = [
    {"channel_mult": [8]},
    {"channel_mult": [1, 8]},
    {"channel_mult_emb": 100},
    {"num_blocks": 30},
    {"label_dim": 10_000},
    {"augment_dim": 10_000},
    {"in_channels": 3000},
    {"out_channels": 3000},
]


@pytest.mark.parametrize("changes", [{}, *LARGE], ids=str)
def test_size_is_a_lower_bound(changes: dict[str, Any]) -> None:
    """No network is refused for being larger than itself; what makes it large is counted."""
    for make, extra in ((tiny_unet, {}), (tiny_unet, NCSN), (adm, {"model_channels": 8})):
        net = make(**{**extra, **changes})
        size = sum(tensor.numel() for tensor in net.state_dict().values())
        _check_size(type(net), net.to_arguments(), size)
        if changes:
            with pytest.raises(EDMPickleError, match="describe a network"):
                _check_size(type(net), net.to_arguments(), size // 20)
