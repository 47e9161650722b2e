"""Two things that the site needs beyond MkDocs and its plugins.

Formulas, which pymdownx.arithmatex marks, become MathML while the site is built: browsers draw it by
themselves, without scripts or fonts. Links to files of the repository outside of docs/ become pages of the
site, below repository/: Markdown as it is, code as a block, and everything else as a file.
"""

from __future__ import annotations

import html
import logging
import os
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

log = logging.getLogger("mkdocs.hooks.repository")  # below mkdocs: a warning fails a strict build

DOCS = Path(__file__).parent
ROOT = DOCS.parent
FOLDER = "repository"
LINK = re.compile(r"(?<=\]\()([^)#:\s]+)(?=[)#])")
CODE = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".cff": "yaml", ".txt": "text"}
ALWAYS = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")  # of the navigation
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', flags=re.DOTALL)


def on_files(files: Files, *, config: Any) -> Files:
    """Adds the repository's files that pages link to, and those that these link to."""
    waiting = [DOCS / file.src_uri for file in files.documentation_pages()]
    waiting += [ROOT / name for name in ALWAYS]
    seen: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        if not path.is_relative_to(DOCS):
            files.append(_file(path, config))
        if path.suffix == ".md":
            waiting += [target for link in LINK.findall(path.read_text()) if (target := _outside(path, link))]
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Points links to the repository's files, and from these to pages, at where they are in the site."""
    uri = page.file.src_uri
    place = _place(uri)
    if place.suffix != ".md":
        return markdown

    def moved(match: re.Match[str]) -> str:
        target = (place.parent / match[1]).resolve()
        if not target.is_file() or not target.is_relative_to(ROOT):
            return match[1]
        return os.path.relpath(_uri(target), os.path.dirname(uri) or ".")

    return LINK.sub(moved, markdown)


def on_page_content(content: str, *, page: Any, config: Any, files: Files) -> str:
    """Formulas as MathML."""

    def drawn(match: re.Match[str]) -> str:
        try:
            return convert(html.unescape(match[2]), display="block" if match[1] == "div" else "inline")
        except Exception as error:
            log.warning("%s: not a formula: %s (%r)", page.file.src_uri, match[2], error)
            return match[0]

    return FORMULA.sub(drawn, content)


def _outside(path: Path, link: str) -> Path | None:
    target = (path.parent / link).resolve()
    inside = target.is_relative_to(ROOT) and not target.is_relative_to(DOCS)
    return target if inside and target.is_file() else None


def _uri(target: Path) -> str:
    """Where a file of the repository is in the site's sources."""
    if target.is_relative_to(DOCS):
        return target.relative_to(DOCS).as_posix()
    name = f"{FOLDER}/{target.relative_to(ROOT).as_posix()}"
    return f"{name}.md" if target.suffix in CODE else name


def _place(uri: str) -> Path:
    """The inverse of `_uri`."""
    if not uri.startswith(f"{FOLDER}/"):
        return DOCS / uri
    path = ROOT / uri.removeprefix(f"{FOLDER}/")
    return path if path.is_file() else path.with_suffix("")


def _file(path: Path, config: Any) -> File:
    if path.suffix not in CODE:
        return File.generated(config, _uri(path), abs_src_path=str(path))
    name = path.relative_to(ROOT).as_posix()
    front = "---\nsearch:\n  exclude: true\n---"
    code = f"`````{CODE[path.suffix]}\n{path.read_text()}\n`````"
    return File.generated(config, _uri(path), content=f"{front}\n# {name}\n\n{code}\n")
