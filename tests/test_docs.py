"""What the pages of docs/ show works: their code runs, their links lead somewhere, their commands exist."""

import argparse
import pkgutil
import re
import shlex
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec as spec
from pathlib import Path

import pytest
import torch

import gaussnet as gn
from gaussnet.cli import _parser
from train.configfile import load_config

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
TEXTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES = sorted(DOCS.rglob("*.md"))
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
FEWER = {"start.md": ("range(300)", "range(3)")}  # steps of training; all of them are run by a slow test
UNLISTED = {
    *("gaussnet.cli", "gaussnet.cli_fid", "gaussnet.cli_fit", "gaussnet.cli_reproduce", "gaussnet.cli_sample")
}
UNLISTED |= {"gaussnet.version", "gaussnet.processes", "gaussnet.run_report", "gaussnet.edm_unpickler"}


def blocks(page: Path) -> list[str]:
    return [code for language, code in FENCE.findall(page.read_text()) if language == "python"]


def names(pages: list[Path]) -> list[str]:
    return [page.relative_to(ROOT).as_posix() for page in pages]


# Code ---------------------------------------------------------------------------------------------


def run(page: Path, replaced: tuple[str, str] = ("", "")) -> dict[str, object]:
    """Runs the blocks of a page in order, in one namespace; a traceback shows the line of the page."""
    space: dict[str, object] = {"__name__": "__main__"}
    text = page.read_text()
    for match in FENCE.finditer(text):
        if match[1] == "python":
            above = "\n" * (text.count("\n", 0, match.start()) + 1)
            exec(compile(above + match[2].replace(*replaced), str(page), "exec"), space)
    return space


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return tmp_path


WITH_CODE = [page for page in PAGES if blocks(page)]


@pytest.mark.parametrize("page", WITH_CODE, ids=names(WITH_CODE))
def test_code_runs(page: Path, elsewhere: Path) -> None:
    replaced = FEWER.get(page.name, ("", ""))
    assert replaced[0] in page.read_text()
    space = run(page, replaced)
    if page.name == "start.md":  # it promises a picture, and 10 evaluations in place of 24
        assert (elsewhere / "start.png").stat().st_size > 5000
        assert [space[name]() for name in ("plain", "short")] == [24, 10]  # pyright: ignore[reportCallIssue]


@pytest.mark.slow
def test_first_page_trains(elsewhere: Path) -> None:
    space = run(DOCS / "start.md")
    noisy, heldout, model, denoisers = (space[name] for name in ("noisy", "heldout", "model", "denoisers"))
    errors = {
        name: float((denoiser(noisy, 0.2) - heldout).square().mean())
        for name, denoiser in {**denoisers, "model": model}.items()  # pyright: ignore
    }
    assert errors["model"] < 0.9 * errors["mixture of 10"]
    assert float(space["difference"]) < 0.15  # pyright: ignore


# Links --------------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    """The anchor of a heading, as Markdown's toc makes it."""
    text = re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading)
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", text).strip().lower())


def anchors(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text())
    found = {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)}
    return found | set(re.findall(r"\{[^}]*#([\w-]+)[^}]*\}", text))


def leads_somewhere(page: Path, target: str) -> bool:
    path, _, anchor = target.partition("#")
    there = (page.parent / path).resolve() if path else page
    if not there.exists():
        return False
    if not anchor or there.suffix != ".md" or anchor in anchors(there):
        return True
    try:  # of the reference, an anchor is the name of an object
        return pkgutil.resolve_name(anchor) is not None and there.parent == DOCS / "api"
    except (ImportError, AttributeError, ValueError):
        return False


@pytest.mark.parametrize("page", PAGES + TEXTS, ids=names(PAGES + TEXTS))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))
    targets = re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", text)
    assert [target for target in targets if not leads_somewhere(page, target)] == []


def test_navigation_has_every_page() -> None:
    text = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    listed = set(re.findall(r"([\w/.-]+\.md)$", text, flags=re.MULTILINE))
    site = {page.relative_to(DOCS).as_posix() for page in PAGES}
    assert site <= listed
    missing = {name for name in listed - site if not (ROOT / name.removeprefix("repository/")).is_file()}
    assert missing == set()


# Names --------------------------------------------------------------------------------------------


