"""Hostile models: pairs of config.json and weights that do not fit each other, and pickles of EDM."""

import copy
import json
import pickletools
import struct
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import test_edm_pickle as edm
import torch
from cases import denoiser
from fuzz import CUTS, EDITS, ODD_TEXTS, PLAIN, TREES, campaign, clear_errors, mutated
from hypothesis import strategies as st

from gaussnet import EDMPrecond, FarFieldDenoiser, GaussianDenoiser, from_pretrained
from gaussnet.edm_import import import_edm
from gaussnet.edm_unpickler import EDMPickleError
from gaussnet.hub import CONFIG_NAME, WEIGHTS_NAME
from gaussnet.summary import summarise

MODELS = ("gaussian-rank-10", "cosine", "far-field", "mixture-classes", "delta-classes", "pca-local",
    "patch-els",
          "guided", "edm", "bypass", "vp", "ve", "iddpm")  # fmt: skip


@cache
def saved(name: str) -> tuple[dict[str, Any], bytes]:
    """The description and the weights of a small model."""
    match name:
        case "cosine":
            model: Any = GaussianDenoiser.fit(edm.randn(30, 2, 4, 4).float(), basis="cosine")
        case "far-field":
            model = FarFieldDenoiser(denoiser("gaussian-rank-10", torch.float32), 3)
        case _:
            model = denoiser(name, torch.float32)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return json.loads((Path(folder) / CONFIG_NAME).read_text()), (
            Path(folder) / WEIGHTS_NAME
        ).read_bytes()


def places(tree: Any) -> list[tuple[Any, Any]]:
    """All (container, key) of a tree."""
    if not isinstance(tree, (dict, list)):
        return []
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    return [pair for key in keys for pair in [(tree, key), *places(tree[key])]]


@st.composite
def configs(draw: st.DrawFn, name: str) -> bytes:
    """A config.json, changed here and there."""
    config = copy.deepcopy(saved(name)[0])
    for _ in range(draw(st.integers(0, 3))):
        where = [place for place in places(config) if place[1] != "gaussnet_version"]
        if not where:
            break
        container, key = draw(st.sampled_from(where))
        match draw(
            st.sampled_from(["value", "value", "value", "tree", "drop", "add", "nest", "other", "wrap"])
        ):
            case "value":
                container[key] = draw(PLAIN)
            case "tree":
                container[key] = draw(TREES)
            case "drop":
                del container[key]
            case "add" if isinstance(container, dict):
                container[
                    draw(ODD_TEXTS | st.sampled_from(["device", "dtype", "local_dir", "endpoint", "config"]))
                ] = draw(PLAIN)
            case "nest":
                container[key] = copy.deepcopy(config)
            case "other":
                container[key] = copy.deepcopy(saved(draw(st.sampled_from(MODELS)))[0])
            case _:
                container[key] = [container[key]]
    text = json.dumps(config).encode()
    return mutated(text, draw(EDITS), draw(CUTS)) if draw(st.integers(0, 4)) == 0 else text


@st.composite
def weights(draw: st.DrawFn, name: str) -> bytes:
    """A safetensors file, its header changed, or its bytes."""
    data = saved(name)[1]
    match draw(st.sampled_from(["right", "header", "bytes", "numbers", "other", "none"])):
        case "header":
            (length,) = struct.unpack("<Q", data[:8])
            header = json.loads(data[8 : 8 + length])
            for _ in range(draw(st.integers(1, 2))):
                container, key = draw(st.sampled_from(places(header)))
                if draw(st.booleans()):
                    container[key] = draw(
                        st.sampled_from(["F64", "I64", "BOOL", "BF16", "F8_E4M3", "U8", "x"]) | PLAIN
                    )
                else:
                    del container[key]
                if not places(header):
                    break
            text = json.dumps(header).encode()
            return struct.pack("<Q", len(text)) + text + data[8 + length :]
        case "bytes":
            return mutated(data[: 1 << 14], draw(EDITS), draw(CUTS)) + data[1 << 14 :]
        case "numbers":
            return data[:-400] + draw(st.sampled_from([b"\xff", b"\x00", b"\x7f", b"\x80"])) * 400
        case "other":
            return saved(draw(st.sampled_from(MODELS)))[1]
        case "none":
            return draw(
                st.sampled_from(
                    [b"", b"\xff" * 8, struct.pack("<Q", 2**62) + b"{}", b"\x02" + bytes(7) + b"{}"]
                )
            )
        case _:
            return data


PAIRS = st.sampled_from(MODELS).flatmap(
    lambda name: st.tuples(configs(name), st.just(saved(name)[1]) | weights(name))
)
DEEP = b'{"class_name": "FarFieldDenoiser", "arguments": {"order": 1, "gaussian": '


def described(name: str, **arguments: Any) -> bytes:
    return json.dumps({"class_name": name, "arguments": arguments}).encode()


