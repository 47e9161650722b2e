"""Hostile configurations of the training application, and odd arguments of the command line."""

import atexit
import contextlib
import dataclasses
import io
import json
import math
import platform
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from fuzz import CUTS, EDITS, ODD_TEXTS, PLAIN, TREES, campaign, clear_errors, mutated
from huggingface_hub.errors import EntryNotFoundError
from hypothesis import strategies as st
from PIL import Image

from gaussnet import GaussianDenoiser
from gaussnet.cli import main
from gaussnet.plots.style import pyplot
from train.config import Config, ConfigError
from train.configfile import differences, load_config, to_yaml

CONFIGS = sorted(Path(__file__).parents[1].glob("configs/*.yaml"))
GROUPS: list[Any] = [field for field in dataclasses.fields(Config) if callable(field.default_factory)]
KEYS = [f"{group.name}.{key.name}" for group in GROUPS for key in dataclasses.fields(group.default_factory())]
KEYS += ["out", "seed", "precond"]
ODD_KEYS = st.one_of(
    st.sampled_from(KEYS), st.sampled_from(KEYS),
    st.sampled_from(["", ".", "train", "train.", ".steps", "train..steps", "train.steps.x", "[0]",
        "train[steps]", "data.scaling.0", "__class__",
                     "network.arguments.x", "train.__init__", "a b", "${x}", "@", "_target_",
                     "train.trackers.0", "ema.halflife_kimg[0]"]),
    ODD_TEXTS,
)  # fmt: skip
VALUES = st.one_of(PLAIN.map(str), TREES.map(lambda tree: json.dumps(tree)), st.sampled_from(
    ["true", "null", "nan", "-inf", ".inf", ".nan", "1e400", "0o17", "1_000", "2026-01-01", "[1,nan]",
        "[.nan]", "[]", "{}", "[[1]]", "???", "${seed}", "${train.steps}", "${oc.env:NOPE}",
     "${oc.env:HOME}", "${oc.decode:${oc.env:HOME}}", "${oc.create:[1]}", "${.lr}", "${loss}", "${",
     "!!python/name:os.system", "!!python/object/apply:os.system ['id']", "!!binary aGk=", "[" * 500,
     "{a: " * 300,
     "&a [*a]", "'", "\"", "|", "bypass", "fp16", "classes", "MLP", "raise", "x: y", "- 1", "\t", "%",
     "'${seed}'", "0x7fffffffffffffffff", "1e-400"])
)  # fmt: skip
OVERRIDES = st.lists(st.builds(lambda key, value: f"{key}={value}", ODD_KEYS, VALUES) | ODD_TEXTS, max_size=3)
BOMB = "a: &a [x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(12)
)


@st.composite
def yamls(draw: st.DrawFn) -> bytes:
    """A configuration: one of the project's, changed, or nearly none."""
    match draw(st.sampled_from(["changed", "changed", "changed", "damaged", "tree", "text", "odd"])):
        case "tree":
            return yaml.safe_dump(draw(TREES), allow_unicode=True).encode("utf-8", "replace")
        case "text":
            return draw(st.text(max_size=60)).encode("utf-8", "replace")
        case "odd":
            return draw(st.sampled_from([BOMB, "[" * 5000, "{a: " * 2000, "- " * 3000, "&a [*a]",
                "a: &a\n  b: *a", "<<: *x", "? ? ?", "a: 1\na: 2", "\x00", "--- 1\n--- 2", "%YAML 9.9\n---",
                "out: !!python/object/apply:os.system ['id']", "out: !x y", "out: ${out}",
                "data: ${train}\ntrain: ${data}", "out: x\ntrain: 5", "out: x\ntrain: null",
                "out: x\nnetwork: {arguments: {a: &a {b: *a}}}", "out: [x]", "1: 2", "null: 2",
                "out: x\ntrain: {1: 2}", "out: x\n? [a]\n: b", "\ufeffout: x", "out: '" + "9" * 9000 + "'",
                "seed: " + "9" * 9000])).encode()  # fmt: skip
        case kind:
            text = draw(st.sampled_from(CONFIGS)).read_bytes()
            if kind == "damaged":
                return mutated(text, draw(EDITS), draw(CUTS))
            tree = yaml.safe_load(text)
            for _ in range(draw(st.integers(0, 2))):
                group, _, key = draw(st.sampled_from(KEYS)).partition(".")
                value = draw(PLAIN | TREES)
                if key and isinstance(tree.setdefault(group, {}), dict):
                    tree[group][key] = value
                else:
                    tree[group] = value
            return yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "replace")


def numbers(value: Any) -> list[float]:
    if dataclasses.is_dataclass(value):
        return [x for field in dataclasses.fields(value) for x in numbers(getattr(value, field.name))]
    if isinstance(value, (list, tuple)):
        return [x for part in value for x in numbers(part)]
    return [value] if isinstance(value, float) else []


