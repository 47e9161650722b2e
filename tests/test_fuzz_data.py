"""Hostile data sets: zips, folders, IDX files and arrays that a stranger wrote."""

import gzip
import io
import json
import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from fuzz import CUTS, EDITS, NUMBERS, ODD_TEXTS, TREES, bounded, campaign, clear_errors, mutated, watched
from hypothesis import strategies as st
from PIL import Image

from gaussnet.cli import main
from gaussnet.data import ImageError, open_images
from gaussnet.data.files import decode


class Canary:
    """Fails the test if it is ever unpickled: the watch over a campaign forbids to look up a class."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("the canary ran",)


def look(path: Path, **options: Any) -> None:
    """Opens a data set and reads images, labels and its description; errors have to name the file."""
    with clear_errors(path.name):
        data = open_images(path, **options)
        repr(data)
        images, _ = data[range(min(3, len(data)))]
        assert data.to_float(images).isfinite().all()


def encoded(format: str, mode: str = "RGB", size: tuple[int, int] = (4, 3)) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, 1).save(stream, format)
    return stream.getvalue()


def huge_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes that declares any size."""
    data = bytearray(encoded("PNG"))
    data[16:24] = struct.pack(">II", width, height)
    return bytes(data[:29]) + struct.pack(">I", zlib.crc32(data[12:29])) + bytes(data[33:])


IMAGES = [
    encoded("PNG"), encoded("PNG"), encoded("PNG"), encoded("JPEG"), encoded("BMP"), encoded("WEBP"),
        encoded("PNG", "L"), encoded("PNG", "1"),
    encoded("PNG", "LA"), encoded("PNG", "P"), encoded("PNG", "RGBA"), encoded("PNG", "I;16"), encoded("JPEG",
        "CMYK"),
    encoded("GIF", "L"), encoded("TIFF"), encoded("PNG", size=(1, 1)), b"", b"\x89PNG\r\n\x1a\n",
    huge_png(2**31 - 1, 2**31 - 1), huge_png(9000, 9000), huge_png(0, 5), huge_png(40000, 2),
]  # fmt: skip
CONTENTS = st.builds(mutated, st.sampled_from(IMAGES), EDITS, CUTS)
NAMES = st.one_of(
    st.sampled_from(["a.png", "b.png", "00000/img00000000.png", "00001/a.jpg", "c.PNG", "../evil.png",
        "/tmp/evil.png", "../../evil.png",
                     "C:\\evil.png", "a.png/b.png", "__MACOSX/a.png", ".hidden.png", "dir/", "a.txt",
                     "dataset.json", "x/dataset.json", "con.bmp", "..png", "e\u0301.webp"]),
    st.builds(lambda name, suffix: name + suffix, ODD_TEXTS, st.sampled_from([".png", ".jpg", ".webp", ""])),
)  # fmt: skip
LABELS = st.one_of(st.integers(0, 9), NUMBERS, TREES)
METADATA = st.one_of(
    st.builds(lambda names, label: {"labels": [[name, label] for name in names]}, st.lists(NAMES, max_size=4),
        LABELS),
    st.builds(lambda labels: {"labels": labels}, TREES),
    st.just({"labels": None}),
    TREES,
).map(lambda tree: json.dumps(tree).encode()) | st.sampled_from(
    [b"[" * 100_000, b'{"labels":' * 3000, b"\xff\xfe", b"\x00", b"{", b"9" * 10_000,
        b'{"labels": [["a.png", 1' + b"0" * 5000 + b"]]}"]
)  # fmt: skip


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    """A zip: members of any names, kinds and sizes, then damaged or not."""
    stream = io.BytesIO()
    names = draw(st.lists(NAMES, max_size=5))
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            info = zipfile.ZipInfo(name.encode("utf-8", "replace").decode())
            info.compress_type = draw(st.sampled_from([0, 0, 8, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]))
            info.external_attr = draw(st.sampled_from([0, 0o120777 << 16, 0o040755 << 16, 0xFFFFFFFF]))
            link = info.external_attr == 0o120777 << 16
            archive.writestr(info, b"/etc/passwd" if link else draw(CONTENTS))
        if draw(st.booleans()):
            fitting = json.dumps({"labels": [[name, 1] for name in names]}).encode()
            archive.writestr("dataset.json", draw(st.just(fitting) | METADATA))
        if draw(st.booleans()):
            archive.comment = b"PK\x05\x06" * 5
    data = stream.getvalue()
    if draw(st.booleans()):  # the fields of the central directory: flags, methods, sizes, offsets
        fields = [at + delta for at in _all(data, b"PK\x01\x02") for delta in range(4, 46)]
        fields += [at + delta for at in _all(data, b"PK\x03\x04") for delta in range(4, 30)]
        fields += [at + delta for at in _all(data, b"PK\x05\x06") for delta in range(4, 22)]
        edited = bytearray(data)
        for _ in range(draw(st.integers(0, 3))):
            at, value = draw(st.sampled_from(fields)), draw(st.sampled_from([0, 1, 8, 99, 127, 255]))
            if at < len(edited):
                edited[at] = value
        return bytes(edited)
    return mutated(data, draw(EDITS) if draw(st.booleans()) else [], draw(CUTS))


