"""The zoo: checkpoint histories on disk, whole shards or none, each with its digest.

    zoo/zoo.json                    format, task, recipe, steps kept, the weight specification
    zoo/shard-00000.safetensors     weights (runs, steps, P), loss and accuracy (runs, steps), seeds (runs)
    zoo/shard-00000.json            digest of the shard; a shard counts once this file stands
    zoo/seconds.json                seconds that each shard took

Dimensions: R runs, K kept states, P parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mole.errors import CorruptFileError, MoleError
from mole.files import file_digest, read_json, remove, replacing, value_digest, write_json
from mole.representations import WeightSpec
from mole.tasks import Metrics

FORMAT = 1


@dataclass(frozen=True)
class Zoo:
    """Histories of many trainings of one network family, in memory.

    Example:
        >>> zoo = Zoo.open(Path("runs/digits/zoo"))
        >>> zoo.weights.shape
        torch.Size([2112, 30, 1210])
    """

    spec: WeightSpec
    steps: list[int]
    seeds: Tensor
    """(R,) int64."""
    weights: Tensor
    """(R, K, P) float32, finite."""
    loss: Tensor
    """(R, K) on the prompt images, in nats."""
    accuracy: Tensor
    """(R, K) on the prompt images, 0..1."""
    digest: str
    """Of every shard together."""
    skipped: int
    """Runs left out because a state of theirs was NaN or infinite."""

    def __repr__(self) -> str:
        runs, states, size = self.weights.shape
        return (
            f"Zoo({runs} runs x {states} checkpoints of {size} parameters, {self.skipped} runs skipped, "
            f"prompt loss {self.loss.min():.3f} to {self.loss.max():.3f})"
        )

    def runs(self, indices: slice) -> "Zoo":
        """The part of the zoo with these runs."""
        parts = (self.seeds[indices], self.weights[indices], self.loss[indices], self.accuracy[indices])
        return Zoo(self.spec, self.steps, *parts, digest=self.digest, skipped=0)

    def split_by_run(self, heldout: int) -> tuple["Zoo", "Zoo"]:
        """Training runs and the last `heldout` runs, which share nothing with them."""
        if not 0 < heldout < len(self.seeds):
            raise MoleError(f"cannot hold out {heldout} of {len(self.seeds)} runs; legal is 1 to {len(self.seeds) - 1}")
        cut = len(self.seeds) - heldout
        return self.runs(slice(0, cut)), self.runs(slice(cut, None))

    @classmethod
    def open(cls, folder: Path) -> "Zoo":
        """Read and check a zoo.

        Raises:
            MoleError: there is no zoo, or its shards differ in shape.
            CorruptFileError: naming every shard whose bytes are not those that were written.
        """
        header = _header(folder)
        spec = WeightSpec.from_json(header["spec"])
        names = sorted(path.stem for path in folder.glob("shard-*.json"))
        if not names:
            raise MoleError(f"{folder}: no finished shard; run the harvest stage first")
        faults = [fault for name in names if (fault := shard_fault(folder, name))]
        if faults:
            raise CorruptFileError("; ".join(faults) + "; run the harvest stage again to replace them")
        shards = [_load(folder / f"{name}.safetensors") for name in names]
        wanted = (len(header["steps"]), spec.size)
        for name, shard in zip(names, shards, strict=True):
            if tuple(shard["weights"].shape[1:]) != wanted:
                raise MoleError(
                    f"{folder}/{name}.safetensors: weights of shape {tuple(shard['weights'].shape)}; "
                    f"this zoo holds (runs, {wanted[0]}, {wanted[1]})"
                )
        seeds, weights, loss, accuracy = (
            torch.cat([shard[key] for shard in shards]) for key in ("seeds", "weights", "loss", "accuracy")
        )
        finite = torch.stack([w.isfinite().all() for w in weights]) & loss.isfinite().all(1)
        if not finite.any():
            raise MoleError(f"{folder}: every run diverged; lower task.learning_rate")
        if not finite.all():
            seeds, weights, loss, accuracy = seeds[finite], weights[finite], loss[finite], accuracy[finite]
        digest = value_digest([read_json(folder / f"{name}.json")["sha256"] for name in names])
        return cls(spec, header["steps"], seeds, weights, loss, accuracy, digest, int((~finite).sum()))


class ZooWriter:
    """Appends shards to a zoo folder; what is already there and sound is kept.

    A folder that holds a zoo of another task or recipe is emptied first.
    """

    def __init__(self, folder: Path, spec: WeightSpec, steps: Sequence[int], recipe: dict[str, Any]) -> None:
        self.folder = folder
        header = {"format": FORMAT, "recipe": recipe, "steps": list(steps), "spec": spec.to_json()}
        try:
            same = read_json(folder / "zoo.json") == header
        except (FileNotFoundError, CorruptFileError):
            same = False
        if not same:
            for path in folder.glob("shard-*"):
                remove(path)
            write_json(folder / "zoo.json", header)

    def has(self, index: int, seeds: Sequence[int]) -> bool:
        """Whether this shard is finished, undamaged and holds just these runs."""
        name = shard_name(index)
        if not (self.folder / f"{name}.json").exists() or shard_fault(self.folder, name):
            return False
        return _load(self.folder / f"{name}.safetensors")["seeds"].tolist() == list(seeds)

    def write(self, index: int, seeds: Sequence[int], weights: Tensor, metrics: Metrics, *, seconds: float) -> None:
        """Write one shard: weights (R, K, P), metrics (R, K), and the seconds that it took to train."""
        name = shard_name(index)
        (self.folder / f"{name}.json").unlink(missing_ok=True)
        tensors = {
            "weights": weights.float().cpu().contiguous(),
            "loss": metrics.loss.float().cpu().contiguous(),
            "accuracy": metrics.accuracy.float().cpu().contiguous(),
            "seeds": torch.tensor(list(seeds)),
        }
        with replacing(self.folder / f"{name}.safetensors") as temporary:
            save_file(tensors, temporary)
        digest = file_digest(self.folder / f"{name}.safetensors")
        write_json(self.folder / f"{name}.json", {"runs": len(seeds), "sha256": digest})
        write_json(self.folder / "seconds.json", {**self._seconds(), name: seconds})

    def seconds(self) -> float:
        """What all the shards took, in whichever session they were made."""
        return sum(s for name, s in self._seconds().items() if (self.folder / f"{name}.json").exists())

    def _seconds(self) -> dict[str, float]:
        try:
            return read_json(self.folder / "seconds.json")
        except (FileNotFoundError, CorruptFileError):
            return {}

    def trim(self, shards: int) -> None:
        """Delete shards beyond the first `shards`: those of an earlier, larger harvest."""
        for path in self.folder.glob("shard-*"):
            if int(path.stem.removeprefix("shard-")) >= shards:
                remove(path)


def shard_name(index: int) -> str:
    """File name of a shard, without its suffix."""
    return f"shard-{index:05d}"


def shard_fault(folder: Path, name: str) -> str | None:
    """What is wrong with a shard, or None."""
    path = folder / f"{name}.safetensors"
    if not path.exists():
        return f"{path}: missing"
    try:
        expected = read_json(folder / f"{name}.json")["sha256"]
    except (CorruptFileError, KeyError, TypeError) as error:
        return f"{folder / name}.json: unreadable ({error})"
    if file_digest(path) != expected:
        return f"{path}: truncated or altered (its digest differs from the one recorded)"
    return None


def _header(folder: Path) -> dict[str, Any]:
    try:
        header = read_json(folder / "zoo.json")
    except FileNotFoundError:
        raise MoleError(f"{folder}: no zoo here (zoo.json is missing); run the harvest stage first") from None
    if not isinstance(header, dict) or not {"steps", "spec"} <= header.keys():
        raise CorruptFileError(f"{folder}/zoo.json: not the header of a zoo; run the harvest stage again")
    if header.get("format") != FORMAT:
        raise MoleError(f"{folder}/zoo.json: format {header.get('format')}; this version reads {FORMAT}")
    return header


def _load(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CorruptFileError(f"{path}: not a safetensors file ({error})") from None
    missing = {"weights", "loss", "accuracy", "seeds"} - tensors.keys()
    if missing:
        raise CorruptFileError(f"{path}: lacks {', '.join(sorted(missing))}")
    return tensors
