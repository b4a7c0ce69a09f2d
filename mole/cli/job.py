"""The main job's command line: reads what is asked for, says every mistake at once, then runs the pipeline.

Nothing here imports torch before the input has been found good.
"""

import argparse
import difflib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mole import stages as staging
from mole.config import Config, keys, load, to_yaml
from mole.errors import ConfigError
from mole.files import locked
from mole.stages import STAGES, RunFolder, StageName

BEGAN = time.perf_counter()

ROOT = Path(__file__).resolve().parent.parent.parent
DEFAULT_CONFIG = ROOT / "configs" / "digits.yaml"

FLAGS = {"--only": "STAGES", "--out": "DIR", "--print-config": "", "--dry-run": "", "--help": ""}

DESCRIPTION = f"""\
Harvest checkpoint histories, train a generator on them, generate networks in one pass, judge and rank them.

usage: python train.py [CONFIG.yaml ...] [--section.key VALUE ...] [options]

  CONFIG.yaml ...       layered left to right; without one: configs/digits.yaml
  --section.key VALUE   override one key, for example --train.steps 500
  --only STAGES         only these, comma-separated: {", ".join(STAGES)}
  --out DIR             run folder; without it: runs/<name>
  --print-config        print the resulting configuration and stop
  --dry-run             print what would run and stop

The same command again resumes: finished stages are skipped, a stage that was cut off continues.
"""


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    config: Config
    stages: tuple[StageName, ...]
    out: Path
    print_config: bool
    dry_run: bool


def run_job(arguments: Sequence[str]) -> int:
    """Do what the arguments ask for; returns the exit code.

    Raises:
        ConfigError: with every mistake.
    """
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
    try:
        config = load(paths or [DEFAULT_CONFIG], overrides)
    except ConfigError as error:
        raise ConfigError(mistakes + error.mistakes) from None
    mistakes += [f"configuration: {fault}" for fault in staging.unlearnable(config, stages)]
    out = Path(options.out) if options.out else Path("runs") / config.name
    for place in (out, *out.parents):
        if place.exists() and not place.is_dir():
            mistakes.append(f"command line: --out: {place} is a file; legal is a folder, which may not exist yet")
    needed = staging.unmet(config, RunFolder(out), stages) if not mistakes else {}
    if needed:
        reasons = "; ".join(f"{stage}: {reason}" for stage, reason in needed.items())
        mistakes.append(
            f"command line: --only {options.only}: in {out} other stages have to run first ({reasons}); "
            f"legal is --only {','.join(sorted({*needed, *stages}, key=STAGES.index))}, or no --only"
        )
    if mistakes:
        raise ConfigError(mistakes)
    return Request(config, stages, out, options.print_config, options.dry_run)


def _split(arguments: Sequence[str]) -> tuple[list[Path], list[tuple[str, str]], argparse.Namespace, list[str]]:
    """Configuration files, overrides, options and mistakes."""
    options = argparse.Namespace(only="", out="", print_config=False, dry_run=False)
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
        if flag in ("--print-config", "--dry-run") and not given:
            setattr(options, name.replace("-", "_"), True)
            continue
        if flag in ("--print-config", "--dry-run", "--help"):
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
    print(f"run folder: {request.out}")
    for stage, decision in staging.plan(request.config, RunFolder(request.out), request.stages).items():
        print(f"{stage}: {'would run' if decision.run else 'would be skipped'}, {decision.reason}")


def _execute(request: Request) -> int:
    if int(os.environ.get("RANK", "0")):  # of torchrun: the first process does everything but a part of the training
        from mole.pipeline.helper import assist

        assist(request.config, request.out, request.stages)
        return 0
    with locked(request.out / ".lock", "another process is running there"):
        return _run(request)


def _run(request: Request) -> int:
    plan = staging.plan(request.config, RunFolder(request.out), request.stages)
    if any(decision.run for decision in plan.values()):
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve each other on few cores
        from mole.pipeline import run
        from mole.terminal import reporter

        report = run(request.config, request.out, request.stages, reporter(), began=BEGAN)
    else:
        for stage, decision in plan.items():
            print(f"{stage}: done already, {decision.reason}; skipped")
        report = staging.write_report(request.config, RunFolder(request.out))
    print(summary(report, request.out))
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
        rows.append(("samples", text, "samples/, provenance/"))
    if "one_pass" in report:
        rows += _judgement(report)
    if "rank" in report:
        r = report["rank"]
        text = (
            f"tau {r['kendall_tau']:.2f}; best first loses {r['top1_regret']:.4f}, at random {r['random_regret']:.4f}"
        )
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
    ratio, spread = ("unknown" if novelty[k] is None else f"{novelty[k]:.2f}" for k in ("ratio", "dispersion"))
    fresh = f"distance ratio {ratio}, dispersion {spread}"
    score = report["score"]
    reached, trained = one[f"{score}_mean"], one[f"trained_{score}_mean"]
    text = f"test {score} {reached:.4g} (trained networks {trained:.4g}); {matched}"
    return [
        ("one pass", text, "figures/optimisers.png"),
        ("alignment", f"R2 {report['alignment']['r2_mean']:.3f}", "figures/alignment.png"),
        ("novelty", fresh, "figures/novelty.png"),
        ("null models", f"as accurate or better: {', '.join(wins) or 'none'}", "report.json"),
    ]
