"""The rules of the source code: who imports whom, what stays out of libraries, how long a function may be."""

import ast
from functools import cache
from pathlib import Path

import pytest

from models import MODELS
from tests.helpers import ROOT

# Top to bottom: a file imports only from its own floor and from lower ones.
FLOORS = (("study",), ("predict", "app", "export"), ("models",), tuple(MODELS), ("dataset",), ("utils",))
FLOOR_OF = {name: number for number, floor in enumerate(FLOORS) for name in floor}
IMPORT_EVERYTHING = {"benchmarks", "docs"}
MODELS_THAT_MAY_IMPORT = {("point_clip", "clip_seg")}

UNIX_ONLY = {"fcntl", "grp", "pwd", "resource", "termios"}
MAY_PRINT = {("utils/distributed.py", "print_once"), ("utils/script.py", "run_script")}
LONGEST_FUNCTION = 70
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef

PATHS = [path.relative_to(ROOT) for path in (*ROOT.glob("*.py"), *ROOT.glob("[!.]*/**/*.py"))]
FILES = sorted(str(path) for path in PATHS if path.parts[0] != "tests")
OURS = {Path(file).parts[0].removesuffix(".py") for file in FILES}


@cache
def tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"), file)


def imports(node: ast.AST):
    """Line and top-level name of every import in `node`, also in functions and under TYPE_CHECKING."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from ((child.lineno, alias.name.split(".")[0]) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert not child.level, f"line {child.lineno}: a relative import"
            yield child.lineno, child.module.split(".")[0]


def functions(file: str) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree(file)) if isinstance(node, FUNCTION)]


def is_allowed(importer: str, imported: str) -> bool:
    """Whether a file of `importer` may import from `imported`, both top-level names of this repository."""
    if importer in IMPORT_EVERYTHING or importer == imported:
        return True
    if imported not in FLOOR_OF:
        return False
    if importer in MODELS and imported in MODELS:
        return (importer, imported) in MODELS_THAT_MAY_IMPORT
    return FLOOR_OF[importer] <= FLOOR_OF[imported]


def test_every_file_has_a_floor():
    missing = OURS - set(FLOOR_OF) - IMPORT_EVERYTHING
    hint = "to FLOORS in tests/unit/test_floors.py, or, if it belongs to a model, the model to MODELS in models.py"
    assert not missing, f"add {', '.join(sorted(missing))} {hint}"


def test_rules_allow_lower_floors_only():
    assert is_allowed("study", "utils") and is_allowed("predict", "models") and is_allowed("point_clip", "clip_seg")
    forbidden = [
        ("utils", "dataset"), ("dataset", "unet"), ("unet", "models"), ("models", "study"), ("clip_seg", "point_clip"),
        ("unet", "autoencoder"), ("study", "benchmarks"), ("dataset", "tests"),
    ]  # fmt: skip
    assert [pair for pair in forbidden if is_allowed(*pair)] == []


@pytest.mark.parametrize("file", FILES)
def test_file_imports_from_lower_floors_only(file):
    importer = Path(file).parts[0].removesuffix(".py")
    ours = [(line, name) for line, name in imports(tree(file)) if name in OURS | {"tests"}]
    wrong = [f"line {line}: {name}" for line, name in ours if not is_allowed(importer, name)]
    assert not wrong, f"{file} may not import {'; '.join(wrong)}"


def test_unix_only_modules_are_imported_in_functions_only():
    statements = [(file, statement) for file in FILES for statement in executed_on_import(tree(file))]
    found = [(file, *one) for file, statement in statements for one in imports(statement)]
    wrong = [f"{file}, line {line}: {name}" for file, line, name in found if name in UNIX_ONLY]
    assert not wrong, "Windows does not have these: " + "; ".join(wrong)


def executed_on_import(node: ast.AST):
    """The import statements below `node` that are not in a function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif not isinstance(child, FUNCTION):
            yield from executed_on_import(child)


def test_utils_print_nothing():
    wrong = [
        f"{file}, line {call.lineno}"
        for file in FILES
        if file.startswith("utils/")
        for call in ast.walk(tree(file))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "print"
        if not any(
            function.lineno <= call.lineno <= function.end_lineno
            for function in functions(file) if (file, function.name) in MAY_PRINT
        )
    ]  # fmt: skip
    assert not wrong, "use logging instead of print: " + "; ".join(wrong)


def test_functions_are_short():
    every = [(file, node.name, node.end_lineno - node.lineno + 1) for file in FILES for node in functions(file)]
    long = [f"{file}: {name} has {lines} lines" for file, name, lines in every if lines > LONGEST_FUNCTION]
    assert not long, f"at most {LONGEST_FUNCTION} lines: " + "; ".join(long)


def test_every_module_has_a_docstring():
    missing = [file for file in FILES if tree(file).body and not ast.get_docstring(tree(file))]
    assert not missing, f"no docstring: {', '.join(missing)}"
