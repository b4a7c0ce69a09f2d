"""The main job's command line: reads what is asked for, says every mistake at once, then runs the pipeline.

Nothing here imports torch before the input has been found good.
"""

import argparse
import difflib
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mole import stages as staging
from mole.config import Config, keys, load, shipped, to_yaml
from mole.errors import ConfigError
from mole.estimate import estimate, unaffordable
from mole.files import LockedError, locked, value_digest
from mole.reporting import printable
from mole.signals import handling, stop
from mole.stages import STAGES, Decision, RunFolder, StageName

BEGAN = time.perf_counter()
DEFAULT_CONFIG = Path("configs") / "digits.yaml"

FLAGS = {
    "--only": "STAGES", "--out": "DIR", "--replace": "", "--redo": "", "--print-config": "", "--dry-run": "",
    "--help": "",
}  # fmt: skip
SWITCHES = [flag for flag, value in FLAGS.items() if not value]

DESCRIPTION = f"""\
Harvest checkpoint histories, train a generator on them, generate networks in one pass, judge and rank them.

usage: python train.py [CONFIG.yaml ...] [--section.key VALUE ...] [options]     (or: mole train ...)

  CONFIG.yaml ...       layered left to right; without one: configs/digits.yaml
  --section.key VALUE   override one key, for example --train.steps 500
  --only STAGES         only these, comma-separated: {", ".join(STAGES)}
  --out DIR             run folder; without it: runs/<name>, and what differs from the first file (runs/digits-s1)
  --replace             replace finished work of another configuration in that folder
  --redo                do again what other code has done
  --print-config        print the resulting configuration and stop
  --dry-run             print what would run, how long and with how much memory, and stop

The same command again resumes: finished stages are skipped, a stage that was cut off continues.
"""


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    config: Config
    stages: tuple[StageName, ...]
    out: Path
    print_config: bool = False
    dry_run: bool = False
    replace: bool = False
    """Whether finished work of another configuration may be replaced."""
    redo: bool = False
    """Whether work of other code is done again."""


def run_job(arguments: Sequence[str]) -> int:
    """Do what the arguments ask for; returns the exit code.

    Raises:
        ConfigError: with every mistake.
    """
    if any(argument in ("--help", "-h") for argument in arguments):
        print(DESCRIPTION, end="")
        return 0
    request = parse(arguments)
    if request.print_config:
        print(to_yaml(request.config), end="")
    elif request.dry_run:
        _show_plan(request)
    else:
        return _execute(request)
    return 0


def parse(arguments: Sequence[str]) -> Request:
    """Read the arguments and the files they name.

    Raises:
        ConfigError: with every mistake.
    """
    paths, overrides, options, mistakes = _split(arguments)
    stages = _stages(options.only, mistakes)
    paths = [shipped(path) for path in paths] or [shipped(DEFAULT_CONFIG)]
    try:
        config = load(paths, overrides)
    except ConfigError as error:
        raise ConfigError(mistakes + error.mistakes) from None
    mistakes += [f"configuration: {fault}" for fault in staging.unlearnable(config, stages)]
    if not options.out:
        config = config.model_copy(update={"name": run_name(config, paths[0])})
    out = Path(options.out) if options.out else Path("runs") / config.name
    mistakes += _folder_mistakes(out)
    folder = RunFolder(out)
    needed = staging.unmet(config, folder, stages) if not mistakes else {}
    if needed:
        reasons = "; ".join(f"{stage}: {reason}" for stage, reason in needed.items())
        mistakes.append(
            f"command line: --only {options.only}: in {out} other stages have to run first ({reasons}); "
            f"legal is --only {','.join(sorted({*needed, *stages}, key=STAGES.index))}, or no --only"
        )
    if not mistakes and not options.replace and not options.print_config:
        mistakes += _clash(config, folder, stages)
    if mistakes:
        raise ConfigError(mistakes)
    return Request(config, stages, out, options.print_config, options.dry_run, options.replace, options.redo)


