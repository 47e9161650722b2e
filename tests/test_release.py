"""What a release says of itself agrees: versions, requirements, pins, and what is tested where."""

import re
import tomllib
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import gaussnet

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
INSTALLED = ("train", "dev", "docs")  # the extras that make setup and make docs install
ASKED = {
    extra: [Requirement(line) for line in lines]
    for extra, lines in {"": PROJECT["dependencies"], **EXTRAS}.items()
}
CITATION: dict[str, Any] = yaml.safe_load((ROOT / "CITATION.cff").read_text())
CHANGES = (ROOT / "CHANGELOG.md").read_text()
WORKFLOW: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
JOBS: dict[str, Any] = WORKFLOW["jobs"]
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def pins() -> dict[str, list[Version]]:
    """The versions in constraints.txt: PyTorch's depend on the processor."""
    found: dict[str, list[Version]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            (only,) = requirement.specifier
            assert only.operator == "==", f"constraints.txt: got {line}, expected one version"
            found.setdefault(canonicalize_name(requirement.name), []).append(Version(only.version))
    return found


def lowest(requirement: Requirement) -> str:
    return next(bound.version for bound in requirement.specifier if bound.operator == ">=")


# Versions -----------------------------------------------------------------------------------------


def test_citation_has_the_version() -> None:
    assert CITATION["version"] == gaussnet.__version__
    assert CITATION["license"] == PROJECT["license"]
    assert isinstance(CITATION["date-released"], date)
    assert [work["url"] for work in CITATION["references"]] == [PROJECT["urls"]["Paper"]]


def test_changes_are_a_changelog() -> None:
    """In the form of Keep a Changelog; a version that is not a development version has its heading."""
    headings = re.findall(r"^## (.*)$", CHANGES, flags=re.MULTILINE)
    released = [re.fullmatch(r"\[(.+)\] - (\d{4}-\d\d-\d\d)", heading) for heading in headings[1:]]
    assert headings[0] == "[Unreleased]"
    assert all(released), headings
    versions = [Version(match[1]) for match in released if match]
    assert versions == sorted(versions, reverse=True)
    if not Version(gaussnet.__version__).is_devrelease:
        assert headings[1] == f"[{gaussnet.__version__}] - {CITATION['date-released']}"
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", CHANGES, flags=re.MULTILINE)) <= kinds


# Requirements -------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", EXTRAS)
def test_readme_names_the_extra(extra: str) -> None:
    (sentence,) = re.findall(r"`pip install \.` .*", (ROOT / "README.md").read_text())
    assert f"`{extra}`" in sentence


def test_pins_are_within_the_ranges() -> None:
    pinned = pins()
    wrong = [
        f"{requirement}: {version}"
        for requirements in ASKED.values()
        for requirement in requirements
        for version in pinned.get(canonicalize_name(requirement.name), [])
        if version not in requirement.specifier
    ]
    assert wrong == []


@pytest.mark.parametrize("extra", ["", *INSTALLED])
def test_what_is_installed_is_pinned(extra: str) -> None:
    assert {canonicalize_name(requirement.name) for requirement in ASKED[extra]} - set(pins()) == set()


@pytest.mark.parametrize("extra", ASKED)
def test_every_requirement_has_a_lower_bound(extra: str) -> None:
    for requirement in ASKED[extra]:
        assert any(bound.operator == ">=" for bound in requirement.specifier), requirement


# Where it is tested -------------------------------------------------------------------------------


def test_tested_pythons_are_the_supported_ones() -> None:
    tested = JOBS["test"]["strategy"]["matrix"]["python"]
    listed = re.findall(r"Programming Language :: Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert tested == listed
    assert f">={tested[0]}" == PROJECT["requires-python"]
    assert all(version in SpecifierSet(PROJECT["requires-python"]) for version in tested)


def test_the_oldest_torch_is_tested() -> None:
    (line,) = re.findall(r"^OLDEST := torch==(\S+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    (torch,) = (requirement for requirement in ASKED[""] if requirement.name == "torch")
    assert Version(line) == Version(lowest(torch))


def test_workflow_has_no_logic_of_its_own() -> None:
    """Every step is an action of a major version, or a target of the Makefile."""
    for job in JOBS.values():
        targets = job["strategy"]["matrix"].get("target", [])
        assert set(targets) <= TARGETS
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]), step
            else:
                assert step["run"] == ("make ${{ matrix.target }}" if targets else ".ci/run"), step
    assert WORKFLOW["permissions"] == {"contents": "read"}


def test_hooks_need_no_network() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [source["repo"] for source in hooks] == ["local"]
    for hook in hooks[0]["hooks"]:
        assert hook["entry"].startswith(".venv/bin/"), hook
        assert hook["language"] == "system", hook
