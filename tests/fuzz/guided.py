"""Coverage-guided fuzzing of what parses bytes, by atheris (pip install atheris; Linux, Python up to 3.11).

    cd tests && python -m fuzz.guided edm-pickles -max_total_time=600

Targets are in `TARGETS`; further arguments are those of libFuzzer. Each begins with good files of its kind,
which libFuzzer changes so that new lines of the parsers are reached. What has to hold is that of the
campaigns: errors are clear, nothing is unpickled, started or written. An input that breaks it is kept as
crash-... in the working folder, and becomes a case of tests/test_fuzz_*.py.
"""

from __future__ import annotations

import io
import struct
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from fuzz import clear_errors, watched

PARSERS = (
    "gaussnet.edm_unpickler",
    "gaussnet.edm_pickle",
    "gaussnet.data",
)  # `main` imports them


def edm_pickle(path: Path) -> None:
    from gaussnet.edm_pickle import EDMPickleError, read_edm_pickle

    with clear_errors(path.name, kinds=(EDMPickleError,)):
        read_edm_pickle(path)


def images(path: Path) -> None:
    from gaussnet.data import open_images

    with clear_errors(path.name):
        data = open_images(path)
        for index in {0, len(data) - 1}:
            data[index]


def good_pickles() -> list[bytes]:
    from test_fuzz_models import opcodes

    return [b"".join(opcodes())]


def good_idx() -> list[bytes]:
    return [struct.pack(">4B3I", 0, 0, 8, 3, 2, 3, 3) + bytes(range(18))]


def good_arrays(save: Callable[[Any, Any], None]) -> list[bytes]:
    found: list[bytes] = []
    for array in (np.zeros((2, 4, 4), np.uint8), np.zeros((2, 4, 4, 3), np.float32)):
        stream = io.BytesIO()
        save(stream, array)
        found.append(stream.getvalue())
    return found


def good_zips() -> list[bytes]:
    from test_fuzz_data import ZIPS

    return [case[0] for case in ZIPS]


TARGETS: dict[str, tuple[str, Callable[[Path], None], Callable[[], list[bytes]]]] = {
    "edm-pickles": ("snapshot.pkl", edm_pickle, good_pickles),
    "idx": ("train-images-idx3-ubyte", images, good_idx),
    "npy": ("data.npy", images, lambda: good_arrays(lambda stream, array: np.save(stream, array))),
    "npz": ("data.npz", images, lambda: good_arrays(lambda stream, array: np.savez(stream, images=array))),
    "zips": ("data.zip", images, good_zips),
}


def main() -> None:
    """Fuzzes one target."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        raise SystemExit(f"expected a target, one of {', '.join(TARGETS)}, got {sys.argv[1:]}")
    try:
        atheris: Any = import_module("atheris")
    except ImportError as error:
        raise SystemExit("guided fuzzing needs: pip install atheris") from error
    with atheris.instrument_imports(include=list(PARSERS)):
        for parser in PARSERS:
            import_module(parser)
    name, check, good = TARGETS[sys.argv[1]]
    with tempfile.TemporaryDirectory() as own, tempfile.TemporaryDirectory() as corpus:
        for number, content in enumerate(good()):
            Path(corpus, str(number)).write_bytes(content)

        def one(data: bytes) -> None:
            path = Path(own, name)
            path.write_bytes(data)
            with watched(Path(own)):
                check(path)

        limits = ["-timeout=20", "-rss_limit_mb=4096", "-max_len=65536"]
        atheris.Setup([sys.argv[0], *limits, *sys.argv[2:], corpus], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
