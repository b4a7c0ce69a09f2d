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


@pytest.mark.parametrize("number", range(len([b for b in BLOCKS if b[0] == "python"])))
def test_python_blocks_run(number: int, tiny_run: Path, tmp_path: Path) -> None:
    """In a folder where `runs/digits` is a finished run."""
    (tmp_path / "runs").mkdir()
    shutil.copytree(tiny_run, tmp_path / "runs" / "digits")
    code = [text for language, text in BLOCKS if language == "python"][number]
    done = run_command(code=code.replace("target_loss=0.15", "target_loss=0.5"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_links_and_named_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
