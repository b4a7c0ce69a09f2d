"""The corridor: runs the stages of a configuration in a run folder, skipping what is done."""

import csv
import io
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from mole.checkpoints import Zoo, ZooWriter, kept_steps, train_population
from mole.config import Config, to_yaml
from mole.diffusion import Generator
from mole.diffusion.generator import versions
from mole.errors import CorruptFileError, MoleError
from mole.evaluation.figures import draw_figures
from mole.evaluation.judge import PARTS, Exhibits, judge
from mole.files import remove, write_json, write_text
from mole.metrics import MetricsFile
from mole.provenance import Ledger
from mole.rank import kendall_tau, rank_networks, regret
from mole.reporting import Advance, Reporter
from mole.stages import STAGES, RunFolder, StageName, decide, fingerprint, read_marker, write_marker
from mole.tasks import Task, load_task
from mole.tasks.task import build_network
from mole.tracking import Tracker

SEEDS_PER_CONFIG = 2**20
"""Run r of a harvest has the seed `config.seed * SEEDS_PER_CONFIG + r`."""

Result = tuple[list[Path], dict[str, Any]]
"""Files that a stage wrote, and its part of the report."""


@dataclass(frozen=True)
class Run:
    """One configuration in one folder, with what the stages share."""

    config: Config
    folder: RunFolder
    reporter: Reporter
    tracker: Tracker
    device: torch.device

    @cached_property
    def task(self) -> Task:
        """The task, its data on the device."""
        return load_task(self.config.task).to(self.device)

    @cached_property
    def zoo(self) -> tuple[Zoo, Zoo]:
        """Training runs and held-out runs."""
        return Zoo.open(self.folder.zoo).split_by_run(self.config.harvest.heldout_runs)

    @cached_property
    def generator(self) -> Generator:
        return Generator.load(self.folder.generator, self.device)

    @cached_property
    def metrics(self) -> MetricsFile:
        return MetricsFile(self.folder.metrics)

    @cached_property
    def ledger(self) -> Ledger:
        return Ledger(self.folder.ledger)

    def log(self, stage: StageName, step: int, values: dict[str, float]) -> None:
        """Into `metrics.csv`, and to the tracker."""
        self.metrics.append(stage, step, values)
        self.tracker.log({**values, f"{stage}/step": step})


def run(
    config: Config, root: Path, stages: tuple[StageName, ...], reporter: Reporter, *, began: float
) -> dict[str, Any]:
    """Run the stages that are not done yet; returns the report, which is also written.

    Args:
        config: what to do.
        root: the run folder.
        stages: which stages, in order; those they depend on must have finished.
        reporter: told the progress.
        began: `time.perf_counter()` when the process began; the start-up counts for the first stage.

    Raises:
        MoleError: something the user can mend.
    """
    folder = RunFolder(root)
    device = choose_device(config)
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    write_text(root / "config.yaml", to_yaml(config))
    tracker = Tracker(config.tracking, name=config.name, folder=root, settings=config.model_dump(mode="json"))
    reporter.say(tracker.line)
    current = Run(config, folder, reporter, tracker, device)
    try:
        for stage in stages:
            decision = decide(config, folder, stage)
            if not decision.run:
                reporter.say(f"{stage}: done already, {decision.reason}; skipped")
                continue
            if read_marker(folder, stage) is not None:
                reporter.say(f"{stage}: runs again, {decision.reason}")
            began = _finish(current, stage, STAGE_FUNCTIONS[stage], began)
    finally:
        tracker.finish()
    return write_report(config, folder)


def _finish(current: Run, stage: StageName, function: Callable[[Run], Result], began: float) -> float:
    """Run one stage and declare it finished; returns when that was."""
    folder = current.folder
    remove(folder.marker(stage))
    if stage != "train":  # a training may continue, and keeps the rows of what it has done
        current.metrics.rewind(stage, -1)
    outputs, result = function(current)
    ended = time.perf_counter()
    seconds = ended - began + result.pop("seconds_before", 0.0)
    result["machine"] = _machine(current.device)
    write_marker(folder, current.config, stage, outputs, seconds, result)
    write_report(current.config, folder)
    return ended


