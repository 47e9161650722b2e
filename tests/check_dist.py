"""Checks what `make dist` built: names, sizes, metadata, and the quickstart from the installed wheel.

The wheel is installed into an environment that holds only the distributions that it asks for, and those that
these ask for, as links into this one: what the library uses without asking for is missing there, and nothing
is downloaded.
"""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath

from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
LARGEST = 1_000_000  # bytes of a file that is uploaded
SUFFIXES = {".py", ".typed", ".md", ".toml", ".yaml", ".yml", ".txt", ".cff", ".csv", ".json"}
SUFFIXES |= {".png", ".css", ".woff2", ".safetensors"}
BARE = {"LICENSE", "Makefile", "PKG-INFO", "run", ".gitignore"}  # names without a suffix
BUILT = {"runs", "build", "dist", ".venv", "__pycache__", ".hypothesis", ".pytest_cache", ".ruff_cache"}


def expect(holds: bool, text: str) -> None:
    """Ends with the text unless it holds."""
    if not holds:
        raise SystemExit(f"make dist: {text}")


def same(what: str, got: set[str], expected: set[str]) -> None:
    """Ends with what is missing and what should not be there."""
    expect(got == expected, f"{what}: missing {sorted(expected - got)}, unexpected {sorted(got - expected)}")


def project() -> dict:
    """The [project] of pyproject.toml, with the version of gaussnet/version.py."""
    version = re.search(r'^__version__ = "(.+)"$', (ROOT / "gaussnet/version.py").read_text(), re.MULTILINE)
    expect(version is not None, "gaussnet/version.py has no line __version__ = ...")
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {**table, "version": version[1]}  # pyright: ignore[reportOptionalSubscript]


def sources(folder: str) -> set[str]:
    """Its files in the source tree, as posix paths from the root."""
    files = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file()}
    return {path.as_posix() for path in files if not BUILT & set(path.parts)}


def normal(requirement: Requirement) -> str:
    return f"{canonicalize_name(requirement.name)}{requirement.specifier}"


def needs(metadata: Metadata) -> list[Requirement]:
    """What is asked for without any extra."""
    return [requirement for requirement in metadata.requires_dist or [] if not requirement.marker]


# Contents -----------------------------------------------------------------------------------------


def check_wheel(path: Path, table: dict) -> Metadata:
    """The library and nothing else, and metadata that say what pyproject.toml says."""
    info = f"gaussnet-{table['version']}.dist-info"
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        about = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
        same("wheel", names, sources("gaussnet") | {f"{info}/{name}" for name in about})
        other = {name for name in sources("gaussnet") if not name.endswith((".py", "/py.typed"))}
        expect(not other, f"wheel: gaussnet/ holds {sorted(other)}, expected Python alone")
        expect("gaussnet/py.typed" in names, "wheel: without gaussnet/py.typed nobody sees the types")
        metadata = Metadata.from_email(wheel.read(f"{info}/METADATA"))
    same(
        "metadata",
        {
            metadata.name,
            str(metadata.version),
            str(metadata.requires_python),
            str(metadata.license_expression),
        },
        {table["name"], table["version"], table["requires-python"], table["license"]},
    )
    same("extras", set(metadata.provides_extra or []), set(table["optional-dependencies"]))
    expected = {normal(Requirement(line)) for line in table["dependencies"]}
    same("requirements", {normal(requirement) for requirement in needs(metadata)}, expected)
    expect(
        metadata.description == (ROOT / table["readme"]).read_text(), "the long description is not the README"
    )
    return metadata


