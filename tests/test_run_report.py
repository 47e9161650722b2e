"""A run's page and status: what they show of complete, partial and hostile folders."""

import base64
import csv
import io
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from gaussnet.run_report import Run, Status, figures, page, status, watch, watching, write_page
from gaussnet.run_report.folder import read_picture, read_table

VOID = {"meta", "img", "br", "link", "input"}
SECTIONS = [
    "config",
    "curves",
    "heldout",
    "probes",
    "samples",
    "errors",
    "skips",
    "frechet",
    "load",
    "environment",
]
SIGMAS = (0.5, 2.0)
CONFIG = """\
out: runs/r
data:
  source: digits
network:
  name: SongUNet
precond: bypass
train:
  steps: 400
  batch: 50
"""


class Page(HTMLParser):
    """Every tag with its attributes, balanced, and the text by section."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self.section = ""
        self.feed(source)
        self.close()
        assert not self.stack, f"left open: {self.stack}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self.section = dict(attrs)["id"] or ""
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag
        if tag == "section":
            self.section = ""

    def handle_data(self, data: str) -> None:
        self.text[self.section] = self.text.get(self.section, "") + data

    @property
    def sections(self) -> list[str | None]:
        return [attributes["id"] for tag, attributes in self.tags if tag == "section"]

    @property
    def captions(self) -> list[str | None]:
        return [attributes["alt"] for tag, attributes in self.tags if tag == "img"]


def table(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def picture(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (5, 4)).save(path)


def metrics_row(step: int, loss: float | None) -> str:
    row = {"step": step, "loss": loss, "lr": 1e-3, "images_per_second": 10.0 * step, "waiting": step / 1000}
    return json.dumps(row | {"bad_steps": 7}) + "\n"


def probe_rows(references: tuple[str, ...] = ("gaussian", "mixture-2")) -> list[dict[str, Any]]:
    """The Gaussian is closest at step 10, and left; the mixture comes closer until the end."""
    shares = {0: (1.0, 0.9), 10: (0.125, 0.5), 400: (0.75, 0.25)}
    return [
        {
            "step": step,
            "weights": weights,
            "sigma": sigma,
            "queries": kind,
            "reference": reference,
            "quantity": quantity,
            "mean": share * (1 if weights == "ema" else 3) * (1 if quantity == "score" else 0.1) / sigma,
            "count": 4,
        }
        for step, both in shares.items()
        for weights in ("raw", "ema")
        for sigma in SIGMAS
        for kind in ("noised", "noise")
        for reference, share in zip(references, both, strict=True)
        for quantity in ("score", "denoiser")
    ]


def heldout_rows() -> list[dict[str, Any]]:
    relative = {0: 1.5, 200: 0.75, 400: 0.875}
    return [
        {"step": step, "weights": weights, "sigma": sigma, "error": sigma * value, "relative": value + shift}
        for step, value in relative.items()
        for weights, more in (("raw", 0.0), ("ema", 0.125), ("ema-50", 5.0))
        for sigma, shift in zip(SIGMAS, (more - 0.25, more + 0.25), strict=True)
    ]


def complete(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(CONFIG)
    (path / "metrics.jsonl").write_text("".join(metrics_row(s, 1 / s) for s in (100, 200, 300, 400)))
    table(path / "probes.csv", probe_rows())
    table(path / "heldout.csv", heldout_rows())
    table(
        path / "frechet.csv",
        [{"step": s, "fid": 300 / (s + 1), "kid": 0.5, "samples": 64, "NFE": 35} for s in (0, 400)],
    )
    table(path / "errors.csv", [{"sigma": s, "gaussian": 0.0123456 * s, "model": 0.01 * s} for s in SIGMAS])
    table(path / "skips.csv", [{"skipped": 0, "sigma_skip": 80.0, "NFE": 35, "RMS": 0.031337}])
    for step in (0, 400):
        picture(path / "samples" / f"step-{step:09d}.png")
    picture(path / "samples.png")
    (path / "config.json").write_text("{}")
    (path / "best").mkdir()
    (path / "best" / "config.json").write_text("{}")
    (path / "report.md").write_text("done")
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = complete(tmp_path_factory.mktemp("runs") / "whole")
    return folder, page.page(Run(folder))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    found: list[Figure] = []
    save = Figure.savefig

    def spy(figure: Figure, *args: Any, **kwargs: Any) -> None:
        found.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", spy)
    for cached in (figures.training, figures.heldout, figures.dynamics, figures.distances):
        cached.cache_clear()
    return found


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page without its figures of probes, which take seconds."""
    monkeypatch.setattr(figures, "dynamics", lambda *_: "<svg></svg>")


