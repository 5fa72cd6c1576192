"""Who may import whom, and how long a file may get."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import tetris_onnx
from tetris_onnx.graph.io import ModelError

PACKAGE = Path(tetris_onnx.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES = 550


def name_of(path: Path) -> str:
    """``tetris_onnx.graph.io`` for graph/io.py, ``tetris_onnx.graph`` for graph/__init__.py."""
    parts = [PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """The modules that a file imports, anywhere in it, but not those for type checking only."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.walk(node)
    }
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {n if n in MODULES else str(node.module) for n in names}
    return found


def ours(path: Path) -> set[str]:
    return {n.removeprefix("tetris_onnx.") for n in imports(path) if n.startswith("tetris_onnx.")}


def packages(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def files_of(package: str) -> list[Path]:
    return sorted((PACKAGE / package).glob("*.py"))


def test_there_is_something_to_check() -> None:
    assert {"tetris_onnx.graph.io", "tetris_onnx.passes", "tetris_onnx.algorithms.reorder"} <= MODULES.keys()
    assert "graph.channels" in ours(PACKAGE / "passes" / "fold_gathers.py")


@pytest.mark.parametrize("path", files_of("algorithms"), ids=lambda p: p.name)
def test_algorithms_know_no_onnx(path: Path) -> None:
    assert packages(ours(path)) <= {"algorithms", "errors"}
    outside = packages(imports(path))
    assert not {n for n in outside if n.startswith(("onnx", "torch"))}


@pytest.mark.parametrize("path", files_of("graph"), ids=lambda p: p.name)
def test_graph_knows_no_search_and_no_pass(path: Path) -> None:
    assert packages(ours(path)) <= {"graph", "algorithms", "errors"}
    assert packages({n for n in ours(path) if n.startswith("algorithms")}) <= {"algorithms"}
    assert not {n for n in ours(path) if n.startswith("algorithms") and n != "algorithms.permutation"}
    assert "onnxruntime" not in packages(imports(path))


@pytest.mark.parametrize("path", files_of("passes"), ids=lambda p: p.name)
def test_passes_know_graphs_algorithms_and_plans(path: Path) -> None:
    assert packages(ours(path)) <= {"passes", "graph", "algorithms", "plan", "errors"}
    assert "onnxruntime" not in packages(imports(path))


# What the other packages may import.
BELOW = {
    "data": set(),
    "timing": {"algorithms", "config", "data", "graph", "runtime", "session"},
    "reports": {"algorithms", "graph", "passes", "plan", "sweep"},
    "accuracy": {"algorithms", "config", "data", "graph", "passes", "plan", "planner", "reports", "session"},
}


@pytest.mark.parametrize("package", BELOW)
def test_packages_know_what_is_below_them(package: str) -> None:
    assert set().union(*(packages(ours(path)) for path in files_of(package))) <= BELOW[package] | {package, "errors"}


# What a file at the top may import of its neighbors: those below it.
LAYERS = ["sweep", "optimize", "decision", "planner", "plan"]


@pytest.mark.parametrize("name", LAYERS)
def test_imports_go_one_way(name: str) -> None:
    above = LAYERS[: LAYERS.index(name)]
    assert not packages(ours(PACKAGE / f"{name}.py")) & set(above)


def test_all_errors_are_of_one_family() -> None:
    """``except tetris_onnx.TetrisError`` catches what this package raises, whatever a later module adds."""
    found = [
        (path.name, node)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and node.name.endswith("Error") and node.name != "TetrisError"
    ]
    assert len(found) > 10
    for name, node in found:
        assert "TetrisError" in {ast.unparse(base) for base in node.bases}, f"{node.name} in {name}"
    assert issubclass(ModelError, tetris_onnx.TetrisError)


def test_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file(), "type checkers of those who import it would ignore its annotations"


def test_nothing_imports_the_command_line() -> None:
    for path in FILES:
        if path.parent.name != "cli" and path.name != "__main__.py":
            assert "cli" not in packages(ours(path)), path


def test_no_two_modules_import_each_other_at_load_time() -> None:
    graph = {name: imports(path, top_level_only=True) & MODULES.keys() - {name} for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for other in graph[name]:
                # A package's __init__ imports its modules, and they are reached through it: that is no cycle of ours.
                if not name.startswith(f"{other}."):
                    visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_readable(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    assert path.name != "utils.py"
    tree = ast.parse(text)
    assert ast.get_docstring(tree) or not tree.body, "what is this module for?"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.args.kwarg is not None:
            annotation = node.args.kwarg.annotation
            assert annotation is not None, f"{node.name} takes **kwargs of any kind"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_module_level_mutable_state(path: Path) -> None:
    for node in ast.parse(path.read_text()).body:
        value = getattr(node, "value", None)
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(value, (ast.List, ast.Dict, ast.Set, ast.Call)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [t.id for t in targets if isinstance(t, ast.Name)]
            # An upper-case table that nobody writes to is a constant; __all__ is Python's.
            assert all(n.isupper() or n == "__all__" or isinstance(value, ast.Call) for n in names), names
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Global)