def check_sdist(path: Path, table: dict) -> None:
    """All that builds and tests the library; no runs, no data, nothing that was built."""
    with tarfile.open(path) as sdist:
        members = [member for member in sdist if not member.isdir()]
    expect(all(member.isfile() for member in members), "sdist: holds links or devices")
    top = {PurePosixPath(member.name).parts[0] for member in members}
    same("sdist's folder", top, {f"gaussnet-{table['version']}"})
    files = {PurePosixPath(*PurePosixPath(member.name).parts[1:]) for member in members}
    names = {file.as_posix() for file in files}
    needed = {
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "pyproject.toml",
        "PKG-INFO",
        "Makefile",
        "constraints.txt",
    }
    needed |= {name for folder in ("gaussnet", "train", "tests", "configs") for name in sources(folder)}
    needed -= {name for name in sources("tests/fixtures") if name.endswith(".safetensors")}
    expect(needed <= names, f"sdist: missing {sorted(needed - names)}")
    odd = {file.as_posix() for file in files if BUILT & set(file.parts)}
    odd |= {file.as_posix() for file in files if file.suffix not in SUFFIXES and file.name not in BARE}
    expect(not odd, f"sdist: unexpected {sorted(odd)}")


def check_size(path: Path) -> None:
    size = path.stat().st_size
    print(f"{path.name}: {size / 1000:.0f} kB", flush=True)
    expect(size < LARGEST, f"{path.name} has {size} bytes, expected less than {LARGEST}")


# Installed ----------------------------------------------------------------------------------------


def link(site: Path, requirements: list[Requirement]) -> None:
    """Links the distributions of this environment that the requirements name, and all that these name."""
    done: set[tuple[str, str]] = set()
    pending = [(requirement, "") for requirement in requirements]
    while pending:
        requirement, by = pending.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": by}):
            continue
        for extra in {"", *requirement.extras}:
            key = (canonicalize_name(requirement.name), extra)
            if key in done:
                continue
            done.add(key)
            try:
                found = distribution(requirement.name)
            except PackageNotFoundError:
                raise SystemExit(f"make dist: this environment lacks {requirement}: make setup") from None
            for name in {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}:
                if not (site / name).is_symlink():
                    (site / name).symlink_to(Path(str(found.locate_file(name))))
            pending += [(Requirement(line), extra) for line in found.requires or []]


def check_installed(wheel: Path, metadata: Metadata, folder: Path) -> None:
    """Installs the wheel where nothing else of ours is, and runs what the README promises there."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(*command: str | Path) -> str:
        words = [str(word) for word in command]
        done = subprocess.run(
            words, cwd=folder, env=variables, capture_output=True, text=True, timeout=600, check=False
        )
        print("$", " ".join(Path(word).name for word in words), flush=True)
        expect(done.returncode == 0, f"{words}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    venv.create(folder / "env", symlinks=True)
    python = folder / "env/bin/python"
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder / "env")}))
    link(site, needs(metadata))
    # pip, too, has to find that nothing is missing and every version fits.
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", wheel)

    version, place = run(
        python, "-c", "import gaussnet; print(gaussnet.__version__, gaussnet.__file__)"
    ).split()
    expect(version == str(metadata.version), f"installed version: got {version}, expected {metadata.version}")
    expect(Path(place).is_relative_to(site), f"gaussnet comes from {place}, expected {site}")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    expect(len(blocks) == 1, f"README.md: got {len(blocks)} blocks of Python, expected the quickstart")
    (folder / "quickstart.py").write_text(blocks[0])
    print(run(python, "quickstart.py"), end="")
    program = folder / "env/bin/gaussnet"
    expect("reproduce" in run(program, "--help"), "gaussnet --help does not list its commands")
    expect("BypassPrecond" in run(program, "info", "digits-model"), "gaussnet info does not name the class")


def main(folder: Path) -> None:
    """Checks the one wheel and the one source distribution of a folder."""
    table = project()
    paths = [sorted(folder.glob(pattern)) for pattern in ("*.whl", "*.tar.gz")]
    expect([len(found) for found in paths] == [1, 1], f"{folder}: got {paths}, expected one wheel, one sdist")
    (wheel,), (sdist,) = paths
    for path in (wheel, sdist):
        check_size(path)
    metadata = check_wheel(wheel.resolve(), table)
    check_sdist(sdist, table)
    with tempfile.TemporaryDirectory(prefix="gaussnet-dist-") as place:
        check_installed(wheel.resolve(), metadata, Path(place).resolve())
    print("make dist: all checks passed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