# The page of a complete run -----------------------------------------------------------------------


def test_every_section(whole: tuple[Path, str]) -> None:
    assert Page(whole[1]).sections == SECTIONS


def test_nothing_external_and_nothing_that_runs(whole: tuple[Path, str]) -> None:
    parsed = Page(whole[1])
    assert "http:" not in whole[1]
    assert "https:" not in whole[1]
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in parsed.tags}
    ids = Counter(attributes["id"] for _, attributes in parsed.tags if "id" in attributes)
    assert max(ids.values()) == 1, "an id stands twice"
    references = 0
    for tag, attributes in parsed.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            value = value or ""
            if name == "src":
                assert value.startswith("data:image/png;base64,"), value[:50]
            if name == "href":
                assert value[1:] in ids, value
            for target in re.findall(r"url\(([^)]*)\)", value):
                references += 1
                assert target[0] == "#", target
                assert target[1:] in ids, target
    assert references > 10
    policy = next(a["content"] for tag, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert "prefers-color-scheme: dark" in whole[1]
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in parsed.tags


def test_what_a_complete_run_shows(whole: tuple[Path, str]) -> None:
    folder, source = whole
    parsed = Page(source)
    text = parsed.text
    assert "whole: complete, 400 steps" in text[""]
    assert "digits, SongUNet, bypass" in text[""]
    assert "progress" not in {tag for tag, _ in parsed.tags}
    assert CONFIG in text["config"]
    assert text["curves"].count("training loss") == 1
    assert "averaged weights" in text["heldout"]
    for quantity in ("score", "denoiser"):
        for kind in ("noised data", "noise"):
            assert f"unexplained of the network's {quantity}, at {kind}\n" in text["probes"]
    assert '<td class="least">0.005</td>' in source
    assert "<td>0.006173</td>" in source
    assert "<td>80</td><td>35</td><td>0.03134</td>" in source
    assert f"best = gaussnet.from_pretrained({str(folder / 'best')!r})" in text["load"]
    assert f"model = gaussnet.from_pretrained({str(folder)!r})" in text["load"]
    assert "299.2" not in text["frechet"]
    assert "0.7481" in text["frechet"]
    for name in ("gaussnet", "torch", "python", "platform"):
        assert name in text["environment"]
    assert parsed.captions == ["samples", "step 400", "step 0"]
    encoded = base64.b64encode((folder / "samples.png").read_bytes()).decode()
    assert f'src="data:image/png;base64,{encoded}"' in source


def test_closest_steps(whole: tuple[Path, str]) -> None:
    # Of the averaged weights; sigma = 0.5 doubles the shares, the denoiser's are a tenth.
    head = "<tr><th>sigma</th><th>gaussian</th><th>mixture-2</th></tr>"
    score = "<tr><td>0.5</td><td>0.25 at 10 \u2197</td><td>0.5 at 400</td></tr>"
    denoiser = "<tr><td>2</td><td>0.00625 at 10 \u2197</td><td>0.0125 at 400</td></tr>"
    assert whole[1].count(head) == 4
    assert whole[1].count(score) == 2
    assert whole[1].count(denoiser) == 2


def test_curves(drawn: list[Figure], tmp_path: Path, fast: None) -> None:
    folder = complete(tmp_path / "r")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(metrics_row(500, None))
    text = page.page(Run(folder))
    training, heldout, frechet = drawn
    expected = [[0.01, 0.005, 1 / 300, 0.0025, np.nan], [1e3, 2e3, 3e3, 4e3, 5e3], [0.1, 0.2, 0.3, 0.4, 0.5]]
    for axis, values in zip(training.axes, expected, strict=True):
        (line,) = axis.get_lines()
        xy = np.asarray(line.get_xydata())
        assert xy == pytest.approx(np.array([[100, 200, 300, 400, 500], values]).T, nan_ok=True)
        assert axis.get_xscale() == "log"
        assert axis.get_ylim()[1] > np.nanmax(values)
    assert [axis.get_yscale() for axis in training.axes] == ["log", "linear", "linear"]
    titles = ["trained weights", "averaged weights", "ema-50"]
    assert [axis.get_title() for axis in heldout.axes] == [*titles, "", "", ""]
    for axis, values in (
        (heldout.axes[1], [[0.75, 0.375, 0.4375], [3.0, 1.5, 1.75]]),
        (heldout.axes[4], [[1.375, 0.625, 0.75], [1.875, 1.125, 1.25]]),
    ):
        for line, ys in zip(axis.get_lines(), values, strict=False):
            assert np.asarray(line.get_xydata()) == pytest.approx(np.array([[0.5, 200, 400], ys]).T)
    assert [axis.get_ylabel() for axis in frechet.axes] == ["fid", "kid"], "samples and NFE are none"
    (line,) = frechet.axes[0].get_lines()
    assert np.asarray(line.get_xydata()) == pytest.approx(np.array([[0.5, 300], [400, 300 / 401]]))
    without = [part for part in text.splitlines() if "<td>" not in part or "written" not in part]
    again = [
        part for part in page.page(Run(folder)).splitlines() if "<td>" not in part or "written" not in part
    ]
    assert again == without
    assert len(drawn) == 3, "a figure of the same values was drawn again"


def test_many_pictures_are_thinned(tmp_path: Path) -> None:
    folder = begun(tmp_path / "r")
    for step in range(100):
        picture(folder / "samples" / f"step-{step:09d}.png")
    captions = Page(page.page(Run(folder))).captions
    assert captions == [f"step {step}" for step in (99, 90, 81, 72, 63, 54, 45, 36, 27, 18, 9, 0)]


# Partial runs -------------------------------------------------------------------------------------


def begun(path: Path) -> Path:
    path.mkdir()
    (path / "config.yaml").write_text(CONFIG)
    return path


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    parsed = Page(page.page(Run(begun(tmp_path / "r"))))
    assert parsed.sections == ["config", "environment"]
    assert "r: at step 0 of 400" in parsed.text[""]
    assert ("progress", {"max": "400", "value": "0"}) in parsed.tags


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "probes.csv", "heldout.csv", "frechet.csv", "errors.csv", "skips.csv"]
)
@pytest.mark.parametrize(
    "content", ["", "\n", "step", "step,weights\n", "\x00\xff\n", '{"step": 1', "[1]\nnull\n3\n"]
)
def test_a_table_without_a_row_is_left_out(name: str, content: str, tmp_path: Path) -> None:
    folder = begun(tmp_path / "r")
    (folder / name).write_text(content, encoding="latin-1")
    assert Page(page.page(Run(folder))).sections == ["config", "environment"]
    assert Status.of(Run(folder)).facts() == []


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("config.yaml", "config"),
        ("metrics.jsonl", "curves"),
        ("heldout.csv", "heldout"),
        ("probes.csv", "probes"),
        ("frechet.csv", "frechet"),
        ("errors.csv", "errors"),
        ("skips.csv", "skips"),
    ],
)
def test_one_missing_part_is_left_out(name: str, section: str, tmp_path: Path, fast: None) -> None:
    folder = complete(tmp_path / "r")
    (folder / name).unlink()
    assert Page(page.page(Run(folder))).sections == [part for part in SECTIONS if part != section]