def _all(data: bytes, mark: bytes) -> list[int]:
    return [at for at in range(len(data)) if data.startswith(mark, at)]


def zipped(path: Path, members: dict[str, bytes], claimed: int | None = None, method: int = 8) -> Path:
    """A zip, whose directory claims another size of its first member, if one is given."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, method)  # which takes any name
        if claimed is not None:
            archive.filelist[0].file_size = claimed
    return path


def in_memory(members: dict[str, bytes], method: int = 0) -> bytes:
    with TemporaryDirectory() as folder:
        return zipped(Path(folder) / "x.zip", members, method=method).read_bytes()


def npy(shape: tuple[int, ...], values: int = 18, dtype: str = "|u1") -> bytes:
    """A .npy file of zeros, of a shape that need not fit."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue() + bytes(values)


def npy_of(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode("latin1")


# What was once no clear error.
ZIPS: list[tuple[bytes, dict[str, Any]]] = [
    (in_memory({"": b"", "a.png": IMAGES[0]}), {}),  # a member without a name
    (in_memory({"a.png": IMAGES[0], "dataset.json": b"[" * 100_000}), {}),
    (in_memory({"a.png": bytes(999)}, zipfile.ZIP_BZIP2).replace(b"1AY&SY", b"1AY&SX"), {}),
    (in_memory({"a.png": IMAGES[0]}).replace(b"PK\x01\x02\x14\x03\x14", b"PK\x01\x02\x14\x03\xff"), {}),
]
NPYS = [
    npy_of("[" * 90),
    npy_of("(" * 200),
    npy_of("9" * 9000),
    b"",
    npy((2**32, 2**32)),
    pickle.dumps(Canary(), 0),
]
NPZS = [
    in_memory({"images.npy": pickle.dumps(Canary(), 0)}),  # NumPy gives its bytes
    in_memory({"images.npy": npy((2, 3, 3)), "labels": b"no array"}),
    in_memory({"x.npy": npy_of("[" * 90)}),
    in_memory({"x.npy": npy((2, 3, 3))}).replace(
        b"\x14\x00\x00\x00\x00\x00\x00", b"\x14\x00\x00\x00\x63\x00\x00"
    ),
]


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "mode": st.sampled_from(["L", "RGB", "RGBA"]),
        "resolution": st.sampled_from([1, 5]),
        "on_error": st.just("skip"),
        "cache": st.sampled_from([0, 100]),
    },
)


@campaign(archives(), OPTIONS, known=ZIPS, few=40, many=4000)
def test_zips(folder: Path, content: bytes, options: dict[str, Any]) -> None:
    path = folder / "data.zip"
    path.write_bytes(content)
    look(path, **options)
    assert [entry.name for entry in folder.iterdir()] == ["data.zip"]


@campaign(
    st.lists(st.tuples(NAMES, CONTENTS), max_size=5),
    st.none() | METADATA,
    OPTIONS,
    known=[([("a.png", IMAGES[0])], b"[" * 100_000, {})],
    few=30,
    many=4000,
)
def test_folders(
    folder: Path, files: list[tuple[str, bytes]], metadata: bytes | None, options: dict[str, Any]
) -> None:
    inside = folder / "one" / "two" / "data"
    inside.mkdir(parents=True)
    for name, content in files:
        path = inside / name.replace("..", "dots").lstrip("/")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except (OSError, ValueError):  # no name of a file here
            continue
    if metadata is not None and not (inside / "dataset.json").is_dir():
        (inside / "dataset.json").write_bytes(metadata)
    look(inside, **options)


SIZES = st.sampled_from([0, 1, 2, 3, 4, 255, 2**16, 2**31, 2**32 - 1])


@st.composite
def idx_files(draw: st.DrawFn, ndim: int) -> bytes:
    """An IDX file, right or nearly so."""
    shape = draw(st.lists(SIZES, min_size=ndim, max_size=ndim) | st.just([2, 3, 3][:ndim]))
    magic = draw(
        st.sampled_from([bytes([0, 0, 8, ndim])] * 4 + [bytes(4), b"\x00\x00\x0d\x03", b"\x1f\x8b\x08\x00"])
    )
    data = magic + struct.pack(f">{len(shape)}I", *shape) + bytes(draw(st.sampled_from([0, 2, 18, 19, 5000])))
    return mutated(data, draw(EDITS) if draw(st.booleans()) else [], draw(CUTS))


