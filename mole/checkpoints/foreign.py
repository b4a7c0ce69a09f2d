"""Files of others, read without running anything in them: what they hold, which run, which step, which metrics."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mole.checkpoints.format import plain
from mole.checkpoints.gpt import NETWORKS, step_of_key
from mole.errors import CorruptFileError
from mole.reading.guard import check_file
from mole.reading.tensors import check_tensors, read_safetensors, read_torch
from mole.reading.text import read_json
from mole.representations import WeightSpec

SUFFIXES = {".pt", ".pth", ".ckpt", ".bin", ".safetensors"}

NOT_NETWORKS = {
    "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth", "training_args.bin",
}  # fmt: skip
"""What Hugging Face's trainer writes beside the network."""

STATE_KEYS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "params", "weights", "module")

WRAPPERS = ("module.", "_orig_mod.", "_forward_module.")
"""Prefixes of data-parallel, compiled and fabric modules."""


class UnusableError(Exception):
    """Why a file is left out; files left out for the same reason are counted together."""


@dataclass(frozen=True)
class Candidate:
    """A file that may hold a network, the shards of one, or an LMDB folder."""

    paths: list[Path]
    name: str
    """As the report calls it."""
    run: str
    is_lmdb: bool = False
    fault: str = ""
    """Why it cannot even be looked at."""


@dataclass(frozen=True)
class Found:
    """One network that was found."""

    run: str
    step: int | None
    """None if nothing tells it: the order of the files does."""
    state: dict[str, Tensor]
    name: str
    """Where it was."""
    metrics: dict[str, float] = field(default_factory=dict)
    spec: WeightSpec | None = None
    """Its layout, where more is known than its tensors tell."""


def candidates(source: Path, without: Path) -> list[Candidate]:
    """Everything below `source` that may hold networks, in natural order; `without` is passed over."""
    if not source.is_dir():
        return [Candidate([source], source.name, source.parent.name or "run")]
    found: list[Candidate] = []
    for folder in sorted([source, *(p for p in source.rglob("*") if p.is_dir())], key=_natural):
        if folder == without or without in folder.parents:
            continue
        name = folder.relative_to(source).as_posix()
        run = name if name != "." else source.resolve().name
        if (folder / "data.mdb").exists():
            found.append(Candidate([folder], name, run, is_lmdb=True))
            continue
        try:
            files = sorted((p for p in folder.iterdir() if p.suffix in SUFFIXES and not p.is_dir()), key=_natural)
        except OSError as error:
            found.append(Candidate([folder], name, run, fault=f"cannot be read ({error.strerror or error})"))
            continue
        found += _files(source, folder, run, files)
    return found


def _files(source: Path, folder: Path, run: str, files: list[Path]) -> list[Candidate]:
    if re.fullmatch(r"checkpoint-\d+", folder.name):
        above = folder.parent.relative_to(source).as_posix() if folder != source else "."
        run = above if above != "." else source.resolve().name
    found, sharded = [], _sharded(folder)
    if sharded:
        found.append(Candidate(sharded, sharded[0].relative_to(source).as_posix(), run))
    for path in files:
        if path not in sharded:
            found.append(Candidate([path], path.relative_to(source).as_posix(), run))
    return found


def _sharded(folder: Path) -> list[Path]:
    """The files that an index of Hugging Face's splits one network into."""
    for index in sorted(folder.glob("*.index.json")):
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
        except (OSError, CorruptFileError, KeyError, TypeError, AttributeError):
            continue
        if all(isinstance(name, str) and "/" not in name and (folder / name).is_file() for name in names):
            return [folder / name for name in names]
    return []


def _natural(path: Path) -> list[tuple[int, int | str]]:
    """Sorts `step9` before `step10`."""
    parts = re.split(r"(\d+)", path.as_posix())
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts]


