"""What a finished run shows: one table, the samples, the learning dynamics."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gaussnet import BypassPrecond, Denoiser, count_nfe, heun, karras_sigmas, plots, teleport
from train.config import Config
from train.data import Data, generator_for
from train.models import Analytic
from train.rundir import RunFolder, append_csv

Row = dict[str, Any]


def write_report(run: RunFolder, config: Config, data: Data, analytic: Analytic, model: BypassPrecond) -> str:
    """Measures the model, writes its tables as CSV and the figures, and returns the text of report.md."""
    denoisers: dict[str, Denoiser] = {**analytic.named(), "model": model}
    errors = denoising_errors(denoisers, data.heldout, config)
    skips, pictures = teleport_table(model, analytic, config)
    for name, rows in (("errors.csv", errors), ("skips.csv", skips)):
        (run.path / name).unlink(missing_ok=True)
        append_csv(run.path / name, rows)
    plots.image_rows({"real data": data.train, **pictures}, run.path / "samples.png")
    plots.learning_dynamics(run.read_probes(), run.path / "probes.png")

    count = len(data.heldout) * config.report.draws
    return "\n".join(
        [
            f"Mean squared denoising error per pixel, {len(data.heldout)} held-out images x "
            f"{config.report.draws} noise draws = {count} queries",
            "",
            markdown(errors, {"sigma": "g"}, ".5f"),
            "",
            f"Heun, {config.report.sample_steps} steps from the same {config.report.samples} initial noises; "
            f"RMS per pixel to a {config.report.reference_steps}-step solution of the model",
            "",
            markdown(skips, {"skipped": "d", "sigma_skip": ".1f", "NFE": "d"}, ".4f"),
            "",
        ]
    )


@torch.no_grad()
def denoising_errors(denoisers: Mapping[str, Denoiser], clean: Tensor, config: Config) -> list[Row]:
    """The mean squared denoising error per pixel on the same noised images, a row for each sigma."""
    rows: list[Row] = []
    for sigma in config.report.sigmas:
        totals = dict.fromkeys(denoisers, 0.0)
        for draw in range(config.report.draws):
            generator = generator_for(config.seed, "heldout", draw)
            x = clean + sigma * torch.randn(clean.shape, generator=generator).to(clean.device)
            for name, denoiser in denoisers.items():
                totals[name] += float((denoiser(x, sigma) - clean).square().mean())
        rows.append({"sigma": sigma} | {name: total / config.report.draws for name, total in totals.items()})
    return rows


@torch.no_grad()
def teleport_table(
    model: BypassPrecond, analytic: Analytic, config: Config
) -> tuple[list[Row], dict[str, Tensor]]:
    """NFE and distance to a fine solution per number of skipped steps, and rows of samples to look at."""
    options, gaussian = config.report, analytic.gaussian
    sigmas = karras_sigmas(options.sample_steps)
    noise = torch.randn(
        options.samples, *model.event_shape, generator=generator_for(config.seed, "initial noise")
    )
    start = float(sigmas[0]) * noise.to(gaussian.mean.device)
    fine = heun(model, start, karras_sigmas(options.reference_steps))
    rows: list[Row] = []
    samples: dict[int, Tensor] = {}
    for skip in sorted({0, *options.skips, options.picture_skip}):
        with count_nfe(model) as nfe:
            samples[skip] = heun(model, *teleport(gaussian, start, sigmas, skip=skip))
        rms = float((samples[skip] - fine).square().mean().sqrt())
        rows.append({"skipped": skip, "sigma_skip": float(sigmas[skip]), "NFE": nfe(), "RMS": rms})
    pictures = {
        "Gaussian,\nclosed form": gaussian.flow(start, float(sigmas[0]), 0.0),
        f"model,\n{rows[0]['NFE']} NFE": samples[0],
        f"teleport,\n{_row(rows, options.picture_skip)['NFE']} NFE": samples[options.picture_skip],
    }
    return [row for row in rows if row["skipped"] in {0, *options.skips}], pictures


def markdown(rows: list[Row], formats: Mapping[str, str], default: str) -> str:
    """A Markdown table, aligned for a terminal, too."""
    names = list(rows[0])
    cells = [names] + [[format(row[name], formats.get(name, default)) for name in names] for row in rows]
    widths = [max(len(line[k]) for line in cells) for k in range(len(names))]
    lines = [
        "| " + " | ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|")
    return "\n".join(lines)


def files(run: RunFolder) -> list[Path]:
    """What a finished run has written, without its checkpoints."""
    return sorted(path for path in run.path.iterdir() if path.is_file())


def _row(rows: list[Row], skip: int) -> Row:
    return next(row for row in rows if row["skipped"] == skip)
