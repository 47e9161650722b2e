"""The benchmarks: what runs them, keeps their numbers and writes them into pages."""

import ast
import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks"

sys.path.insert(0, str(FOLDER))
bench: Any = import_module("bench")
results: Any = import_module("results")
sys.path.remove(str(FOLDER))

names = pytest.mark.parametrize("name", [entry.name for entry in bench.ENTRIES])

TINY = """
from results import Record, parser
made = parser("Tiny.")
made.add_argument("--repeats", type=int)
made.add_argument("--mnist")
record = Record(made.parse_args())
record.table(["a", "b"], [["1", str(record.options.repeats)]])
record.text(f"read from {record.options.mnist} by {record.options.threads}")
record.number("speed", 1.25, ">= 1", "theirs", headline=True)
record.number("memory", 0.5, "<= 0.2", unit="GB", headline=True)
record.number("other", 3)
record.close()
"""
BROKEN = f"{TINY}\nraise SystemExit(3)"  # after its numbers
PAGE = "# Tiny\n\nProse before.\n\n<!-- results -->\nold\n<!-- /results -->\n\nProse after.\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(FOLDER))
    (tmp_path / "tiny.py").write_text(TINY)
    (tmp_path / "broken.py").write_text(BROKEN)
    (tmp_path / "tiny.md").write_text(PAGE)
    (tmp_path / "README.md").write_text(
        f"# Title\n\n{bench.PERFORMANCE[0]}\n{bench.PERFORMANCE[1]}\n\nEnd.\n"
    )
    return tmp_path


def run(folder: Path, *argv: str, entries: Any = None) -> int:
    entries = entries or (bench.Entry("tiny", "--repeats 1", "--repeats 2", takes=("mnist",)),)
    return bench.main(argv, entries, folder, folder / "README.md")


def result(folder: Path, name: str = "tiny") -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


# What is committed --------------------------------------------------------------------------------


def test_readme_shows_the_results() -> None:
    text = (ROOT / "README.md").read_text()
    start, end = bench.PERFORMANCE
    shown = text.partition(f"{start}\n")[2].partition(f"\n{end}")[0]
    assert shown == bench.readme_block(), "run python benchmarks/bench.py --readme"


@names
def test_scripts_take_what_they_are_given(name: str) -> None:
    text = (FOLDER / f"{name}.py").read_text()
    assert ast.get_docstring(ast.parse(text))
    declared = set(re.findall(r'add_argument\(\s*"(--\w+)"', text)) | {"--json", "--threads"}
    entry = next(entry for entry in bench.ENTRIES if entry.name == name)
    passed = set(re.findall(r"--\w+", f"{entry.quick} {entry.full}"))
    passed |= {f"--{data}" for data in entry.takes + entry.needs}
    assert passed <= declared
    assert {data for data in bench.DATA if f"--{data}" in declared} == set(entry.takes + entry.needs)
    for part in ("parser(__doc__)", "record.number(", "record.close()"):
        assert part in text


def test_pages_take_a_block() -> None:
    for entry in bench.ENTRIES:
        page = FOLDER / f"{entry.name}.md"
        if page.exists():
            text = bench.replace_block(page.read_text(), bench.RESULTS, "")  # raises for damaged markers
            assert text.count(bench.RESULTS[0]) == 1, page


def test_help_tells_the_common_options() -> None:
    command = [sys.executable, FOLDER / "import_time.py", "--help"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--json" in told
    assert "--repeats" in told
    assert "beyond importing torch" in told


# Numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "asked", "reached"),
    [(1.1, "<= 1.15", True), (1.2, "<= 1.15", False), (2, ">= 1.5", True), (1e-5, "<= 1e-5", True)],
)
def test_bounds(value: float, asked: str, reached: bool) -> None:
    assert results.Number("a", value, asked).reached() is reached


def test_numbers_without_a_bound() -> None:
    assert results.Number("a", 1.0).reached() is None
    assert results.Number("a", float("nan"), "<= 1").reached() is False
    assert results.Number("a", 12.345, unit="%").told() == "12.3 %"
    assert results.Number("a", 1.0).told() == "1"


@pytest.mark.parametrize("asked", ["< 1", "<= ", "1.15", "<= fast"])
def test_impossible_bounds_are_errors(asked: str) -> None:
    with pytest.raises(ValueError, match="expected a bound"):
        results.Number("a", 1.0, asked)


def test_tables_are_printed_row_by_row(capsys: pytest.CaptureFixture[str]) -> None:
    record = results.Record(results.parser("x").parse_args([]))

    def rows() -> Any:
        yield ["1", "2"]
        assert capsys.readouterr().out == "| a | b |\n|---|---|\n| 1 | 2 |\n"

    record.table(["a", "b"], rows())
    assert record.number("n", 2) == 2
    record.close()  # without --json there is nothing to write


# Runs ---------------------------------------------------------------------------------------------