def read_file(file: Candidate) -> Found:
    """The network in a file, or in the shards of one.

    Raises:
        UnusableError: there is none, or it cannot be read without running code.
    """
    state: dict[str, Tensor] = {}
    content: Mapping[str, Any] = {}
    for path in file.paths:
        if path.name in NOT_NETWORKS:
            raise UnusableError("not a network (state of an optimiser, scheduler or random generator)")
        content = _load(path)
        part = _state_dict(content)
        if part is None:
            raise UnusableError("no state dict in it")
        try:
            check_tensors(part)
        except CorruptFileError as error:
            raise UnusableError(str(error)) from None
        state |= {name: tensor.detach() for name, tensor in part.items()}
        if part.keys() == content.keys():
            content = {}  # tensors alone: none of them is a metric
    lightning = "pytorch-lightning_version" in content
    state = _without_prefixes(state, lightning=lightning)
    if any(name != plain(name) for name in state):
        raise UnusableError("names that are no Unicode text")
    if not any(tensor.is_floating_point() for tensor in state.values()):
        raise UnusableError("no state dict in it")
    metrics = {**_metrics_of_name(file.paths[0]), **_metrics_of_content(content), **_metrics_of_trainer(file.paths[0])}
    step = _step(file.paths[0], content)
    return Found(plain(file.run), step, state, plain(file.name), metrics)


def _load(path: Path) -> Mapping[str, Any]:
    try:
        content = read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    except CorruptFileError as error:
        raise UnusableError(str(error).removeprefix(f"{path}: ")) from None
    if not isinstance(content, Mapping):
        raise UnusableError("no state dict in it")
    return content


def _state_dict(content: Mapping[str, Any], depth: int = 2) -> dict[str, Tensor] | None:
    """The state dict in a file's content: itself, or under one of the usual keys."""
    if content and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        return dict(content)
    for key in STATE_KEYS:
        inner = content.get(key)
        if depth and isinstance(inner, Mapping) and (found := _state_dict(inner, depth - 1)) is not None:
            return found
    return None


def _without_prefixes(state: dict[str, Tensor], *, lightning: bool) -> dict[str, Tensor]:
    for wrapper in WRAPPERS:
        if all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): tensor for name, tensor in state.items()}
    heads = {name.split(".", 1)[0] for name in state}
    if lightning and len(heads) == 1 and all("." in name for name in state):
        state = {name.split(".", 1)[1]: tensor for name, tensor in state.items()}
        return _without_prefixes(state, lightning=False)
    return state


STEP = re.compile(r"(?<![a-z])(?:global_?step|steps?|iteration|iter|it|checkpoint|ckpt)[=_-]?(\d+)", re.IGNORECASE)
EPOCH = re.compile(r"(?<![a-z])(?:epoch|ep)[=_-]?(\d+)", re.IGNORECASE)


def _step(path: Path, content: Mapping[str, Any]) -> int | None:
    """Optimiser steps if the file or its name tells them, else epochs, else the last number in its name, else None."""
    steps = [_whole(content.get(key)) for key in ("global_step", "step", "steps", "iteration")]
    name = f"{path.parent.name}/{path.stem}" if path.parent.name.startswith("checkpoint-") else path.stem
    numbers = re.findall(r"\d+", re.sub(r"=-?\d*\.\d+(?:e-?\d+)?", "", path.stem))
    told = (*steps, _last(STEP.findall(name)), _whole(content.get("epoch")), _last(EPOCH.findall(name)), _last(numbers))
    return next((step for step in told if step is not None), None)


def _whole(value: Any) -> int | None:
    """A whole number of at least 0; None for anything else."""
    number = _number(value)
    return int(number) if number is not None and 0 <= number < 2**53 and number == int(number) else None


def _last(numbers: list[str]) -> int | None:
    return int(numbers[-1][:15]) if numbers else None


def _metrics_of_name(path: Path) -> dict[str, float]:
    """`epoch=3-val_loss=0.25.ckpt` has a `val_loss` of 0.25."""
    found = re.findall(r"([A-Za-z][\w/]*)=(-?\d+\.\d+(?:e-?\d+)?)", path.stem)
    return {name.lstrip("_"): float(value) for name, value in found}


