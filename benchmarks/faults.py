"""Faults caused on purpose, and what came of them: flipped and cut files, hostile inputs, kills at random moments.

    python benchmarks/faults.py --flips 220 --inputs 390 --kills 100

Flips: one byte of a file of a finished run is changed, or its end is cut off; seen means that the next command makes
it again, refuses it, or says so. Inputs: every kind of tests/hostile.py, given to every command that reads such files,
in a process of its own; it must end within 20 seconds, without a traceback, and run nothing. Kills: a job is killed at
a random moment, and given again to its end; no temporary file may be left, and samples must be those of a run that
nobody killed. The last line is JSON.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mole import stages as staging  # noqa: E402
from mole.config import load  # noqa: E402
from mole.errors import MoleError  # noqa: E402
from mole.files import file_digest  # noqa: E402
from mole.stages import STAGES, RunFolder  # noqa: E402

TINY = ["configs/tiny.yaml"]
PATIENCE = 20


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`train.py` with these arguments."""
    return subprocess.run([sys.executable, "train.py", *arguments], cwd=ROOT, capture_output=True, text=True)


def flips(folder: Path, count: int, rng: random.Random) -> tuple[int, list[str]]:
    """Change a byte of `count` files of a finished run, one at a time; how many were seen, and which were not."""
    config, unseen = load([ROOT / TINY[0]]), list[str]()
    run_folder = RunFolder(folder)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.endswith(".lock")]
    files = [path for path in files if path.stat().st_size]
    for number in range(count):
        path = files[number % len(files)]
        before = path.read_bytes()
        if number % 5 == 4:
            path.write_bytes(before[: rng.randrange(len(before))])
        else:
            place = rng.randrange(len(before))
            path.write_bytes(before[:place] + bytes([before[place] ^ (1 << rng.randrange(8))]) + before[place + 1 :])
        if not seen(config, run_folder, path, before):
            unseen.append(f"{path.relative_to(folder)}")
        path.write_bytes(before)
    return count - len(unseen), unseen


def seen(config: object, folder: RunFolder, path: Path, before: bytes) -> bool:
    """Whether the next command makes a file again, refuses it, or says so."""
    try:
        plan = staging.plan(config, folder, STAGES)  # type: ignore[arg-type]
        if any(decision.run for decision in plan.values()):
            return True
        told = staging.mend_records(config, folder)  # type: ignore[arg-type]
        staging.write_report(config, folder)  # type: ignore[arg-type]
    except MoleError:
        return True
    return bool(told) or path.read_bytes() == before


Case = tuple[str, Callable[[Path], None], Path, list[str]]


def cases(work: Path, finished: Path) -> Iterator[Case]:
    """Kind, maker, where it is put, and the command that meets it there."""
    from tests import hostile

    texts = {**hostile.NOT_REGULAR, **hostile.TEXTS}
    copy = work / "run"
    train = ["train", "configs/tiny.yaml", "--out", str(copy)]
    for name, make in {**texts, **hostile.YAMLS}.items():
        yield f"configuration: {name}", make, work / "bad.yaml", ["train", str(work / "bad.yaml"), "--dry-run"]
    for name, make in texts.items():
        yield f"marker: {name}", make, copy / "stages" / "rank.json", [*train, "--dry-run"]
        yield f"ledger: {name}", make, copy / "provenance" / "ledger.jsonl", train
        yield f"ledger, rank: {name}", make, copy / "provenance" / "ledger.jsonl", [
            "rank", str(copy / "samples"), "--data", "digits"]  # fmt: skip
        yield f"zoo.json: {name}", make, copy / "zoo" / "zoo.json", ["zoo", "show", str(copy / "zoo")]
        yield f"zoo.json, verify: {name}", make, copy / "zoo" / "zoo.json", ["zoo", "verify", str(copy / "zoo")]
        yield (
            f"layout: {name}",
            make,
            next((finished / "zoo" / "layouts").iterdir()),
            ["zoo", "show", str(copy / "zoo")],
        )
        yield f"card: {name}", make, copy / "generator" / "config.json", ["load", str(copy)]
        yield f"rows: {name}", make, copy / "ranked" / "rows.jsonl", [
            "rank", str(copy / "samples"), "--data", "digits", "--out", str(copy / "ranked")]  # fmt: skip
        yield f"trainer state: {name}", make, work / "in" / "checkpoint-5" / "trainer_state.json", [
            "import", str(work / "in"), "--into", str(work / "zoo")]  # fmt: skip
    for name, make in {**texts, **hostile.SAFETENSORS}.items():
        yield f"safetensors, import: {name}", make, work / "in" / "x.safetensors", [
            "import", str(work / "in"), "--into", str(work / "zoo")]  # fmt: skip
        yield f"safetensors, sample: {name}", make, copy / "samples" / "00000.safetensors", [
            "rank", str(copy / "samples"), "--data", "digits"]  # fmt: skip
        yield f"safetensors, generator: {name}", make, copy / "generator" / "model.safetensors", ["load", str(copy)]
        yield f"safetensors, shard: {name}", make, copy / "zoo" / "shards" / "group-00000.safetensors", [
            "zoo", "verify", str(copy / "zoo")]  # fmt: skip
    for name, make in {**texts, **hostile.TORCH}.items():
        for suffix in ("pt", "ckpt"):
            yield f"{suffix}, import: {name}", make, work / "in" / f"x.{suffix}", [
                "import", str(work / "in"), "--into", str(work / "zoo")]  # fmt: skip
    for name, make in {**texts, **hostile.NPZ}.items():
        yield f"npz: {name}", make, work / "x.npz", ["rank", str(copy), "--data", str(work / "x.npz")]
    for name, make in {**texts, **hostile.INDEXES}.items():
        for action in ("show", "verify"):
            yield f"index, {action}: {name}", make, copy / "zoo" / "shards" / "group-00001.parquet", [
                "zoo", action, str(copy / "zoo")]  # fmt: skip


