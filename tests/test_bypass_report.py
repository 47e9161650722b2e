"""The arithmetic of the ablation's report, and the tables that runs are collected in."""

import math
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import bypass_report
import bypass_tables
import bypass_tasks
from bypass_ablation import claim, main, train, waiting
from bypass_report import Curve, curves, interval, level, ratios, reached, summary_text, task_text, worst
from bypass_tables import device_of, label_of, merge, read
from bypass_tasks import RATE_SEED, RATES, Run

SIGMAS = (0.1, 1.0, 10.0)


def curve(errors: dict[int, float]) -> Curve:
    """The same error at all levels, by step."""
    return {step: dict.fromkeys(SIGMAS, error) for step, error in errors.items()}


def test_level_is_the_mean_logarithm_over_a_range() -> None:
    errors = {0.1: 0.5, 1.0: 0.25, 10.0: 4.0}
    assert level(errors, 0.0, math.inf) == pytest.approx(math.log(0.5 * 0.25 * 4.0) / 3)
    assert level(errors, 0.5, 2.0) == pytest.approx(math.log(0.25))


def test_the_step_is_interpolated_in_its_logarithm() -> None:
    power = curve({step: step**-0.5 for step in (1, 100, 400, 1600)})  # a line in both logarithms
    for target in (7, 100, 255, 1600):
        assert reached(power, math.log(target**-0.5), 0.0, math.inf) == pytest.approx(target)
    assert reached(power, math.log(2.0), 0.0, math.inf) == 1, "it begins below"
    assert reached(power, math.log(0.001), 0.0, math.inf) == math.inf
    assert reached(curve({0: 1.0, 10: 0.1}), math.log(0.1**0.5), 0.0, math.inf) == pytest.approx(10**0.5)


def test_interval_is_students() -> None:
    shares = [0.5, 0.4, 0.6]
    logs = [math.log(value) for value in shares]
    low, high = stats.t.interval(0.95, 2, *stats.norm.fit(logs)[:1], stats.sem(logs))
    mean = sum(logs) / 3
    assert interval(shares) == f"{math.exp(mean):.3f} ({math.exp(low):.3f} to {math.exp(high):.3f})"
    assert interval(shares[:1]) == "0.500"
    assert interval([0.9, 0.4]) == "0.600 (0.900, 0.400)", "of two, both"
    assert interval([math.inf]) == "not reached"
    assert interval([0.0, 0.0, 0.0]) == "0"
    assert interval([0.0, 0.1]) == "0.010 (0.000, 0.100)", "a thousandth, for what begins there"
    assert interval([0.5, math.inf]) == "0.500, 1 of 2 runs never"
    assert interval([0.0, math.inf]) == "0, 1 of 2 runs never"


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (bypass_tables, bypass_report):
        monkeypatch.setattr(module, "TABLES", tmp_path)
    return tmp_path


def collect(run: Run, errors: dict[int, float], device: str = "cpu") -> None:
    rows = [
        {"step": str(step), "sigma": str(sigma), "error": str(error * sigma)}
        for step, error in errors.items()
        for sigma in SIGMAS
    ]
    merge("errors", label_of(run, device), rows, ("step", "sigma", "error"))


