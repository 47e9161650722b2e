"""What the runs of benchmarks/bypass_ablation.py say: tables in Markdown, figures beside them.

    python benchmarks/bypass_report.py          writes benchmarks/bypass_ablation/{report.md, *.png} and the
                                                two blocks of docs/evidence.md

All from the tables in benchmarks/bypass_ablation/. Errors are squared denoising errors per pixel on
held-out images, of averaged weights. "Steps to EDM's error" are the steps after which an arm's mean log
error over the levels is the lowest that EDM had, as a share of the steps that EDM took to it (all, but
for one run on patches that ends above its lowest error), interpolated in the logarithm of the step;
"time" is that share times the cost of a step (cost.csv, by bypass_cost.py). "At the last step" is the
largest ratio of errors over the levels, above 1 where an arm is worse than EDM somewhere; "at the lowest"
is the same with each run at the step where its mean log error is lowest, which comes before the last in
one that overfits. Ratios are geometric means over pairs of runs: of a seed and, where EDM was trained on
it, a device; else the noise was another, and the table says so. Of three or more they have 95% intervals
by Student's t of their logarithms, of two both stand there. An arm that is told the class is also
compared with EDM that is told.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
from bench import replace_block, write
from bypass_tables import HERE, TABLES, read
from bypass_tasks import ARMS, RATE_SEED, TASKS, plain
from scipy import stats

from gaussnet.plots.style import pyplot, save

EVIDENCE = HERE.parent / "docs" / "evidence.md"
MARKERS = ("<!-- ablation: made by benchmarks/bypass_report.py -->", "<!-- /ablation -->")
SUMMARY = ("<!-- summary: made by benchmarks/bypass_report.py -->", "<!-- /summary -->")
REFERENCE = "edm"
OF_CLASSES = ("bypass-classes", "marginal-classes", "marginal-each-class", "marginal-each-class-folds")
OTHERS = dict.fromkeys(OF_CLASSES, "edm-classes")  # compared with it, too
LEAST = 1e-3  # of EDM's steps: what an arm that begins there is counted as, in means
RANGES = {"all levels": (0.0, math.inf), "from 0.5 up": (0.5, math.inf), "below 0.5": (0.0, 0.49)}
DEFAULTS = ("marginal-estimate", "marginal-estimate-folds")
SHOWN = ("edm", "edm-moments", "edm-shown", "bypass", "bypass-all", "marginal", DEFAULTS[0])  # of the axes

Curve = dict[int, dict[float, float]]  # step -> sigma -> error
Runs = dict[tuple[str, int, str], Curve]  # (arm, seed, device) -> errors, of one task
Found = Mapping[tuple[str, str, int, str], Curve]  # (task, arm, seed, device) -> errors


def rates() -> dict[tuple[str, str], float]:
    """(task, arm) -> the learning rate that its short runs chose."""
    logs: dict[tuple[str, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in read(TABLES / "errors.csv"):
        if int(row["seed"]) == RATE_SEED and float(row["lr"]) in TASKS[row["task"]].rates:
            logs[row["task"], row["arm"]][float(row["lr"])].append(math.log(float(row["error"])))
    return {key: min(by_rate, key=lambda lr: np.mean(by_rate[lr])) for key, by_rate in logs.items()}


def compared(table: str) -> Iterator[dict[str, str]]:
    """The rows of the runs that are compared: full ones, at the rate that was chosen for their arm."""
    chosen = rates()
    for row in read(TABLES / f"{table}.csv"):
        own, lr = TASKS[row["task"]].rates, float(row["lr"])
        rate = (
            own[0] if len(own) == 1 else chosen.get((row["task"] if own else "core", plain(row["arm"])), lr)
        )
        if int(row["seed"]) != RATE_SEED and rate == lr:
            yield row


def curves() -> dict[tuple[str, str, int, str], Curve]:
    """(task, arm, seed, device) -> errors."""
    found: dict[tuple[str, str, int, str], Curve] = defaultdict(lambda: defaultdict(dict))
    for row in compared("errors"):
        curve = found[row["task"], row["arm"], int(row["seed"]), row["device"]]
        curve[int(row["step"])][float(row["sigma"])] = float(row["error"])
    return found


def level(errors: Mapping[float, float], low: float, high: float) -> float:
    """The mean logarithm of the error over the levels of a range."""
    return float(np.mean([math.log(error) for sigma, error in errors.items() if low <= sigma <= high]))


def reached(curve: Curve, target: float, low: float, high: float) -> float:
    """The step at which the mean log error falls to the target; inf if it does not."""
    points = [(step, level(errors, low, high)) for step, errors in sorted(curve.items())]
    if points[0][1] <= target:
        return points[0][0]
    for (step, value), (next_step, next_value) in pairwise(points):
        if next_value <= target:
            share = (value - target) / (value - next_value)
            first = max(step, 1)
            return math.exp(math.log(first) + share * (math.log(next_step) - math.log(first)))
    return math.inf


def lowest(curve: Curve, low: float, high: float) -> tuple[int, float]:
    """The step at which the mean log error is lowest, and that error."""
    return min(((step, level(errors, low, high)) for step, errors in curve.items()), key=lambda it: it[1])


def interval(shares: Sequence[float]) -> str:
    """A geometric mean with its interval, or both of two; inf where it was not reached."""
    finite = [share for share in shares if math.isfinite(share)]
    if not finite:
        return "not reached"
    logs = np.log(np.maximum(finite, LEAST))
    mean = float(np.mean(logs))
    text = f"{math.exp(mean):.3f}" if any(finite) else "0"
    if any(finite) and len(finite) == 2:
        text += f" ({', '.join(f'{share:.3f}' for share in finite)})"
    elif any(finite) and len(finite) > 2:
        spread = float(stats.t.ppf(0.975, len(finite) - 1) * np.std(logs, ddof=1) / math.sqrt(len(finite)))
        text += f" ({math.exp(mean - spread):.3f} to {math.exp(mean + spread):.3f})"
    missing = len(shares) - len(finite)
    return text + (f", {missing} of {len(shares)} runs never" if missing else "")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def of_task(task: str, found: Found) -> tuple[int, Runs, list[str]]:
    """EDM's last step, the runs of a task that got there, and the arms of those that did not."""
    own = {key[1:]: curve for key, curve in found.items() if key[0] == task}
    last = max((max(curve) for key, curve in own.items() if key[0] == REFERENCE), default=0)
    stopped = [arm for arm in ARMS if any(key[0] == arm and last not in own[key] for key in own)]
    return last, {key: curve for key, curve in own.items() if last in curve}, stopped


