"""What the tests of hostile files share: campaigns of random inputs, and a watch over what reading them does.

A property gets an empty folder and an input. Whatever the input, it has to hold, and while it is tested

- no file is opened for writing outside of the folder and of the scratch folder,
- nothing is unpickled, no process is started, no connection is opened,
- no input takes long, and none takes much memory.

Inputs are the same in every run. FUZZ_INPUTS=N tries N in place of the thousands of the slow tests, and
FUZZ_SEED=S others.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CLEAR = (ValueError, TypeError, FileNotFoundError)
SECONDS = 20.0  # of one input: far more than any takes, far less than a hang
MEMORY = 1 << 20  # KiB that a whole campaign may add to what the process held at most
FORBIDDEN = ("pickle.find_class", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn",
             "subprocess.Popen", "socket.connect", "socket.bind")  # fmt: skip
SLOW = (
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.filter_too_much,
    HealthCheck.large_base_example,
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_watched: tuple[str, ...] | None = None
_seen: list[str] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is None:
        return
    if event in FORBIDDEN:
        _seen.append(f"{event}{arguments!r:.200}")
    paths: list[Any] = []
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING:
        paths = [arguments[0]]
    elif event in (
        "os.mkdir",
        "os.remove",
        "os.rename",
        "os.rmdir",
        "shutil.rmtree",
        "os.symlink",
        "os.link",
        "os.truncate",
    ):
        within = event in ("os.remove", "os.rmdir") and arguments[1] != -1  # names in a folder that is open
        paths = [] if within else list(arguments[:2])
    names = [os.fsdecode(path) for path in paths if isinstance(path, (str, bytes, os.PathLike))]
    _seen.extend(f"{event} of {name!r}" for name in names if not _inside(name))


def _inside(path: str) -> bool:
    return path == os.devnull or os.path.abspath(path).startswith(_watched or ())


sys.addaudithook(_audit)


@contextmanager
def watched(*folders: Path) -> Iterator[None]:
    """Fails if the block unpickles, starts, connects to or writes anything outside of the folders."""
    global _watched
    _seen.clear()
    _watched = tuple(f"{folder}{end}" for folder in folders for end in ("", os.sep))
    try:
        yield
    finally:
        _watched = None
    assert not _seen, f"forbidden: {_seen[:5]}"


@contextmanager
def clear_errors(*names: str, kinds: tuple[type[Exception], ...] = CLEAR) -> Iterator[None]:
    """Lets errors of these kinds pass, if their texts are short and hold one of the names."""
    try:
        yield
    except kinds as error:
        text = str(error)
        told = f"{type(error).__name__}: {text!r:.500}"
        assert text.strip(), f"an error without a text: {told}"
        assert len(text) < 20_000, f"an endless text: {told}"
        assert not names or any(name in text for name in names), f"expected one of {names} in {told}"


def campaign(
    *strategies: st.SearchStrategy[Any], known: Sequence[Any] = (), few: int = 25, many: int = 2000
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a test of a property(folder, *values): with `few` inputs, and with `many` in a slow test.

    Args:
        strategies: of the values.
        known: inputs, tuples if there are several values, that are tried first.
        few: number of inputs of the fast test.
        many: of the slow one.
    """

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        slow = (pytest.mark.slow, pytest.mark.timeout(7200))

        @pytest.mark.parametrize("inputs", [few, pytest.param(many, marks=slow)], ids=["few", "many"])
        def test(inputs: int, tmp_path: Path) -> None:
            count = int(os.environ.get("FUZZ_INPUTS", many)) if inputs == many else few
            seed = os.environ.get("FUZZ_SEED")
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

            def one(values: tuple[Any, ...]) -> None:
                with tempfile.TemporaryDirectory(dir=tmp_path) as name, scratch(tmp_path / "scratch") as own:
                    start = time.process_time()
                    with watched(Path(name), own):
                        check(Path(name), *values)
                    took = time.process_time() - start
                assert took < SECONDS, f"{took:.0f} s"
                grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
                assert grown < MEMORY, f"{grown / 1024:.0f} MiB"

            for values in known:
                one(values if isinstance(values, tuple) else (values,))
            run = settings(
                max_examples=count,
                derandomize=seed is None,
                database=None,
                deadline=None,
                suppress_health_check=SLOW,
                verbosity=hypothesis.Verbosity.normal,
            )(given(st.tuples(*strategies))(one))
            if seed is not None:
                run = hypothesis.seed(int(seed))(run)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run()

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        vars(test).update(check=check, strategies=strategies, known=known)
        return test

    return decorate


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """Makes a folder that of all temporary files."""
    folder.mkdir(exist_ok=True)
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield folder
    finally:
        tempfile.tempdir = before


# Strategies -------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2, 3, 4, 8, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 10**30,
        10**400]),
    st.sampled_from([0.0, -0.0, 0.5, 1e-320, 1e308, -1e308, float("inf"), float("-inf"), float("nan")]),
    st.integers(-5, 20),
    st.floats(),
)  # fmt: skip
ODD_TEXTS = st.one_of(
    st.sampled_from(
        ["", " ", ".", "..", "/", "../../evil", "/tmp/evil", "a\x00b", "a\nb", "\x1b[2J", "\ud800", "\u202e",
            "é", "None",
         "nan", "inf", "-inf", "1e999", "0x10", "9" * 5000, "a" * 300, "${oc.env:HOME}", "${x", "{", "[",
         "${out}", "~", "*", "&a", "!!python/object/apply:os.system [id]"]
    ),
    st.text(max_size=20),
)  # fmt: skip
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, ODD_TEXTS)
TREES = st.recursive(
    PLAIN, lambda part: st.one_of(st.lists(part, max_size=4), st.dictionaries(ODD_TEXTS, part, max_size=4)),
        max_leaves=8
)  # fmt: skip
EDITS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6)
CUTS = st.one_of(st.none(), st.none(), st.floats(0, 1))


def mutated(data: bytes, edits: Sequence[tuple[float, int]], cut: float | None = None) -> bytes:
    """Bytes with some of them replaced, at shares of the length, and cut off at a share of it."""
    edited = bytearray(data)
    for where, byte in edits:
        if edited:
            edited[int(where * len(edited))] = byte
    return bytes(edited if cut is None else edited[: int(cut * len(edited))])


@contextmanager
def bounded(size: int) -> Iterator[None]:
    """Lets the block have `size` more bytes of memory than there are, and no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