KNOWN = [
    (b"[" * 100_000, b""),
    (DEEP * 200 + b"1" + b"}}" * 200, b""),
    (b'{"class_name": ["GaussianDenoiser"], "arguments": {}}', b""),
    (b'{"class_name": "GaussianDenoiser", "arguments": {"event_shape": [1000000000000], "rank": 0}}', b""),
    (b'{"class_name": "GaussianDenoiser", "arguments": {"event_shape": [-1], "rank": 1}}', b""),
    (described("DeltaDenoiser", event_shape=[1, 8, 8], size=10**9, labelled=False, chunk_size=1), b""),
    (described("SongUNet", img_resolution=8, in_channels=1, out_channels=1, model_channels=10**5), b""),
    (described("SongUNet", img_resolution=8, in_channels=1, out_channels=1, num_blocks=10**9), b""),
    (b'{"class_name": "MLP", "arguments": {}}', b""),
    (b'{"class_name": "object", "arguments": {}}', b""),
]  # fmt: skip


@campaign(PAIRS, known=[(pair,) for pair in KNOWN], few=20, many=5000)
def test_models(folder: Path, pair: tuple[bytes, bytes]) -> None:
    (folder / CONFIG_NAME).write_bytes(pair[0])
    (folder / WEIGHTS_NAME).write_bytes(pair[1])
    with clear_errors(folder.name, kinds=(ValueError, TypeError)):
        model = from_pretrained(folder)
        model.provenance = {}
        text = summarise(model)
        assert "nan" not in text.lower(), text


def test_config_json_gives_no_arguments_to_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a repository on the hub, both files are asked for as the caller says, whatever config.json says."""
    config = {**saved("gaussian-rank-10")[0], "local_dir": "/evil", "endpoint": "http://evil", "token": "x"}
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config))
    (tmp_path / WEIGHTS_NAME).write_bytes(saved("gaussian-rank-10")[1])
    asked: list[Any] = []

    def download(**arguments: Any) -> str:
        asked.append(arguments)
        return str(tmp_path / arguments["filename"])

    monkeypatch.setattr("gaussnet.hub.hf_hub_download", download)
    assert isinstance(from_pretrained("some/model", revision="main"), GaussianDenoiser)
    own = {"repo_id": "some/model", "revision": "main"}
    assert asked == [{**own, "filename": CONFIG_NAME}, {**own, "filename": WEIGHTS_NAME}]


# Pickles ----------------------------------------------------------------------------------------------


@cache
def opcodes() -> tuple[bytes, ...]:
    """A whole snapshot of EDM, split into its opcodes."""
    model = EDMPrecond(edm.tiny_unet())
    kwargs = {"img_resolution": 8, "img_channels": 1, "model_type": "SongUNet", **edm.SONG}
    data = edm.dumps(lambda: edm.snapshot("EDMPrecond", model.state_dict(), **kwargs), 2)
    starts = [position for _, _, position in pickletools.genops(data) if position is not None]
    return tuple(data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=True))


CODES = st.one_of(
    st.sampled_from([opcode.code.encode("latin1") for opcode in pickletools.opcodes]),
    st.sampled_from(
        [b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch.nn.modules.container\nModuleDict\n",
            b"X\x02\x00\x00\x00id", b"(X\x02\x00\x00\x00id", b"tR", b"o",
         b"i", b"ios\nsystem\n", b"\x8c\x02os\x8c\x06system\x93", b"\x82\x01", b"P0\n", b"Q",
         b"\x8a\xff" + b"\xff" * 255, b"\x8b\xff\xff\xff\x7f",
         b"X\xff\xff\xff\x7f", b"\x8d" + b"\xff" * 8, b"J\xff\xff\xff\xff", b"J\xff\xff\xff\x7f",
         b"G\x7f\xf8" + bytes(6), b"r\xff\xff\xff\x7f", b"j\xff\xff\xff\x7f", b"}}", b"0", b"2"]
    ),
    st.binary(max_size=4),
)  # fmt: skip
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["drop", "twice", "swap", "insert", "replace", "argument", "move"]),
        st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True), CODES, EDITS,
    ),
    min_size=1, max_size=4,
)  # fmt: skip


@campaign(CHANGES, few=40, many=5000)
def test_edm_pickles(folder: Path, changes: list[tuple[str, float, float, bytes, Any]]) -> None:
    """Opcodes of a good snapshot are dropped, doubled, moved, replaced or given other arguments."""
    parts = list(opcodes())
    for kind, where, other, code, edits in changes:
        at, to = int(where * len(parts)), int(other * len(parts))
        match kind:
            case "drop":
                parts[at] = b""
            case "twice":
                parts[at] *= 2
            case "swap":
                parts[at], parts[to] = parts[to], parts[at]
            case "insert":
                parts[at] += code
            case "replace":
                parts[at] = code
            case "argument":
                parts[at] = parts[at][:1] + mutated(parts[at][1:], edits)
            case _:
                parts.insert(to, parts.pop(at))
    (folder / "snapshot.pkl").write_bytes(b"".join(parts))
    with clear_errors("snapshot.pkl", kinds=(EDMPickleError,)):
        model = import_edm(folder / "snapshot.pkl")
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
