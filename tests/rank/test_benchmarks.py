import json
import subprocess
import sys
from pathlib import Path

from ..conftest import ROOT


def test_the_papers_tables_come_out_and_networks_are_kept(tmp_path: Path) -> None:
    """On random images: the way, not the figures."""
    command = [sys.executable, "benchmarks/neuralrank.py", "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["tables"]) == {"table 2", "tables 3 and 4", "table 5, MNIST", "table 5, Fashion", "table 6"}
    assert len(list((tmp_path / "networks").iterdir())) == 23 and "| paper's | 0.784 | 0.821 |" in done.stdout
    assert set(result["halving"]) == set(result["layers"]) == {"M04", "F04"}
    assert all(len(scores) == 6 for scores in result["layers"]["M04"].values())
    assert {path.name for path in tmp_path.glob("*.png")} == {"neuralrank_dimensions.png", "neuralrank_latent.png"}