NANS = ("probe.sigmas=[1,.nan]", "ema.halflife_kimg=[1,.nan]", "loss.P_mean=.nan", "data.scaling=[0,.nan]")
CONFIGURATIONS: list[tuple[bytes, list[str]]] = [
    (BOMB.encode(), []),
    (b"- " * 3000, []),
    (b"false", []),
    (b"out: x", ["[=None"]),
    (b"out: ${[}", []),
    (b"out: x\nedm: {sigma_data: 1" + b"0" * 400 + b"}", []),
    *((b"out: x", [override]) for override in (*NANS, "train.lr=.inf", "data.heldout=.inf")),
]


@campaign(yamls(), OVERRIDES, known=CONFIGURATIONS, few=12, many=3000)
def test_configurations(folder: Path, content: bytes, overrides: list[str]) -> None:
    path = folder / "config.yaml"
    path.write_bytes(content)
    with clear_errors("config.yaml", *KEYS, "key=value", kinds=(ConfigError,)):
        config = load_config(path, overrides)
        assert all(map(math.isfinite, numbers(config)))
        assert load_config_again(folder, to_yaml(config)) == config
        assert differences(to_yaml(config), config) == []


def load_config_again(folder: Path, text: str) -> Config:
    (folder / "again.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    return load_config(folder / "again.yaml")


# The command line -------------------------------------------------------------------------------------

ODD_NUMBERS = st.sampled_from(
    [
        "-1",
        "0",
        "1",
        "2",
        "3",
        "0.5",
        "nan",
        "inf",
        "-inf",
        "1e400",
        "x",
        "",
        "9" * 30,
        "1e-320",
        "-0.0",
        "٣",
        "1_0",
        "0x3",
        "²",
    ]
)
FILES = st.sampled_from(
    [
        "data.npy",
        "data.npz",
        "pictures",
        "model",
        "stats.npz",
        "run",
        "groups.npy",
        "empty",
        "text.txt",
        "nothing",
        "none/such",
        "",
        ".",
        "objects.npy",
        "empty.npz",
        "empty.npy",
        "a\nb",
        "digits:",
        "\udcff",
        "x" * 300,
        "model/config.json",
        "a\x00b",
    ]
)
DATA = st.sampled_from(["data.npy", "data.npy", "data.npz", "pictures"]) | FILES
OUT = st.sampled_from(
    [
        "out",
        "out",
        "out/deep",
        "out.npz",
        "out.html",
        "model",
        "data.npy",
        "text.txt/x",
        "",
        "out\n",
        "x" * 300,
    ]
)
SEEDS = st.sampled_from(
    ["0", "0-2", "1,5", "3-1", "-", "", "0-", "-1", "a", "²", "1,,2", "1,1", "9" * 25, "1_0", "0-1,1"]
)
COMMANDS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "fit": ([DATA], {
        "--out": OUT, "--components": ODD_NUMBERS, "--classes": None, "--delta": None, "--rank": ODD_NUMBERS,
            "--shrinkage": st.sampled_from(["none", "oas", "x"]),
        "--tail": st.sampled_from(["mean", "zero", "x"]), "--solver": ODD_TEXTS,
        "--basis": st.sampled_from(["eigen", "cosine"]), "--select": st.just("heldout"), "--mirror": None,
        "--em-steps": st.sampled_from(["-1", "0", "1", "x"]),
        "--seed": ODD_NUMBERS, "--groups": FILES, "--unscaled": None, "--layout": st.sampled_from(["NCHW",
        "x"]), "--mode": st.just("L"), "--resolution": st.sampled_from(["-1", "0", "2", "x"]),
        "--split": ODD_TEXTS, "--root": FILES, "--on-error": st.just("skip"), "--overwrite": None}),
    "info": ([FILES], {"-v": None}),
    "import-edm": ([FILES, OUT], {"--overwrite": None}),
    "sample": ([st.sampled_from(["model", "model", "run", "nothing", "\udcff"]) | FILES], {
        "--out": OUT, "--seeds": SEEDS, "--solver": st.sampled_from(["euler", "heun", "dpm_v3", "unipc",
            "x"]), "--steps": st.sampled_from(["-1", "0", "1", "2", "x", "9" * 30]),
            "--sigma-min": ODD_NUMBERS, "--sigma-max": ODD_NUMBERS, "--rho": ODD_NUMBERS,
        "--teleport": ODD_NUMBERS | st.sampled_from(["auto", "none"]), "--plain-skip": None,
        "--gaussian": FILES, "--classes": SEEDS, "--guidance": ODD_NUMBERS, "--statistics": FILES,
        "--batch": st.sampled_from(["-1", "0", "1", "9" * 30]), "--device": st.sampled_from(["cpu", "x", "",
        "cuda:99", "meta"]), "--grid": st.sampled_from(["grid.png", "grid.xyz", "none/grid.png", ""])}),
    "fid": ([DATA], {
        "--ref": FILES, "--data": DATA, "--make-ref": DATA, "--num": ODD_NUMBERS,
            "--features": st.sampled_from(["x", "", "model", "run", "timm:x y"]), "--weights": FILES,
            "--split": ODD_TEXTS, "--out": OUT, "--seed": ODD_NUMBERS, "--batch": ODD_NUMBERS,
            "--device": st.sampled_from(["cpu", "x", ""])}),
    "reproduce": ([st.sampled_from(["score-deviation", "emergence", "x", "modes-ranks"])], {"--model": FILES,
    "--out": OUT, "--seed": ODD_NUMBERS, "--device": st.sampled_from(["cpu", "x"]),
    "--batch": st.sampled_from(["-1", "0", "x"]), "--data": DATA, "--heldout": ODD_NUMBERS,
    "--fit-images": ODD_NUMBERS}),
    "watch": ([st.sampled_from(["run", "run", "nothing", "model", "empty"])], {"--every": ODD_NUMBERS,
    "--once": None}),
    "report": ([st.sampled_from(["nothing", "model", "empty", "data.npy"])], {"--out": OUT}),
}  # fmt: skip