def test_distances_that_are_nan_are_gaps(tmp_path: Path, drawn: list[Figure]) -> None:
    folder = complete(tmp_path / "r")
    rows = [{"step": s, "fid": fid, "kid": 0.5} for s, fid in ((0, 300.0), (200, "nan"), (400, "nan"))]
    table(folder / "frechet.csv", rows)
    page.page(Run(folder))
    assert [axis.get_ylabel() for axis in drawn[-1].axes] == ["fid", "kid"]
    assert [np.size(axis.get_lines()[0].get_xdata()) for axis in drawn[-1].axes] == [1, 3]


def test_a_noise_level_that_equals_an_error_is_not_bold(tmp_path: Path, fast: None) -> None:
    folder = complete(tmp_path / "r")
    table(folder / "errors.csv", [{"sigma": 0.25, "model": 0.25, "gaussian": 0.5}])
    source = page.page(Run(folder))
    assert '<tr><td>0.25</td><td class="least">0.25</td><td>0.5</td></tr>' in source


@pytest.mark.parametrize("value", ["!!bool maybe", "!!timestamp foo", '!!int ""'])
def test_a_config_whose_values_are_none(value: str, tmp_path: Path) -> None:
    folder = begun(tmp_path / "r")
    (folder / "config.yaml").write_text(f"precond: {value}\n")
    assert Run(folder).config == {}