def _folder_mistakes(out: Path) -> list[str]:
    """Why nothing can be written there."""
    try:
        str(out.absolute()).encode("utf-8")
    except UnicodeEncodeError:
        return [f"command line: --out: the name of {out.absolute()} is not UTF-8, which safetensors cannot write; "
                "legal is a folder with another name"]  # fmt: skip
    except OSError as error:
        return [
            f"command line: --out: the present folder cannot be found ({error.strerror}); legal is one that is there"
        ]
    return [f"command line: --out: {place} is a file; legal is a folder, which may not exist yet"
            for place in (out, *out.parents) if place.exists() and not place.is_dir()]  # fmt: skip


def _clash(config: Config, folder: RunFolder, stages: tuple[StageName, ...]) -> list[str]:
    """What finished work of another configuration would be replaced."""
    differences = staging.clashes(config, folder, stages)
    if not differences:
        return []
    more = f", and {len(differences) - 12} more" if len(differences) > 12 else ""
    return [f"{folder.root} holds work of another configuration ({'; '.join(differences[:12])}{more}); legal is "
            "another folder (--out DIR or --name NAME), or --replace, which removes that work"]  # fmt: skip


def run_name(config: Config, first: Path) -> str:
    """Name of a run: that of its first configuration file, and whatever else the command changes of its results.

    Example: `digits-s1` for `--seed 1`, `digits-objective_mean` for `--train.objective mean`.
    """
    try:
        reference = load([first])
    except ConfigError:  # a part of a configuration, that does not stand alone
        return config.name
    if config.name != reference.name:
        return config.name
    there, asked = (settings(one) for one in (reference, config))
    parts = [_name_part(key, value) for key, value in asked.items() if there[key] != value]
    name = "-".join([config.name, *parts])
    if len(name) > LONGEST_NAME or any(not part for part in parts):
        name = f"{config.name}-{value_digest(asked)[:8]}"
    return name


LONGEST_NAME = 100


def settings(config: Config) -> dict[str, Any]:
    """Every key that decides results, dotted, with its value."""
    values: dict[str, Any] = {}
    for key in keys():
        if key.split(".")[0] not in ("name", "tracking", "runtime"):
            value: Any = config
            for part in key.split("."):
                value = getattr(value, part)
            values[key] = value
    return values


def _name_part(key: str, value: Any) -> str:
    """A key and its value as a part of a folder's name; empty if it cannot be one."""
    if key == "seed":
        return f"s{value}"
    leaf = key.rpartition(".")[2]
    name = leaf if sum(other.rpartition(".")[2] == leaf for other in keys()) == 1 else key
    values = value if isinstance(value, list) else [value]
    if any(isinstance(one, list) for one in values):
        return ""
    return re.sub(r"[^A-Za-z0-9._]", "", "_".join([name, *(f"{one:g}" if isinstance(one, float) else str(one)
                                                           for one in values)]))  # fmt: skip


def _split(arguments: Sequence[str]) -> tuple[list[Path], list[tuple[str, str]], argparse.Namespace, list[str]]:
    """Configuration files, overrides, options and mistakes."""
    options = argparse.Namespace(only="", out="", print_config=False, dry_run=False, replace=False, redo=False)
    paths: list[Path] = []
    overrides: list[tuple[str, str]] = []
    mistakes: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            paths.append(Path(argument))
            continue
        flag, given, value = argument.partition("=")
        name = flag[2:]
        if flag in SWITCHES and not given:
            setattr(options, name.replace("-", "_"), True)
            continue
        if flag in SWITCHES:
            mistakes.append(f"command line: {argument}: {flag} takes no value")
            continue
        if flag not in FLAGS and name not in keys():
            mistakes.append(_unknown(flag))
            if not given and rest and not rest[0].startswith("--") and not rest[0].endswith((".yaml", ".yml")):
                rest.pop(0)  # most likely its value
            continue
        if not given:
            if not rest or rest[0].startswith("--"):
                mistakes.append(f"command line: {flag}: a value is missing; legal is {flag} {FLAGS.get(flag, 'VALUE')}")
                continue
            value = rest.pop(0)
        if not value:
            mistakes.append(f"command line: {flag}: the value is empty; legal is {flag} {FLAGS.get(flag, 'VALUE')}")
        elif flag in FLAGS:
            setattr(options, name, value)
        else:
            overrides.append((name, value))
    return paths, overrides, options, mistakes