def test_a_run_writes_json_page_and_readme(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = folder / "digits"
    data.mkdir()
    assert run(folder, "--mnist", str(data), "--threads", "1") == 0
    told = capsys.readouterr().out
    assert "missed: tiny: memory" in told
    assert "missed: tiny: speed" not in told

    found = result(folder)
    assert found["command"] == "python benchmarks/tiny.py --repeats 1 --mnist MNIST"
    assert (found["mode"], found["data"]) == ("quick", ["mnist"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"])
    assert set(found["machine"]) - {"gpu"} == {"cpu", "cores", "memory_gb", "threads", "load"}
    assert found["machine"]["threads"] == 1
    assert {"python", "torch", "gaussnet", "numpy"} <= set(found["versions"])
    assert [(row["name"], row["value"], row["reached"]) for row in found["numbers"]] == [
        ("speed", 1.25, True),
        ("memory", 0.5, False),
        ("other", 3.0, None),
    ]

    page = (folder / "tiny.md").read_text()
    assert page.startswith("# Tiny\n\nProse before.\n")
    assert page.endswith("\n\nProse after.\n")
    assert "old" not in page
    assert "| 1 | 1 |\n\nread from MNIST by 1\n" in page
    assert str(folder) not in page
    assert "| speed | 1.25 | >= 1 " in page
    assert "| memory | 0.5 GB | <= 0.2 GB | no |" in page
    assert "other" not in page

    readme = (folder / "README.md").read_text()
    assert readme.startswith("# Title\n")
    assert readme.endswith("\n\nEnd.\n")
    assert "| [speed](benchmarks/tiny.md) | 1.25 | >= 1 | theirs |" in readme
    assert "| [memory](benchmarks/tiny.md) | 0.5 GB (missed) | <= 0.2 GB |  |" in readme
    assert "other" not in readme
    assert f"`make bench`, {found['date']}, {found['machine']['cpu']}" in readme
    assert not list(folder.glob("*.partial"))


def test_a_page_is_begun_where_there_is_none(folder: Path) -> None:
    (folder / "tiny.md").unlink()
    assert run(folder) == 0
    first = (folder / "tiny.md").read_text()
    assert first.startswith("# tiny\n")
    assert run(folder) == 0
    assert (folder / "tiny.md").read_text().count("| speed |") == first.count("| speed |") == 1


def test_a_failure_is_named_and_the_others_go_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "silent.py").write_text("pass")  # no numbers
    entries = [bench.Entry(name) for name in ("broken", "silent", "tiny")]
    assert run(folder, entries=entries) == 2
    assert capsys.readouterr().out.endswith("failed: broken, silent\n")
    assert result(folder)["numbers"]
    assert not (folder / "broken.json").exists()


def test_a_damaged_page_costs_no_number(folder: Path) -> None:
    (folder / "tiny.md").write_text("<!-- results -->\n")
    assert run(folder) == 1
    assert result(folder)["numbers"]
    assert (folder / "tiny.md").read_text() == "<!-- results -->\n"


def test_lacking_data_leave_a_script_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = [bench.Entry("tiny", needs=("mnist", "edm")), bench.Entry("broken", None)]
    assert run(folder, entries=entries) == 0
    told = capsys.readouterr().out
    assert "tiny: left out, it needs --mnist and --edm" in told
    assert "broken: left out, it needs --full" in told
    assert not (folder / "tiny.json").exists()
    assert "No results yet" in (folder / "README.md").read_text()


def test_fuller_results_are_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def modes() -> tuple[str, list[str]]:
        return result(folder)["mode"], result(folder)["data"]

    assert run(folder, "--mnist", "m") == 0
    page = (folder / "tiny.md").read_text()
    capsys.readouterr()
    assert run(folder) == 0
    assert "has more: --mnist" in capsys.readouterr().out
    assert modes() == ("quick", ["mnist"])
    assert (folder / "tiny.md").read_text() == page
    assert run(folder, "--full", "--mnist", "m") == 0
    assert modes() == ("full", ["mnist"])
    assert "--repeats 2" in result(folder)["command"]
    assert "make bench-full" in (folder / "README.md").read_text()
    capsys.readouterr()
    assert run(folder, "--mnist", "m") == 0
    assert "has more: the full run" in capsys.readouterr().out
    assert modes() == ("full", ["mnist"])
    assert run(folder, "--replace") == 0
    assert modes() == ("quick", [])


def test_an_interruption_keeps_what_was_finished(folder: Path) -> None:
    (folder / "broken.py").write_text(
        "import os, signal, time\nos.kill(os.getppid(), signal.SIGINT)\ntime.sleep(60)"
    )
    entries = "[bench.Entry(name) for name in ('tiny', 'broken', 'never')]"
    code = f"""
import bench, pathlib, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background of a shell begin without
folder = pathlib.Path({str(folder)!r})
sys.exit(bench.main([], {entries}, folder, folder / "README.md"))
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False
    )
    assert ended.returncode == 130, ended.stderr
    assert "[2/3] broken: interrupted" in ended.stdout
    assert result(folder)["numbers"]
    assert "[speed]" in (folder / "README.md").read_text()


def test_only_some_run_and_are_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = [bench.Entry("tiny", "--repeats 1", takes=("mnist",)), bench.Entry("broken", None)]
    assert run(folder, "--list", entries=entries) == 0
    assert capsys.readouterr().out == "tiny --repeats 1 [--mnist]\nbroken (only with --full)\n"
    assert run(folder, "--only", "tiny", entries=entries) == 0
    with pytest.raises(SystemExit):
        run(folder, "--only", "other", entries=entries)
    assert "invalid choice" in capsys.readouterr().err


def test_readme_alone_is_rewritten(folder: Path) -> None:
    assert run(folder) == 0
    readme = (folder / "README.md").read_text()
    (folder / "README.md").write_text(readme.replace("1.25", "9.99"))
    (folder / "tiny.py").write_text(BROKEN)
    assert run(folder, "--readme") == 0
    assert (folder / "README.md").read_text() == readme


@pytest.mark.parametrize("text", ["<a>", "</a>", "<a></a><a>", "</a><a>", "<a></a></a>"])
def test_unpaired_markers_are_errors(text: str) -> None:
    with pytest.raises(ValueError, match="expected one <a> before one </a>"):
        bench.replace_block(text, ("<a>", "</a>"), "x")
