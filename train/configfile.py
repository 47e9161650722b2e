"""Configurations from and to YAML: a file, overridden by key=value arguments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from train.config import Config, ConfigError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file and applies overrides such as "train.steps=100".

    Raises:
        ConfigError: naming the file or the key that is missing, unknown, of a wrong type or impossible.
    """
    if not Path(path).is_file():
        raise ConfigError(f"no config file {path}")
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"expected overrides of the form key=value, got {override!r}")
    try:
        merged = OmegaConf.merge(
            OmegaConf.structured(Config), OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides))
        )
        missing = OmegaConf.missing_keys(merged)
        if missing:
            raise ConfigError(f"{path}: expected values for {', '.join(sorted(missing))}, got none")
        return cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path}: {key}: {reason}" if key else f"{path}: {reason}") from error
    except ConfigError:
        raise
    except YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except IndexError as error:  # OmegaConf's, of keys such as "[", in overrides or interpolations
        told = f" and overrides {list(overrides)}" if overrides else ""
        raise ConfigError(
            f"{path}: expected keys such as train.steps, got a malformed one in it{told}"
        ) from error
    except OverflowError as error:
        raise ConfigError(f"{path}: expected numbers below 1e308, got a larger integer: {error}") from error
    except (ValueError, TypeError, OSError, RecursionError) as error:  # such as a list, or a mere number
        raise ConfigError(f"{path}: {error}") from error


def to_yaml(config: Config) -> str:
    """The whole configuration, defaults included."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def differences(saved: str, config: Config) -> list[str]:
    """Lines "key: saved -> now" for each value of a saved YAML that differs from `config`, but for `out`.

    That folder may have been moved, or be named in another way. A key that the saved one does not know is
    newer than the run, which did as its default does.

    Raises:
        ValueError: if the saved one is not the YAML of a run.
    """
    # By way of YAML, as the others: enums are words there.
    defaults = _flatten(OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(Config))))
    try:
        tree = OmegaConf.to_container(OmegaConf.create(saved))
    except (YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict) or "out" not in tree:
        raise ValueError(f"expected the keys of a run, got {saved!r:.100}")
    old = defaults | _flatten(tree)
    new = _flatten(OmegaConf.to_container(OmegaConf.create(to_yaml(config))))
    keys = sorted((set(old) | set(new)) - {"out"})
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)]


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
