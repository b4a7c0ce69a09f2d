"""What the README says is done, and done by its own text."""

import re
import shutil
from pathlib import Path

import pytest

from .conftest import ROOT, run_command

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


def test_the_two_commands_are_the_ones_that_continuous_integration_runs() -> None:
    commands = [text.strip() for language, text in BLOCKS if language == "bash" and "pip install" in text]
    assert commands == [
        "python -m pip install -c constraints.txt -e . && python train.py",
        'python -m pip install -c constraints.txt -e ".[test]" && python -m pytest',
    ]
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


PYTHON = [
    (name, number, text)
    for name in ("README.md", "docs/harvest.md", "docs/zoo_format.md", "docs/generator.md")
    for number, text in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL))
]


@pytest.mark.parametrize(("name", "number", "text"), PYTHON, ids=[f"{name}-{number}" for name, number, _ in PYTHON])
def test_python_blocks_run(name: str, number: int, text: str, tiny_run: Path, tmp_path: Path) -> None:
    """In a folder where `runs/digits` is a finished run."""
    (tmp_path / "runs").mkdir()
    shutil.copytree(tiny_run, tmp_path / "runs" / "digits")
    done = run_command(code="import mole\n" + text.replace("target_loss=0.15", "target_loss=0.5"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_links_and_named_files_exist() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)
