"""The main job as a person runs it, in processes of its own, with faults caused on purpose."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mole
from mole import cli
from mole import stages as staging
from mole.config import load
from mole.files import file_digest, sealed, value_digest, write_json
from mole.provenance import Ledger
from mole.reading.text import read_json
from mole.revision import revision
from mole.stages import RunFolder

from .conftest import CONFIGS, ROOT, run_command

REPORT = {
    "harvest": "runs checkpoints parameters seconds checkpoints_per_second",
    "split": "train_runs heldout_runs prompt_images test_images",
    "one_pass": "starts network_evaluations accuracy_mean accuracy_std loss_mean trained_accuracy_mean "
    "start_accuracy_mean adam_steps_to_match sgd_steps_to_match seconds_per_network",
    "alignment": "prompts starts r2_mean spearman slope noop_r2",
    "nulls": "mean_of_16_aligned noise nearest_prompt_retrieval start",
    "novelty": "nearest_training_distance training_leave_one_out_distance ratio max_wrong_iou_mean dispersion",
    "as_trained": "accuracy_mean accuracy_std trained_accuracy_mean trained_accuracy_std dispersion diversity",
    "rank": "candidates kendall_tau top1_regret random_regret",
    "seconds": "harvest train sample evaluate rank total",
}


def test_the_run_folder_holds_what_was_promised(tiny_run: Path) -> None:
    report = json.loads((tiny_run / "report.json").read_text())
    for section, keys in REPORT.items():
        assert set(keys.split()) <= report[section].keys(), section
    for null in report["nulls"].values():
        assert null.keys() == {
            "accuracy_mean",
            "loss_mean",
            "prompt_split_loss_mean",
            "nearest_training_distance",
            "diversity",
        }
    assert report["split"] == {
        "train_runs": 48, "heldout_runs": 16, "train_images": 1200, "prompt_images": 300, "test_images": 297,
    }  # fmt: skip
    assert report["harvest"]["runs"] == 64 and report["harvest"]["checkpoints"] == 64 * 8
    assert report["one_pass"]["network_evaluations"] == 1
    assert report["nulls"]["start"]["accuracy_mean"] == report["one_pass"]["start_accuracy_mean"]
    assert report["nulls_at_least_as_accurate"] == [
        name for name, null in report["nulls"].items() if null["accuracy_mean"] >= report["one_pass"]["accuracy_mean"]
    ]
    for name in ("alignment", "optimisers", "novelty"):
        assert (tiny_run / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "train,10,train/loss," in (tiny_run / "metrics.csv").read_text()
    assert "val/one_pass_accuracy" in (tiny_run / "metrics.csv").read_text()
    assert "name: tiny" in (tiny_run / "config.yaml").read_text()
    assert not list(tiny_run.rglob(".tmp-*")) and not (tiny_run / "training.ckpt").exists()


def test_every_sample_is_a_plain_network_with_a_record(tiny_run: Path) -> None:
    records = {r["file"]: r for r in Ledger(tiny_run / "provenance" / "ledger.jsonl").records if r["type"] == "network"}
    files = sorted((tiny_run / "samples").iterdir())
    assert [f"samples/{path.name}" for path in files] == sorted(records)
    generator = mole.load(tiny_run)
    for path in files:
        network = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
        network.load_state_dict(load_file(path))
        record = records[f"samples/{path.name}"]
        assert record["generator"] == generator.digest and record["start"]["kind"] == "held-out run"
        assert 48 <= record["start"]["seed"] < 64


def test_the_ledger_leads_from_a_network_to_its_zoo(tiny_run: Path) -> None:
    records = Ledger(tiny_run / "provenance" / "ledger.jsonl").records
    by_type = {kind: [r for r in records if r["type"] == kind] for kind in ("zoo", "generator", "network")}
    network = by_type["network"][0]
    generator = next(r for r in by_type["generator"] if r["digest"] == network["generator"])
    assert generator["wasDerivedFrom"]["zoo"] == by_type["zoo"][0]["digest"] == network["zoo"]


def test_the_leaderboard_is_in_order_of_the_deciding_scorer(tiny_run: Path) -> None:
    rows = list(csv.DictReader((tiny_run / "rank" / "leaderboard.csv").open()))
    scores = [float(row["leep"]) for row in rows]
    assert len(rows) == 8 and scores == sorted(scores, reverse=True)
    assert {row["file"] for row in rows} == {path.name for path in (tiny_run / "samples").iterdir()}


def test_the_same_command_again_skips_every_stage(tiny_run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*.*") if path.name != ".lock"}
    code = (
        "import sys\nfrom mole.cli import main\n"
        "try:\n    main(['train', *sys.argv[1:]])\nfinally:\n    print('torch' in sys.modules)"
    )
    done = run_command("configs/tiny.yaml", "--out", str(tiny_run), code=code)
    assert done.returncode == 0 and done.stdout.count("skipped") == 5 and "False" in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*.*") if path.name != ".lock"}


def test_a_changed_key_runs_what_depends_on_it_and_damaged_files_are_made_again(tiny_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_run, folder)
    dry = run_command(
        "configs/tiny.yaml", "--out", str(folder), "--rank.scorers", "[class_mean]", "--dry-run", "--replace"
    ).stdout
    assert dry.count("would be skipped") == 4 and "rank: would run, its configuration or its inputs changed" in dry

    digest = file_digest(folder / "generator" / "model.safetensors")
    shard, network = folder / "zoo" / "shards" / "group-00001.safetensors", folder / "samples" / "00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    network.unlink()
    done = run_command("configs/tiny.yaml", "--out", str(folder))
    assert done.returncode == 0, done.stderr
    assert "harvest: runs again, zoo/shards/group-00001.safetensors is truncated or altered" in done.stdout
    assert "train: done already" in done.stdout
    assert "sample: runs again, samples/00003.safetensors is missing" in done.stdout
    assert "rank: done already" in done.stdout  # the same network came out again
    assert file_digest(folder / "generator" / "model.safetensors") == digest


def test_nothing_stands_on_the_work_of_another_configuration(tiny_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_run, folder)
    for arguments, stage in (
        (
            ["--only", "evaluate", "--harvest.heldout_runs", "60"],
            "harvest",
        ),  # training runs would be judged as held out
        (["--only", "rank", "--train.steps", "61"], "train"),
        (["--only", "sample", "--seed", "7"], "harvest"),
    ):
        done = run_command("configs/tiny.yaml", "--out", str(folder), *arguments)
        assert done.returncode == 2
        assert f"{stage}: its configuration or its inputs changed" in done.stderr
    (folder / "zoo" / "shards" / "group-00001.parquet").unlink()
    done = run_command("configs/tiny.yaml", "--out", str(folder), "--only", "evaluate")
    assert done.returncode == 2 and "zoo/shards/group-00001.parquet is missing" in done.stderr


def test_a_damaged_ledger_is_said_before_the_work_and_a_damaged_report_is_written_again(
    tiny_run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_run, folder)
    (folder / "report.json").write_text("{")
    (folder / "stages" / "rank.json").write_text('{"fingerprint": 3}')
    assert run_command("configs/tiny.yaml", "--out", str(folder)).returncode == 0
    assert "rank" in json.loads((folder / "report.json").read_text())
    ledger = folder / "provenance" / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace('"zoo"', '"zoos"', 1))
    done = run_command("configs/tiny.yaml", "--out", str(folder), "--train.steps", "61", "--replace")
    assert done.returncode == 1 and "altered after it was written" in done.stderr
    assert "train:" not in done.stdout


def test_files_of_others_are_left_alone(tiny_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_run, folder)
    (folder / "samples" / "photo.jpg").write_text("mine")
    shutil.copy(folder / "samples" / "00000.safetensors", folder / "samples" / "mine.safetensors")
    done = run_command("configs/tiny.yaml", "--out", str(folder), "--sample.networks", "2", "--replace")
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (folder / "samples").iterdir())
    assert names == ["00000.safetensors", "00001.safetensors", "mine.safetensors", "photo.jpg"]
    assert json.loads((folder / "report.json").read_text())["rank"]["candidates"] == 2


STREAM = ("configs/tiny.yaml", "--harvest.mode", "stream", "--train.batch_size", "64", "--harvest.reuse", "4")


def test_in_transit_no_zoo_is_written_and_every_group_is_recorded_before_it_is_read(
    tiny_run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    shutil.rmtree(folder / "zoo")
    killed = run_command("train", *STREAM, "--out", str(folder), "--replace", code=KILL)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = [r for r in Ledger(folder / "provenance" / "ledger.jsonl").records if r["type"] == "streamed group"]
    done = run_command(*STREAM, "--out", str(folder))
    assert done.returncode == 0, done.stderr
    assert not (folder / "zoo").exists() and not list(folder.rglob("*.parquet"))
    report = json.loads((folder / "report.json").read_text())
    stream = report["train"]["stream"]
    assert report["train"]["resumed_from_step"] == 40 and 0 < stream["reads_per_checkpoint"] <= 4
    assert report["one_pass"]["trained_accuracy_mean"] > 0.8 and "in transit" in done.stdout
    after = [r for r in Ledger(folder / "provenance" / "ledger.jsonl").records if r["type"] == "streamed group"]
    assert len(after) > len(before) > 0  # what came after the last saved state is recorded, but was lost with the kill
    assert sum(len(r["runs"]) for r in after[len(before) :]) < stream["runs"] <= sum(len(r["runs"]) for r in after)
    runs = [run for record in after for run in record["runs"]]
    assert len(runs) == len(set(runs)) and not set(runs) & set(range(48, 64))  # none twice, none held out
    assert after[0]["wasGeneratedBy"]["recipe"]["task"]["name"] == "digits"
    again = run_command(*STREAM, "--out", str(folder))
    assert again.stdout.count("skipped") == 5


def test_varied_runs_are_harvested_with_their_factors_and_refused_by_the_generator(tmp_path: Path) -> None:
    varied = (
        "configs/tiny.yaml", "--out", str(tmp_path), "--harvest.vary.width", "[4, 8]", "--harvest.keep", "loss",
        "--harvest.vary.optimizer", "[adam, sgd]", "--harvest.dtype", "float16",
    )  # fmt: skip
    refused = run_command(*varied, "--harvest.vary.labels", "[[0, 1], [2, 3]]", "--generator.symmetry", "none")
    assert refused.returncode == 2 and not (tmp_path / "zoo").exists()
    assert "harvest.vary.labels: generators are not told which labels a network knows; legal is" in refused.stderr
    assert "harvest.vary.width is [4, 8], but task.width is 16; legal is to have it among them" in refused.stderr
    assert "by generators of symmetry equivariant; found disk and none" in refused.stderr
    assert run_command(*varied, "--only", "harvest").returncode == 0
    zoo = mole.Zoo(tmp_path / "zoo")
    assert zoo.runs == 64 and set(zoo.column("width")) == {4, 8} and set(zoo.column("optimizer")) == {"adam", "sgd"}
    assert zoo.header.dtype == "float16" and zoo.filter(width=8).spec.size == 610


SHORT = ("configs/tiny.yaml", "--train.steps", "10", "--train.validate_every", "10", "--evaluate.repeats", "2",
         "--evaluate.unseen", "2", "--evaluate.optimizer_steps", "5", "--harvest.heldout_runs", "32")  # fmt: skip


def test_a_generator_of_several_widths_is_trained_and_judged_at_unseen_ones(tmp_path: Path) -> None:
    done = run_command(
        *SHORT, "--task.width", "8", "--harvest.vary.width", "[4, 8]", "--harvest.vary.activation", "[relu, tanh]",
        "--generator.conditions", "[target_loss, activation]", "--evaluate.widths", "[4, 6]", "--out", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = read_json(tmp_path / "report.json")
    assert [(row["width"], row["in_zoo"]) for row in report["widths"]] == [(4, True), (6, False)]
    assert set(report["unseen_initialisations"]) == {"xavier", "orthogonal", "kaiming_fan_in", "kaiming_fan_out"}
    assert report["conditional_dispersion"]["ratio"] > 0
    generator = mole.load(tmp_path)
    kinds = {(a.widths[1], a.activation) for a in generator.card.architectures}
    assert kinds == {(4, "relu"), (4, "tanh"), (8, "relu"), (8, "tanh")}
    wide = generator.card.architecture.model_copy(update={"widths": [64, 20, 10]})
    samples = generator.sample(n=2, architecture=wide, target_loss=1.0, activation="relu")
    assert samples[0].module()(torch.rand(3, 64)).shape == (3, 10) and samples.architecture.widths == [64, 20, 10]


def test_a_generator_of_subtasks_is_told_of_them_by_examples(tmp_path: Path) -> None:
    done = run_command(
        *SHORT, "--task.subtasks.labels", "[4, 10]", "--task.subtasks.rename", "true", "--task.subtasks.rotate", "90",
        "--task.subtasks.pixels", "0.5", "--generator.view", "classes", "--generator.data", "true", "--out",
        str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = read_json(tmp_path / "report.json")
    assert "unseen_initialisations" not in report and report["one_pass"]["heldout_trained_accuracy_mean"] > 0.5
    assert len((tmp_path / "rank" / "leaderboard.csv").read_text().splitlines()) == 9
    generator = mole.load(tmp_path)
    images, labels = torch.rand(30, 64), torch.arange(30) % 5
    one = generator.sample(n=2, support=(images, labels), target_loss=0.3)
    other = generator.sample(n=2, support=(images.flip(1), labels), target_loss=0.3)
    assert not torch.equal(one.flat, other.flat)
    again = generator.sample(n=2, support=(images.flip(0), labels.flip(0)), target_loss=0.3)
    torch.testing.assert_close(again.flat, one.flat, rtol=1e-4, atol=1e-5)  # in any order


def run_twice(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`train.py` in two processes."""
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", str(ROOT / "train.py"), *arguments]
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        capture_output=True, timeout=300,
    )  # fmt: skip


