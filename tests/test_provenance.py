"""What a fit leaves on record: equal for equal arguments, JSON for all of them, saved and loaded."""

import copy
import hashlib
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import denoiser, randn
from hypothesis import given, settings
from hypothesis import strategies as st

import gaussnet
from gaussnet import Denoiser, GaussianDenoiser, GaussianMixtureDenoiser
from gaussnet.fit import select_heldout
from gaussnet.hub import record

DATA = randn(60, 1, 2, 4)
LABELS = torch.arange(60) % 3

GAUSSIANS: dict[str, dict[str, Any]] = {
    "default": {},
    "rank": {"rank": 3},
    "share": {"rank": 0.5},
    "none": {"shrinkage": "none"},
    "oas": {"shrinkage": "oas"},
    "gram": {"solver": "gram"},
    "groups": {"groups": torch.arange(60) // 2},
    "zero-tail": {"rank": 3, "tail": "zero"},
    "cosine": {"basis": "cosine"},
    "mirror": {"mirror": True},
    "cosine-mirror": {"basis": "cosine", "mirror": True},
    "select": {"select": "heldout"},
    "krylov": {"rank": 2, "solver": "krylov"},
}
MIXTURES: dict[str, dict[str, Any]] = {
    "clusters": {"n_components": 3},
    "seed": {"n_components": 3, "seed": 1},
    "classes": {"labels": LABELS},
    "groups": {"labels": LABELS, "groups": torch.arange(60) // 2},
    "rank": {"n_components": 3, "rank": 2, "tail": "zero"},
    "share": {"n_components": 3, "rank": 0.5},
    "mirror": {"n_components": 3, "mirror": True},
    "select": {"n_components": 3, "select": "heldout"},
    "em": {"n_components": 3, "rank": 2, "em_steps": 2, "shrinkage": "none"},
    "em-cv": {"n_components": 3, "rank": 2, "em_steps": 2},
}
FITS: dict[str, Any] = {
    **{f"gaussian {name}": (GaussianDenoiser, options) for name, options in GAUSSIANS.items()},
    **{f"mixture {name}": (GaussianMixtureDenoiser, options) for name, options in MIXTURES.items()},
}


def fit(name: str, **changes: Any) -> Any:
    cls, options = FITS[name]
    return cls.fit(DATA, **{**options, **changes})


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", FITS)
def test_any_fit_is_on_record_and_saved(name: str, tmp_path: Path) -> None:
    fitted = fit(name)
    provenance = dict(fitted.provenance)
    assert json.loads(json.dumps(provenance)) == provenance, "what JSON gives back"
    fitted.save_pretrained(tmp_path)
    assert config(tmp_path)["provenance"] == provenance
    for load in (gaussnet.from_pretrained, type(fitted).from_pretrained, Denoiser.from_pretrained):
        loaded = load(tmp_path)
        assert loaded.provenance == provenance
    loaded = gaussnet.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    assert config(tmp_path / "again") == config(tmp_path)


@pytest.mark.parametrize("name", FITS)
def test_it_tells_data_and_arguments(name: str) -> None:
    (cls, options), provenance = FITS[name], fit(name).provenance
    assert provenance["data"] == {"size": 60, "event_shape": [1, 2, 4]}
    arguments = provenance["arguments"]
    assert arguments["grouped"] is ("groups" in options)
    for key, value in options.items():
        if key not in ("groups", "labels"):
            assert arguments[key] == value
    defaults: dict[str, Any] = {
        "rank": None,
        "shrinkage": "cv",
        "tail": "mean",
        "mirror": False,
        "select": None,
    }
    only = {GaussianDenoiser: {"solver": "auto", "basis": "eigen"}}
    clusters = {"n_components": None, "seed": 0, "em_steps": 0, "prior": 0.0}
    for key, value in {**defaults, **only.get(cls, clusters)}.items():
        if key not in options:
            assert arguments[key] == value, key
    assert set(arguments) == {*defaults, *only.get(cls, clusters), "grouped"}
    extra = {"selection"} if "select" in options and cls is GaussianDenoiser else set()
    extra |= {"log_likelihood"} if "em_steps" in options else set()
    assert set(provenance) == {"data", "arguments", "arguments_sha256"} | extra


def test_equal_arguments_have_equal_hashes_and_others_have_others() -> None:
    first = {name: fit(name).provenance for name in FITS}
    hashes = {name: provenance["arguments_sha256"] for name, provenance in first.items()}
    for name in FITS:
        assert fit(name).provenance["arguments_sha256"] == hashes[name], name
    for one, other in combinations(FITS, 2):
        same = first[one]["arguments"] == first[other]["arguments"]
        assert (hashes[one] == hashes[other]) == same, f"{one}, {other}"
    assert len(set(hashes.values())) == len(FITS)


def test_hashes_do_not_depend_on_the_data() -> None:
    few = GaussianDenoiser.fit(DATA[:30]).provenance
    assert few["arguments_sha256"] == GaussianDenoiser.fit(DATA).provenance["arguments_sha256"]
    assert few["data"]["size"] == 30


def test_streams_are_counted() -> None:
    assert GaussianDenoiser.fit(iter(DATA.split(7))).provenance["data"]["size"] == 60
    pairs = list(zip(DATA.split(7), LABELS.split(7), strict=True))
    for mirror in (False, True):
        fitted = GaussianMixtureDenoiser.fit(iter(pairs), mirror=mirror)
        assert fitted.provenance["data"] == {"size": 60, "event_shape": [1, 2, 4]}


def test_a_selection_is_on_record(tmp_path: Path) -> None:
    fitted = fit("gaussian select")
    assert fitted.provenance["selection"] == select_heldout(DATA).table()
    fitted.save_pretrained(tmp_path)
    assert gaussnet.from_pretrained(tmp_path).provenance["selection"] == fitted.provenance["selection"]


def test_models_without_provenance_save_none(tmp_path: Path) -> None:
    for name in ("isotropic", "bypass", "delta"):
        model = GaussianDenoiser.isotropic(torch.zeros(3), 1.0) if name == "isotropic" else denoiser(name)
        assert dict(model.provenance) == {}
        model.save_pretrained(tmp_path / name)
        assert set(config(tmp_path / name)) == {"class_name", "arguments", "gaussnet_version"}
        assert gaussnet.from_pretrained(tmp_path / name).provenance == {}


def test_one_models_provenance_is_not_anothers() -> None:
    fitted = fit("gaussian default")
    assert GaussianDenoiser.isotropic(torch.zeros(3), 1.0).provenance == {}
    assert copy.deepcopy(fitted).provenance == fitted.provenance
    assert fitted.float().provenance == fitted.provenance
    assert "provenance" not in fitted.state_dict()


# Record -------------------------------------------------------------------------------------------


def test_a_record_as_it_stands() -> None:
    found = record({"name": "digits", "size": 3}, {"b": 1, "a": [0.5, None, True]})
    digest = hashlib.sha256(b'{"a": [0.5, null, true], "b": 1}').hexdigest()
    assert found == {
        "data": {"name": "digits", "size": 3},
        "arguments": {"b": 1, "a": [0.5, None, True]},
        "arguments_sha256": digest,
    }


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
arguments = st.dictionaries(st.text(max_size=3), plain, max_size=3)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(one=arguments, other=arguments)
def test_hashes_are_equal_where_arguments_are(one: dict[str, Any], other: dict[str, Any]) -> None:
    first, second, shuffled = (record({}, a) for a in (one, other, dict(reversed(one.items()))))
    assert first["arguments"] == one
    assert first["arguments_sha256"] == shuffled["arguments_sha256"]
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (first["arguments_sha256"] == second["arguments_sha256"]) == same


def test_numbers_of_libraries_are_numbers() -> None:
    numbers = {"a": np.int64(5), "b": np.float32(0.5), "c": torch.tensor(3), "d": np.bool_(True), "e": (1, 2)}
    found, expected = (record(n, n) for n in (numbers, {"a": 5, "b": 0.5, "c": 3, "d": True, "e": [1, 2]}))
    assert found == expected
    assert json.loads(json.dumps(found)) == expected


def test_a_record_is_its_own() -> None:
    arguments: dict[str, Any] = {"levels": [1, 2]}
    found = record(arguments, arguments)
    arguments["levels"].append(3)
    assert found["arguments"] == found["data"] == {"levels": [1, 2]}


@pytest.mark.parametrize(
    "value", [torch.zeros(2), np.zeros(2), {1, 2}, object], ids=["tensor", "array", "set", "type"]
)
def test_what_json_cannot_hold_is_named(value: Any) -> None:
    with pytest.raises(TypeError, match=f"expected what JSON can hold, got {type(value).__name__}: "):
        record({}, {"rank": value})
    with pytest.raises(TypeError, match="expected what JSON can hold"):
        record({"size": value}, {})