def partners(own: Runs, arm: str, other: str) -> dict[tuple[str, int, str], tuple[str, int, str]]:
    """The runs of an arm, and those of another of the same seed and, where there are such, device."""
    found: dict[tuple[str, int, str], tuple[str, int, str]] = {}
    for key in sorted(key for key in own if key[0] == arm):
        same = [partner for partner in sorted(own) if partner[:2] == (other, key[1])]
        if same:
            found[key] = min(same, key=lambda partner: partner[2] != key[2])
    return found


def paired(own: Runs, arm: str, other: str) -> list[tuple[Curve, Curve]]:
    """The runs of two arms, by seed and, where that can be, device."""
    return [(own[key], own[partner]) for key, partner in partners(own, arm, other).items()]


def runs_of(own: Runs, arm: str, other: str) -> str:
    """How many pairs there are, and whether some of them saw other noise."""
    found = partners(own, arm, other)
    strange = any(key[2] != partner[2] for key, partner in found.items())
    return f"{len(found)}, other noise" if strange else f"{len(found)}"


def shares(pairs: Sequence[tuple[Curve, Curve]], low: float, high: float) -> list[float]:
    """Of the second curve's steps to its lowest error, those that the first takes to it."""
    goals = [lowest(other, low, high) for _, other in pairs]
    return [
        reached(curve, target, low, high) / step
        for (curve, _), (step, target) in zip(pairs, goals, strict=True)
    ]


