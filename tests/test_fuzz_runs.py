"""Hostile runs, whose page and status are asked for, and hostile statistics of features."""

import io
import json
import platform
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzz import CUTS, EDITS, NUMBERS, ODD_TEXTS, PLAIN, TREES, campaign, clear_errors, mutated
from hypothesis import strategies as st
from test_fuzz_config import BOMB
from test_fuzz_data import npy_files, npy_of

from gaussnet.metrics import FeatureStatistics
from gaussnet.plots.style import pyplot
from gaussnet.run_report import Run, watch, write_page

CELLS = st.one_of(
    st.sampled_from(["1", "2", "0", "10", "ema", "raw", "noised", "data", "gaussian", "score", "denoiser",
        "0.5", "1e-3", "nan", "inf", "-inf", "1e400", "-1", "9" * 400, "", '"', '"a\n"', "a,b", "²", "=1+1",
        "<script>", "&lt;", "]]>", "\x00", "$x^{", "\\frac"]),
    ODD_TEXTS,
)  # fmt: skip
HEADS = {
    "probes.csv": "step,weights,sigma,queries,reference,quantity,mean",
    "heldout.csv": "step,weights,sigma,error,relative",
    "frechet.csv": "step,frechet,samples",
    "errors.csv": "sigma,gaussian,model",
    "skips.csv": "skipped,sigma_skip,NFE,RMS",
}
GOOD = {
    "probes.csv": ["{i},ema,0.5,noised,gaussian,score,0.25", "{i},ema,1.0,noised,gaussian,score,0.5",
        "{i},raw,0.5,noised,delta,denoiser,0.1"],
    "heldout.csv": ["{i},ema,0.5,0.1,0.9", "{i},ema,1.0,0.2,0.8", "{i},raw,0.5,0.1,1.1"],
    "frechet.csv": ["{i},12.5,100"],
    "errors.csv": ["0.{i},0.1,0.2"],
    "skips.csv": ["{i},12.0,30,0.01"],
}  # fmt: skip


@st.composite
def tables(draw: st.DrawFn, name: str) -> bytes:
    """A CSV file of a run with odd cells, rows or heads."""
    head = draw(st.just(HEADS[name]) | st.just(HEADS[name]) | st.lists(CELLS, max_size=4).map(",".join))
    lines = [row.format(i=i) for i in range(draw(st.integers(0, 3))) for row in GOOD[name]]
    for _ in range(draw(st.integers(0, 3))):
        if lines and draw(st.booleans()):
            cells = draw(st.sampled_from(lines)).split(",")
            cells[draw(st.integers(0, len(cells) - 1))] = draw(CELLS)
            lines.append(",".join(cells))
        else:
            lines.append(",".join(draw(st.lists(CELLS, max_size=8))))
    text = "\n".join([head, *lines, ""]).encode("utf-8", "replace")
    return mutated(text, draw(EDITS), draw(CUTS)) if draw(st.integers(0, 3)) == 0 else text


