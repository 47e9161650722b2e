"""A run as one HTML page that needs nothing else: figures and pictures lie in it, and no script.

A part of which the run has nothing yet is left out.
"""

from __future__ import annotations

import base64
import os
import platform
from collections.abc import Iterable, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

import torch

from gaussnet.probes import KINDS, QUANTITIES, minima
from gaussnet.run_report import figures
from gaussnet.run_report.folder import Row, Run, read_picture
from gaussnet.run_report.status import Status
from gaussnet.version import __version__

PAGE = "report.html"
PICTURES = 12  # of samples while training, at most

_CSS = """
:root { color-scheme: light dark; --line: #ccc; --soft: #666; --back: #fff; --text: #111; --fill: #f4f4f4 }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: auto; padding: 0 1rem 3rem;
  background: var(--back); color: var(--text) }
h1 { margin-bottom: 0 } h2 { border-bottom: 1px solid var(--line); margin-top: 2.5rem }
nav a { margin-right: .8rem } a { color: inherit }
.soft, figcaption { color: var(--soft) }
.wide { overflow-x: auto } .wide > svg { width: 100%; height: auto; display: block }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0 }
th, td { padding: .15rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
.facts th, .facts td { text-align: left; white-space: normal }
.least { font-weight: bold }
pre { background: var(--fill); padding: .8rem; overflow-x: auto }
figure { margin: 1rem 0 } figure img { max-width: 100%; background: #fff }
progress { width: 100% }
@media (prefers-color-scheme: dark) {
  :root { --line: #444; --soft: #aaa; --back: #161616; --text: #eee; --fill: #222 }
  .wide > svg { filter: invert(1) hue-rotate(180deg) }
}
"""


def write_page(run: Run, out: str | Path | None = None) -> Path:
    """Writes the page of a run, whole or not at all.

    Args:
        run: what has been written of it so far is shown.
        out: the page's file, *.html; default: report.html in the run's folder.

    Returns:
        The page's file.

    Raises:
        ValueError: if the file is not named *.html: a run's folder holds files that must not be replaced.
        FileNotFoundError: if there is no folder for the page.
        ImportError: if matplotlib is not installed.
    """
    path = run.path / PAGE if out is None else Path(out)
    if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
        raise ValueError(f"expected a file FILE.html for the page, got {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"expected a folder for the page, got {path.parent}, which is none")
    text = page(run)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def page(run: Run) -> str:
    """The page as text."""
    status = Status.of(run)
    parts = {
        "config": ("Configuration", _config(run)),
        "curves": ("Training", _curves(run)),
        "heldout": ("Held-out error", _heldout(run)),
        "probes": ("Score probes", _probes(run)),
        "samples": ("Samples", _samples(run)),
        "errors": ("Denoising error", _errors(run)),
        "skips": ("Teleport", _skips(run)),
        "frechet": ("Fr\u00e9chet distance", _frechet(run)),
        "load": ("Use", _load(run)),
        "environment": ("Environment", _environment()),
    }
    shown = {name: part for name, part in parts.items() if part[1]}
    links = "".join(f'<a href="#{name}">{title}</a> ' for name, (title, _) in shown.items())
    sections = "".join(
        f'<section id="{name}">\n<h2>{title}</h2>\n{body}\n</section>\n'
        for name, (title, body) in shown.items()
    )
    title = escape(f"{status.name}: {status.title}")
    # No address is ever asked for, whatever a file of the run holds.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
        f"<header>{_header(run, status)}</header>\n<nav>{links}</nav>\n{sections}</body>\n</html>\n"
    )


# Parts --------------------------------------------------------------------------------------------


def _header(run: Run, status: Status) -> str:
    kind = [
        run.setting("data", "source"),
        run.setting("network", "name"),
        run.config.get("precond"),
    ]
    about = ", ".join(str(value) for value in kind if isinstance(value, str))
    lines = [f"<h1>{escape(status.name)}</h1>", f"<p>{escape(status.title)}</p>"]
    if about:
        lines.append(f'<p class="soft">{escape(about)}</p>')
    if status.steps and not status.complete:
        lines.append(f'<progress max="{status.steps}" value="{min(status.step, status.steps)}"></progress>')
    return "\n".join([*lines, _facts(status.facts())])


def _config(run: Run) -> str:
    if not run.config_text.strip():
        return ""
    return f"<details><summary>config.yaml</summary>\n<pre>{escape(run.config_text)}</pre></details>"


def _curves(run: Run) -> str:
    if not run.metrics:
        return ""
    return _wide(
        figures.training(figures.values(run.metrics, "step", "loss", "images_per_second", "waiting"))
    )


def _heldout(run: Run) -> str:
    if not run.heldout:
        return ""
    names = ("step", "weights", "sigma", "error", "relative")
    last = max(row["step"] for row in run.heldout)
    table = [row for row in run.heldout if row["step"] == last]
    return (
        "<p>Mean squared denoising error per pixel at noise levels &sigma;, and its ratio to what the "
        "Gaussian denoiser leaves.</p>"
        + _wide(figures.heldout(figures.values(run.heldout, *names)))
        + _details(f"step {last}", _table(names, ([row[name] for name in names] for row in table)))
    )