def test_half_a_last_line(tmp_path: Path, fast: None) -> None:
    folder = complete(tmp_path / "r")
    run = Run(folder)
    before = (run.metrics, run.probes, run.heldout, run.errors)
    for name, half in (
        ("metrics.jsonl", metrics_row(500, 0.1)[:-1]),
        ("probes.csv", "500,ema,0.5,noised,gaussian,score,0.1,4"),
        ("errors.csv", "5.0,0.1,0.0"),
    ):
        with (folder / name).open("a") as file:
            file.write(half)
    with (folder / "heldout.csv").open("a") as file:  # killed after the averaged weights' first level
        file.write("500,raw,0.5,1,1\n500,raw,2.0,1,1\n500,ema,0.5,1,0.01\n500,ema,2.0,1")
    cut = Run(folder)
    assert (cut.metrics, cut.probes, cut.errors) == (before[0], before[1], before[3])
    assert [row for row in cut.heldout if row["step"] <= 400] == before[2]
    assert {row["weights"] for row in cut.heldout if row["step"] == 500} == {"raw"}
    assert Status.of(cut).best == (200, 0.875)
    assert Page(page.page(cut)).sections == SECTIONS


def test_pictures_and_models_that_are_not_whole(tmp_path: Path, fast: None) -> None:
    folder = complete(tmp_path / "r")
    last = folder / "samples" / "step-000000400.png"
    last.write_bytes(last.read_bytes()[:-3])
    (folder / "samples" / "step-000000001.png").write_bytes(b"")
    (folder / "samples" / "step-x.png").write_bytes(b"")
    (folder / "report.md").unlink()
    (folder / "config.json").unlink()
    parsed = Page(page.page(Run(folder)))
    assert parsed.captions == ["step 0"], "samples.png is the old one until the run is complete"
    assert "best = gaussnet" in parsed.text["load"]
    assert "model =" not in parsed.text["load"]
    (folder / "best" / "config.json").unlink()
    assert "load" not in Page(page.page(Run(folder))).sections


def test_numbers_that_are_none(tmp_path: Path) -> None:
    folder = begun(tmp_path / "r")
    (folder / "metrics.jsonl").write_text(
        '{"step": 5, "loss": NaN, "waiting": "x"}\n{"step": "6"}\n' + metrics_row(7, None)
    )
    assert [(row["step"], row["loss"], row["waiting"]) for row in Run(folder).metrics] == [
        (5, None, None),
        (7, None, 0.007),
    ]
    rows = [row for row in probe_rows() if row["quantity"] == "score"]
    for row in rows:  # at the first level, the network is every reference
        row["mean"] = 0.0 if row["sigma"] == 0.5 else row["mean"]
    rows[0]["mean"], rows[1]["sigma"], rows[2]["step"] = "nan", "", "-1"
    next(row for row in rows if row["weights"] == "ema" and row["sigma"] == 2.0)["mean"] = "inf"
    table(folder / "probes.csv", rows)
    read = Run(folder).probes
    assert len(read) == len(rows) - 3
    text = page.page(Run(folder))
    parsed = Page(text)
    assert parsed.sections == ["config", "curves", "probes", "environment"]
    assert text.count("<svg") == 3, "training, and two kinds of scores"
    assert "<tr><td>0.5</td><td>0 at 0</td><td>0 at 0</td></tr>" in text, "all levels are in the table"
    assert dict(Status.of(Run(folder)).facts())["loss"] == "not finite"


@pytest.mark.parametrize(
    "text", ["", "{", "- 1\n", "3", "train: 5\n", "train: {steps: x}\n", "&a [*a]\n", "[" * 400]
)
def test_any_config(text: str, tmp_path: Path) -> None:
    folder = begun(tmp_path / "r")
    (folder / "config.yaml").write_text(text)
    assert Status.of(Run(folder)).title == "at step 0"
    assert Page(page.page(Run(folder))).sections == (["config"] if text else []) + ["environment"]


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"with a config\.yaml or metrics\.jsonl, got"):
        Run(tmp_path)
    with pytest.raises(FileNotFoundError, match="which is none"):
        Run(tmp_path / "missing")


# Hostile strings ----------------------------------------------------------------------------------

EVIL = "<script>alert(1)</script><img src=\"http://x\" onerror='x'>&amp;$\\frac{$"