def test_arms_are_compared_seed_by_seed(tables: Path) -> None:
    for seed, scale in ((0, 1.0), (1, 3.0)):  # a seed that is harder for both changes no ratio
        edm = {step: scale * step**-0.5 for step in (100, 200, 400)}
        fast = {step: 0.5 * scale * step**-0.5 for step in (50, 100, 200, 400)}
        collect(Run("core", "edm", seed, 0.01, 400), edm)
        collect(Run("core", "marginal", seed, 0.02, 400), fast)
    collect(Run("core", "marginal", RATE_SEED, 0.02, 80), {80: 1e-9})  # chose the rate
    (tables / "cost.csv").write_text("task,arm,cost\ncore,marginal,1.200\n")
    text = task_text("core", curves())
    row = next(line for line in text.splitlines() if line.startswith("| marginal |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:2] == ["marginal", "2"]
    assert cells[2] == "0.250 (0.250, 0.250)"  # four times fewer steps
    assert cells[5] == "0.300 (0.300, 0.300)", "each costs 1.2 of EDM's"
    assert cells[6].startswith("0.500 (at")
    assert task_text("digits", curves()) == ""


def test_runs_are_compared_on_their_own_device_where_there_are_such(tables: Path) -> None:
    steps, noisy = (50, 100, 200, 400), Run("core", "edm", 0, 0.01, 400)
    collect(noisy, {step: step**-0.5 for step in steps}, "cuda")
    collect(Run("core", "marginal", 0, 0.01, 400), {step: 0.5 * step**-0.5 for step in steps}, "cuda")
    collect(Run("core", "marginal-estimate", 0, 0.01, 400), {step: step**-0.5 for step in steps}, "cpu")
    collect(Run("core", "marginal-hidden", 1, 0.01, 400), {step: step**-0.5 for step in steps}, "cpu")
    (tables / "cost.csv").write_text("task,arm,cost\n")

    def cells() -> dict[str, list[str]]:
        lines = [line.strip("| ").split(" | ") for line in task_text("core", curves()).splitlines()]
        return {line[0]: line[1:] for line in reversed(lines) if len(line) > 2}

    assert cells()["marginal"][:2] == ["1", "0.250"]
    assert cells()["marginal-estimate"][:2] == ["1, other noise", "1.000"]
    assert "1, other noise" in summary_text(curves())
    collect(noisy, {step: 2 * step**-0.5 for step in steps}, "cpu")
    assert cells()["marginal"][:2] == ["1", "0.250"], "another device's rows stay, and stay compared"
    assert cells()["marginal-estimate"][:2] == ["1", "0.250"]
    assert "other noise" not in summary_text(curves())
    assert "marginal-hidden" not in cells(), "no EDM of its seed"
    absolute = [cells()[f"edm ({device}), error"][1] for device in ("cpu", "cuda")]
    assert absolute == ["0.1", "0.05"], "at sigma = 1"


def test_a_run_is_done_once_a_device_if_that_is_named(tables: Path) -> None:
    run = Run("core", "edm", 0, 0.01, 400)
    chosen = Run("core", "edm", RATE_SEED, 0.01, 80)  # only chooses a rate
    collect(run, {400: 1.0}, "cuda")
    collect(chosen, {80: 1.0}, "cuda")
    errors = read(tables / "errors.csv")
    known = {device: run in bypass_tasks.finished(errors, device) for device in (None, "cpu", "cuda")}
    assert known == {None: True, "cpu": False, "cuda": True}
    assert chosen in bypass_tasks.finished(errors, "cpu")


def test_the_log_tells_the_device(tmp_path: Path) -> None:
    line = "training 42 parameters for 8 steps of 4 images on 1 process(es), {}\n  0%| | 0/8\n"
    for device in ("cpu", "cuda"):
        (tmp_path / "log.txt").write_text("fit: gaussian in 1 s\n" + line.format(device))
        assert device_of(tmp_path) == device
    (tmp_path / "log.txt").write_text("training in 5 folds, in 2.0 s\n")
    with pytest.raises(ValueError, match=r"log\.txt: expected a line 'training"):
        device_of(tmp_path)


def test_a_folder_holds_the_run_of_one_device(tmp_path: Path) -> None:
    run = Run("core", "edm", 0, 0.01, 400)
    path = tmp_path / run.name
    path.mkdir(parents=True)
    (path / "measured.json").write_text("[]")
    (path / "log.txt").write_text("training 42 parameters for 8 steps of 4 images on 1 process(es), cuda\n")
    assert not train(run, tmp_path, 1), "complete"
    assert not train(run, tmp_path, 1, "cuda")
    with pytest.raises(SystemExit, match="expected a run on cpu, got one on cuda"):
        train(run, tmp_path, 1, "cpu")


def test_a_gpu_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bypass_ablation.py", "run", "--device", "cuda"])
    with pytest.raises(SystemExit):
        main()
    assert "--device cuda: torch sees no GPU" in capsys.readouterr().err


def test_the_worst_level_is_that_of_the_largest_mean_ratio() -> None:
    edm = {400: {0.1: 1.0, 1.0: 1.0, 10.0: 2.0}}
    first, second = {400: {0.1: 0.5, 1.0: 0.9, 10.0: 4.0}}, {400: {0.1: 0.5, 1.0: 1.6, 10.0: 1.0}}
    of_levels = ratios([(first, edm), (second, edm)], 400)
    assert of_levels == pytest.approx({0.1: 0.5, 1.0: 1.2, 10.0: 1.0})
    assert worst(of_levels) == "1.200 (at 1)"


def test_a_run_that_overfits_is_also_compared_where_it_is_lowest() -> None:
    edm = {100: {0.1: 4.0, 1.0: 4.0}, 200: {0.1: 3.0, 1.0: 3.0}, 400: {0.1: 2.0, 1.0: 2.0}}
    early = {100: {0.1: 1.0, 1.0: 1.6}, 200: {0.1: 1.5, 1.0: 2.5}, 400: {0.1: 1.0, 1.0: 3.0}}
    late = {100: {0.1: 3.0, 1.0: 3.0}, 200: {0.1: 1.0, 1.0: 1.6}, 400: {0.1: 1.0, 1.0: 3.0}}
    pairs = [(early, edm), (late, edm)]
    assert ratios(pairs, 400) == pytest.approx({0.1: 0.5, 1.0: 1.5})
    assert ratios(pairs) == pytest.approx({0.1: 0.5, 1.0: 0.8}), "EDM at 400, the others at 100 and 200"


def test_the_summary_is_of_the_defaults(tables: Path) -> None:
    for arm, scale in (("edm", 1.0), ("marginal-estimate", 0.5), ("edm-classes", 0.8), ("bypass-all", 0.1)):
        collect(Run("core", arm, 0, 0.01, 400), {step: scale * step**-0.5 for step in (50, 100, 200, 400)})
    collect(Run("digits", "marginal-estimate-folds", 0, 0.01, 400), {400: 0.1})  # and no EDM
    classes = {step: 0.4 * (step**-0.5 if step < 400 else 0.04) for step in (50, 100, 200, 400)}
    collect(Run("core", "marginal-each-class-folds", 0, 0.01, 400), classes)
    rows = [line.strip("| ").split(" | ") for line in summary_text(curves()).splitlines()[2:]]
    assert [row[:3] for row in rows] == [["MNIST", "1", "0.250"], ["MNIST, with classes", "1", "0.250"]]
    assert [row[-1].split()[0] for row in rows] == ["0.500", "0.400"]


def test_the_goal_is_the_lowest_error_that_edm_had(tables: Path) -> None:
    collect(Run("core", "edm", 0, 0.01, 400), {100: 1.0, 200: 0.5, 400: 0.8})  # ends above it
    collect(Run("core", "marginal", 0, 0.01, 400), {100: 0.5, 200: 0.4, 400: 0.3})
    collect(Run("core", "bypass", 0, 0.01, 400), {100: 1.0, 200: 0.7, 400: 0.6})
    (tables / "cost.csv").write_text("task,arm,cost\n")
    lines = [line.split(" | ") for line in task_text("core", curves()).splitlines()]
    cells = {line[0]: line[2] for line in lines if len(line) == 8}
    assert cells["| marginal"] == "0.500", "100 of the 200 steps that EDM took"
    assert cells["| bypass"] == "not reached"


def test_runs_at_other_rates_are_kept_and_not_compared(tables: Path) -> None:
    low, high = RATES[:2]
    for lr, short, full in ((low, 0.5, 0.2), (high, 0.4, 0.3), (1.0, 0.1, 0.1)):  # 1.0 is none of the three
        collect(Run("core", "edm", RATE_SEED, lr, 80), {80: short})
        collect(Run("core", "edm", 0, lr, 400), {400: full})
        collect(Run("mnist-300", "edm", 0, lr, 400), {400: full})  # takes the rate of the task core
    found = curves()
    assert {key: curve[400][1.0] for key, curve in found.items()} == {
        ("core", "edm", 0, "cpu"): 0.3,
        ("mnist-300", "edm", 0, "cpu"): 0.3,
    }
    assert len({row["lr"] for row in read(tables / "errors.csv")}) == 3


def test_a_run_replaces_its_rows_alone(tables: Path) -> None:
    first, second = Run("core", "edm", 0, 0.01, 400), Run("core", "edm", 1, 0.01, 400)
    collect(first, {100: 1.0, 200: 0.5})
    collect(second, {100: 2.0})
    collect(first, {100: 3.0})
    rows = read(tables / "errors.csv")
    assert [(row["seed"], row["step"], row["error"]) for row in rows if row["sigma"] == "1"] == [
        ("0", "100", "3"),
        ("1", "100", "2"),
    ]


def test_a_run_is_done_by_one_process_and_taken_over_from_a_dead_one(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    assert claim(lock)
    assert not claim(lock), "this process lives"
    assert lock.read_text() == str(os.getpid())
    lock.write_text(str(2**22 + 1))  # more than any pid
    assert claim(lock)


def test_a_lock_is_claimed_by_one_of_many(tmp_path: Path) -> None:
    together = threading.Barrier(
        8
    )  # each opens the folder anew, so they lock one another out as processes do

    def one(lock: Path) -> bool:
        together.wait()
        return claim(lock)

    with ThreadPoolExecutor(8) as pool:
        for attempt in range(30):
            folder = tmp_path / str(attempt)
            folder.mkdir()
            assert sum(pool.map(one, [folder / "lock"] * 8)) == 1
    (tmp_path / "lock").write_text("99999999")  # of a process that is gone
    assert claim(tmp_path / "lock")
    assert (tmp_path / "lock").read_text() == str(os.getpid())


def test_runs_without_a_rate_are_told(tables: Path) -> None:
    (line,) = waiting(["mnist-300", "long"], ["marginal-folds"], [])
    assert line == "mnist-300: waits for the learning rates of short runs: run --task core --arm marginal"
    for lr in RATES:
        collect(Run("core", "marginal", RATE_SEED, lr, 300), {300: lr})
    assert waiting(["mnist-300"], ["marginal-folds"], read(tables / "errors.csv")) == []


def test_runs_that_stopped_earlier_are_left_out(tables: Path) -> None:
    collect(Run("core", "edm", 0, 0.01, 400), {100: 1.0, 200: 0.5, 400: 0.3})
    collect(Run("core", "marginal", 0, 0.01, 400), {100: 0.5, 200: 0.4, 400: 0.2})
    collect(Run("core", "bypass", 0, 0.01, 400), {100: 1.0, 200: 0.7})
    text = task_text("core", curves())
    assert "| marginal | 1 |" in text
    assert "| bypass | 1 |" not in text
    assert text.endswith("Runs that stopped before step 400 are left out: bypass.")


def test_the_figure_has_every_arm(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, arm in enumerate(bypass_tasks.ARMS):  # more than there are colours; half in another task
        collect(Run("core" if number % 2 else "digits", arm, 0, 0.01, 400), {100: 1.0, 400: 0.5})
    figures: list[Any] = []
    monkeypatch.setattr(bypass_report, "save", lambda figure, path: figures.append(figure))
    bypass_report.draw_curves(curves())
    legend = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert legend == list(bypass_tasks.ARMS)
    assert tables.is_dir()


def test_the_arms_of_the_page_are_those_of_the_script() -> None:
    page = bypass_report.EVIDENCE.read_text()
    missing = [arm for arm in bypass_tasks.ARMS if f"`{arm}`" not in page]
    assert not missing


def test_rates_and_finished_runs_are_those_of_the_table(tables: Path) -> None:
    data, arms = {"mnist": "mnist"}, ["edm", "marginal", "marginal-folds"]

    def planned() -> list[tuple[str, str, int, float]]:
        runs = bypass_tasks.runs("mnist-300", arms, 1, read(tables / "errors.csv"), data)
        return [(run.task, run.arm, run.seed, run.lr) for run in runs]

    for lr in RATES[:-1]:
        collect(Run("core", "marginal", RATE_SEED, lr, 300), {300: lr})
    assert planned() == [], "one short run is missing"
    collect(Run("core", "marginal", RATE_SEED, RATES[-1], 300), {300: 1.0})
    chosen = [("mnist-300", "marginal", 0, RATES[0]), ("mnist-300", "marginal-folds", 0, RATES[0])]
    assert planned() == chosen, "folds take the rate of the arm without"

    collect(Run("mnist-300", "marginal", 0, RATES[0], 1500), {100: 0.5})
    assert Run("mnist-300", "marginal", 0, RATES[0], 1500) not in bypass_tasks.finished(
        read(tables / "errors.csv")
    )
    collect(Run("mnist-300", "marginal", 0, RATES[0], 1500), {100: 0.5, 1500: 0.4})
    known = bypass_tasks.finished(read(tables / "errors.csv"))
    assert Run("mnist-300", "marginal", 0, RATES[0], 1500) in known
    assert Run("mnist-300", "marginal-folds", 0, RATES[0], 1500) not in known


@pytest.mark.usefixtures("tables")
def test_a_task_with_one_rate_needs_no_short_runs() -> None:
    data = {"mnist": "mnist"}
    (rate,) = bypass_tasks.TASKS["long"].rates
    planned = list(bypass_tasks.runs("long", ["edm", "marginal"], 1, [], data))
    assert [(run.arm, run.seed, run.lr) for run in planned] == [("edm", 0, rate), ("marginal", 0, rate)]
    for lr, error in ((rate, 0.2), (2 * rate, 0.1)):
        collect(Run("long", "edm", 0, lr, 10_000), {10_000: error})
    assert {key: curve[10_000][1.0] for key, curve in curves().items()} == {("long", "edm", 0, "cpu"): 0.2}