def choose_device(config: Config) -> torch.device:
    """CUDA where there is one, unless told otherwise.

    Raises:
        MoleError: CUDA was asked for and is not there.
    """
    if config.runtime.device == "cuda" and not torch.cuda.is_available():
        raise MoleError("runtime.device is cuda, but PyTorch finds no such device; legal here: auto, cpu")
    if config.runtime.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.runtime.device)


def _machine(device: torch.device) -> dict[str, Any]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return {"device": name, "threads": torch.get_num_threads(), "peak_memory_bytes": peak, "versions": versions()}


def harvest(current: Run) -> Result:
    """Train a population in groups; each group is a shard that counts once it is whole."""
    config, task = current.config, current.task
    settings, recipe = config.harvest, {"seed": config.seed, "task": config.task.model_dump(mode="json")}
    steps = kept_steps(config.task.steps, settings.checkpoints)
    writer = ZooWriter(current.folder.zoo, task.spec, steps, recipe)
    total = settings.runs + settings.heldout_runs
    seeds = [config.seed * SEEDS_PER_CONFIG + index for index in range(total)]
    groups = [seeds[low : low + settings.group_size] for low in range(0, total, settings.group_size)]
    done, before = 0, writer.seconds()
    with current.reporter.stage("harvest", total * config.task.steps, "steps") as advance:
        for index, group in enumerate(groups):
            base = done

            def progress(steps_done: int, base: int = base) -> None:
                advance(base + steps_done)

            if not writer.has(index, group):
                _write_shard(current, writer, index, group, steps, progress)
            done += len(group) * config.task.steps
            advance(done)
    writer.trim(len(groups))
    zoo = Zoo.open(current.folder.zoo)
    seconds = writer.seconds()
    current.ledger.append(
        [
            {
                "kind": "entity", "type": "zoo", "digest": zoo.digest, "runs": total, "recipe": recipe,
                "steps": steps, "seeds": [seeds[0], seeds[-1]], "spec": task.spec.fingerprint,
                "wasGeneratedBy": {"activity": "harvest", "versions": versions()},
            }
        ]
    )  # fmt: skip
    checkpoints = zoo.weights.shape[0] * zoo.weights.shape[1]
    report = {
        "runs": len(zoo.seeds), "skipped_runs": zoo.skipped, "checkpoints": checkpoints,
        "parameters": task.spec.size, "seconds": seconds, "checkpoints_per_second": checkpoints / max(seconds, 1e-9),
        "prompt_loss_best": float(zoo.loss.min()), "digest": zoo.digest,
    }  # fmt: skip
    split = {
        "train_runs": settings.runs, "heldout_runs": settings.heldout_runs, "train_images": len(task.train),
        "prompt_images": len(task.prompt), "test_images": len(task.test),
    }  # fmt: skip
    outputs = [current.folder.zoo / "zoo.json", *current.folder.zoo.glob("shard-*")]
    return outputs, {"harvest": report, "split": split, "seconds_before": before}


def _write_shard(
    current: Run, writer: ZooWriter, index: int, seeds: list[int], steps: list[int], progress: Callable[[int], None]
) -> None:
    began, task = time.perf_counter(), current.task
    weights = train_population(task, seeds, steps, progress=progress)
    metrics = task.measure(weights.flatten(0, 1), task.prompt)
    shape = weights.shape[:2]
    shaped = type(metrics)(metrics.loss.unflatten(0, shape), metrics.accuracy.unflatten(0, shape))
    writer.write(index, seeds, weights, shaped, seconds=time.perf_counter() - began)