def test_strings_of_files_are_escaped(tmp_path: Path) -> None:
    folder = complete(tmp_path / "<b>'\"&\x1b[31m")
    evil = json.dumps(EVIL)
    (folder / "config.yaml").write_text(
        f"data: {{source: {evil}}}\nnetwork: {{name: {evil}}}\nprecond: {evil}\n# </pre>{EVIL}\n"
    )
    evil_rows = probe_rows((EVIL, "\x07\ufffe\u4e2d"))
    table(
        folder / "probes.csv",
        [row for row in evil_rows if (row["queries"], row["quantity"]) == ("noise", "score")],
    )
    rows = heldout_rows()
    table(folder / "heldout.csv", [row | {"weights": row["weights"].replace("-50", EVIL)} for row in rows])
    table(folder / "errors.csv", [{"sigma": 1, EVIL: EVIL, "model": 0.5}])
    table(folder / "skips.csv", [{"skipped": 1, EVIL: EVIL}])
    table(folder / "frechet.csv", [{"step": 1, EVIL: 5.0, "extractor": EVIL}])
    source = page.page(Run(folder))
    parsed = Page(source)
    assert parsed.sections == SECTIONS
    assert "script" not in {tag for tag, _ in parsed.tags}
    for _, attributes in parsed.tags:
        assert "onerror" not in attributes
        assert (attributes.get("src") or "data:").startswith("data:")
    for section in ("config", "probes", "heldout", "errors", "skips", "frechet"):
        assert EVIL in parsed.text[section], section
    assert parsed.text[""].count(EVIL) == 3
    assert "??\u4e2d" in parsed.text["probes"]
    assert "\x1b" not in source
    assert "\x1b" not in "\n".join(Status.of(Run(folder)).lines())