def _unknown(flag: str) -> str:
    legal = [*FLAGS, *(f"--{key}" for key in keys())]
    near = difflib.get_close_matches(flag, legal, 1)
    near = near or [key for key in legal if key.endswith(f".{flag[2:]}")][:1]
    hint = f"did you mean {near[0]}?" if near else "--print-config shows every key"
    return f"command line: {flag}: unknown option; legal are {', '.join(FLAGS)} and --section.key; {hint}"


def _stages(only: str, mistakes: list[str]) -> tuple[StageName, ...]:
    """The stages asked for, in their order."""
    wanted = [name.strip() for name in only.split(",")] if only else list(STAGES)
    for name in wanted:
        if name not in STAGES:
            near = difflib.get_close_matches(name, STAGES, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            mistakes.append(f"command line: --only: found {name!r}; legal: {', '.join(STAGES)}{hint}")
    return tuple(stage for stage in STAGES if stage in wanted)


def _show_plan(request: Request) -> None:
    print(printable(f"run folder: {request.out}"))
    print(f"the whole job takes {estimate(request.config)}")
    plan = staging.plan(request.config, RunFolder(request.out), request.stages, redo=request.redo)
    _check_room(request, plan)
    for stage, decision in plan.items():
        print(f"{stage}: {'would run' if decision.run else 'would be skipped'}, {decision.reason}")
    if request.config.runtime.device == "cuda":
        from mole.pipeline.runner import choose_device

        choose_device(request.config)


def _check_room(request: Request, plan: dict[StageName, Decision]) -> None:
    """Refuse what fits neither into memory nor on the disk, unless it is done already.

    Raises:
        ConfigError: naming the keys to lower.
    """
    if any(decision.run for decision in plan.values()):
        faults = unaffordable(request.config, request.out, [stage for stage, decision in plan.items() if decision.run])
        if faults:
            raise ConfigError([f"configuration: {fault}" for fault in faults])


def _execute(request: Request) -> int:
    if int(os.environ.get("RANK", "0")):  # of torchrun: the first process does everything but a part of the training
        from mole.pipeline.helper import assist

        with handling(on_stop=stop, on_save=lambda: None):
            assist(request.config, request.out, request.stages, redo=request.redo)
        return 0
    lock, note = request.out / ".lock", _step_of_slurm(request)
    try:
        with (
            handling(on_stop=stop, on_save=lambda: None),  # what is finished is on disk; a training does more
            locked(lock, "another process is running there", note=note),
        ):
            return _run(request)
    except LockedError:
        if note and _note_in(lock) == note:
            print(f"another task of this SLURM step does the work of {request.out}; nothing is left for this one")
            return 0
        raise


def _step_of_slurm(request: Request) -> str:
    """What the tasks of one `srun` with one configuration have in common; empty elsewhere."""
    job, step = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_STEP_ID", "")
    if not job or os.environ.get("SLURM_NTASKS", "1") in ("", "1"):
        return ""
    return f"slurm {job}.{step} {value_digest(request.config.model_dump(mode='json'))[:16]}"


def _note_in(lock: Path) -> str:
    """What the process that holds a lock has written into it; it may have begun a moment ago."""
    for _ in range(20):
        if note := lock.read_text(errors="replace"):
            return note
        time.sleep(0.05)
    return ""


def _run(request: Request) -> int:
    config, folder = request.config, RunFolder(request.out)
    print(printable(f"run folder: {request.out}"), flush=True)
    if not request.replace and (clash := _clash(config, folder, request.stages)):  # another job was faster
        raise ConfigError(clash)
    plan = staging.plan(config, folder, request.stages, redo=request.redo)
    _check_room(request, plan)
    if any(decision.run for decision in plan.values()):
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve each other on few cores
        from mole.pipeline import run
        from mole.terminal import reporter

        report = run(
            config, request.out, request.stages, reporter(), began=BEGAN, replace=request.replace, redo=request.redo
        )
    else:
        staging.clear_leftovers(folder)
        for line in staging.mend_records(config, folder, request.stages):
            print(printable(line))
        for stage, decision in plan.items():
            print(f"{stage}: done already, {decision.reason}; skipped")
        report = staging.write_report(config, folder)
    print(printable(summary(report, request.out)))
    return 0


def summary(report: dict[str, Any], folder: Path) -> str:
    """The closing table: what was reached and where it lies."""
    rows: list[tuple[str, str, str]] = []
    if report.get("harvest", {}).get("mode") == "stream":
        flow = report.get("train", {}).get("stream", {"runs": 0, "checkpoints": 0, "reads_per_checkpoint": 0})
        read = f"each read {flow['reads_per_checkpoint']:.1f} times"
        rows.append(("in transit", f"{flow['runs']:,} runs, {flow['checkpoints']:,} checkpoints, {read}", "no zoo"))
    elif "harvest" in report:
        h = report["harvest"]
        text = f"{h['runs']:,} runs, {h['checkpoints']:,} checkpoints in {h['seconds']:.0f} s"
        rows.append(("harvest", text, "zoo/"))
    if "train" in report:
        t = report["train"]
        text = f"{t['parameters'] / 1e6:.2f} M parameters, {t['steps']:,} steps in {t['seconds']:.0f} s"
        rows.append(("generator", text, "generator/"))
    if "sample" in report:
        s = report["sample"]
        text = f"{s['networks']} networks for loss {s['target_loss']:.3f}"
        if s.get("not_finite"):
            text += f"; {s['not_finite']} more had NaN or infinite weights"
        rows.append(("samples", text, "samples/, provenance/"))
    if "one_pass" in report:
        rows += _judgement(report)
    if "rank" in report:
        r = report["rank"]
        tau, first, chance = (_number(r[key], ".4f") for key in ("kendall_tau", "top1_regret", "random_regret"))
        text = f"tau {tau}; best first loses {first}, at random {chance}"
        rows.append(("screening", text, "rank/leaderboard.csv"))
    rows.append(("time", f"{report['seconds']['total']:.0f} s", "report.json, metrics.csv"))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows]
    return "\n".join([f"{report['name']}: everything lies in {folder}", *lines])


