"""Networks as people have them: a zoo, the samples of a run, a folder of files, or a library's models."""

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mole.checkpoints import Zoo
from mole.checkpoints.layouts import variants
from mole.config import TaskConfig
from mole.errors import CorruptFileError, MoleError
from mole.files import value_digest
from mole.rank.request import Candidate
from mole.reading.tensors import read_safetensors
from mole.reading.text import json_lines
from mole.representations import weights_digest
from mole.tasks import Architecture, load_task

Factory = Callable[[], nn.Module]
"""Makes a network of the kind whose weights are to be loaded."""


def candidates(path: str | Path, *, factory: Factory | None = None) -> list[Candidate]:
    """The networks in a place.

    Args:
        path: a zoo (or a run folder with one), a run's `samples/`, a folder of safetensors files, or the name of a
            pretrained model, `timm:NAME` or `transformers:NAME`, where that library is installed.
        factory: for files that do not say what network they are of.

    Raises:
        MoleError: there is nothing there, or it is not known what networks the files are of.
    """
    kind, _, name = str(path).partition(":")
    if kind in LIBRARIES and name:
        return [Candidate(str(path), partial(LIBRARIES[kind], name), {"library": kind, "model": name})]
    folder = Path(path)
    if (folder / "zoo.json").is_file() or (folder / "zoo" / "zoo.json").is_file():
        return from_zoo(folder if (folder / "zoo.json").is_file() else folder / "zoo", factory)
    files = sorted(path for path in folder.rglob("*.safetensors") if not path.is_dir()) if folder.is_dir() else []
    if not files:
        raise MoleError(f"{path}: no networks here; legal is a zoo, a folder of .safetensors files, or timm:NAME")
    origin = _origins(folder)
    if factory is None and not origin:
        raise MoleError(
            f"{path}: nothing says what networks these files are of; give a factory, --factory module:function"
        )
    return [_of_file(file, folder, origin.get(file.name, []), factory) for file in files]


def from_zoo(path: Path, factory: Factory | None = None) -> list[Candidate]:
    """The last state of every run of a zoo.

    Raises:
        MoleError: the zoo was imported, so it does not say what its networks are, and there is no factory.
    """
    zoo = Zoo(path)
    if bool(zoo.loss.isfinite().any()):  # networks without a known loss are ranked all the same
        zoo = zoo.finished()
    recipe = zoo.header.recipe.get("task")
    if recipe is None and factory is None:
        raise MoleError(f"{path}: this zoo was imported; give a factory, --factory module:function")
    if factory is not None:
        parts = [(zoo, factory)]
    else:
        task = load_task(TaskConfig.model_validate(recipe))
        parts = [(part, partial(other.architecture.build, 0)) for part, other in variants(zoo, task)]
    found = []
    for part, make in parts:
        names, places = part.column("run")[part.last.numpy()], part.last
        for name, place in zip(names.tolist(), places.tolist(), strict=True):
            origin = {"zoo": part.digest, "run": name, "checkpoint": place}
            found.append(Candidate(str(name), partial(_of_zoo, part, place, make), origin))
    return found


def _of_zoo(zoo: Zoo, place: int, make: Factory) -> nn.Module:
    network = make()
    network.load_state_dict(zoo[place].state_dict())
    return network


def _origins(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What the ledger of a run says of its samples, by file name: a name may have been used more than once."""
    for root in (folder, folder.parent):
        path = root / "provenance" / "ledger.jsonl"
        if path.is_file():
            origins: dict[str, list[dict[str, Any]]] = {}
            for _, record in json_lines(path):
                if _is_about_a_file(record):
                    origins.setdefault(Path(record["file"]).name, []).append(record)
            return origins
    return {}


def _is_about_a_file(record: Any) -> bool:
    """Whether a line of the ledger is whole, and about a network in a file."""
    if not isinstance(record, dict) or record.get("type") != "network" or not isinstance(record.get("file"), str):
        return False
    return value_digest({key: value for key, value in record.items() if key != "id"}) == record.get("id")


def _of_file(file: Path, folder: Path, records: list[dict[str, Any]], factory: Factory | None) -> Candidate:
    name, provenance = file.relative_to(folder), {"file": str(file)}
    origin = records[-1] if records else {}
    if records and (factory is not None or len(records) > 1):
        matching = [record for record in records if _is_recorded(file, record, factory or _maker(record))]
        # another network may lie under the name of a recorded one: then it has no record, and no architecture
        origin = matching[-1] if matching else {} if factory is not None else origin
    provenance |= {key: origin[key] for key in ("generator", "zoo", "prompt") if key in origin}
    return Candidate(str(name.with_suffix("")), partial(_load, file, origin, factory), provenance)


def _maker(origin: dict[str, Any]) -> Factory:
    """Makes networks of the architecture in a record.

    Raises:
        CorruptFileError: it is none.
    """
    try:
        return partial(Architecture.model_validate(origin.get("architecture")).build, 0)
    except ValidationError as error:
        raise CorruptFileError(f"the ledger's architecture is none ({str(error).splitlines()[0]})") from None


def _is_recorded(file: Path, origin: dict[str, Any], make: Factory) -> bool:
    """Whether a file holds the network of a record."""
    try:
        return _digest(_built(file, make)) == origin.get("weights")
    except (OSError, MoleError):
        return False


def _load(file: Path, origin: dict[str, Any], factory: Factory | None) -> nn.Module:
    if factory is None and "architecture" not in origin:
        raise MoleError(f"{file}: the ledger does not say of what network it is; give a factory")
    network = _built(file, factory or _maker(origin))
    if origin and _digest(network) != origin.get("weights"):
        raise CorruptFileError(
            f"{file}: not the network that the ledger records under this name (its weights differ); to rank it as a "
            "file of its own, give a factory, --factory module:function"
        )
    return network


def _built(file: Path, make: Factory) -> nn.Module:
    network = make()
    try:
        network.load_state_dict(read_safetensors(file))
    except RuntimeError as error:
        raise MoleError(f"{file}: {' '.join(str(error).split())[:300]}") from None
    return network


def _digest(network: nn.Module) -> str:
    """Digest of a network's weights, as the ledger records it: every number in order of its state."""
    state: list[Tensor] = [t for t in network.state_dict().values() if t.is_floating_point()]
    return weights_digest(torch.cat([tensor.flatten().float() for tensor in state]))


def named(text: str) -> Callable[..., Any]:
    """A factory from `module:function`.

    Raises:
        MoleError: there is none.
    """
    module, _, name = text.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever that module does
        raise MoleError(f"factory {text!r}: {error}; legal is module:function") from None
    if not callable(found):
        raise MoleError(f"factory {text!r} is {type(found).__name__}; legal is a function that returns a network")
    return found


def _timm(name: str) -> nn.Module:
    return _library("timm").create_model(name, pretrained=True)


def _transformers(name: str) -> nn.Module:
    return _library("transformers").AutoModel.from_pretrained(name, use_safetensors=True)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MoleError(f"{name} is not installed; pip install {name}") from None


LIBRARIES: dict[str, Callable[[str], nn.Module]] = {"timm": _timm, "transformers": _transformers}