# Writing ------------------------------------------------------------------------------------------


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_page_is_whole_and_disturbs_nothing(
    tmp_path: Path, fast: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = complete(tmp_path / "r")
    before = listing(folder)
    assert write_page(Run(folder)) == folder / "report.html"
    after = listing(folder)
    text = after.pop(str(folder / "report.html")).decode()
    assert after == before
    assert text.endswith("</html>\n")
    write_page(Run(folder), tmp_path / "other.HTML")
    assert (tmp_path / "other.HTML").stat().st_size == len(text.encode())
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            write_page(Run(folder))
    assert listing(folder) == after | {str(folder / "report.html"): text.encode()}


def test_no_other_file_is_replaced(tmp_path: Path) -> None:
    folder = begun(tmp_path / "r")
    for out in (folder / "report.md", folder / "config.yaml", folder):
        with pytest.raises(ValueError, match=r"expected a file FILE\.html"):
            write_page(Run(folder), out)
    with pytest.raises(FileNotFoundError, match="expected a folder for the page"):
        write_page(Run(folder), tmp_path / "no" / "x.html")
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


# Status and watching ------------------------------------------------------------------------------


def test_status_of_a_run_in_progress(tmp_path: Path) -> None:
    folder = complete(tmp_path / "r")
    (folder / "report.md").unlink()
    (folder / "config.yaml").write_text(CONFIG.replace("400", "1000"))
    found = Status.of(Run(folder))
    assert (found.step, found.steps, found.complete) == (400, 1000, False)
    assert found.loss == 1 / 400
    assert found.mean_loss == pytest.approx((1 / 100 + 1 / 200 + 1 / 300 + 1 / 400) / 4)
    assert found.remaining == pytest.approx(600 * 50 / 2500)
    assert found.heldout == (400, 1.0)
    assert found.best == (200, 0.875)
    assert found.probe == (400, {0.5: 1.5, 2.0: 0.375})
    assert found.lines()[:2] == ["r: at step 400 of 1000", "[" + "#" * 16 + "-" * 24 + "] 40.0%"]
    assert dict(line.split(None, 1) for line in found.lines()[2:6]) == {
        "loss": "0.0025, mean of the last 5 rows 0.005208",
        "speed": "4000 images/s",
        "remaining": "about 12 s of training",
        "waiting": "40.0% of the time, for data",
    }
    assert "bad steps       7" in found.lines()
    assert "held-out error  1 of the Gaussian's, step 400" in found.lines()
    assert "best            0.875, step 200" in found.lines()
    assert found.lines()[-2:] == ["  sigma       0.5        2", "  share       1.5    0.375"]
    assert found.written is not None
    assert found.written.timestamp() == pytest.approx((folder / "metrics.jsonl").stat().st_mtime)
    assert max(map(len, found.lines(17))) == 17
    assert [line for line in found.lines(17) if "sigma" in line] == ["  sigma       0.5", "  sigma         2"]


def test_files_that_go_while_they_are_read(tmp_path: Path) -> None:
    folder = begun(tmp_path / "r")
    (folder / "metrics.jsonl").write_text(metrics_row(100, 0.5))
    one = Run(folder)
    assert len(one.metrics) == 1
    (folder / "metrics.jsonl").unlink()
    found = Status.of(one)
    assert (found.step, found.written) == (100, None)
    picture(folder / "a.png")
    assert read_picture(folder / "a.png") == (folder / "a.png").read_bytes()
    (folder / "a.png").unlink()
    assert read_picture(folder / "a.png") is None


def test_means_are_of_the_last_rows(tmp_path: Path) -> None:
    folder = begun(tmp_path / "r")
    (folder / "metrics.jsonl").write_text("".join(metrics_row(s, float(s)) for s in range(1, 11)))
    assert Status.of(Run(folder)).mean_loss == 8.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (60, "1 min 0 s"), (3725, "1 h 2 min"), (90000, "1 d 1 h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert status.duration(seconds) == text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_watch_once_prints_and_writes_nothing(tmp_path: Path) -> None:
    folder = complete(tmp_path / "r")
    before, stream = listing(folder), io.StringIO()
    watch(folder, once=True, stream=stream)
    assert stream.getvalue() == "\n".join(Status.of(Run(folder)).lines()) + "\n\n"
    assert "complete, 400 steps" in stream.getvalue()
    assert listing(folder) == before


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["plain", "terminal"])
def test_watch_until_the_run_is_complete(
    stream: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = begun(tmp_path / "r")
    pages: list[int] = []
    naps: list[float] = []

    def write(run: Run) -> Path:
        pages.append(len(run.metrics))
        return run.path / "report.html"

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        assert len(naps) < 9, "does not end"
        if len(naps) == 2:  # nothing has changed before
            (folder / "metrics.jsonl").write_text(metrics_row(100, 0.5))
        if len(naps) == 3:
            (folder / "report.md").write_text("done")

    monkeypatch.setattr(watching, "write_page", write)
    monkeypatch.setattr(watching.time, "sleep", sleep)
    watch(folder, every=3.0, stream=stream)
    assert naps == [3.0, 3.0, 3.0]
    assert pages == [0, 1, 1], "a page at first, after a change, and at the end"
    printed = stream.getvalue()
    assert printed.count(": at step 0 of 400") == 3, "twice, and once more with the page's name"
    assert printed.count("page: ") == 4
    assert printed.count("r: at step 100 of 400") == 1
    assert printed.count("r: complete, 400 steps") == 1
    assert ("\x1b[" in printed) == stream.isatty()
    if stream.isatty():
        # Each status goes up over the lines of the one before.
        heights = [int(n) for n in re.findall(r"\x1b\[(\d+)F\x1b\[J", printed)]
        blocks = re.split(r"\x1b\[\d+F\x1b\[J", printed)
        assert heights == [block.count("\n") for block in blocks[:-1]]


def test_interrupt_leaves_cleanly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = begun(tmp_path / "r")

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watching.time, "sleep", interrupt)
    stream = io.StringIO()
    watch(folder, stream=stream)
    assert stream.getvalue().endswith("\n")
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "report.html"]


def test_watching_needs_no_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = complete(tmp_path / "r")

    def missing() -> None:
        raise ImportError("figures need matplotlib: pip install 'gaussnet[train]'")

    monkeypatch.setattr(figures, "pyplot", missing)
    for cached in (figures.training, figures.heldout, figures.dynamics, figures.distances):
        cached.cache_clear()
    stream = io.StringIO()
    watch(folder, stream=stream)
    assert "no report.html: figures need matplotlib: pip install" in stream.getvalue()
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("every", [0.0, -1.0, float("nan")])
def test_impossible_intervals(every: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected seconds > 0"):
        watch(begun(tmp_path / "r"), every)


def test_tables(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("step,name,x\n1,a,0.5\n2,b\n3,c,1,2\n4,d,inf\n5,e,nan\n6.5,f,1\n7,,1\n8,g,y\n9,h,2")
    assert read_table(path, ("name",), ("step", "x")) == [
        {"name": "a", "step": 1, "x": 0.5},
        {"name": "d", "step": 4, "x": float("inf")},
    ]
    assert [list(row.values()) for row in read_table(path)][2:4] == [[5, "e", "nan"], ["6.5", "f", 1.0]]
    assert read_table(tmp_path / "missing.csv") == []
    path.write_text("a\n" + "x" * 200_000 + "\n")
    assert read_table(path) == []