def _probes(run: Run) -> str:
    parts: list[str] = []
    averaged = [row for row in run.probes if row["weights"] == "ema"]
    for quantity in QUANTITIES:
        for kind in KINDS:
            chosen = [row for row in averaged if (row["quantity"], row["queries"]) == (quantity, kind)]
            # A level where the network is every reference has no place on a logarithmic axis.
            drawable = {row["sigma"] for row in chosen if 0 < row["mean"] < float("inf")}
            curves = [row for row in chosen if row["sigma"] in drawable]
            if curves:
                names = ("step", "sigma", "reference", "mean")
                parts.append(_wide(figures.dynamics(figures.values(curves, *names), quantity, kind)))
            if chosen:
                summary = f"where the {quantity} came closest to each, {kind}"
                parts.append(_details(summary, _minima(minima(chosen))))
    if not parts:
        return ""
    return (
        "<p>The share of the network's score or denoised image that simple denoisers leave unexplained "
        "while it learns, averaged weights. Tables: the smallest share and its step; an arrow marks "
        "references that the network has left again.</p>" + "".join(parts)
    )


def _minima(table: Sequence[Row]) -> str:
    references = list(dict.fromkeys(row["reference"] for row in table))
    cells: dict[float, dict[str, str]] = {}
    for row in table:
        arrow = " \u2197" if row["left"] else ""
        cells.setdefault(row["sigma"], {})[row["reference"]] = f"{row['minimum']:.3g} at {row['step']}{arrow}"
    lines = ([sigma, *(cells[sigma].get(name, "") for name in references)] for sigma in sorted(cells))
    return _table(["sigma", *references], lines)


def _samples(run: Run) -> str:
    pictures = [("samples", run.path / "samples.png")] if run.complete else []
    found = run.pictures()
    if len(found) > PICTURES:  # evenly, with the first and the last
        found = [found[round(i * (len(found) - 1) / (PICTURES - 1))] for i in range(PICTURES)]
    pictures += [(f"step {step}", path) for step, path in reversed(found)]
    shown: list[str] = []
    for caption, path in pictures:
        data = read_picture(path)
        if data is not None:
            source = "data:image/png;base64," + base64.b64encode(data).decode()
            shown.append(
                f'<figure><figcaption>{caption}</figcaption><img alt="{caption}" src="{source}"></figure>'
            )
    return "\n".join(shown)


def _errors(run: Run) -> str:
    if not run.errors:
        return ""
    names = list(run.errors[0])
    lines: list[list[Any]] = []
    for row in run.errors:
        least = min((row[name] for name in names[1:] if not isinstance(row[name], str)), default=None)
        values = [row[name] for name in names[1:]]
        lines.append([row[names[0]], *(_Bold(value) if value == least else value for value in values)])
    return (
        "<p>Mean squared error per pixel on held-out images, the least of each noise level in bold.</p>"
        + _table(names, lines)
    )


def _skips(run: Run) -> str:
    if not run.skips:
        return ""
    return (
        "<p>Sampling that skips its first steps by the Gaussian's closed form: network evaluations (NFE), "
        "and RMS per pixel to a fine solution from the same noise.</p>"
        + _table(list(run.skips[0]), (list(row.values()) for row in run.skips))
    )


def _frechet(run: Run) -> str:
    points: list[Row] = []
    for row in run.frechet:
        words = (value for value in row.values() if isinstance(value, str))
        of = " ".join(word for word in words if word.lstrip("-") not in ("nan", "inf"))  # those are gaps
        for name, value in row.items():
            if name not in ("step", "samples", "NFE") and not isinstance(value, str):
                points.append({"step": row["step"], "name": f"{name} {of}".strip(), "value": value})
    if not points:
        return ""
    drawn = figures.distances(figures.values(points, "step", "name", "value"))
    table = _table(list(run.frechet[0]), (list(row.values()) for row in run.frechet))
    return _wide(drawn) + _details("all", table)


def _load(run: Run) -> str:
    saved = [("model", run.path, "config.json"), ("best", run.path / "best", "best/config.json")]
    lines = [
        f"{name} = gaussnet.from_pretrained({str(folder)!r})"
        for name, folder, config in saved
        if (run.path / config).is_file()
    ]
    if not lines:
        return ""
    name = lines[0].partition(" ")[0]
    code = ["import gaussnet", "", *lines, f"denoised = {name}(x, sigma)  # x: (B, C, H, W)"]
    note = "" if len(lines) == 1 and name == "model" else "<p>best: the one of the least held-out error.</p>"
    return f"<pre>{escape(chr(10).join(code))}</pre>{note}"


def _environment() -> str:
    facts = [
        ("gaussnet", __version__),
        ("torch", str(torch.__version__)),
        ("python", platform.python_version()),
        ("platform", platform.platform()),
        ("written", datetime.now().astimezone().isoformat(" ", "seconds")),
    ]
    return f"<p>Of the machine that wrote this page.</p>{_facts(facts)}"


# Elements -----------------------------------------------------------------------------------------


class _Bold(float):
    """A number to be shown in bold."""


def _table(names: Iterable[str], lines: Iterable[Iterable[Any]]) -> str:
    head = "".join(f"<th>{escape(str(name))}</th>" for name in names)
    body = "".join(f"<tr>{''.join(map(_cell, line))}</tr>\n" for line in lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    start = '<td class="least">' if isinstance(value, _Bold) else "<td>"
    return f"{start}{escape(text)}</td>"


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>\n" for name, value in facts)
    return f'<table class="facts"><tbody>{rows}</tbody></table>' if rows else ""


def _details(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>\n{body}</details>\n"


def _wide(body: str) -> str:
    return f'<div class="wide">{body}</div>\n'
