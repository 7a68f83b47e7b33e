"""The package as a whole: what is public is there and explained, and every module imports downward only."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import trilogue

ROOT = Path(trilogue.__file__).parent
# Each may import those before it and nothing after it.
LAYERS = (
    "errors", "urls", "durations", "patterns", "retry", "events", "ports",
    "sealing", "codec", "aggregate", "gate", "handlers", "outcomes", "process", "instances", "projection", "features",
    "stores", "relay", "brokers", "builds", "schema", "runner", "watch", "follower", "projections",
    "router", "rehydrate", "deciding", "stream", "history", "privacy", "reading", "sync", "app",
    "",  # "" is the package's own __init__: whatever comes after it uses public names only
    "testing", "conformance", "bench", "apps", "cli", "__main__",
)  # fmt: skip


def modules() -> Iterator[str]:
    yield "trilogue"
    for found in pkgutil.walk_packages([str(ROOT)], "trilogue."):
        yield found.name


MODULES = sorted(set(modules()) - {"trilogue.__main__"})


def layer(module: str) -> int:
    name = module.removeprefix("trilogue").removeprefix(".").partition(".")[0]
    assert name in LAYERS, f"{module} has no place in the order: add it to LAYERS"
    return LAYERS.index(name)


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """What a file imports when it is run: not what it imports for type checking, or inside a function."""
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "trilogue":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                is_module = (ROOT.parent / Path(*name.split("."))).with_suffix(".py").exists() or (
                    ROOT.parent / Path(*name.split("."))
                ).is_dir()
                yield (name if is_module else node.module), node.lineno
        elif isinstance(node, ast.Import):
            yield from ((a.name, node.lineno) for a in node.names if a.name.split(".")[0] == "trilogue")


def test_all_is_there_and_sorted() -> None:
    assert [name for name in trilogue.__all__ if not hasattr(trilogue, name)] == []
    assert len(set(trilogue.__all__)) == len(trilogue.__all__)
    assert list(trilogue.__all__) == sorted(trilogue.__all__)


def test_nothing_public_is_left_out() -> None:
    public = {
        name
        for name, value in vars(trilogue).items()
        if not name.startswith("_") and not inspect.ismodule(value) and not isinstance(value, ModuleType)
    }
    assert public == set(trilogue.__all__)


def test_what_is_public_comes_by_star() -> None:
    space: dict[str, object] = {}
    exec("from trilogue import *", space)
    assert space.keys() - {"__builtins__"} == set(trilogue.__all__)


@pytest.mark.parametrize("module", MODULES)
def test_every_public_thing_is_explained(module: str) -> None:
    found = importlib.import_module(module)
    assert (found.__doc__ or "").strip(), f"{module} has no docstring"
    missing = []
    for name, value in vars(found).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module:
            continue
        if inspect.isclass(value):
            missing += [] if _explained(value) else [name]
            missing += [f"{name}.{method}" for method in _methods(value)]
        elif inspect.isfunction(value) and not (value.__doc__ or "").strip():
            missing.append(name)
    assert missing == []


def _explained(cls: type) -> bool:
    written = (cls.__dict__.get("__doc__") or "").strip()
    return bool(written) and not written.startswith(f"{cls.__name__}(")  # what dataclass writes by itself


def _methods(cls: type) -> Iterator[str]:
    for name, value in vars(cls).items():
        function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        function = function.fget if isinstance(function, property) else function
        if not name.startswith("_") and inspect.isfunction(function) and not (function.__doc__ or "").strip():
            yield name


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downward(path: Path) -> None:
    module = ".".join(("trilogue", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
    upward = [
        f"line {line}: {module} imports {name}"
        for name, line in imported(path)
        if layer(name) > layer(module) or (layer(name) == layer(module) and name == module)
    ]
    assert upward == []


@pytest.mark.parametrize("path", sorted((ROOT / "apps").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_apps_import_public_names_only(path: Path) -> None:
    """An app in the package is one a newcomer can copy out of it: the words of the package, and modules of its own."""
    allowed = re.compile(r"trilogue(\.apps\..*|\.apps)?|trilogue\.(errors|durations)")
    assert [name for name, _ in imported(path) if not allowed.fullmatch(name)] == []


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_pickle_no_eval_no_names_turned_into_imports(path: Path) -> None:
    tree = ast.parse(path.read_text())
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & {"eval", "exec", "__import__", "compile"}
    names = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not names & {"pickle", "marshal", "shelve", "dill"}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_are_short(path: Path) -> None:
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    lengths = {node.name: _own_lines(node) for node in functions}
    assert {name: length for name, length in lengths.items() if length > 50} == {}


def _own_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of the body, without the docstring."""
    body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1


@pytest.mark.parametrize("module", ["codec", "durations", "events", "patterns", "retry", "handlers", "app"])
def test_examples_in_docstrings_are_true(module: str) -> None:
    found = importlib.import_module(f"trilogue.{module}")
    space = {"dataclass": __import__("dataclasses").dataclass, "App": trilogue.App, "Router": trilogue.Router}
    failed, _ = doctest.testmod(found, extraglobs=space)
    assert failed == 0


def test_the_package_says_it_is_typed() -> None:
    assert (ROOT / "py.typed").exists()