def train(current: Run) -> Result:
    """Train the generator; its state is on disk every few hundred steps."""
    from mole.diffusion.training import Data, train_generator  # Lightning takes seconds to import

    config, folder = current.config, current.folder
    training, heldout = current.zoo
    resumed = folder.training_state.exists()
    with current.reporter.stage("train", config.train.steps, "steps") as advance:
        generator, seconds, before = train_generator(
            config,
            Data(current.task, training, heldout),
            folder.training_state,
            identity=fingerprint(config, folder, "train"),
            device=current.device,
            progress=advance,
            log=lambda step, values: current.log("train", step, dict(values)),
            on_resume=lambda step: current.metrics.rewind("train", step),
        )
    generator = generator.save(folder.generator)
    remove(folder.training_state)
    current.ledger.append(
        [
            {
                "kind": "entity", "type": "generator", "digest": generator.digest,
                "wasDerivedFrom": {"zoo": training.digest}, "config": generator.card.denoiser.model_dump(mode="json"),
                "wasGeneratedBy": {
                    "activity": "train", "settings": config.train.model_dump(mode="json"), "seed": config.seed,
                    "versions": versions(),
                },
            }
        ]
    )  # fmt: skip
    report = {
        "parameters": sum(p.numel() for p in generator.denoiser.parameters()), "steps": config.train.steps,
        "seconds": seconds, "steps_per_second": config.train.steps / max(seconds, 1e-9), "resumed": resumed,
        "digest": generator.digest,
    }  # fmt: skip
    return list(folder.generator.iterdir()), {"train": report, "seconds_before": before}


def sample(current: Run) -> Result:
    """Generate networks from held-out starts, one file each, each with its record in the ledger."""
    settings, folder = current.config.sample, current.folder
    _, heldout = current.zoo
    starts = heldout.weights[: settings.networks, 0]
    with current.reporter.stage("sample", settings.networks, "networks") as advance:
        samples = current.generator.sample(
            target_loss=settings.target_loss, n=settings.networks, seed=current.config.seed,
            starts=starts, evaluations=settings.evaluations,
        )  # fmt: skip
        names = [f"{index:05d}.safetensors" for index in range(len(samples))]
        for stale in set(folder.samples.glob("*")) - {folder.samples / name for name in names}:
            remove(stale)
        for done, (name, network) in enumerate(zip(names, samples, strict=True), 1):
            network.save(folder.samples / name)
            advance(done)
    seeds = heldout.seeds[: settings.networks].tolist()
    records = []
    for name, record, seed in zip(names, samples.provenance, seeds, strict=True):
        start = {**record["start"], "kind": "held-out run", "seed": seed, "step": 0}
        records.append({"kind": "entity", "type": "network", "file": f"samples/{name}", **record, "start": start})
    current.ledger.append(records)
    measured = current.task.measure(samples.flat.to(current.device), current.task.prompt)
    target = samples.provenance[0]["prompt"]["target_loss"]
    values = {
        "sample/prompt_loss_mean": float(measured.loss.mean()),
        "sample/prompt_accuracy_mean": float(measured.accuracy.mean()),
        "sample/target_loss": target,
    }
    current.log("sample", 0, values)
    report = {
        "networks": len(samples), "target_loss": target, "network_evaluations": samples.network_evaluations,
        "prompt_split_loss_mean": values["sample/prompt_loss_mean"],
        "prompt_split_accuracy_mean": values["sample/prompt_accuracy_mean"],
    }  # fmt: skip
    return [folder.samples / name for name in names], {"sample": report}


def evaluate(current: Run) -> Result:
    """Judge the generator on held-out runs and test images, beside baselines and null models."""
    training, heldout = current.zoo
    generator, seed = current.generator, current.config.seed

    def draw(starts: torch.Tensor, target_loss: torch.Tensor, evaluations: int) -> tuple[torch.Tensor, int]:
        drawn = generator.draw(starts, target_loss, seed=seed, evaluations=evaluations)
        return drawn.flat, drawn.evaluations

    task = load_task(current.config.task)  # judged on the CPU, wherever it was generated
    exhibits = Exhibits(task, training, heldout, draw, current.config.evaluate, seed)
    done = 0
    with current.reporter.stage("evaluate", PARTS, "parts") as advance:

        def tick() -> None:
            nonlocal done
            done += 1
            advance(done)

        result = judge(exhibits, tick)
    values = {f"novelty/{key}": value for key, value in result["novelty"].items()}
    values |= {f"sample/one_pass_{key}": result["one_pass"][key] for key in ("accuracy_mean", "loss_mean")}
    current.log("evaluate", 0, {**values, "sample/alignment_r2": result["alignment"]["r2_mean"]})
    paths = draw_figures(current.folder.figures, result)
    return paths, result


