"""Where a run stands, in numbers and in lines of text."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from statistics import fmean
from typing import Self

from gaussnet.run_report.folder import MAX_STEP, Row, Run

LAST = 5  # rows that means are taken of
BAR = 40
FOREVER = 1e9 * 86400.0  # seconds, the longest time that is told


@dataclass(frozen=True)
class Status:
    """Where a run stands; None for what is not known yet.

    Attributes:
        name: of the run's folder.
        complete: whether the run is over.
        step: the last one on record.
        steps: of the whole run.
        loss: in the last row; None, too, if it is not finite.
        mean_loss: over the last rows.
        images_per_second: in the last row.
        waiting: share of the time that the last row's steps waited for data.
        bad_steps: with gradients that were not finite, since the run was started or resumed.
        remaining: seconds of training, at the speed of the last rows, without what is looked at meanwhile.
        heldout: (step, error): the last held-out error of the averaged weights, relative to the Gaussian's
            and averaged over the levels.
        best: (step, error) where it was lowest.
        probe: (step, {sigma: share}): the share of the averaged weights' score that the Gaussian leaves
            unexplained at noised data, at the last probe.
        written: when the last row of metrics was written.
    """

    name: str
    complete: bool
    step: int
    steps: int | None
    loss: float | None
    mean_loss: float | None
    images_per_second: float | None
    waiting: float | None
    bad_steps: int | None
    remaining: float | None
    heldout: tuple[int, float] | None
    best: tuple[int, float] | None
    probe: tuple[int, dict[float, float]] | None
    written: datetime | None

    @classmethod
    def of(cls, run: Run) -> Self:
        """The status of a run."""
        metrics = run.metrics
        last: Row = metrics[-1] if metrics else {}
        steps = _positive(run.setting("train", "steps"))
        batch = _positive(run.setting("train", "batch"))
        on_record = [rows[-1]["step"] for rows in (metrics, run.heldout, run.probes) if rows]
        step = max(on_record, default=0)
        speed = _mean(metrics, "images_per_second")
        remaining = None
        if steps and batch and speed and not run.complete:
            remaining = min(max(steps - step, 0) * batch / max(speed, 1e-9), FOREVER)
        errors = _errors(run.heldout)
        return cls(
            name=run.name,
            complete=run.complete,
            step=step,
            steps=steps,
            loss=last.get("loss"),
            mean_loss=_mean(metrics, "loss"),
            images_per_second=last.get("images_per_second"),
            waiting=last.get("waiting"),
            bad_steps=last.get("bad_steps"),
            remaining=remaining,
            heldout=max(errors.items(), default=None),
            best=min(errors.items(), key=lambda item: (item[1], item[0]), default=None),
            probe=_probe(run.probes),
            written=_written(run) if metrics else None,
        )

    @property
    def title(self) -> str:
        """The state in few words."""
        if self.complete:
            return "complete" if self.steps is None else f"complete, {self.steps} steps"
        return f"at step {self.step}" if self.steps is None else f"at step {self.step} of {self.steps}"

    def facts(self) -> list[tuple[str, str]]:
        """Names and values of what is known."""
        facts: list[tuple[str, str]] = []
        if self.written is not None:
            loss = "not finite" if self.loss is None else f"{self.loss:.4g}"
            mean = "" if self.mean_loss is None else f", mean of the last {LAST} rows {self.mean_loss:.4g}"
            facts.append(("loss", loss + mean))
        if self.images_per_second is not None:
            facts.append(("speed", f"{self.images_per_second:.4g} images/s"))
        if self.remaining is not None:
            facts.append(("remaining", f"about {duration(self.remaining)} of training"))
        if self.waiting is not None:
            facts.append(("waiting", f"{self.waiting:.1%} of the time, for data"))
        if self.bad_steps is not None:
            facts.append(("bad steps", f"{self.bad_steps}"))
        if self.heldout is not None and self.best is not None:
            (step, error), (best_step, best) = self.heldout, self.best
            facts.append(("held-out error", f"{error:.4g} of the Gaussian's, step {step}"))
            facts.append(("best", f"{best:.4g}, step {best_step}"))
        if self.written is not None:
            facts.append(("last row", self.written.isoformat(" ", "seconds")))
        return facts

    def lines(self, width: int = 80) -> list[str]:
        """The status for a terminal, in ASCII but for the run's name, no line longer than `width`."""
        lines = [f"{self.name}: {self.title}"]
        if self.steps is not None:
            share = 1.0 if self.complete else min(self.step / self.steps, 1.0)
            done = int(share * BAR)
            lines.append(f"[{'#' * done}{'-' * (BAR - done)}] {share:.1%}")
        lines += [f"{name:<15} {value}" for name, value in self.facts()]
        if self.probe is not None:
            step, shares = self.probe
            lines.append(f"score unexplained by the Gaussian, step {step}:")
            cells, each = list(shares.items()), max((width - 8) // 9, 1)
            for first in range(0, len(cells), each):
                part = cells[first : first + each]
                lines.append("  sigma " + "".join(f"{sigma:>9g}" for sigma, _ in part))
                lines.append("  share " + "".join(f"{share:>9.3g}" for _, share in part))
        return [line[:width] for line in lines]


def duration(seconds: float) -> str:
    """A time in its two largest units.

    Example:
        >>> duration(3725)
        '1 h 2 min'
    """
    seconds = round(seconds)
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    for (name, size), (smaller, part) in pairwise(units):
        if seconds >= size:
            return f"{seconds // size} {name} {seconds % size // part} {smaller}"
    return f"{seconds} s"


def _errors(heldout: list[Row]) -> dict[int, float]:
    """Step -> mean over the levels of the averaged weights' error, relative to the Gaussian's."""
    by_step: dict[int, list[float]] = {}
    for row in heldout:
        if row["weights"] == "ema":
            by_step.setdefault(row["step"], []).append(row["relative"])
    return {step: fmean(values) for step, values in by_step.items()}


def _probe(rows: list[Row]) -> tuple[int, dict[float, float]] | None:
    wanted = {"weights": "ema", "queries": "noised", "reference": "gaussian", "quantity": "score"}
    chosen = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    if not chosen:
        return None
    step = max(row["step"] for row in chosen)
    return step, {row["sigma"]: row["mean"] for row in chosen if row["step"] == step}


def _mean(rows: list[Row], name: str) -> float | None:
    values = [row[name] for row in rows[-LAST:] if row[name] is not None]
    return fmean(values) if values else None


def _positive(value: object) -> int | None:
    return value if isinstance(value, int) and 0 < value < MAX_STEP else None


def _written(run: Run) -> datetime | None:
    try:
        return datetime.fromtimestamp((run.path / "metrics.jsonl").stat().st_mtime).astimezone()
    except OSError:
        return None
