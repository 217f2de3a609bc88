"""Imports run one way, deploy -> converters -> models, and are absolute, inside functions too."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ["models", "converters", "deploy"]  # each may import itself and what stands before it
CODE = sorted(path for folder in FLOORS for path in (ROOT / folder).rglob("*.py"))
OTHERS = sorted(path for folder in ("tests", "hw_tests", "bench") for path in (ROOT / folder).rglob("*.py"))


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, module) of every import, wherever it stands; a relative one starts with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield node.lineno, module
            # `from spikeport import deploy` names the module only among the names
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names if module == "spikeport")
        elif isinstance(node, ast.Call) and called_name(node.func) in {"import_module", "__import__"}:
            yield from (
                (node.lineno, argument.value)
                for argument in node.args
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
            )


def called_name(function: ast.expr) -> str:
    match function:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case _:
            return ""


def wrong_imports(source: str, folder: str) -> list[str]:
    """The imports that code in `folder` must not have, one line each."""
    wrong = []
    for line, module in imported_modules(ast.parse(source)):
        first, _, rest = module.partition(".")
        floor = rest.partition(".")[0]
        if module.startswith("."):
            wrong.append(f"line {line}: {module} is relative; write spikeport.{folder}...")
        elif first in FLOORS:
            wrong.append(f"line {line}: {module} works only inside the checkout; write spikeport.{module}")
        elif first == "spikeport" and folder in FLOORS and floor in FLOORS[FLOORS.index(folder) + 1 :]:
            wrong.append(f"line {line}: {folder}/ must not import {module}")
    return wrong


@pytest.mark.parametrize("path", CODE + OTHERS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_are_absolute_and_run_one_way(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    assert wrong_imports(path.read_text(encoding="utf-8"), folder) == []


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("models", "import spikeport.converters.graph"),
        ("models", "def f():\n    from spikeport.deploy.trace import Trace"),
        ("models", "from spikeport import deploy"),
        ("models", "import importlib\nimportlib.import_module('spikeport.deploy.cli')"),
        ("converters", "from spikeport.deploy import trace"),
        ("deploy", "from . import trace"),
        ("deploy", "from .trace import Trace"),
        ("deploy", "from models.errors import SpikeportError"),
        ("tests", "import deploy.trace"),
    ],
)
def test_a_wrong_import_is_found(folder: str, source: str) -> None:
    assert len(wrong_imports(source, folder)) == 1


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("deploy", "from spikeport.converters.graph import ProcessGraph\nfrom spikeport.models import errors"),
        ("converters", "import spikeport.models.files"),
        ("models", "import torch.nn.functional as models"),
        ("tests", "from spikeport.deploy.trace import Trace"),
    ],
)
def test_a_right_import_passes(folder: str, source: str) -> None:
    assert wrong_imports(source, folder) == []