def _metrics_of_content(content: Mapping[str, Any]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    nested = content.get("metrics")
    for name, value in [*content.items(), *(nested.items() if isinstance(nested, Mapping) else ())]:
        number = _number(value)
        if isinstance(name, str) and number is not None and name not in ("global_step", "step", "steps", "iteration"):
            metrics[name] = number
    callbacks = content.get("callbacks")
    for state in callbacks.values() if isinstance(callbacks, Mapping) else ():  # Lightning's ModelCheckpoint
        if isinstance(state, Mapping) and isinstance(state.get("monitor"), str):
            score = _number(state.get("current_score"))
            if score is not None:
                metrics[state["monitor"]] = score
    return metrics


def _metrics_of_trainer(path: Path) -> dict[str, float]:
    """What Hugging Face's `trainer_state.json` beside a checkpoint says of its step."""
    state = path.parent / "trainer_state.json"
    if not state.exists():
        return {}
    try:
        content = read_json(state)
        rows = [row for row in content["log_history"] if row.get("step") == content["global_step"]]
    except (CorruptFileError, KeyError, TypeError, AttributeError, RecursionError):
        raise UnusableError("its trainer_state.json is damaged") from None
    numbers = {name: _number(value) for row in rows for name, value in row.items() if name != "step"}
    return {name: value for name, value in numbers.items() if value is not None}


def _number(value: Any) -> float | None:
    """A finite number as a float; None for anything else."""
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 and not value.is_complex() else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if isfinite(value) else None
    except OverflowError:
        return None


def read_lmdb(file: Candidate, spec: WeightSpec | None) -> Iterator[Found]:
    """The runs of one LMDB folder of G.pt: flat float32 weights under the keys that `runs.json` lists.

    Raises:
        UnusableError: there is no reader, the files are damaged, or the architecture is not known.
    """
    try:
        import lmdb
    except ImportError:
        raise UnusableError("an LMDB run needs `pip install lmdb`") from None
    folder = file.paths[0]
    try:
        content = read_json(folder / "runs.json")
        runs = {file.run: content} if "checkpoints" in content else dict(content)
        listed = {run: dict(value["checkpoints"]) for run, value in runs.items()}
    except (OSError, CorruptFileError, ValueError, KeyError, TypeError, AttributeError):
        raise UnusableError("an LMDB run without a sound runs.json") from None
    try:
        size = check_file(folder / "data.mdb")
        with lmdb.open(str(folder), readonly=True, lock=False, readahead=False, create=False) as database:
            pages = (int(database.info()["last_pgno"]) + 1) * int(database.stat()["psize"])
        if size < pages:  # what is mapped and not there would end the process
            raise UnusableError(f"a truncated LMDB file ({size:,} of {pages:,} bytes)")
        with (
            lmdb.open(str(folder), readonly=True, lock=False, readahead=False, create=False) as database,
            database.begin() as transaction,
        ):
            for run, checkpoints in listed.items():
                yield from _lmdb_run(transaction, run, checkpoints, spec)
    except CorruptFileError as error:
        raise UnusableError(str(error)) from None
    except lmdb.Error:
        raise UnusableError("a damaged LMDB file") from None


def _lmdb_run(transaction: Any, run: str, checkpoints: dict[str, Any], spec: WeightSpec | None) -> Iterator[Found]:
    for place, (key, values) in enumerate(sorted((str(key), values) for key, values in checkpoints.items())):
        stored, sizes = (transaction.get(name.encode()) for name in (key, f"{key}_arch"))
        if stored is None or sizes is None or len(stored) % 4 or len(sizes) % 4:
            raise UnusableError("an LMDB run that lacks what its runs.json lists")
        flat = torch.from_numpy(np.frombuffer(stored, np.float32).copy())
        shape = np.frombuffer(sizes, np.float32).astype(np.int64).tolist()
        network = spec or next((known.spec for known in NETWORKS if known.fits(shape)), None)
        wanted = [entry.size for entry in network.entries] if network else None
        if network is None or wanted != shape[: len(network.entries)] or sum(shape) != len(flat):
            raise UnusableError(f"an LMDB run of tensors with {shape} numbers, which is none of G.pt's; give `module`")
        metrics = values if isinstance(values, Mapping) else {}
        numbers = {name: n for name, value in metrics.items() if (n := _number(value)) is not None}
        state = network.unflatten(flat[: network.size])
        yield Found(run, step_of_key(key, shape, place), state, key, numbers, network)