EMPTY = struct.pack(">4I", 2051, 2**32 - 1, 0, 2**32 - 1)


@campaign(
    idx_files(3),
    st.none() | idx_files(1),
    st.booleans(),
    EDITS,
    CUTS,
    known=[(EMPTY, None, False, [], None), (EMPTY, None, True, [], None)],
    few=30,
    many=4000,
)
def test_idx_files(
    folder: Path, images: bytes, labels: bytes | None, packed: bool, edits: Any, cut: float | None
) -> None:
    suffix = ".gz" if packed else ""
    path = folder / f"train-images-idx3-ubyte{suffix}"
    path.write_bytes(mutated(gzip.compress(images), edits, cut) if packed else images)
    if labels is not None:
        (folder / "train-labels-idx1-ubyte").write_bytes(labels)
    for source in (path, folder):
        with clear_errors("train-images", "train-labels", folder.name):
            open_images(source)[0]


DTYPES = [
    "|u1",
    "|u1",
    "|u1",
    "<f4",
    ">f8",
    "<f2",
    "|b1",
    "<i4",
    ">u8",
    "<c8",
    "|O",
    "|V8",
    "<U4",
    "|S3",
    "<M8[s]",
    "<f16",
    "(2,)u1",
    "u1,f4",
    "x",
    "",
    "|u1\x00",
]
SHAPES = st.one_of(
    st.just((2, 3, 3)),
    st.lists(st.sampled_from([0, 1, 2, 3, 4, -1, 2**31, 2**32, 2**62, 2**63, 10**30, True, 1.5, "a", None]),
        max_size=5).map(tuple),
)  # fmt: skip
HEADERS = st.one_of(
    st.builds(
        lambda descr, fortran, shape: repr({"descr": descr, "fortran_order": fortran, "shape": shape}),
        st.sampled_from(DTYPES) | st.sampled_from([[("a", "|u1")], [("a", "|O")], [], None, 5, ("|u1", (10**9,
            ))]),
        st.sampled_from([False, False, True, 1, None, "x"]),
        SHAPES,
    ),
    st.sampled_from(
        ["", "{", "()", "[" * 9000, "(" * 200,
         "{'descr': '|u1', 'fortran_order': False, 'shape': (2, 3, 3), 'x': __import__('os').system('id')}",
         "__import__('os').system('id')", "{'descr': '|u1'}", "{1: 2}", "\x00", "-" * 9000 + "1", "{" * 90,
         "9" * 9000, "{[]: 1}",
         "{'descr': '|u1', 'fortran_order': False, 'shape': (2L, 3L, 3L)}",
         "{'descr': '|u1', 'fortran_order': False, 'shape': 18}",
         "{'descr': '|u1', 'fortran_order': False, 'shape': (" + "1," * 70 + ")}",
         "{'descr': '|u1', 'fortran_order': False, 'shape': (2, 3, 3), 'shape': 5}", "é" * 10, "'" ]
    ),
    st.text(max_size=30),
)  # fmt: skip