@st.composite
def lines(draw: st.DrawFn) -> list[str]:
    """Arguments of a command: any of its options with any values; --out nearly always."""
    if draw(st.integers(0, 19)) == 0:
        return draw(st.lists(ODD_TEXTS, max_size=3))
    name = draw(st.sampled_from(sorted(COMMANDS)))
    positional, options = COMMANDS[name]
    line = [name, *(draw(values) for values in positional)]
    chosen = set(draw(st.lists(st.sampled_from(sorted(options)), max_size=3)))
    for option in sorted(chosen | ({"--out"} & set(options))):
        values = options[option]
        line += [option] if values is None else [option, draw(values)]
    return line


@cache
def template() -> Path:
    """A folder with one file of each kind that a command reads."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    images = torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    np.save(folder / "data.npy", (images * 255).byte().numpy())
    np.savez(folder / "data.npz", images=(images * 255).byte().numpy(), labels=np.arange(12) % 3)
    np.save(folder / "objects.npy", np.array([ConfigError, None], dtype=object), allow_pickle=True)
    np.savez(folder / "empty.npz")
    (folder / "empty.npy").touch()
    np.save(folder / "groups.npy", np.arange(12) // 2)
    np.savez(folder / "stats.npz", mu=np.zeros(3), sigma=np.eye(3))
    (folder / "empty").touch()
    (folder / "text.txt").write_text("text")
    for name in ("pictures", "run"):
        (folder / name).mkdir()
    for i in range(3):
        Image.new("L", (4, 4), 40 * i).save(folder / "pictures" / f"{i}.png")
    (folder / "run" / "config.yaml").write_text("train: {steps: 10, batch: 2}\n")
    (folder / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "images_per_second": 2.0}\n')
    GaussianDenoiser.fit(2 * images - 1, rank=3).save_pretrained(folder / "model")
    pyplot()  # which writes caches, once
    platform.platform()  # which starts a process
    return folder


LINES = [
    (["watch", "run", "--every", "inf"],),
    (["sample", "model", "--out", "out", "--device", "x"],),
    (["sample", "model", "--out", "out", "--device", "cuda:99"],),
    (["info", "a\nb\x1b[2J"],),
    (["fit", "data.npy", "--out", "out", "--groups", "empty.npy"],),
    (["fit", "data.npy", "--out", "out", "--groups", "stats.npz"],),
]


def interrupted(seconds: float) -> None:
    if seconds > 2**33:
        raise OverflowError("timestamp too large to convert")
    raise KeyboardInterrupt


def offline(*_: Any, **arguments: Any) -> str:
    raise EntryNotFoundError(f"no network: {arguments}")


@pytest.fixture(autouse=True, scope="module")
def written() -> None:
    template()


@campaign(lines(), known=LINES, few=30, many=3000)
def test_commands(folder: Path, line: list[str]) -> None:
    shutil.copytree(template(), folder, dirs_exist_ok=True)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch("gaussnet.hub.hf_hub_download", offline),
        mock.patch("gaussnet.run_report.watching.time.sleep", interrupted),
    ):
        try:
            status = main(line)
            usage = False
        except SystemExit as stop:
            status, usage = stop.code, True
    told = f"gaussnet {' '.join(map(repr, line))}: {status}\n{err.getvalue()}"
    assert status in (0, 2), told
    assert "Traceback" not in err.getvalue(), told
    if status == 2:
        assert err.getvalue().strip(), told
        assert usage or err.getvalue().count("\n") == 1, told
        assert err.getvalue().replace("\n", "").isprintable(), told
        after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
        assert {path: time for path, time in after.items() if before.get(path) != time} == {}, told
