"""The doors open one way, and importing the package is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "mole"

BASE = {"errors", "files", "reading"}
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": set(),
    "errors": set(),
    "__main__": {"cli"},
    "reading": {"errors"},
    "files": {"errors", "reading"},
    "revision": set(),
    "estimate": {"config", "reading"},
    "signals": {"errors"},
    "devices": {"errors"},
    "config": {"errors", "reading"},
    "reporting": set(),
    "seeding": set(),
    "terminal": {"reporting"},
    "metrics": {"files", "reading"},
    "tracking": {"config"},
    "stages": {"config", "metrics", "provenance", "revision", *BASE},
    "representations": {"seeding", *BASE},
    "tasks": {"config", "representations", "seeding", *BASE},
    "checkpoints": {"config", "representations", "seeding", "tasks", *BASE},
    "diffusion": {
        "config", "devices", "reporting", "representations", "revision", "seeding", "signals", "tasks", "checkpoints",
        *BASE,
    },
    "evaluation": {"config", "representations", "seeding", "tasks", "checkpoints", *BASE},
    "rank": {"checkpoints", "config", "devices", "reporting", "representations", "tasks", *BASE},
    "provenance": BASE,
    "pipeline": {
        "checkpoints", "config", "diffusion", "evaluation", "metrics", "provenance", "rank", "reporting",
        "representations", "revision", "stages", "tasks", "tracking", *BASE,
    },
    "cli": {
        "checkpoints", "config", "estimate", "pipeline", "rank", "reporting", "revision", "signals", "stages", "tasks",
        "terminal", *BASE,
    },
}  # fmt: skip


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Modules that a file imports, `TYPE_CHECKING` blocks aside, as dotted names."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_one_way(path: Path) -> None:
    here = room(path)
    rooms = {n.split(".")[1] for n in imported(path) if n.startswith("mole.") and (PACKAGE / n.split(".")[1]).exists()}
    rooms |= {
        n.split(".")[1]
        for n in imported(path)
        if n.startswith("mole.") and (PACKAGE / f"{n.split('.')[1]}.py").exists()
    }
    assert rooms - {here} <= MAY_IMPORT[here], f"{here} may not import {rooms - {here} - MAY_IMPORT[here]}"


def test_the_rules_have_no_circle() -> None:
    order: list[str] = []
    while len(order) < len(MAY_IMPORT):
        ready = [name for name, needs in MAY_IMPORT.items() if name not in order and needs <= set(order)]
        assert ready, f"a circle among {set(MAY_IMPORT) - set(order)}"
        order += ready


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_one_room_each_for_wandb_printing_and_exiting(path: Path) -> None:
    here = room(path)
    if here != "tracking":
        assert not any(name.split(".")[0] == "wandb" for name in imported(path))
    calls = {
        getattr(node.func, "id", "") for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
    }
    if here not in ("cli", "terminal"):
        assert not calls & {"print", "input", "exit", "quit"}


def test_importing_mole_imports_nothing_heavy() -> None:
    code = "import sys, mole; print(sorted({'torch', 'numpy', 'pydantic', 'lightning'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_every_public_name_can_be_had() -> None:
    import mole

    for name in mole.__all__:
        assert getattr(mole, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'lod'; it has"):
        mole.lod  # noqa: B018
