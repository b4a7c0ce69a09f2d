"""`mole rank`: order networks by how well they would serve data."""

import argparse
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from mole.errors import ConfigError, CorruptFileError, MoleError
from mole.files import read_sealed, sealed, write_json
from mole.stages import differences

SPLITS = ("train", "prompt", "test")


def add_parser(commands: Any) -> None:
    """The arguments of `mole rank`."""
    rank: argparse.ArgumentParser = commands.add_parser("rank", help="order networks by how well they would serve data")
    rank.add_argument("path", nargs="+", help="a zoo, a run's samples, a folder of .safetensors, timm:NAME")
    rank.add_argument("--data", required=True, help="a task (digits, mnist, ...), or an .npz of `inputs`, `labels`")
    rank.add_argument("--split", choices=SPLITS, default="prompt", help="of a task (default: prompt)")
    rank.add_argument("--labels", help="only examples of these labels, as 0,1,2")
    rank.add_argument("--unlabelled", action="store_true", help="rank without reading any label")
    rank.add_argument("--examples", type=int, default=2000, help="at most so many (default: 2000)")
    rank.add_argument("--scorer", help="names, separated by commas; the first decides the order")
    rank.add_argument("--layer", default="last hidden", help="its name or place (default: what the last layer reads)")
    rank.add_argument("--bootstrap", type=int, default=0, help="samples for intervals and the chance to be best")
    rank.add_argument("--factory", help="module:function that makes a network for the files")
    rank.add_argument("--out", type=Path, help="folder for CSV, Parquet, figure; the same command goes on there")
    rank.add_argument("--replace", action="store_true", help="replace another ranking in that folder")
    rank.add_argument("--device", default="cpu")
    rank.add_argument("--seed", type=int, default=0)


def run_rank(options: argparse.Namespace) -> int:
    """Rank, print the table, and write it where that is asked for; 1 if no network could be scored.

    Raises:
        ConfigError: arguments do not fit.
        MoleError: there are no networks, or the data cannot be had.
    """
    legal = {"examples": (3, 2**40), "bootstrap": (0, 10**6), "seed": (0, 2**63 - 1)}
    wrong = {name: getattr(options, name) for name, (low, high) in legal.items()
             if not low <= getattr(options, name) <= high}  # fmt: skip
    if wrong:
        raise ConfigError([f"command line: --{name} is {str(value)[:40]}; legal is {legal[name][0]} or more, up to "
                           f"{legal[name][1]}" for name, value in wrong.items()], "command line")  # fmt: skip
    if options.out is not None:
        _check_folder(options)
    from rich.console import Console

    from mole.rank import leaderboard
    from mole.rank.repository import candidates, named
    from mole.rank.tables import save, terminal
    from mole.reporting import printable
    from mole.terminal import reporter

    factory = named(options.factory) if options.factory else None
    networks = []
    for path in options.path:  # names say where a network lies, if there are several places
        before = f"{path}: " if len(options.path) > 1 else ""
        networks += [replace(found, name=before + found.name) for found in candidates(path, factory=factory)]
    names = [name.strip() for name in options.scorer.split(",")] if options.scorer else None
    layer = int(options.layer) if re.fullmatch(r"-?[0-9]{1,9}", options.layer) else options.layer
    with reporter().stage("rank", len(networks), "networks") as advance:
        board = leaderboard(
            networks, _data(options), scorers=names, layer=layer,
            bootstrap=options.bootstrap, device=options.device, seed=options.seed, progress=advance,
            kept=options.out / "rows.jsonl" if options.out else None,
        )  # fmt: skip
    reasons = {row.reason for row in board.rows}
    if len(reasons) == 1 and "" not in reasons and len(board.rows) > 1:
        raise MoleError(f"all {len(board.rows)} networks: {reasons.pop()}")
    for path in save(board, options.out) if options.out else []:
        print(printable(str(path)))
    if options.out is not None:
        write_json(options.out / "ranking.json", sealed({"request": _request(options)}))
    console = Console(file=sys.stdout)
    console.print(terminal(board, width=console.width))
    return 0 if any(row.scores for row in board.rows) else 1


def _request(options: argparse.Namespace) -> dict[str, Any]:
    """What decides a ranking, as plain values."""
    names = (
        "path",
        "data",
        "split",
        "labels",
        "unlabelled",
        "examples",
        "scorer",
        "layer",
        "bootstrap",
        "factory",
        "seed",
    )
    return {name: getattr(options, name) for name in names}


