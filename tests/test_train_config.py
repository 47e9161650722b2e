"""The configuration of a run: every error names its key, before anything is computed."""

from pathlib import Path

import pytest

from train.config import ConfigError, Precond, differences, load_config, to_yaml

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_names_its_command(path: Path) -> None:
    config = load_config(path)
    assert config.out == f"runs/{path.stem}"
    assert path.read_text().startswith(f"# accelerate launch -m train configs/{path.name}\n")


def test_overrides_win_over_the_file() -> None:
    config = load_config(
        CONFIGS[0], ["train.steps=7", "out=elsewhere", "precond=edm", "network.channel_mult=[3]"]
    )
    assert (config.train.steps, config.out, config.precond) == (7, "elsewhere", Precond.edm)
    assert config.network.channel_mult == [3]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", r"train\.stepz"),
        ("trian.steps=3", r"trian"),
        ("train.steps=many", r"train\.steps.*many"),
        ("train.steps=0", r"train\.steps: expected >= 1, got 0"),
        ("train.lr=-1", r"train\.lr: expected > 0, got -1"),
        ("train.ema_decay=1", r"train\.ema_decay"),
        ("precond=vp", r"precond.*vp.*bypass, edm"),
        ("data.heldout=1.5", r"data\.heldout: expected between 0 and 1, got 1.5"),
        ("fit.shrinkage=ridge", r"fit\.shrinkage.*ridge"),
        ("loss.P_std=0", r"loss\.P_std"),
        ("probe.sigmas=[0.1,-1]", r"probe\.sigmas"),
        ("report.skips=[0,18]", r"report\.skips: expected between 0 and sample_steps - 1 = 17"),
        ("seed=-1", r"seed"),
        ("train.steps", r"key=value, got 'train.steps'"),
    ],
)
def test_impossible_values_are_errors_that_name_the_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(CONFIGS[0], [override])


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no config file"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "bare.yaml").write_text("seed: 1\n")
    with pytest.raises(ConfigError, match="expected values for out"):
        load_config(tmp_path / "bare.yaml")
    (tmp_path / "broken.yaml").write_text("out: [unclosed\n")
    with pytest.raises(ConfigError, match=r"broken\.yaml is not valid YAML"):
        load_config(tmp_path / "broken.yaml")


def test_differences_name_each_key_and_both_values() -> None:
    config = load_config(CONFIGS[0])
    saved = to_yaml(config)
    assert differences(saved, config) == []
    config.train.lr, config.seed = 0.5, 3
    assert differences(saved, config) == ["seed: 0 -> 3", "train.lr: 0.001 -> 0.5"]