def inputs(finished: Path, count: int, work: Path) -> tuple[int, list[str]]:
    """Give hostile files to the commands; how many, and what went wrong."""
    import torch

    import mole
    import mole.checkpoints.importing
    import mole.diffusion
    import mole.pipeline
    import mole.rank.repository
    import mole.rank.tables  # noqa: F401 - what is imported once need not be in every child

    torch.set_num_threads(1)
    wrong, done = list[str](), 0
    for kind, make, place, command in list(cases(work, finished))[:count]:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        if str(work / "run") in " ".join(command):
            shutil.copytree(finished, work / "run")
        place = work / "run" / place.relative_to(finished) if place.is_relative_to(finished) else place
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.parent.name in ("in", "checkpoint-5"):
            torch.save({"0.weight": torch.ones(6, 4), "0.bias": torch.ones(6)}, place.parent / "good.pt")
        place.unlink(missing_ok=True)
        make(place)
        ended = child(command, work)
        done += 1
        if ended:
            wrong.append(f"{kind}: {ended}")
    return done, wrong


def child(command: list[str], work: Path) -> str:
    """What went wrong in a process that runs a command of `mole`, or loads a generator; empty if nothing did."""
    process = os.fork()
    if process == 0:
        os.setsid()
        os.chdir(work)
        output = os.open(work / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = ["mole", *command]
        code = 99
        try:
            import mole
            from mole.cli import main

            if command[0] == "load":
                sys.stdout = sys.stderr = os.fdopen(1, "w", closefd=False)
                mole.load(command[1])
                code = 0
            else:
                main(command)
        except SystemExit as ended:
            code = int(ended.code or 0)
        except MoleError:
            code = 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    began = time.monotonic()
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            break
        if time.monotonic() - began > PATIENCE:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return "hung"
        time.sleep(0.005)
    text = (work / "output").read_text(errors="replace")
    if os.WIFSIGNALED(status):
        return f"killed by signal {os.WTERMSIG(status)}"
    if "Traceback" in text or os.WEXITSTATUS(status) == 99:
        return text.strip().splitlines()[-1][:200]
    if any(work.rglob("hacked")) or Path("hacked").exists():
        return "ran code"
    if "\x1b" in text:
        return "control characters reached the terminal"
    return ""


def kills(count: int, finished: Path, work: Path, rng: random.Random) -> tuple[int, int]:
    """Kill a job at random moments; temporary files that the next run left, and results that differ."""
    leftovers = differing = 0
    for _ in range(count):
        folder = work / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        process = subprocess.Popen(
            [sys.executable, "train.py", *TINY, "--out", str(folder)], cwd=ROOT, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while not folder.exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 14))
        process.kill()
        process.wait()
        run(*TINY, "--out", str(folder))
        leftovers += len(list(folder.rglob(".tmp-*")))
        names = [path.relative_to(finished) for path in (finished / "samples").iterdir()]
        differing += any(file_digest(folder / name) != file_digest(finished / name) for name in names)
    return leftovers, differing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=220)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng, details = random.Random(given.seed), dict[str, object]()
    with tempfile.TemporaryDirectory() as name:
        work, finished = Path(name) / "work", Path(name) / "finished"
        done = run(*TINY, "--out", str(finished))
        assert done.returncode == 0, done.stderr
        if given.flips:
            found, unseen = flips(finished, given.flips, rng)
            details |= {"flips": given.flips, "flips_seen": found, "unseen": dict(Counter(unseen))}
        if given.inputs:
            count, wrong = inputs(finished, given.inputs, work)
            details |= {"inputs": count, "inputs_wrong": len(wrong), "wrong": wrong}
        if given.kills:
            left, differing = kills(given.kills, finished, work, rng)
            details |= {"kills": given.kills, "leftovers": left, "differing": differing}
    bad = len(details.get("unseen", {})) + details.get("inputs_wrong", 0) + details.get("leftovers", 0)  # type: ignore
    for line in details.pop("wrong", []):  # type: ignore[attr-defined]
        print(line)
    print(json.dumps({"name": "faults", "ratio": None, "ours": bad, "baseline": None, "unit": "faults not handled",
                      "details": details}))  # fmt: skip


if __name__ == "__main__":
    main()