def _check_folder(options: argparse.Namespace) -> None:
    """Refuse a folder that holds another finished ranking.

    Raises:
        ConfigError: naming what differs, and what to do.
    """
    path, asked = options.out / "ranking.json", _request(options)
    try:
        there = read_sealed(path, {"request"})["request"]
    except (OSError, CorruptFileError):
        return  # none, or not known any more
    told = differences(there, asked)
    if told and not options.replace:
        raise ConfigError([f"{options.out} holds another ranking ({'; '.join(told)}); legal is another --out, or "
                           "--replace"], "command line")  # fmt: skip


def _data(options: argparse.Namespace) -> Any:
    """Inputs and labels, drawn by the seed."""
    import torch

    inputs, labels = _from_file(Path(options.data)) if options.data.endswith(".npz") else _from_task(options)
    if options.labels:
        inputs, labels = _of_labels(inputs, labels, options.labels)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(options.seed))[: options.examples]
    return inputs[order], None if labels is None or options.unlabelled else labels[order]


def _of_labels(inputs: Any, labels: Any, text: str) -> tuple[Any, Any]:
    """The examples of some labels."""
    import torch

    if labels is None:
        raise ConfigError([f"command line: --labels {text}: the data have no labels"])
    if labels.is_floating_point() or labels.ndim != 1:
        told = f"labels are {tuple(labels.shape)} {str(labels.dtype).removeprefix('torch.')}"
        raise ConfigError([f"command line: --labels {text}: {told}; legal are whole labels (n,)"])
    legal = [str(label) for label in labels.unique().tolist()]
    wanted = [part.strip() for part in text.split(",")]
    if unknown := [part for part in wanted if part not in legal]:
        raise ConfigError([f"command line: --labels {', '.join(unknown)}; legal: {', '.join(legal[:20])}"])
    chosen = torch.isin(labels, torch.tensor([int(part) for part in wanted]))
    return inputs[chosen], labels[chosen]


def _from_task(options: argparse.Namespace) -> tuple[Any, Any]:
    from typing import get_args

    from mole.config import TaskConfig
    from mole.config.sections import TaskName
    from mole.tasks import labelled, load_task

    if options.data not in get_args(TaskName):
        legal = ", ".join(get_args(TaskName))
        raise ConfigError([f"command line: --data {options.data}; legal: {legal}, or an .npz of inputs and labels"])
    split = labelled(load_task(TaskConfig(name=options.data))).split(options.split)
    return split.images, split.labels


def _from_file(path: Path) -> tuple[Any, Any]:
    import numpy as np
    import torch

    from mole.reading.tensors import read_npz

    legal = "legal is an .npz of numbers `inputs` (n, ...) and, if there are some, whole `labels` (n,)"
    try:
        arrays = read_npz(path, ("inputs", "labels"))
    except OSError as error:
        raise ConfigError([f"command line: --data {path}: {error.strerror}; {legal}"]) from None
    except CorruptFileError as error:
        raise ConfigError([f"command line: --data {error}; {legal}"]) from None
    inputs, labels = arrays.get("inputs"), arrays.get("labels")
    if inputs is None or inputs.ndim < 1 or inputs.dtype.kind not in "fiub":
        what = "no inputs" if inputs is None else f"inputs {inputs.shape} {inputs.dtype}"
        raise ConfigError([f"command line: --data {path}: {what}; {legal}"])
    if labels is None:
        return torch.from_numpy(inputs.astype(np.float32)), None
    if labels.ndim == 2 and labels.shape[1] == 1 and labels.dtype.kind in "iub":
        labels = labels[:, 0]
    huge = labels.dtype.kind == "u" and bool((labels > np.iinfo(np.int64).max).any())
    if labels.ndim < 1 or len(labels) != len(inputs) or labels.dtype.kind not in "fiub" or huge:
        what = f"{len(inputs)} inputs, labels {labels.shape} {labels.dtype}"
        raise ConfigError([f"command line: --data {path}: {what}; {legal}"])
    kind = np.float32 if labels.dtype.kind == "f" else np.int64
    return torch.from_numpy(inputs.astype(np.float32)), torch.from_numpy(labels.astype(kind))