def test_reference_lists_every_module() -> None:
    shown = {name for page in PAGES for name in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE)}
    broken = {name for name in shown if not spec(name)}
    assert broken == set()
    packages = {module.name for module in pkgutil.walk_packages(gn.__path__, "gaussnet.") if module.ispkg}
    modules = {module.name for module in pkgutil.walk_packages(gn.__path__, "gaussnet.")} - packages
    inside = {name for name in modules if name.rpartition(".")[0] in UNLISTED or name in UNLISTED}
    inside |= {"gaussnet.experiments", "gaussnet.networks.blocks", "gaussnet.samplers.weights"}
    inside |= {"gaussnet.data.named", "gaussnet.metrics.samples", "gaussnet.plots.style"}
    inside |= {"gaussnet.bypass_parts", "gaussnet.bypass_fit"}
    assert modules - shown - inside == set()


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_named_members_exist(page: Path) -> None:
    """`Class.member` in the text is one of the library's."""
    for owner, member in re.findall(r"`([A-Z]\w+)\.(\w+)", FENCE.sub("", page.read_text())):
        if hasattr(gn, owner):
            assert hasattr(getattr(gn, owner), member), f"{owner}.{member}"


def numbers(text: str) -> set[int]:
    """18, 20 to 23 of "18, 20-23"."""
    spans = re.findall(r"(\d+)(?:-(\d+))?", text)
    return {number for first, last in spans for number in range(int(first), int(last or first) + 1)}


def test_theory_has_every_equation_of_the_sources() -> None:
    rows = re.findall(r"^\| ([\d, -]+) \|", (DOCS / "theory.md").read_text(), flags=re.MULTILINE)
    listed = set().union(*map(numbers, rows))
    sources = {path.name: path.read_text() for path in (ROOT / "gaussnet").rglob("*.py")}
    for name in ("patch.py", "kernel.py", "guided_flow.py", "posterior.py"):  # they count those of others
        del sources[name]
    text = re.sub(r"2206\.00364, Eq\. \d+", "", "".join(sources.values()))  # EDM's
    named = set().union(*map(numbers, re.findall(r"Eq\. (\d[\d, -]*)", text)))
    assert named - listed == set()


# Commands -----------------------------------------------------------------------------------------


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each shell line of a page: of indented and `sh` blocks, and of inline code."""
    text = page.read_text()
    lines = [code for language, code in FENCE.findall(text) if language in ("sh", "bash")]
    rest = FENCE.sub("", text)
    lines += re.findall(r"^ {4}(.*(?:\\\n.*)*)$", rest, flags=re.MULTILINE) + re.findall(r"`([^`\n]+)`", rest)
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        try:
            yield shlex.split(line, comments=True)
        except ValueError:  # not a shell's
            continue


def check_gaussnet(words: list[str]) -> None:
    """Fails where a command or option does not exist; values are not looked at."""
    parser = _parser()
    for word in words:
        nested = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        if word.startswith("-"):
            assert word.split("=")[0] in parser._option_string_actions, f"{parser.prog} has no {word}"
        elif nested and (word.isupper() or word == "..."):  # EXPERIMENT
            return
        elif nested:
            assert word in nested[0].choices, f"{parser.prog} has no {word}"
            parser = nested[0].choices[word]


def check_train(words: list[str]) -> None:
    """Fails where a configuration or a key does not exist."""
    if words and words[0].islower():
        load_config(ROOT / words[0], [word for word in words[1:] if re.match(r"[\w.]+=[^A-Z]", word)])


@pytest.mark.parametrize("page", PAGES + TEXTS, ids=names(PAGES + TEXTS))
def test_commands_exist(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for words in commands(page):
        match words:
            case ["make", target, *_]:
                assert target in targets, words
            case ["pip", "install", *rest]:
                for extra in re.findall(r"\[([\w,]+)\]", " ".join(rest)):
                    assert set(extra.split(",")) <= set(extras), words
            case ["python", path, *_] if path.startswith("benchmarks/"):
                assert (ROOT / path).is_file(), words
        if "train" in words and words[words.index("train") - 1] == "-m":
            check_train(words[words.index("train") + 1 :])
        if "gaussnet" in words and (words[0] == "gaussnet" or "launch" in words or words[0] == "torchrun"):
            check_gaussnet(words[words.index("gaussnet") + 1 :])