def ratios(pairs: Sequence[tuple[Curve, Curve]], step: int | None = None) -> dict[float, float]:
    """The geometric means of the ratios of errors, by sigma; without a step, where each run is lowest."""

    def at(curve: Curve) -> dict[float, float]:
        return curve[lowest(curve, *RANGES["all levels"])[0] if step is None else step]

    errors = [(at(curve), at(other)) for curve, other in pairs]
    logs = {sigma: [math.log(own[sigma] / other[sigma]) for own, other in errors] for sigma in errors[0][1]}
    return {sigma: math.exp(np.mean(logs[sigma])) for sigma in sorted(logs)}


def worst(of_levels: Mapping[float, float]) -> str:
    """The largest ratio, and its level."""
    sigma = max(of_levels, key=of_levels.__getitem__)
    return f"{of_levels[sigma]:.3f} (at {sigma:g})"


def summary_text(found: Found) -> str:
    """Of each task, what the defaults are worth."""
    rows: list[list[str]] = []
    for task, spec in TASKS.items():
        last, own, _ = of_task(task, found)
        for arm, other in spec.defaults.items():
            pairs = paired(own, arm, other)
            if not pairs:
                continue
            cells = [interval(shares(pairs, *bounds)) for bounds in RANGES.values()]
            what = spec.title if other == REFERENCE else f"{spec.title}, with classes"
            rows.append([what, runs_of(own, arm, other), *cells, worst(ratios(pairs, last))])
    return table(["task", "runs", *(f"steps, {name}" for name in RANGES), "worst error"], rows)


def task_text(task: str, found: Found) -> str:
    """The tables of a task."""
    last, own, stopped = of_task(task, found)
    devices = sorted({device for arm, _, device in own if arm == REFERENCE})
    arms = [arm for arm in ARMS if paired(own, arm, REFERENCE)]
    if len(arms) < 2:
        return ""
    costs = {row["arm"]: float(row["cost"]) for row in read(TABLES / "cost.csv") if row["task"] == task}
    sigmas = sorted(next(curve for key, curve in own.items() if key[0] == REFERENCE)[last])
    speeds: list[list[str]] = []
    errors: list[list[str]] = []
    pairs = [(arm, REFERENCE) for arm in arms]
    pairs += [(arm, other) for arm, other in OTHERS.items() if arm in arms and other in arms]
    for arm, other in pairs:
        matched = paired(own, arm, other)
        name = arm if other == REFERENCE else f"{arm}, of {other}"
        if arm == REFERENCE:
            for device in devices:
                seeds = [curve[last] for key, curve in own.items() if (key[0], key[2]) == (arm, device)]
                absolute = [np.mean([curve[sigma] for curve in seeds]) for sigma in sigmas]
                errors.append([f"{arm} ({device}), error", *(f"{value:.3g}" for value in absolute)])
            continue
        steps = [shares(matched, *bounds) for bounds in RANGES.values()]
        known = arm in costs and (other in costs or other == REFERENCE)
        cost = costs[arm] / costs.get(other, 1.0) if known else math.nan
        time = interval([step * cost for step in steps[0]]) if known else "-"
        of_levels, of_lowest = ratios(matched, last), ratios(matched)
        ends = [worst(of_levels), worst(of_lowest)]
        speeds.append([name, runs_of(own, arm, other), *map(interval, steps), time, *ends])
        errors.append([f"{name}, ratio", *(f"{ratio:.3f}" for ratio in of_levels.values())])
    head = ["arm", "runs", *(f"steps to EDM's error, {name}" for name in RANGES), "time"]
    head += ["at the last step", "at the lowest"]
    parts = [
        f"## {task}, {last} steps",
        table(head, speeds),
        f"Held-out error per pixel after {last} steps, by sigma:",
        table(["arm", *(f"{sigma:g}" for sigma in sigmas)], errors),
    ]
    if stopped:
        parts.append(f"Runs that stopped before step {last} are left out: {', '.join(stopped)}.")
    return "\n\n".join(parts)