def rank(current: Run) -> Result:
    """Order the generated networks by silhouette, and say how far that order can be trusted."""
    folder, task = current.folder, load_task(current.config.task)
    files = sorted(folder.samples.glob("*.safetensors"))
    states = [_load_sample(task, path) for path in files]
    flat = torch.stack([task.spec.flatten(state) for state in states])
    with current.reporter.stage("rank", len(files), "networks") as advance:
        networks = _counted((_module(task, state) for state in states), advance)
        ranking = rank_networks(
            networks, task.prompt.images, task.prompt.labels, components=current.config.rank.components
        )
    prompt, test = task.measure(flat, task.prompt), task.measure(flat, task.test)
    rows = [
        [place, files[i].name, float(ranking.scores[i]), float(prompt.loss[i]), float(prompt.accuracy[i]),
         float(test.loss[i]), float(test.accuracy[i])]
        for place, i in enumerate(ranking.order, 1)
    ]  # fmt: skip
    columns = ["rank", "file", "silhouette", "prompt_loss", "prompt_accuracy", "test_loss", "test_accuracy"]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    write_text(folder.leaderboard, text.getvalue())
    report = {
        "candidates": len(files),
        "kendall_tau": kendall_tau(ranking.scores, test.accuracy),
        "top1_regret": regret(ranking.scores, test.accuracy),
        "random_regret": float(test.accuracy.max() - test.accuracy.mean()),
        "prompt_loss_kendall_tau": kendall_tau(-prompt.loss, test.accuracy),
        "prompt_loss_top1_regret": regret(-prompt.loss, test.accuracy),
        "best": rows[0][1],
    }
    current.log("rank", 0, {f"rank/{k}": float(v) for k, v in report.items() if isinstance(v, float)})
    current.tracker.table("rank/networks", columns, rows)
    return [folder.leaderboard], {"rank": report}


def _counted(networks: Iterable[nn.Module], advance: Advance) -> Iterator[nn.Module]:
    for done, network in enumerate(networks, 1):
        yield network
        advance(done)


def _module(task: Task, state: dict[str, torch.Tensor]) -> nn.Module:
    network = build_network(task.layers, seed=0)
    network.load_state_dict(state)
    return network


def _load_sample(task: Task, path: Path) -> dict[str, torch.Tensor]:
    try:
        state = load_file(path)
        task.spec.check(state)
    except (SafetensorError, MoleError) as error:
        raise CorruptFileError(f"{path}: {error}; run the sample stage again") from None
    return state


STAGE_FUNCTIONS: dict[StageName, Callable[[Run], Result]] = {
    "harvest": harvest, "train": train, "sample": sample, "evaluate": evaluate, "rank": rank,
}  # fmt: skip


def write_report(config: Config, folder: RunFolder) -> dict[str, Any]:
    """Merge what the finished stages found into `report.json`."""
    report: dict[str, Any] = {"name": config.name, "seed": config.seed}
    seconds: dict[str, float] = {}
    machines: dict[str, Any] = {}
    for stage in STAGES:
        marker = read_marker(folder, stage)
        if marker is not None and marker.fingerprint == fingerprint(config, folder, stage):
            result = dict(marker.result)
            machines[stage] = result.pop("machine")
            report |= result
            seconds[stage] = marker.seconds
    report["seconds"] = {**seconds, "total": sum(seconds.values())}
    report["machine"] = machines
    write_json(folder.report, report)
    return report
