"""Stage 5: screen the generated networks."""

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from mole.errors import CorruptFileError, MoleError
from mole.files import write_text
from mole.pipeline.current import Result, Run
from mole.rank import Ranking, kendall_tau, rank_networks, regret
from mole.reporting import Advance
from mole.stages import read_marker
from mole.tasks import Classification, Task


def rank(current: Run) -> Result:
    """Order the generated networks by silhouette, and say how far that order can be trusted.

    Where there are no classes to tell apart, the loss on the prompt split decides.
    """
    folder, task = current.folder, current.task.to(torch.device("cpu"))
    marker = read_marker(folder, "sample")
    files = [folder.root / name for name in sorted(marker.outputs)] if marker else []
    states = [_load_sample(task, path) for path in files]
    flat, seeds = torch.stack([task.spec.flatten(state) for state in states]), None
    if task.config.subtasks.differ:
        heldout = current.own_heldout
        seeds = heldout.column("seed")[heldout.first[: len(files)].numpy()].tolist()
    prompt, test = task.measure(flat, "prompt", seeds), task.measure(flat, "test", seeds)
    ranking = Ranking.of(-prompt["loss"])
    if isinstance(task, Classification):
        with current.reporter.stage("rank", len(files), "networks") as advance:
            networks = _counted((_module(task, state) for state in states), advance)
            ranking = _by_silhouette(task, networks, seeds, current.config.rank.components)
    score, truth = task.score, test[task.score]
    rows = [
        [place, files[i].name, float(ranking.scores[i]), float(prompt["loss"][i]), float(prompt[score][i]),
         float(test["loss"][i]), float(truth[i])]
        for place, i in enumerate(ranking.order, 1)
    ]  # fmt: skip
    scorer = "silhouette" if isinstance(task, Classification) else "minus_prompt_loss"
    columns = ["rank", "file", scorer, "prompt_loss", f"prompt_{score}", "test_loss", f"test_{score}"]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    write_text(folder.leaderboard, text.getvalue())
    report = {
        "candidates": len(files),
        "kendall_tau": kendall_tau(ranking.scores, truth),
        "top1_regret": regret(ranking.scores, truth),
        "random_regret": float(truth.max() - truth.mean()),
        "prompt_loss_kendall_tau": kendall_tau(-prompt["loss"], truth),
        "prompt_loss_top1_regret": regret(-prompt["loss"], truth),
        "best": rows[0][1],
    }
    current.log("rank", 0, {f"rank/{k}": float(v) for k, v in report.items() if isinstance(v, float)})
    current.tracker.table("rank/networks", columns, rows)
    return [folder.leaderboard], {"rank": report}


def _by_silhouette(
    task: Classification, networks: Iterable[nn.Module], seeds: list[int] | None, components: int
) -> Ranking:
    """On the prompt images, each network on those of its own sub-task where they differ."""
    data = task.prompt.images, task.prompt.labels
    if seeds is None:
        return rank_networks(networks, *data, components=components)
    scores = []
    for network, images, labels in zip(networks, *task.shown(*data, seeds), strict=True):
        there = labels >= 0
        scores.append(rank_networks([network], images[there], labels[there], components=components).scores)
    return Ranking.of(torch.cat(scores))


def _counted(networks: Iterable[nn.Module], advance: Advance) -> Iterator[nn.Module]:
    for done, network in enumerate(networks, 1):
        yield network
        advance(done)


def _module(task: Task, state: dict[str, torch.Tensor]) -> nn.Module:
    network = task.architecture.build(seed=0)
    network.load_state_dict(state)
    return network


def _load_sample(task: Task, path: Path) -> dict[str, torch.Tensor]:
    try:
        state = load_file(path)
        task.spec.check(state)
    except (SafetensorError, MoleError) as error:
        raise CorruptFileError(f"{path}: {error}; run the sample stage again") from None
    return state