def measures_text(task: str) -> str:
    """Means over seeds of what was measured on finished runs."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in compared("measures"):
        if row["task"] == task:
            values[row["arm"]][row["name"]].append(float(row["value"]))
    names = list(dict.fromkeys(name for measured in values.values() for name in measured))
    rows = [
        [arm, *(f"{np.mean(values[arm][name]):.4g}" if values[arm][name] else "-" for name in names)]
        for arm in ARMS
        if arm in values
    ]
    return table(["arm", *names], rows) if rows else ""


def draw_curves(found: Found) -> None:
    """Learning curves: the mean log error, a panel a task and range of levels, a line an arm."""
    tasks = [task for task in TASKS if any(key[0] == task for key in found)]
    if not tasks:
        return
    plt = pyplot()
    figure, axes = plt.subplots(
        len(tasks), len(RANGES), figsize=(13, 3.4 * len(tasks)), squeeze=False, layout="constrained"
    )
    arms = [arm for arm in ARMS if any(key[1] == arm for key in found)]
    shades, lines = plt.get_cmap("tab20"), {}
    for line, task in enumerate(tasks):
        for axis, (name, (low, high)) in zip(axes[line], RANGES.items(), strict=True):
            for number, arm in enumerate(arms):
                runs = [curve for key, curve in found.items() if key[:2] == (task, arm)]
                if not runs:
                    continue
                steps = sorted(set.intersection(*(set(run) for run in runs)) - {0})
                means = [np.exp(np.mean([level(run[step], low, high) for run in runs])) for step in steps]
                bold = arm in (REFERENCE, *DEFAULTS)
                style = {"color": shades(number % 20), "ls": "-" if number < 20 else "--"}
                (lines[arm],) = axis.plot(steps, means, lw=2.2 if bold else 1.1, **style)
            axis.set(xscale="log", yscale="log", title=f"{task}: {name}", xlabel="step")
            axis.grid(alpha=0.25, which="both")
        axes[line, 0].set_ylabel("geometric mean of the error")
    told = [arm for arm in arms if arm in lines]
    figure.legend(
        [lines[arm] for arm in told], told, loc="outside lower center", ncols=5, frameon=False, fontsize=9
    )
    save(figure, TABLES / "curves.png")


def draw_modes(task: str) -> None:
    """When each band of axes is learned: the first step within a tenth of its last error."""
    found: dict[tuple[str, float], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in compared("modes"):
        if row["task"] == task and row["arm"] in SHOWN:
            found[row["arm"], float(row["sigma"])][float(row["variance"])].append(float(row["learned"]))
    if not found:
        return
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), sharey=True, layout="constrained")
    for axis, sigma in zip(axes, (0.2, 0.5, 1.0), strict=True):
        for arm in SHOWN:
            points = [(variance, np.mean(steps)) for variance, steps in sorted(found[arm, sigma].items())]
            if points:
                axis.plot(*zip(*points, strict=True), "o-", ms=3, lw=1.2, label=arm)
        axis.set(xscale="log", title=rf"$\sigma$ = {sigma:g}", xlabel="variance along the axes")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("steps to within 10% of the last error")
    lines, told = axes[-1].get_legend_handles_labels()
    figure.legend(lines, told, loc="outside lower center", ncols=len(told), frameon=False, fontsize=8)
    save(figure, TABLES / "modes.png")


def main() -> None:
    """Writes report and figures, and prints the report."""
    found = curves()
    texts = {task: task_text(task, found) for task in TASKS}
    parts = ["# Does the bypass pay?", "    python benchmarks/bypass_report.py"]
    for task, text in texts.items():
        parts += [part for part in (text, measures_text(task) if text else "") if part]
    write(TABLES / "report.md", "\n\n".join(parts) + "\n")
    block = "\n\n".join(text.replace("## ", "### ", 1) for text in texts.values() if text)
    page = replace_block(EVIDENCE.read_text(), SUMMARY, f"\n{summary_text(found)}\n")
    write(EVIDENCE, replace_block(page, MARKERS, f"\n{block}\n"))
    draw_curves(found)
    draw_modes("core")
    print("\n\n".join(parts))


if __name__ == "__main__":
    main()
