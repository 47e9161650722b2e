"""Every public name says in its docstring what goes in, what comes out and what is refused, and shows it.

Examples are run as doctests (`--doctest-modules`); here they must exist.
"""

import inspect
import logging
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import griffe
import pytest

import gaussnet

PACKAGES = ("samplers", "probes", "metrics", "networks", "fit", "data", "denoisers", "experiments")
MODULES = ["gaussnet", *(f"gaussnet.{name}" for name in PACKAGES)]
MODULES += ["gaussnet.integrations.diffusers"] * bool(find_spec("diffusers"))
VALUES = {"__version__", "SOLVERS", "EXPERIMENTS", "KINDS", "PAPER_SIGMAS", "QUANTITIES"}
VALUES |= {"Callback", "Data", "History"}  # no classes or functions, so that they have no docstring
WITHOUT_EXAMPLE = {
    "LocalDenoiser": "abstract: see PatchDenoiser and PCALocalDenoiser",
    "import_edm": "takes a file of NVlabs/edm: tests/test_edm_pickle.py writes such",
    "run": "measures and draws for seconds: tests/test_experiments.py",
}
REFUSES = re.compile(r"\braise\b|\b(_?check_\w+|as_sigma|as_level|expect)\(")  # so are checks named

NAMES: dict[str, Any] = {}
for module in map(import_module, MODULES):
    NAMES |= {name: getattr(module, name) for name in module.__all__ if name not in VALUES}
METHODS = {
    f"{name}.{method}": inspect.unwrap(getattr(cls, method))
    for name, cls in NAMES.items()
    if inspect.isclass(cls)
    for method, own in vars(cls).items()
    if (inspect.isfunction(own) or isinstance(own, classmethod))
    and not method.startswith("_")
    and method not in ("to_arguments", "from_arguments")  # of `gaussnet.hub.Rebuildable`
}


def section(doc: str, *heads: str) -> str:
    entries = rf"^(?:{'|'.join(heads)}):\n((?:    .*\n|\n)*)"
    return "".join(re.findall(entries, doc + "\n", flags=re.MULTILINE))


def code(thing: Any) -> str:
    """What runs when it is called, without its docstring."""
    own = [thing]
    if inspect.isclass(thing):
        own = [vars(thing)[name] for name in ("__init__", "__post_init__") if name in vars(thing)]
        own = [each for each in own if each.__code__.co_filename == inspect.getsourcefile(thing)]
    return "".join(inspect.getsource(each).replace(each.__doc__ or "", "") for each in own)


def lacks(name: str, thing: Any) -> list[str]:
    """What a reader of the docstring of a public class or function misses."""
    doc, found = inspect.cleandoc(thing.__doc__ or ""), []
    if not doc or doc.startswith(f"{name}("):  # which a dataclass writes by itself
        return ["docstring"]
    if inspect.isclass(thing) and issubclass(thing, Exception):
        return []
    described = section(doc, "Args", "Attributes")
    for parameter in inspect.signature(thing).parameters.values():
        if parameter.name.startswith("_") or parameter.name in ("args", "kwargs"):  # of Protocol, too
            continue
        entry = re.search(rf"^    \**{parameter.name}: (.*\n(?:     .*\n)*)", described, flags=re.MULTILINE)
        if entry is None:
            found.append(f"{parameter.name} among Args")
        elif "Tensor" in str(parameter.annotation) and not re.search(r"\(|shape|0-d", entry[1]):
            found.append(f"shape of {parameter.name}")
    if not inspect.isclass(thing) and not section(doc, "Returns", "Yields"):
        found.append("Returns")
    if REFUSES.search(code(thing)) and not section(doc, "Raises"):
        found.append("Raises")
    constructors = [inspect.getdoc(own) or "" for key, own in METHODS.items() if key.startswith(f"{name}.")]
    if name not in WITHOUT_EXAMPLE and not any(">>> " in text for text in (doc, *constructors)):
        found.append("Example")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_docstring_tells_and_shows(name: str) -> None:
    assert lacks(name, NAMES[name]) == []


@pytest.mark.parametrize("name", METHODS)
def test_method_tells(name: str) -> None:
    doc = inspect.getdoc(METHODS[name]) or ""
    assert doc, "expected a docstring, its own or that of the method it overrides"
    assert section(doc, "Raises") or not re.search(r"\braise\b", code(METHODS[name])), "Raises"


def test_docstrings_fit_their_signatures(caplog: pytest.LogCaptureFixture) -> None:
    """As `make docs` reads them, where such a warning is an error."""
    package = griffe.load(
        "gaussnet",
        search_paths=[Path(gaussnet.__file__).parents[1]],
        docstring_parser="google",
        docstring_options={"returns_named_value": False, "returns_multiple_items": False},
        allow_inspection=False,
    )
    objects: list[griffe.Object | griffe.Alias] = [package]
    with caplog.at_level(logging.WARNING):
        for each in objects:
            objects += [member for member in each.members.values() if not member.is_alias]
            assert each.docstring is None or each.docstring.parsed
    assert len(objects) > 1000
    assert [record.getMessage() for record in caplog.records] == []