@st.composite
def npy_files(draw: st.DrawFn) -> bytes:
    """A .npy file: any header, any version, any number of values; or a pickle."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        stream = io.BytesIO()
        np.save(stream, np.array([Canary()] * 2, dtype=object), allow_pickle=True)
        return stream.getvalue()
    if kind == 1:
        return pickle.dumps(Canary(), protocol=draw(st.integers(0, 4)))
    version = draw(st.sampled_from([1, 1, 1, 2, 3, 0, 9]))
    text = draw(HEADERS)
    header = text.encode("utf-8" if version == 3 else "latin1", "replace") + b"\n"
    length = struct.pack(
        "<H" if version == 1 else "<I", draw(st.just(len(header)) | st.sampled_from([0, 1, 65535]))
    )
    data = (
        b"\x93NUMPY"
        + bytes([version, 0])
        + length
        + header
        + bytes(draw(st.sampled_from([0, 17, 18, 19, 400])))
    )
    return mutated(data, draw(EDITS) if draw(st.booleans()) else [], draw(CUTS))


ARRAYS = st.fixed_dictionaries(
    {}, optional={"scaling": st.sampled_from([(0, 1), "none"]), "layout": st.sampled_from(["NCHW", "NHWC"]),
        "on_error": st.just("skip")}
)  # fmt: skip


@campaign(npy_files(), ARRAYS, known=[(content, {}) for content in NPYS], few=40, many=6000)
def test_npy_files(folder: Path, content: bytes, options: dict[str, Any]) -> None:
    (folder / "data.npy").write_bytes(content)
    look(folder / "data.npy", **options)


@campaign(
    st.lists(st.tuples(st.sampled_from(["images", "x", "arr_0", "labels", "y", "../evil"]), npy_files()),
        max_size=3),
    st.sampled_from([".npy", ".npy", "", ".NPY"]), st.booleans(), EDITS, CUTS, ARRAYS, few=60, many=6000,
)  # fmt: skip
def test_npz_files(
    folder: Path,
    members: list[tuple[str, bytes]],
    suffix: str,
    damaged: bool,
    edits: Any,
    cut: Any,
    options: Any,
) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name + suffix, content)
    content = stream.getvalue()
    (folder / "data.npz").write_bytes(mutated(content, edits, cut) if damaged else content)
    look(folder / "data.npz", **options)


# Bombs ------------------------------------------------------------------------------------------------


def bombs(folder: Path) -> dict[str, tuple[Path, str]]:
    """Small files that announce much, and what the error has to say."""
    png = encoded("PNG")
    metadata = b'{"labels": [' + b"[]," * 10_000_000 + b"[]]}"
    idx = folder / "train-images-idx3-ubyte.gz"
    idx.write_bytes(gzip.compress(struct.pack(">4I", 2051, 60_000, 300, 300)))
    (folder / "folder").mkdir()
    (folder / "folder" / "a.png").write_bytes(png)
    (folder / "folder" / "dataset.json").write_bytes(metadata)
    (folder / "giant.npy").write_bytes(npy((2**20, 2**10, 2**10)))
    (folder / "wraps.npy").write_bytes(npy((2**32, 2**32)))
    return {
        "metadata": (zipped(folder / "a.zip", {"a.png": png, "dataset.json": metadata}),
            "refused: 30000016 bytes"),
        "metadata of a folder": (folder / "folder", "refused: 30000016 bytes"),
        "member": (zipped(folder / "b.zip", {"a.png": bytes(10**6)}, claimed=2**40),
        "refused: 1099511627776 bytes"),
        "pixels": (zipped(folder / "c.zip", {"a.png": huge_png(2**20, 2**20)}), "decompression bomb"),
        "members of an npz": (zipped(folder / "d.npz", {"x.npy": npy((2, 3, 3))}, claimed=2**40),
        "more values"),
        "header in an npz": (zipped(folder / "e.npz", {"x.npy": npy((2**20, 2**10, 2**10))}),
        "expected a .npz"),
        "idx": (idx, "more values"),
        "npy": (folder / "giant.npy", "expected a .npy"),
        "npy whose size overflows": (folder / "wraps.npy", "expected a .npy"),
    }  # fmt: skip


def test_bombs(tmp_path: Path) -> None:
    """No small file takes gigabytes."""
    for name, (path, message) in bombs(tmp_path).items():
        assert path.is_dir() or path.stat().st_size < 10**6, name
        with bounded(1 << 29), pytest.raises(ValueError, match=message):
            open_images(path)


@pytest.mark.slow
def test_large_images_are_not_held_at_once(tmp_path: Path) -> None:
    """32 images of 36 million pixels in a megabyte are opened with less memory than half of them take."""
    stream = io.BytesIO()
    Image.new("1", (6000, 6000)).save(stream, "PNG")
    path = zipped(tmp_path / "large.zip", {f"{i}.png": stream.getvalue() for i in range(32)})
    with bounded(3 << 29):
        data = open_images(path, cache=0)
    assert data.event_shape == (1, 6000, 6000)


def test_other_sides_are_not_decoded() -> None:
    """An image whose header tells another size than most is refused before there is memory for it."""
    with bounded(1 << 26), pytest.raises(ImageError, match=r"expected 3 x 3 x 4 .*, got 3 x 9000 x 9000"):
        decode(huge_png(9000, 9000), "a.png", shape=(3, 3, 4))


@pytest.mark.parametrize("content", [b"", b"no array", npy((2,)), npy((12,), 36, "<U3"), pickle.dumps([1])])
def test_groups_of_a_fit(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--groups takes an array of integers from a .npy file, and nothing else."""
    np.save(tmp_path / "data.npy", np.arange(12 * 4, dtype=np.uint8).reshape(12, 2, 2))
    (tmp_path / "groups.npy").write_bytes(content)
    line = ["fit", tmp_path / "data.npy", "--out", tmp_path / "out", "--groups", tmp_path / "groups.npy"]
    assert main([str(part) for part in line]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", NPZS)
def test_members_that_are_no_arrays(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    path.write_bytes(content)
    with watched(tmp_path), pytest.raises(ValueError, match=r"data\.npz: expected a \.npz file of arrays"):
        open_images(path)
