"""What a finished run shows: errors, teleport, samples, learning dynamics; and what its model tells of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from gaussnet import count_nfe, heun, karras_sigmas, plots, teleport
from train.callbacks import Run, denoising_errors
from train.config import Config
from train.data import Data
from train.models import Analytic
from train.writing import append_csv, read_csv

Row = dict[str, Any]


def write_report(run: Run, analytic: Analytic) -> str:
    """Measures the model, writes its tables as CSV and the figures, and returns the text of report.md.

    Every process does its share, and gets the text; the main one writes.
    """
    config, data = run.config, run.data
    errors = error_table(run, analytic)
    skips, pictures = teleport_table(run)
    count = min(config.report.queries, len(data.heldout))
    if run.accelerator.is_main_process:
        for name, rows in (("errors.csv", errors), ("skips.csv", skips)):
            (run.folder.path / name).unlink(missing_ok=True)
            append_csv(run.folder.path / name, rows)
        real = data.train.to_float(data.train.raw(torch.arange(min(12, len(data.train)))))
        plots.image_rows({"real data": real, **pictures}, run.folder.path / "samples.png")
        plots.learning_dynamics(read_csv(run.folder.probes), run.folder.path / "probes.png")
    return "\n".join(
        [
            f"Mean squared denoising error per pixel, {count} held-out images x "
            f"{config.report.draws} noise draws = {count * config.report.draws} queries",
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


def error_table(run: Run, analytic: Analytic) -> list[Row]:
    """The mean squared denoising error per pixel on the same noised images, a row for each sigma."""
    options = run.config.report
    count = min(options.queries, len(run.data.heldout))
    clean, labels = run.heldout(count)
    denoisers = {**analytic.named(), "model": run.average}
    totals = {name: torch.zeros(len(options.sigmas), dtype=torch.float64) for name in denoisers}
    for draw in range(options.draws):
        noise = run.noise(count, "heldout", draw)
        for name, denoiser in denoisers.items():
            totals[name] += denoising_errors(denoiser, clean, noise, options.sigmas, labels).cpu()
    numbers = count * options.draws * run.data.train.event_shape.numel()
    device = run.accelerator.device
    means = {name: (run.total(total.to(device)) / numbers).tolist() for name, total in totals.items()}
    return [
        {"sigma": sigma} | {name: mean[i] for name, mean in means.items()}
        for i, sigma in enumerate(options.sigmas)
    ]


@torch.no_grad()
def teleport_table(run: Run) -> tuple[list[Row], dict[str, Tensor]]:
    """NFE and distance to a fine solution per number of skipped steps, and rows of samples to look at."""
    options, model, gaussian = run.config.report, run.average, run.gaussian
    sigmas = karras_sigmas(options.sample_steps)
    noise, labels = run.initial(options.samples, "initial noise")
    start = float(sigmas[0]) * noise
    fine = heun(model, start, karras_sigmas(options.reference_steps), class_labels=labels)
    rows: list[Row] = []
    samples: dict[int, Tensor] = {}
    for skip in sorted({0, *options.skips, options.picture_skip}):
        with count_nfe(model) as nfe:
            ours = heun(model, *teleport(gaussian, start, sigmas, skip=skip), class_labels=labels)
        square = (ours - fine).double().square().flatten(1).mean(1)
        rms = float(cast(Tensor, run.accelerator.gather(square)).mean().sqrt())
        rows.append({"skipped": skip, "sigma_skip": float(sigmas[skip]), "NFE": nfe(), "RMS": rms})
        samples[skip] = ours
    nfes = {row["skipped"]: row["NFE"] for row in rows}
    rows_of_images = {
        "Gaussian,\nclosed form": gaussian.flow(start, float(sigmas[0]), 0.0),
        f"model,\n{nfes[0]} NFE": samples[0],
        f"teleport,\n{nfes[options.picture_skip]} NFE": samples[options.picture_skip],
    }
    pictures = {
        name: cast(Tensor, run.accelerator.gather(images.float().contiguous()))[: options.samples].cpu()
        for name, images in rows_of_images.items()
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


def provenance(config: Config, data: Data, report: str) -> dict[str, Any]:
    """The numbers of a run, which its model carries."""
    training, loss = config.train, config.loss
    return {
        "data": {"name": data.train.name, "training": len(data.train), "held out": len(data.heldout)},
        "training": {
            "steps": training.steps,
            "images": training.steps * training.batch,
            "batch": training.batch,
            "optimizer": training.optimizer,
            "lr": training.lr,
            "P_mean, P_std": [loss.P_mean, loss.P_std],
            "half-life of the average, kimg": config.ema.halflife_kimg[0],
            "augmentation": ", ".join(config.augment.on()) or "none",
            "precision": training.precision.value,
            "seed": config.seed,
        },
        "report": report,
    }