def test_two_processes_train_one_generator_and_the_first_alone_writes(tmp_path: Path) -> None:
    short = ("configs/tiny.yaml", "--train.steps", "20", "--train.log_every", "10", "--only", "harvest,train", "--out")
    done = run_twice(*short, str(tmp_path / "ddp"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("train: finished") == 1
    rows = (tmp_path / "ddp" / "metrics.csv").read_text().splitlines()
    assert sum(row.startswith("train,10,train/loss,") for row in rows) == 1
    assert len(mole.load(tmp_path / "ddp").sample(n=2)) == 2
    again = run_command(*short, str(tmp_path / "ddp"))
    assert again.returncode == 0 and again.stdout.count("skipped") == 2
    for name in ("zoo", "stages"):
        shutil.copytree(tmp_path / "ddp" / name, tmp_path / "fsdp" / name)
    done = run_twice(*short, str(tmp_path / "fsdp"), "--runtime.strategy", "fsdp", "--train.checkpoint_every", "10",
                     "--replace")  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    losses = []
    for kind in ("ddp", "fsdp"):
        found = csv.reader((tmp_path / kind / "metrics.csv").open())
        losses.append([float(row[3]) for row in found if row[2] in ("train/loss", "val/one_pass_loss")])
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_generator_of_policies_is_judged_by_return(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = run_command(
        "configs/tiny.yaml", "--out", str(folder), "--task.name", "cartpole", "--task.steps", "32",
        "--task.width", "4", "--harvest.runs", "3", "--harvest.heldout_runs", "2", "--harvest.checkpoints", "3",
        "--sample.networks", "2", "--evaluate.starts", "2", "--evaluate.optimizer_steps", "16", "--evaluate.repeats",
        "0", "--evaluate.unseen", "2", "--train.steps", "4", "--train.batch_size", "4",
        "--generator.conditions", "[start_return, target_loss, target_return]",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "report.json").read_text())
    assert report["score"] == "return" and 0 < report["one_pass"]["return_mean"] <= 500
    assert report["nulls"]["start"]["return_mean"] == report["one_pass"]["start_return_mean"]
    assert "max_wrong_iou_mean" not in report["novelty"] and "test return" in done.stdout
    header = (folder / "rank" / "leaderboard.csv").read_text().splitlines()[0]
    assert header == "rank,file,prompt_loss,prompt_return,test_loss,test_return"
    assert set(mole.load(folder).card.ranges) == {"loss", "return"}


def test_the_smallest_legal_run(tmp_path: Path) -> None:
    ones = {
        "task.width": 1, "task.steps": 1, "harvest.runs": 2, "harvest.heldout_runs": 1, "harvest.checkpoints": 2,
        "harvest.group_size": 1, "generator.layers": 1, "train.steps": 1, "train.batch_size": 1, "sample.networks": 1,
        "evaluate.starts": 1, "evaluate.prompts": 2, "evaluate.optimizer_steps": 1,
    }  # fmt: skip
    arguments = [part for key, value in ones.items() for part in (f"--{key}", str(value))]
    done = run_command("configs/tiny.yaml", "--out", str(tmp_path), *arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "report.json").read_text())["one_pass"]["starts"] == 1


KILL = """
import os, signal, sys
import mole.pipeline.runner as pipeline
from mole.checkpoints import ZooWriter
from mole.diffusion import watch

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

stage = sys.argv.pop(1)
if stage == "harvest":
    write = ZooWriter.write
    ZooWriter.write = lambda self, name, *a, **k: die() if name == "group-00001" else write(self, name, *a, **k)
elif stage == "train":
    save = watch.Watch._save
    watch.Watch._save = lambda self, trainer: (save(self, trainer), die() if trainer.global_step == 40 else None)
else:
    mark = pipeline.write_marker
    pipeline.write_marker = lambda f, c, name, *a: die() if name == stage else mark(f, c, name, *a)
from mole.cli import main
main(["train", *sys.argv[1:]])
"""


def test_killed_in_any_stage_the_same_command_ends_as_if_nothing_had_happened(tiny_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for stage in ("harvest", "train", "sample", "evaluate", "rank"):
        done = run_command(stage, "configs/tiny.yaml", "--out", str(folder), code=KILL)
        assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
        if stage == "harvest":
            kept = (folder / "zoo" / "shards" / "group-00000.safetensors").stat().st_mtime_ns
    done = run_command("configs/tiny.yaml", "--out", str(folder))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("skipped") == 4  # only the ranking, killed last, was left
    assert (folder / "zoo" / "shards" / "group-00000.safetensors").stat().st_mtime_ns == kept
    for path in [*sorted(tiny_run.glob("samples/*")), tiny_run / "generator" / "model.safetensors"]:
        assert file_digest(path) == file_digest(folder / path.relative_to(tiny_run)), path.name
    ours, theirs = (json.loads((f / "report.json").read_text()) for f in (folder, tiny_run))
    assert ours["alignment"] == theirs["alignment"] and ours["rank"] == theirs["rank"]
    steps = [row[1] for row in csv.reader((folder / "metrics.csv").open()) if row[2] == "train/loss"]
    assert steps == ["10", "20", "30", "40", "50", "60"]


INTERRUPT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from mole.diffusion import watch
save = watch.Watch._save
def interrupt(self, trainer):
    save(self, trainer)
    if trainer.global_step == 20:
        os.kill(os.getpid(), signal.SIGINT)
watch.Watch._save = interrupt
from mole.cli import main
main(["train", *sys.argv[1:]])
"""


def test_ctrl_c_keeps_what_is_done(tiny_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = run_command("configs/tiny.yaml", "--out", str(folder), "--only", "harvest,train", code=INTERRUPT)
    assert done.returncode == 130 and "the same command continues" in done.stderr
    assert "Traceback" not in done.stderr
    assert (folder / "training.ckpt").exists()
    again = run_command("configs/tiny.yaml", "--out", str(folder), "--only", "train")
    assert again.returncode == 0 and "train: continues after step 20" in again.stdout
    name = "generator/model.safetensors"
    assert file_digest(folder / name) == file_digest(tiny_run / name)


FULL = """
import errno, os, sys
import mole.files
real, count = os.fsync, [0]
def fsync(descriptor):
    count[0] += 1
    if count[0] > 4:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    real(descriptor)
os.fsync = fsync
from mole.cli import main
main(["train", *sys.argv[1:]])
"""


def test_a_full_disk_is_said_and_loses_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = run_command("configs/tiny.yaml", "--out", str(folder), "--only", "harvest", code=FULL)
    assert done.returncode == 1 and "No space left on device" in done.stderr and "make room" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(folder.rglob(".tmp-*"))
    assert run_command("configs/tiny.yaml", "--out", str(folder), "--only", "harvest").returncode == 0


def test_diverging_networks_are_reported_without_a_traceback(tmp_path: Path) -> None:
    done = run_command(
        "configs/tiny.yaml", "--out", str(tmp_path), "--only", "harvest", "--task.optimizer", "sgd",
        "--task.learning_rate", "1e30",
    )  # fmt: skip
    assert done.returncode == 1 and "every run diverged; lower task.learning_rate" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_runs_for_two_steps(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, with a data set of MNIST's shape where a config wants one."""
    from mole.cli import parse
    from mole.pipeline import run
    from mole.terminal import LineReporter

    from .tasks.test_tasks import write_npz

    monkeypatch.setenv("MOLE_DATA", str(tmp_path))
    monkeypatch.setattr("mole.evaluation.judge.REFERENCES", 2)
    write_npz(tmp_path / "mnist.npz")
    write_npz(tmp_path / "cifar10.npz", shape=(32, 32, 3))
    only, heldout = re.search(r"--only (\S+)", path.read_text()), 40 if path.stem == "widths" else 2
    small = {
        "task.steps": 2, "harvest.runs": 20, "harvest.heldout_runs": heldout, "harvest.checkpoints": 3,
        "train.steps": 2, "train.batch_size": 4, "sample.networks": 2, "evaluate.starts": 2, "evaluate.prompts": 2,
        "evaluate.optimizer_steps": 2, "tracking.mode": "disabled",
    }  # fmt: skip
    if path.stem.startswith("gpt"):
        small |= {"generator.parameters": 10**6, "sample.evaluations": 2, "evaluate.evaluations": 2}
    arguments = [part for key, value in small.items() for part in (f"--{key}", str(value))]
    if path.stem in (
        "gpt_cifar10",
        "cartpole",
        "gpt_cartpole",
    ):  # which take minutes to judge
        arguments += ["--only", "harvest,train,sample"]
    arguments += ["--only", only[1]] if only else []
    request = parse([str(path), *arguments, "--out", str(tmp_path / "run")])
    report = run(request.config, request.out, request.stages, LineReporter(), began=0.0)
    assert report["harvest"]["runs"] == 20 + heldout and report["harvest"]["diverged_runs"] == 0
    assert only or (report["train"]["steps"] == 2 and report["sample"]["networks"] == 2)
    assert len(request.stages) < 5 or report["rank"]["candidates"] == 2


def harvest_again(folder: Path) -> str:
    done = run_command("configs/tiny.yaml", "--only", "harvest", "--out", str(folder))
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_a_damaged_header_or_layout_is_made_again_and_the_shards_stay(tiny_run: Path, tmp_path: Path) -> None:
    zoo = tmp_path / "run" / "zoo"
    shutil.copytree(tiny_run, tmp_path / "run")
    shards = {path: (path.stat().st_mtime_ns, file_digest(path)) for path in (zoo / "shards").glob("*.safetensors")}
    header, (layout,) = zoo / "zoo.json", (zoo / "layouts").iterdir()
    before = header.read_text(), layout.read_text()
    header.write_text(before[0].replace('"seed": 0', '"seed": 1', 1))
    harvest_again(tmp_path / "run")
    layout.write_text("x")
    harvest_again(tmp_path / "run")
    layout.unlink()
    harvest_again(tmp_path / "run")
    assert (header.read_text(), layout.read_text()) == before
    assert {path: (path.stat().st_mtime_ns, file_digest(path)) for path in shards} == shards


def test_imported_networks_are_not_removed_by_a_harvest(tmp_path: Path) -> None:
    network = nn.Linear(3, 2)
    torch.save(network.state_dict(), tmp_path / "step1.pt")
    mole.import_checkpoints(tmp_path / "step1.pt", tmp_path / "run" / "zoo")
    done = run_command("configs/tiny.yaml", "--only", "harvest", "--out", str(tmp_path / "run"))
    assert done.returncode == 1 and "networks from elsewhere (import) are here" in done.stderr
    assert len(mole.Zoo(tmp_path / "run" / "zoo")) == 1


SIGNAL = """
import os, signal, sys
from mole.diffusion import watch
number, step = getattr(signal, sys.argv.pop(1)), int(sys.argv.pop(1))
obey = watch.Watch._obey
def tell(self, trainer, at):
    if at == step:
        os.kill(os.getpid(), number)
    obey(self, trainer, at)
watch.Watch._obey = tell
from mole.cli import main
main(["train", *sys.argv[1:]])
"""


def test_sigterm_saves_the_training_at_once_and_the_same_command_goes_on(tiny_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    short = ("configs/tiny.yaml", "--out", str(folder), "--only", "harvest,train")
    done = run_command("SIGTERM", "33", *short, code=SIGNAL)
    assert done.returncode == 143 and "the same command continues" in done.stderr and "Traceback" not in done.stderr
    last = run_command("SIGTERM", "60", *short, code=SIGNAL)
    assert last.returncode == 143 and "train: continues after step 33" in last.stdout, last.stderr
    again = run_command(*short)
    assert again.returncode == 0 and "train: continues after step 60" in again.stdout, again.stderr
    name = "generator/model.safetensors"
    assert file_digest(folder / name) == file_digest(tiny_run / name)


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1",
         "SLURM_NODELIST": "localhost", "SLURM_NNODES": "1", "SLURM_JOB_NAME": "train"}  # fmt: skip


def test_under_slurm_nothing_outside_the_run_folder_is_read_or_written(tiny_run: Path, tmp_path: Path) -> None:
    config = str(ROOT / "configs" / "tiny.yaml")
    (tmp_path / "hpc_ckpt_1.ckpt").write_bytes((tiny_run / "generator" / "model.safetensors").read_bytes())
    done = run_command("SIGUSR1", "20", config, "--out", "run", "--only", "harvest,train", "--train.checkpoint_every",
                       "1000", cwd=tmp_path, env={**SLURM, "PYTHONPATH": str(ROOT)}, code=SIGNAL)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hpc_ckpt_1.ckpt", "run"]
    assert read_json(tmp_path / "run" / "report.json")["train"]["resumed_from_step"] == 0
    steps = [row[1] for row in csv.reader((tmp_path / "run" / "metrics.csv").open()) if row[2] == "train/loss"]
    assert steps[0] == "10"


def test_tasks_of_one_slurm_step_do_not_fight(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    with (tmp_path / ".lock").open("w") as file:
        config = cli.parse(["configs/tiny.yaml", "--out", str(tmp_path)]).config
        file.write(f"slurm 7.0 {value_digest(config.model_dump(mode='json'))[:16]}")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        done = run_command("configs/tiny.yaml", "--out", str(tmp_path), env=SLURM)
        assert done.returncode == 0 and "another task of this SLURM step does the work" in done.stdout
        other = run_command("configs/tiny.yaml", "--out", str(tmp_path), env={**SLURM, "SLURM_STEP_ID": "1"})
        assert other.returncode == 1 and "another process is running there" in other.stderr
        other = run_command("configs/tiny.yaml", "--out", str(tmp_path), "--train.steps", "7", env=SLURM)
        assert other.returncode == 1 and "another process is running there" in other.stderr


def test_networks_that_are_not_finite_are_counted_left_out_and_the_run_ends(tmp_path: Path) -> None:
    code = """
import sys, torch
from mole.diffusion.generator import Generator
draw = Generator._draw
def odd(self, *arguments, **named):
    drawn, losses = draw(self, *arguments, **named)
    drawn.flat[::3] = float("nan")
    return drawn, losses
Generator._draw = odd
from mole.cli import main
main(["train", *sys.argv[1:]])
"""
    done = run_command(*SHORT, "--out", str(tmp_path), code=code)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "3 more had NaN or infinite weights" in done.stdout and "are not finite, and left out" in done.stdout
    report = read_json(tmp_path / "report.json")
    assert report["one_pass"]["finite_fraction"] == pytest.approx(5 / 8) and report["sample"]["networks"] == 5
    assert 0 < report["one_pass"]["accuracy_mean"] <= 1 and report["rank"]["candidates"] == 5
    assert report["sample"]["not_finite"] == 3 and report["novelty"]["nearest_training_distance"] > 0


def test_a_training_that_blows_up_ends_with_a_report_or_with_its_reason(tmp_path: Path) -> None:
    wild = ("configs/tiny.yaml", "--train.steps", "4", "--train.warmup_steps", "1", "--train.learning_rate", "1e6")
    done = run_command(*wild, "--out", str(tmp_path / "run"), "--evaluate.optimizer_steps", "5")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    path = tmp_path / "run" / "generator" / "model.safetensors"
    tensors = load_file(path)
    tensors[next(iter(tensors))].fill_(float("nan"))
    save_file(tensors, path)
    card = read_json(tmp_path / "run" / "generator" / "config.json")
    card["weights"] = file_digest(path)
    card["digest"] = value_digest({name: value for name, value in card.items() if name != "digest"})
    write_json(tmp_path / "run" / "generator" / "config.json", card)
    with pytest.raises(mole.CorruptFileError, match=r"hold NaN or infinity, .* its training diverged"):
        mole.load(tmp_path / "run")


def test_flipped_bytes_and_missing_files_of_a_finished_run_are_seen(tiny_run: Path, tmp_path: Path) -> None:
    """Twenty of the 220 of benchmarks/faults.py, and every kind of file deleted."""
    import random

    from benchmarks.faults import flips, seen

    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    assert flips(folder, 40, random.Random(1)) == (40, [])
    config = load([ROOT / "configs" / "tiny.yaml"])
    for name in ("provenance/ledger.jsonl", "config.yaml", "report.json", "zoo/zoo.json", "samples/00001.safetensors",
                 "zoo/shards/group-00000.json", "figures/novelty.png", "stages/train.json"):  # fmt: skip
        path = folder / name
        before = path.read_bytes()
        path.unlink()
        assert seen(config, RunFolder(folder), path, before), name
        path.write_bytes(before)


def test_a_deleted_ledger_and_configuration_are_written_again(tiny_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    before = (folder / "config.yaml").read_text()
    records = Ledger(folder / "provenance" / "ledger.jsonl").records
    (folder / "provenance" / "ledger.jsonl").unlink()
    (folder / "config.yaml").unlink()
    done = run_command("configs/tiny.yaml", "--out", str(folder))
    assert done.returncode == 0 and f"{len(records)} records were missing, and are written again" in done.stdout
    assert Ledger(folder / "provenance" / "ledger.jsonl").records == records
    assert (folder / "config.yaml").read_text() == before


def test_work_of_other_code_is_kept_with_a_line_and_redone_on_request(tiny_run: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(tiny_run, folder.root)
    config, marker = load([ROOT / "configs" / "tiny.yaml"]), read_json(folder.marker("rank"))
    assert marker["code"]["source"] == revision().source and marker["code"]["version"] == mole.__version__
    marker["code"] |= {"source": "0" * 16, "commit": "a" * 40}
    write_json(folder.marker("rank"), sealed(marker))
    kept, redone = (staging.decide(config, folder, "rank", redo=redo) for redo in (False, True))
    assert not kept.run and "by other code: mole 0.1.0, commit aaaaaaaaaa then" in kept.reason
    assert "--redo does it again" in kept.reason and redone.run
    network = Ledger(folder.ledger).records[-1]
    assert network["versions"]["mole"]["source"] == revision().source


def test_parts_of_an_evaluation_that_are_done_count(tmp_path: Path) -> None:
    from mole.evaluation.parts import Parts

    calls: list[str] = []

    def compute(name: str) -> dict[str, float]:
        calls.append(name)
        return {"value": 0.1, "none": float("nan")}

    for _ in range(2):
        parts = Parts(tmp_path, "this run")
        assert parts.get("a", lambda: compute("a")) == {"value": 0.1, "none": None}
    Parts(tmp_path, "another run").get("a", lambda: compute("again"))
    (tmp_path / "a.json").write_text((tmp_path / "a.json").read_text().replace("0.1", "0.9"))
    Parts(tmp_path, "another run").get("a", lambda: compute("altered"))
    assert calls == ["a", "again", "altered"]
