"""Stage 5: screen the generated networks."""

import csv
import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mole.errors import CorruptFileError, MoleError
from mole.evaluation.parts import without_nan
from mole.files import write_text
from mole.pipeline.current import Run
from mole.rank import REGISTRY, Candidate, kendall_tau, leaderboard, regret
from mole.reading.tensors import read_safetensors
from mole.reporting import Advance
from mole.stages import Work, read_marker
from mole.tasks import Classification, Task


def rank(current: Run) -> Work:
    """Order the generated networks, and say how far that order can be trusted.

    Where there are no classes to tell apart, the loss on the prompt split decides.
    """
    folder, task = current.folder, current.task.to(torch.device("cpu"))
    marker = read_marker(folder, "sample")
    files = [folder.root / name for name in sorted(marker.outputs)] if marker else []
    if not files:
        report = {"candidates": 0, "by": None, "kendall_tau": None, "top1_regret": None, "random_regret": None}
        write_text(folder.leaderboard, "rank,file\n")
        return Work([folder.leaderboard], {"rank": report})
    states = [_load_sample(task, path) for path in files]
    flat, seeds = torch.stack([task.spec.flatten(state) for state in states]), None
    if task.config.subtasks.differ:
        heldout = current.own_heldout
        numbers = [int(path.stem) for path in files]  # of the starts; those of networks that were left out are missing
        seeds = heldout.column("seed")[heldout.first[numbers].numpy()].tolist()
    prompt, test = task.measure(flat, "prompt", seeds), task.measure(flat, "test", seeds)
    columns: dict[str, Tensor] = {}
    if isinstance(task, Classification):
        networks = [
            Candidate(path.name, partial(_module, task, state)) for path, state in zip(files, states, strict=True)
        ]
        with current.reporter.stage("rank", len(files), "networks") as advance:
            columns = _scores(task, networks, seeds, current.config.rank.scorers, advance)
    score, truth = task.score, test[task.score]
    columns |= {"prompt_loss": prompt["loss"], f"prompt_{score}": prompt[score]}
    by = next(iter(columns))
    deciding = columns[by] if by != "prompt_loss" else -columns[by]
    columns |= {"test_loss": test["loss"], f"test_{score}": truth}
    order = sorted(range(len(files)), key=lambda index: -float(deciding[index]))
    rows = [
        [place, files[i].name, *(float(column[i]) for column in columns.values())] for place, i in enumerate(order, 1)
    ]
    text, names = io.StringIO(), ["rank", "file", *columns]
    csv.writer(text, lineterminator="\n").writerows([names, *rows])
    write_text(folder.leaderboard, text.getvalue())
    judges = {name: column for name, column in columns.items() if name in REGISTRY} | {"prompt_loss": -prompt["loss"]}
    report = {
        "candidates": len(files),
        "by": by,
        "kendall_tau": kendall_tau(deciding, truth),
        "top1_regret": regret(deciding, truth),
        "random_regret": float(truth.max() - truth.mean()),
        "scorers": {name: {"kendall_tau": kendall_tau(column, truth), "top1_regret": regret(column, truth)}
                    for name, column in judges.items()},
        "best": rows[0][1],
    }  # fmt: skip
    report = without_nan(report)
    current.log("rank", 0, {f"rank/{k}": float(v) for k, v in report.items() if isinstance(v, float)})
    current.tracker.table("rank/networks", names, rows)
    return Work([folder.leaderboard], {"rank": report})


def _scores(
    task: Classification, networks: list[Candidate], seeds: list[int] | None, scorers: Sequence[str], advance: Advance
) -> dict[str, Tensor]:
    """By scorer (N,), on prompt images, each network on those of its own sub-task where they differ; minus
    infinity where a score could not be had."""
    images, labels = task.prompt.images, task.prompt.labels
    if seeds is None:
        boards = [leaderboard(networks, (images, labels), scorers=scorers, progress=advance)]
    else:
        boards = []
        for network, image, label in zip(networks, *task.shown(images, labels, seeds), strict=True):
            there = label >= 0
            boards.append(leaderboard([network], (image[there], label[there]), scorers=scorers))
            advance(len(boards))
    found = {row.name: row.scores for board in boards for row in board.rows}
    return {name: torch.tensor([found[n.name].get(name, -torch.inf) for n in networks]) for name in scorers}


def _module(task: Task, state: dict[str, torch.Tensor]) -> nn.Module:
    network = task.architecture.build(seed=0)
    network.load_state_dict(state)
    return network


def _load_sample(task: Task, path: Path) -> dict[str, torch.Tensor]:
    try:
        state = read_safetensors(path)
        task.spec.check(state)
    except (OSError, MoleError) as error:
        raise CorruptFileError(f"{path}: {error}; run the sample stage again") from None
    return state