FIELDS = ("loss", "lr", "images_per_second", "waiting", "bad_steps")
METRICS = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {"step": st.integers(0, 5) | NUMBERS | st.booleans()},
            optional=dict.fromkeys(FIELDS, NUMBERS | PLAIN),
        ).map(json.dumps),
        TREES.map(json.dumps),
        st.sampled_from(["[" * 5000, "{", '{"step": 1' + "0" * 5000 + "}", '{"step": 1e999}', "", "null",
            '{"step": 3, "loss": 1' + "0" * 400 + "}"]),
    ),
    max_size=6,
).map(lambda lines: "\n".join([*lines, ""]).encode("utf-8", "replace"))  # fmt: skip
CONFIGS = st.one_of(
    st.builds(lambda steps, batch: json.dumps({"train": {"steps": steps, "batch": batch}}), st.integers(1,
        9) | NUMBERS, st.integers(1, 9) | NUMBERS),
    TREES.map(json.dumps), st.text(max_size=30), st.sampled_from(["train: &a {steps: *a}", "[" * 3000,
        "train: [1]", "out: !!python/object/apply:os.system [id]",
        BOMB, "t: 2026-99-99", "1e1000: .nan"]),
).map(lambda text: text.encode("utf-8", "replace"))  # fmt: skip
RUNS = st.fixed_dictionaries(
    {"config.yaml": CONFIGS, "metrics.jsonl": METRICS},
    optional={
        **{name: tables(name) for name in HEADS},
        "report.md": st.just(b""), "config.json": st.binary(max_size=5),
            "samples.png": st.binary(max_size=30),
        "samples/step-²3.png": st.just(b""),
        "samples/step-" + "9" * 200 + ".png": st.just(b"\x89PNG\r\n\x1a\nIEND\xaeB`\x82"),
    },
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def warm() -> None:
    """What writes caches and starts a process, once."""
    pyplot()
    platform.platform()


def write_run(folder: Path, files: dict[str, bytes]) -> Path:
    run = folder / "run"
    (run / "samples").mkdir(parents=True)
    for name, content in files.items():
        (run / name).write_bytes(content)
    return run


STEP = b'{"step": 1, "loss": 1e308, "images_per_second": 1e-320}\n'
KNOWN: list[tuple[dict[str, bytes]]] = [
    ({"metrics.jsonl": b'{"step": 1, "loss": 1' + b"0" * 400 + b"}\n"},),
    ({"metrics.jsonl": b'{"step": 1' + b"0" * 400 + b"}\n"},),
    ({"metrics.jsonl": 2 * STEP},),
    ({"metrics.jsonl": STEP, "config.yaml": b"train: {steps: 9, batch: 1" + b"0" * 400 + b"}"},),
    (
        {
            "metrics.jsonl": STEP,
            "heldout.csv": HEADS["heldout.csv"].encode() + 2 * b"\n1,ema,0.5,1e308,1e308" + b"\n",
        },
    ),
]


@campaign(RUNS, known=KNOWN, few=20, many=4000)
def test_statuses(folder: Path, files: dict[str, bytes]) -> None:
    """Whatever stands in the files of a run, its status is told, in printable lines."""
    run, stream = write_run(folder, files), io.StringIO()
    watch(run, once=True, stream=stream)
    assert all(line.isprintable() for line in stream.getvalue().splitlines())


@campaign(RUNS, few=4, many=300)
def test_pages(folder: Path, files: dict[str, bytes]) -> None:
    """Whatever stands in the files of a run, its page is written, without a script and nothing else."""
    run = write_run(folder, files)
    before = set(run.rglob("*"))
    page = write_page(Run(run)).read_text(encoding="utf-8")
    assert set(run.rglob("*")) - before == {run / "report.html"}
    assert "<script" not in page


STATISTICS = st.one_of(
    st.builds(
        lambda mu, sigma, count: {"mu": mu, "sigma": sigma, "count": count},
        st.sampled_from([np.zeros(2), np.zeros(0), np.zeros((2, 2)), np.array(1.0), np.array([np.nan, 1]),
            np.array(["a", "b"]), np.zeros(2, complex), np.array([1, 2]), np.full(2, 1e308), np.zeros(2,
                [("a", "u1")])]),
        st.sampled_from([np.eye(2), np.eye(3), np.zeros((2, 2)), -np.eye(2), np.array([[1, 2], [3, 4]]),
            np.full((2, 2), np.inf), np.full((2, 2), 1e308), np.eye(2, dtype=bool), np.array("x"), np.eye(2,
                dtype="M8[s]")]),
        st.sampled_from([None, np.int64(5), np.int64(-1), np.float64("nan"), np.array([1, 2]), np.array("x"),
            np.array(1e300), np.array(1j), np.array(0)]),
    ).map(lambda arrays: {name: value for name, value in arrays.items() if value is not None}),
)  # fmt: skip


COUNTS = (np.array([1, 2]), np.array(np.nan), np.array("x"))


@campaign(
    STATISTICS,
    known=[{"mu": np.zeros(2), "sigma": np.eye(2), "count": count} for count in COUNTS],
    few=40,
    many=3000,
)
def test_statistics(folder: Path, arrays: dict[str, Any]) -> None:
    """Arrays that are no mean and covariance."""
    np.savez(folder / "stats.npz", **arrays)
    look(folder / "stats.npz")


@campaign(
    st.lists(st.tuples(st.sampled_from(["mu.npy", "sigma.npy", "count.npy", "mu"]), npy_files()), max_size=3),
    EDITS,
    CUTS,
    known=[
        ([], [], 0.0),
        ([("mu.npy", npy_of("[" * 90))], [], None),
        ([("mu", b"x"), ("sigma", b"x")], [], None),
    ],
    few=30,
    many=3000,
)
def test_damaged_statistics(
    folder: Path, members: list[tuple[str, bytes]], edits: Any, cut: float | None
) -> None:
    with zipfile.ZipFile(folder / "stats.npz", "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    (folder / "stats.npz").write_bytes(mutated((folder / "stats.npz").read_bytes(), edits, cut))
    look(folder / "stats.npz")


def look(path: Path) -> None:
    statistics = None
    with clear_errors(path.name):
        statistics = FeatureStatistics.load(path)
    if statistics is not None:
        with clear_errors(kinds=(ValueError,)):
            assert np.isfinite(statistics.distance(statistics))