def _judgement(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    one, novelty = report["one_pass"], report["novelty"]
    wins = report["nulls_at_least_as_accurate"]
    steps = one["adam_steps_to_match"]
    matched = f"{steps} Adam steps match it" if steps is not None else "no tried Adam step matches it"
    ratio, spread = (_number(novelty[key], ".2f") for key in ("ratio", "dispersion"))
    fresh = f"distance ratio {ratio}, dispersion {spread}"
    score = report["score"]
    reached, trained = one[f"{score}_mean"], one[f"trained_{score}_mean"]
    text = f"test {score} {_number(reached, '.4g')} (trained networks {_number(trained, '.4g')}); {matched}"
    if one["finite_fraction"] < 1:
        text += f"; {1 - one['finite_fraction']:.0%} are not finite, and left out"
    return [
        ("one pass", text, "figures/optimisers.png"),
        ("alignment", f"R2 {_number(report['alignment']['r2_mean'], '.3f')}", "figures/alignment.png"),
        ("novelty", fresh, "figures/novelty.png"),
        ("null models", f"as accurate or better: {', '.join(wins) or 'none'}", "report.json"),
    ]


def _number(value: float | None, form: str) -> str:
    """A number in words; of what no finite network is left, it is not known."""
    return "unknown" if value is None else f"{value:{form}}"
